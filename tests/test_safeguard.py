"""Rules that see one layer at a time: what they propose, and which layers the network cannot afford to replace."""

import json
import warnings

import numpy as np
import pytest
import torch
from planting import plant
from torch import nn

import decomp
from decomp.planning.build import NothingToDecompose
from decomp.planning.choice import Change, Choice
from decomp.planning.safeguard import LEAST_ENERGY, MOST_TIMES_THE_MEAN, NEGLIGIBLE_LOSS, safeguard
from decomp.ranks import Fixed, vbmf
from decomp.ranks.spectral import evbmf_rank


class Detector(nn.Sequential):
    """Wide convolutions of low rank, and a narrow head whose singular values all matter."""

    def __init__(self):
        torch.manual_seed(0)
        body = [
            nn.Conv2d(3, 64, 3),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3),
            nn.ReLU(),
            nn.Conv2d(128, 128, 3),
            nn.ReLU(),
        ]
        super().__init__(plant(nn.Sequential(*body)), *head())
        for weight in self.parameters():
            weight.data += 2e-4 * torch.randn_like(weight)


def head():
    """A 128 -> 24 layer with one component above the others: rank 1 to vbmf, at most of its energy."""
    narrow = nn.Conv2d(128, 24, 1, dtype=torch.float64)
    u, values, v = torch.linalg.svd(narrow.weight.detach().flatten(1), full_matrices=False)
    values = torch.linspace(1.05, 0.95, 24, dtype=torch.float64)
    values[0] = 2.5
    narrow.weight.data = (u * values @ v)[..., None, None]
    return narrow, nn.ReLU()


IMAGE = torch.zeros(1, 3, 16, 16, dtype=torch.float64)


@pytest.fixture(scope="module")
def detector():
    return Detector()


def choice(params, macs, error, ranks=(2,), output_error=None):
    costs = {"params": Change(*params), "macs": Change(*macs)}
    return Choice("Linear", (4, 4), "svd", ranks, costs, error, "", output_error=output_error)


def brute_force(losses, savings, analysed):
    """The layers at risk: the one with the largest loss per saving, again and again, while a bound is broken."""
    left = np.ones(len(losses), bool)
    while (left & (losses > NEGLIGIBLE_LOSS)).any():
        ratios = np.where(left & (losses > NEGLIGIBLE_LOSS), losses / savings, 0)
        mean = losses[left].sum() / savings[left].sum()
        if ratios.max() <= MOST_TIMES_THE_MEAN * mean and 1 - losses[left].sum() / analysed >= LEAST_ENERGY:
            break
        left[ratios.argmax()] = False
    return set(np.flatnonzero(~left))


@pytest.mark.parametrize("seed", range(20))
def test_the_formula_is_that_of_its_docstring(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 12))
    before = rng.integers(100, 10_000, (count, 2))
    after = (before * rng.uniform(0.05, 0.9, (count, 2))).astype(int)
    errors = rng.uniform(0.02, rng.uniform(0.3, 1.2), count)
    names = [f"layer{index}" for index in range(count)]
    choices = {
        name: choice((before[i, 0], after[i, 0]), (before[i, 1], after[i, 1]), errors[i])
        for i, name in enumerate(names)
    }
    changed = safeguard(choices, dict.fromkeys(names, vbmf()), {})
    savings = np.sqrt(np.prod((before - after) / before.sum(0), 1))
    expected = brute_force(np.minimum(errors, 1) ** 2, savings, count)
    dense = {name for name, each in changed.items() if not each.ranks}
    assert dense == {names[i] for i in expected}
    assert all(
        changed[name].at_risk and changed[name].reason.startswith("at risk: rank 2 of vbmf") for name in dense
    )


def decaying(layer, decay):
    """Give a linear layer singular values that fall by a factor from one to the next."""
    u, values, v = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    layer.weight.data = (u * decay ** torch.arange(len(values)) @ v).float()
    return layer


@pytest.mark.parametrize("limits", [{}, {"multiple_of": 4}, {"min_gain": 0.3}])
def test_a_layer_at_risk_gets_the_ranks_that_save_the_most_of_those_that_lose_no_more_than_the_others(limits):
    torch.manual_seed(0)
    wide = [decaying(nn.Linear(64, 64), 0.5) for _ in range(3)]
    model = nn.Sequential(*wide, decaying(nn.Linear(64, 48), 0.85), nn.Linear(48, 16))
    rule, x = decomp.ranks.energy(0.8), torch.zeros(1, 64)
    plan = decomp.plan(model, ranks=rule, example_inputs=x, **limits)
    chosen = decomp.plan(model, ranks=decomp.ranks.energy(0.8, pure=True), example_inputs=x, **limits)
    costs = {kind: sum(each.costs[kind].before for each in plan.values()) for kind in ("params", "macs")}

    def ratio_and_saving(each):
        saving = np.sqrt(np.prod([each.saved(kind) / total for kind, total in costs.items()]))
        return each.error**2 / saving, saving

    left = [chosen[name] for name in plan if plan[name].ranks and "raised" not in plan[name].note]
    most = sum(each.error**2 for each in left) / sum(ratio_and_saving(each)[1] for each in left)
    candidate = plan._candidates["3"][0]
    others = [candidate.decide(Fixed(rank), **limits) for rank in range(1, 49)]
    others = [each for each in others if each.ranks and each.ranks[0] % limits.get("multiple_of", 1) in (0, 48)]
    others = [
        each
        for each in others
        if each.saved("params") >= limits.get("min_gain", 0.05) * each.costs["params"].before
    ]
    expected = max(
        (each for each in others if ratio_and_saving(each)[0] <= most), key=lambda e: ratio_and_saving(e)[1]
    )
    assert chosen["3"].ranks[0] < expected.ranks[0]
    assert plan["3"].ranks == expected.ranks
    assert plan["3"].note == f"raised from rank {chosen['3'].ranks[0]} of energy, at risk there"
    assert not plan["3"].at_risk
    small = plan.apply(model)
    assert small[3].ranks == expected.ranks
    assert not plan["4"].ranks, "no ranks of a layer whose singular values are alike lose so little"


def test_errors_of_outputs_count_where_there_are_data():
    sizes = ((1000, 100), (1000, 100))
    choices = {"harmless": choice(*sizes, 0.9, output_error=0.1), "harmful": choice(*sizes, 0.1, output_error=0.9)}
    changed = safeguard(choices, dict.fromkeys(choices, vbmf()), {})
    assert set(changed) == {"harmful"}


def test_only_ranks_that_come_from_spectra_alone_are_guarded():
    sizes = ((1000, 100), (1000, 100))
    choices = {name: choice(*sizes, 0.99) for name in ("fixed", "function", "bound", "rule")}
    rules = {
        "fixed": Fixed(2),
        "function": decomp.ranks.parse_spec(lambda candidate: (2,), {}),
        "bound": decomp.ranks.error(0.99),
        "rule": vbmf(),
    }
    assert set(safeguard(choices, rules, {})) == {"rule"}


def test_a_narrow_layer_stays_dense_and_its_reason_says_why(detector):
    plan = decomp.plan(detector, ranks="vbmf", example_inputs=IMAGE)
    replaced = {name for name, each in plan.items() if each.ranks}
    assert "1" not in replaced
    assert {"0.2", "0.4"} <= replaced
    assert plan["1"].at_risk
    assert plan["1"].reason.startswith("at risk: rank ")
    assert "pure=True" in plan["1"].reason
    assert plan["1"].params.after == plan["1"].params.before
    small = decomp.tucker(detector, ranks="vbmf", example_inputs=IMAGE)
    assert isinstance(small[1], nn.Conv2d)


def test_the_pure_rule_replaces_it_and_the_plan_marks_it(detector, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rule = vbmf(pure=True)
    plan = decomp.plan(detector, ranks=rule, example_inputs=IMAGE)
    weight = detector[1].weight.detach().flatten(1)
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    assert plan["1"].ranks == (evbmf_rank(values, *weight.shape),)
    assert plan["1"].at_risk
    assert repr(rule) == "vbmf(weaken=1.0, pure=True)"
    line = next(line for line in str(plan).splitlines() if line.split()[:1] == ["1"])
    assert "at risk" in line


def test_with_ranks_takes_the_same_decisions(detector):
    plan = decomp.plan(detector, ranks=8, example_inputs=IMAGE)
    for rule in ("vbmf", vbmf(pure=True)):
        ours = plan.with_ranks("*", rule)
        expected = decomp.plan(detector, ranks=rule, example_inputs=IMAGE)
        assert {name: each.ranks for name, each in ours.items()} == {n: e.ranks for n, e in expected.items()}
        assert {name: each.at_risk for name, each in ours.items()} == {n: e.at_risk for n, e in expected.items()}


def test_plans_in_files_keep_the_mark_and_older_files_have_none(detector):
    plan = decomp.plan(detector, ranks="vbmf", example_inputs=IMAGE)
    again = decomp.Plan.from_json(plan.to_json())
    assert {n: e.at_risk for n, e in again.items()} == {n: e.at_risk for n, e in plan.items()}
    data = json.loads(plan.to_json())
    for layer in data["layers"].values():
        del layer["at_risk"]
    assert not any(each.at_risk for each in decomp.Plan.from_json(json.dumps(data)).values())


def test_a_call_warns_where_the_result_may_be_useless():
    torch.manual_seed(0)
    noise = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    with pytest.warns(UserWarning, match=r"the ranks of '0', '1', '2' keep \d+ % of the energy on average"):
        decomp.svd(noise, ranks=decomp.ranks.energy(0.3, pure=True))
    with pytest.raises(NothingToDecompose, match="at risk: rank"):
        decomp.svd(noise, ranks=decomp.ranks.energy(0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decomp.svd(noise, ranks=4)  # the ranks that were asked for


def test_what_a_rule_may_do_is_no_reason_for_a_warning():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = decomp.svd(net, ranks=decomp.ranks.energy(0.58)).decomp_plan
    replaced = [choice for choice in plan.values() if choice.ranks]
    assert 0 < len(replaced) < len(plan), "half of the layers had to stay dense"
    assert all(1 - choice.error**2 < 0.6 for choice in replaced)
    assert not any(choice.at_risk for choice in replaced)


def test_no_layer_gets_ranks_that_lose_more_than_those_of_the_rule():
    """Of a flat spectrum the loss per saving is least at rank 1."""
    torch.manual_seed(0)
    low = [decaying(nn.Linear(64, 64), 0.5) for _ in range(14)]
    flat = nn.Linear(128, 128)
    flat.weight.data = torch.linalg.qr(torch.randn(128, 128)).Q
    model = nn.Sequential(*low, nn.Linear(64, 128), flat)
    plan = decomp.plan(model, ranks=decomp.ranks.energy(0.4), example_inputs=torch.zeros(1, 64))
    pure = decomp.plan(model, ranks=decomp.ranks.energy(0.4, pure=True), example_inputs=torch.zeros(1, 64))
    raised = {name: choice for name, choice in plan.items() if "raised" in choice.note}
    assert all(choice.error < pure[name].error for name, choice in raised.items())
    assert pure["15"].ranks
    assert not plan["15"].ranks

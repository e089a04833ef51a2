"""Which ranks rules and budgets may choose: a least gain, and multiples; ranks that the user fixes are obeyed."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import decomp
from decomp.planning.budget import MIN_GAIN


def spectrum(module, values):
    """Give a linear layer or a convolution these singular values in its output mode."""
    matrix = module.weight.detach().flatten(1).double()
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.as_tensor(values, dtype=torch.float64)[: len(u)]
    with torch.no_grad():
        module.weight.copy_((u[:, : len(values)] * values @ v[: len(values)]).reshape(module.weight.shape))
    return module


def linear(kept, size=64):
    """A linear layer for which energy(0.9) keeps ``kept`` components: that many equal ones hold 95 %."""
    weak = (0.05 * kept / 0.95 / (size - kept)) ** 0.5
    return spectrum(nn.Linear(size, size, bias=False), [1.0] * kept + [weak] * (size - kept))


RULE = decomp.ranks.energy(0.945, pure=True)


def test_a_layer_that_saves_too_little_stays_dense_and_says_so():
    model = nn.Sequential(linear(31), linear(30), linear(8))
    plan = decomp.plan(model, ranks=RULE)
    assert MIN_GAIN == 0.05
    assert plan["0"].reason == "too little gain at 31: params x0.97, MACs x0.97, less than min_gain=0.05"
    assert plan["1"].ranks == (30,)  # saves 1 - 30 * 128 / 64**2 = 6 %
    assert plan["2"].ranks == (8,)
    assert decomp.plan(model, ranks=RULE, min_gain=0)["0"].ranks == (31,)
    strict = decomp.svd(model, RULE, min_gain=0.1)
    assert [bool(choice.ranks) for choice in strict.decomp_plan.values()] == [False, False, True]
    assert strict.decomp_plan.request.min_gain == 0.1


def test_the_stem_of_a_resnet_is_not_replaced_for_a_percent():
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False))
    image = torch.zeros(1, 3, 224, 224)
    rule = decomp.ranks.energy(0.9, pure=True)
    replaced = decomp.plan(stem, ranks=rule, min_gain=0, example_inputs=image)["0"]
    assert replaced.ranks
    assert replaced.error > 0.3
    assert replaced.params.after > 0.95 * replaced.params.before
    assert "too little gain" in decomp.plan(stem, ranks=rule, example_inputs=image)["0"].reason


def test_the_gain_is_the_larger_of_those_in_parameters_and_macs():
    """A strided 3 x 1 x 1 decomposition where the MACs fall far more than the parameters."""
    model = nn.Sequential(nn.ConvTranspose2d(16, 32, 3, stride=3))
    x = torch.zeros(1, 16, 4, 4)
    plan = decomp.plan(model, "tucker", (31, 2), example_inputs=x)
    candidate = plan.candidates["0"][0]
    grid = candidate.limited_grid(1, 0.3)
    params, macs = grid.params_share, grid.macs_share
    expected = (params < 1) & (macs < 1) & ((1 - params >= 0.3) | (1 - macs >= 0.3))
    assert np.array_equal(grid.pays, expected)
    assert ((1 - params < 0.3) & grid.pays).any() or ((1 - macs < 0.3) & grid.pays).any()


def test_an_embedding_gains_by_its_parameters_alone():
    model = nn.Sequential(nn.Embedding(64, 64))
    plan = decomp.plan(model, ranks=lambda candidate: (31,), layers=nn.Embedding)
    assert "too little gain at 31" in plan["0"].reason
    assert decomp.plan(model, ranks=lambda candidate: (16,), layers=nn.Embedding)["0"].ranks == (16,)


@pytest.mark.parametrize("ranks", [31, (31,), {"0": 31}, {"*": (31,)}])
def test_ranks_that_the_user_fixes_are_obeyed(ranks):
    model = nn.Sequential(linear(31))
    plan = decomp.plan(model, ranks=ranks, min_gain=0.5, multiple_of=8)
    assert plan["0"].ranks == (31,)
    assert plan.with_ranks("0", 30)["0"].ranks == (30,)
    assert decomp.svd(model, plan).decomp_plan["0"].ranks == (31,)


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        (RULE, 16),
        ("vbmf", None),
        (lambda candidate: (1,), 8),
        (decomp.ranks.params(0.4), 8),
        (decomp.ranks.error(0.3), 16),
    ],
)
def test_ranks_of_rules_are_multiples(rule, rank):
    model = nn.Sequential(linear(9))
    plan = decomp.plan(model, ranks=rule, multiple_of=8)
    one = decomp.plan(model, ranks=rule)
    assert plan["0"].ranks
    assert plan["0"].ranks[0] % 8 == 0
    assert rank is None or plan["0"].ranks == (rank,)
    if isinstance(rule, decomp.ranks.params):
        assert plan["0"].params.after <= 0.4 * plan["0"].params.before, "a bound is rounded down"
    else:
        assert one["0"].ranks[0] <= plan["0"].ranks[0] < one["0"].ranks[0] + 8
    assert plan.with_ranks("0", RULE)["0"].ranks == (16,), "the plan keeps its multiple"


def test_multiples_are_full_or_multiples_in_every_mode_but_those_of_the_method():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(20, 48, 3))
    rule = decomp.ranks.energy(0.5, pure=True)
    for method in ("tucker", "cp", "block_term"):
        chosen = decomp.plan(model, method, rule, multiple_of=4)["0"].ranks
        assert chosen
        assert all(rank % 4 == 0 for rank in chosen), (method, chosen)
    assert decomp.plan(model, "block_term", rule, blocks=3, multiple_of=4)["0"].ranks[0] == 3


def test_a_bound_that_no_multiple_keeps_says_so():
    plan = decomp.plan(nn.Sequential(linear(9)), ranks=decomp.ranks.params(0.2), multiple_of=8)
    assert plan["0"].reason == "even rank 1 has more parameters than this share, with multiples of 8"


def test_a_budget_takes_no_option_below_the_least_gain():
    model = nn.Sequential(linear(8), linear(31), linear(31))
    for share in (0.98, 0.9, 0.7):
        for gain in (0.0, 0.05, 0.3):
            plan = decomp.plan(model, params=share, min_gain=gain)
            saved = [1 - c.params.after / c.params.before for c in plan.values() if c.ranks]
            assert saved
            assert min(saved) >= gain
            assert plan.params.after <= share * plan.params.before
            again = plan.with_budget(params=share, min_gain=0.3)
            assert dict(again) == dict(decomp.plan(model, params=share, min_gain=0.3))
    single = nn.Sequential(linear(31))
    assert decomp.plan(single, params=0.98, min_gain=0.0)["0"].ranks == (31,)
    assert decomp.plan(single, params=0.98)["0"].ranks == (30,)


def test_the_limits_are_kept_in_json():
    model = nn.Sequential(linear(31), linear(8))
    plan = decomp.plan(model, ranks=RULE, min_gain=0.02, multiple_of=2)
    read = decomp.Plan.from_json(plan.to_json())
    assert (read.request.min_gain, read.request.multiple_of) == (0.02, 2)
    editable = decomp.plan(model, ranks=read)
    assert editable.with_ranks("1", lambda c: (3,))["1"].ranks == (4,)
    assert plan.apply(model).decomp_plan.request == plan.request
    data = json.loads(plan.to_json())
    del data["request"]["min_gain"]
    assert decomp.Plan.from_json(json.dumps(data)).request.min_gain == 0.0, "a file without it was made without"


@pytest.mark.parametrize("gain", [-0.1, 1.0, "0.1", True, float("nan")])
def test_a_gain_that_is_no_share_is_refused(gain):
    with pytest.raises(ValueError, match=r"min_gain=.*write a share in \[0, 1\)"):
        decomp.plan(nn.Linear(8, 8), ranks=RULE, min_gain=gain)


def test_a_plan_brings_its_own_limits():
    model = nn.Sequential(linear(8))
    plan = decomp.plan(model, ranks=RULE)
    with pytest.raises(ValueError, match=r"already determines the ranks: give min_gain= to decomp\.plan"):
        decomp.svd(model, plan, min_gain=0.2)


def test_the_explorer_chooses_with_the_limits_of_its_plan():
    from decomp.explorer.state import Exploration

    model = nn.Sequential(linear(8), linear(31), linear(31))
    state = Exploration(model, torch.zeros(1, 64), timed=False, progress=False)
    for share in (0.98, 0.9):
        state.choose_budget("params", share)
        saved = [1 - c.params.after / c.params.before for c in state.plan.values() if c.ranks]
        assert saved
        assert min(saved) >= MIN_GAIN
    state.choose_energy(0.945)
    assert [choice.ranks for choice in state.plan.values()] == [(8,), (), ()]

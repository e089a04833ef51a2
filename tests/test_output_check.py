"""Ranks of rules are judged by the output of the network: what layers keep does not say what the network does."""

import threading

import pytest
import torch
from torch import nn

import decomp
from decomp.data.levels import share_of_variation
from decomp.planning import output_check
from decomp.planning.output_check import MOST_ERROR, STEPS
from decomp.ranks import energy, vbmf

QUIET = {"progress": False}
WIDTH, DEPTH = 48, 6


def weight(seed):
    """Singular values that fall like a power law, so that a few of the ranks have 80 % of the energy."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0] for _ in range(2))
    return (u * 3 * torch.arange(1, WIDTH + 1.0) ** -1.0) @ v


class Net(nn.Module):
    """Linear layers and activations, one after the other, or each beside a skip connection."""

    def __init__(self, residual=0.0):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))
        for at, layer in enumerate(self.layers):
            layer.weight.data.copy_(weight(at))
        self.residual = residual

    def forward(self, x):
        for layer in self.layers:
            x = self.residual * x + nn.functional.leaky_relu(layer(x), 0.6)
        return x


def images(rows=256, seed=9):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def off(small, dense, x):
    """The error of the output about its mean, by its definition."""
    with torch.no_grad():
        expected, output = dense(x), small(x)
    return float((output - expected).norm() / (expected - expected.mean(0)).norm())


def ranks_of(plan):
    return {name: choice.ranks for name, choice in plan.items()}


def test_a_chain_that_its_rule_destroys_gets_ranks_by_its_output():
    model, x = Net().eval(), images()
    destroyed = decomp.svd(model, ranks=energy(0.8), min_gain=0, **QUIET)
    kept = decomp.svd(model, ranks=energy(0.8), min_gain=0, example_inputs=x, **QUIET)
    assert off(destroyed, model, x) > 0.8
    assert off(kept, model, x) <= MOST_ERROR
    assert off(kept, model, images(seed=10)) <= 1.1 * MOST_ERROR  # and on inputs that it did not see
    plan = kept.decomp_plan
    assert plan.macs.after < plan.macs.before
    # A budget that is one step of the bisection smaller is not enough.
    shares = [each.macs.after for each in destroyed.decomp_plan.values()]  # without inputs, of each layer
    asked = plan.macs.before * sum(shares) / len(shares)
    step = (plan.macs.before - asked) / 2**STEPS
    fewer = decomp.compress(model, x, macs=round(plan.macs.after - step), methods="svd", min_gain=0, **QUIET)
    assert off(fewer, model, x) > MOST_ERROR
    notes = [choice.note or choice.reason for choice in plan.values()]
    assert all("of energy here, the network's output is off by" in note for note in notes if note)
    assert any(notes)


def test_a_network_that_forgives_keeps_the_ranks_of_its_rule():
    model, x = Net(residual=6.0).eval(), images()
    without = decomp.plan(model, "svd", energy(0.8), **QUIET)
    checked = decomp.plan(model, "svd", energy(0.8), example_inputs=x, **QUIET)
    assert ranks_of(checked) == ranks_of(without)
    assert off(checked.apply(model, **QUIET), model, x) < MOST_ERROR


PURE = vbmf(pure=True)


@pytest.mark.parametrize("ranks", [3, PURE, {"*": PURE, "layers.0": 3}], ids=["user", "pure", "both"])
def test_ranks_that_are_not_the_guarded_rules_stay(ranks):
    model, x = Net().eval(), images()
    without = decomp.plan(model, "svd", ranks, min_gain=0, **QUIET)
    checked = decomp.plan(model, "svd", ranks, min_gain=0, example_inputs=x, **QUIET)
    assert ranks_of(checked) == ranks_of(without)


def test_layers_of_the_user_stay_beside_those_of_rules():
    plan = decomp.plan(
        Net().eval(), "svd", {"*": energy(0.8), "layers.0": 23}, min_gain=0, example_inputs=images(), **QUIET
    )
    assert plan["layers.0"].ranks == (23,)
    assert not plan["layers.0"].note


def test_fine_tuning_wins_back_what_the_rule_loses():
    model, data = Net().eval(), list(images().split(16))
    given = {"min_gain": 0, "example_inputs": data[0], "sequential": False, **QUIET}
    small = decomp.svd(model, ranks=energy(0.8), data=data, finetune={"steps": 1}, **given)
    asked = decomp.plan(model, "svd", energy(0.8), min_gain=0, data=data, **QUIET)
    assert ranks_of(small.decomp_plan) != ranks_of(asked)
    assert not any("off by" in choice.note + choice.reason for choice in small.decomp_plan.values())


def test_with_data_a_batch_of_it_is_judged_and_statistics_give_the_same_plan(monkeypatch):
    model, data = Net().eval(), [images(16, seed) for seed in range(8)]
    seen = []

    def noting(small, dense, judged, measure):
        seen.append([batch for batch, _ in judged])
        return found(small, dense, judged, measure)

    found = output_check.output_errors
    monkeypatch.setattr(output_check, "output_errors", noting)
    plan = decomp.plan(
        model, "svd", energy(0.8), data=data, min_gain=0, example_inputs=torch.zeros(1, WIDTH), **QUIET
    )
    assert seen
    assert all(torch.equal(x, data[0]) for each in seen for x in each)
    statistics = decomp.calibrate(model, data, **QUIET)
    assert ranks_of(plan) == ranks_of(decomp.plan(model, "svd", energy(0.8), data=statistics, min_gain=0, **QUIET))


class Noisy(Net):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


class Selecting(Net):
    """As many rows come out as the weights say."""

    def forward(self, x):
        y = super().forward(x)
        return y[y[:, 0] > 0]


@pytest.mark.parametrize("kind", [Noisy, Selecting])
def test_outputs_that_cannot_be_compared_change_nothing(kind):
    model, x = kind().eval(), images()
    without = decomp.plan(model, "svd", energy(0.8), min_gain=0, **QUIET)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model(x)  # the pass that counts MACs draws, as a pass does
    once = torch.get_rng_state()
    torch.set_rng_state(before)
    checked = decomp.plan(model, "svd", energy(0.8), min_gain=0, example_inputs=x, **QUIET)
    assert ranks_of(checked) == ranks_of(without)
    assert torch.equal(torch.get_rng_state(), once)


class Changing(Net):
    """A model that changes its input, and counts its passes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return super().forward(x.mul_(2.0))


def test_inputs_and_buffers_are_as_one_pass_leaves_them():
    model, x = Changing().eval(), images()
    before = x.clone()
    plan = decomp.plan(model, "svd", energy(0.8), min_gain=0, example_inputs=x, **QUIET)
    assert any("off by" in choice.note + choice.reason for choice in plan.values())
    assert torch.equal(x, 2 * before)
    assert model.passes == 1


class Locked(Net):
    """A model that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied_has_the_ranks_of_its_rule():
    small = decomp.svd(
        Locked().eval(), ranks=energy(0.8), min_gain=0, inplace=True, example_inputs=images(), **QUIET
    )
    assert len(set(ranks_of(small.decomp_plan).values())) == 1


def test_layers_that_stay_as_they_are_are_not_made_up_for():
    """The user's ranks alone leave the output too far off: the other layers are not blamed, and keep theirs."""
    model = Net().eval()
    ranks = {"*": 2, "layers.0": energy(0.8)}
    plan = decomp.plan(model, "svd", ranks, min_gain=0, example_inputs=images(), **QUIET)
    assert ranks_of(plan) == ranks_of(decomp.plan(model, "svd", ranks, min_gain=0, **QUIET))


def test_layers_that_are_factorized_already_stay():
    model = Net().eval()
    half = decomp.svd(model, ranks=23, layers="layers.[0-2]", **QUIET)
    plan = decomp.plan(half, "svd", energy(0.8), min_gain=0, example_inputs=images(), **QUIET)
    assert all(plan[f"layers.{at}"].ranks == (23,) for at in range(3))
    assert off(plan.apply(half, **QUIET), half, images()) <= MOST_ERROR
    layer = decomp.svd(model, ranks=23, layers="layers.[1-5]", **QUIET)
    plan = decomp.plan(layer, "svd", energy(0.3), min_gain=0, example_inputs=images(), **QUIET)
    assert plan["layers.0"].ranks or "at risk" in plan["layers.0"].reason


def test_a_network_that_no_budget_saves_is_said(monkeypatch):
    monkeypatch.setattr(output_check, "MOST_ERROR", 1e-9)
    with pytest.warns(UserWarning, match="the model may hardly work before it is fine-tuned"):
        plan = decomp.plan(Net().eval(), "svd", energy(0.8), min_gain=0, example_inputs=images(), **QUIET)
    assert 0.85 < plan.macs.after / plan.macs.before < 1  # the nearest that was tried


def test_errors_are_shares_of_the_variation_of_each_channel():
    torch.manual_seed(0)
    y = torch.randn(4, 3, 50) + 10 * torch.arange(3)[None, :, None]
    error = torch.randn_like(y)
    expected = error.square().sum() / (y - y.mean((0, 2), keepdim=True)).square().sum()
    assert share_of_variation([error], y) == pytest.approx(float(expected), rel=1e-5)
    logits = torch.randn(6, 10)
    expected = (expected + logits.square().sum() / (logits - logits.mean()).square().sum()) / 2
    assert share_of_variation([error, logits], (y, logits)) == pytest.approx(float(expected), rel=1e-5)
    assert share_of_variation([torch.ones(5)], torch.full((5,), 10.0)) == pytest.approx(100.0, rel=1e-4)
    assert share_of_variation([], torch.ones(3, dtype=torch.int64)) == 0


def test_columns_of_rows_are_channels_and_a_loss_does_not_count():
    torch.manual_seed(0)
    y = torch.randn(30, 4) + 10 * torch.arange(4)
    by_their_means = y.mean(0) - y  # what a network says that knows nothing
    assert share_of_variation([by_their_means], y) == pytest.approx(1.0, rel=1e-5)
    loss = torch.tensor(3.0)
    assert share_of_variation([loss, by_their_means], (loss, y)) == pytest.approx(1.0, rel=1e-5)
    assert share_of_variation([loss], loss) == 0
    assert share_of_variation([torch.ones(1, 1)], torch.ones(1, 1)) == 0


def test_values_that_one_network_alone_masks_do_not_count():
    y, error = torch.randn(1, 5, 200), torch.full((1, 5, 200), 0.1)
    error[:, :, :3] = torch.inf
    expected = 0.01 * 985 / (y - y.mean((0, 2), keepdim=True)).square().sum()
    assert share_of_variation([error], y) == pytest.approx(float(expected), rel=0.03)
    assert not share_of_variation([torch.full((1, 5, 200), torch.nan)], y) < 1


def test_peaks_of_a_probability_are_no_filling():
    y = torch.full((1, 5, 200), 1e-9)
    y[:, :, 7] = 0.9
    lost = share_of_variation([-y], y)
    assert lost == pytest.approx(1.0, rel=0.02)
    filled = torch.randn(1, 5, 200)
    filled[:, :, :50] = torch.finfo(torch.float32).min
    assert share_of_variation([torch.zeros_like(filled)], filled) == 0
    error = torch.where(filled < -1e6, -torch.inf, 0.1)
    assert share_of_variation([error], filled) == pytest.approx(0.01 * 750 / 750, rel=0.1)

"""Budgets of seconds in a runtime: shares, durations, multiples that it likes, and the bound as measured."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import decomp
from decomp import runtimes
from decomp.explorer.state import Exploration
from decomp.planning import in_runtime

POSITIONS = 64
OVERHEAD = 2e-5


@pytest.fixture
def blocks(monkeypatch):
    """A runtime of known times: every layer takes OVERHEAD, and its MACs with channels in blocks of 16."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("decomp.runtimes.timing.time", SimpleNamespace(perf_counter=lambda: clock.now))

    def seconds(model):
        total = 0.0
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                outputs, inputs = (-(-size // 16) * 16 for size in layer.weight.shape[:2])
                total += OVERHEAD + 1e-9 * POSITIONS * outputs * inputs * layer.weight[0, 0].numel()
        return total

    def prepare(model, example_inputs, data, threads):
        taken = seconds(model)

        def run(batch):
            clock.now += 1e-6 + taken

        return run

    return SimpleNamespace(runtime=runtimes.Runtime("blocks", prepare), seconds=seconds, clock=clock)


def network():
    torch.manual_seed(0)
    parts, inputs = [], 64
    for outputs in (64, 128, 96):
        parts += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*parts, nn.Conv2d(96, 32, 1), nn.ReLU()).eval(), torch.randn(1, 64, 8, 8)


@pytest.mark.parametrize("share", [0.7, 0.5, 0.35])
def test_a_share_is_kept_as_measured_and_nearly_used_up(blocks, share):
    model, x = network()
    small = decomp.compress(model, x, seconds=share, runtime=blocks.runtime, progress=False)
    taken = blocks.seconds(small) / blocks.seconds(model)
    # Blocks of 16 of four layers are coarse: the next larger choice of ranks would be above the bound.
    assert share - 0.1 < taken < share + 1e-3
    plan = small.decomp_plan
    assert plan.measured.runtime == "blocks"
    assert plan.measured.seconds.after / plan.measured.seconds.before == pytest.approx(taken, rel=0.02)
    assert "measured in blocks" in str(plan)
    again = decomp.Plan.from_json(plan.to_json())
    assert again.measured == plan.measured
    assert "measured in blocks" in str(again)


def test_ranks_are_the_multiples_that_the_runtime_pads_to(blocks):
    model, x = network()
    plan = decomp.plan(model, seconds=0.5, runtime=blocks.runtime, example_inputs=x, progress=False)
    assert plan.request.multiple_of == 16
    ranks = [rank for choice in plan.values() for rank in choice.ranks]
    assert ranks
    assert all(rank % 16 == 0 for rank in ranks)
    chosen = decomp.plan(
        model, seconds=0.5, runtime=blocks.runtime, multiple_of=8, example_inputs=x, progress=False
    )
    assert chosen.request.multiple_of == 8


def test_a_layer_that_is_not_faster_there_stays_dense(blocks):
    model, x = network()
    plan = decomp.plan(model, seconds=0.35, runtime=blocks.runtime, example_inputs=x, progress=False)
    # 96 x 32 as two factors of rank 16 saves a third of the MACs and costs a second overhead, which is more.
    assert not plan["9"].ranks
    assert plan["0"].ranks


def test_a_duration_is_no_share(blocks):
    model, x = network()
    total = blocks.seconds(model)
    given = {"runtime": blocks.runtime, "example_inputs": x, "progress": False}
    plan = decomp.plan(model, seconds=decomp.seconds(0.5 * total), **given)
    assert plan.measured.seconds.after <= 0.5 * total * 1.01
    with pytest.raises(ValueError, match=r"a share of the dense model's time, in \(0, 1\], or decomp\.seconds"):
        decomp.plan(model, seconds=1.5, **given)
    with pytest.raises(decomp.OutOfReach, match="cannot be reached"):
        decomp.plan(model, seconds=0.001, **given)
    with pytest.raises(ValueError, match="needs a budget of seconds"):
        decomp.plan(model, macs=0.5, **given)


@pytest.mark.parametrize("outside", [0.5, 3.0])
def test_parts_outside_of_the_layers_are_found_out_by_measuring(blocks, outside):
    """A layer alone takes a third of its time inside, or three times as long: predictions are far off."""
    model, x = network()

    def prepare(model, example_inputs, data, threads):
        run = blocks.runtime.prepare(model, example_inputs, data, threads)
        whole = any(isinstance(layer, nn.ReLU) for layer in model.modules())

        def repeated(batch):
            for _ in range(6 if whole else round(6 / outside)):
                run(batch)

        return repeated

    own = runtimes.Runtime("outside", prepare)
    for share in (0.7, 0.5):
        small = decomp.compress(model, x, seconds=share, runtime=own, progress=False)
        assert share - 0.1 < blocks.seconds(small) / blocks.seconds(model) < share + 1e-3


@pytest.mark.parametrize("share", [0.7, 0.5, 0.35])
def test_a_bound_is_kept_with_the_margin_of_a_measurement(blocks, share):
    """Times are those of the MACs, without steps: any share could be met exactly."""
    model, x = network()

    def seconds(model):
        convolutions = (layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
        return 1e-3 + 1e-8 * sum(layer.weight.numel() for layer in convolutions)

    def prepare(model, example_inputs, data, threads):
        taken = seconds(model)

        def run(batch):
            blocks.clock.now += taken

        return run

    small = decomp.compress(model, x, seconds=share, runtime=runtimes.Runtime("smooth", prepare), progress=False)
    taken = seconds(small) / seconds(model)
    assert 0.945 * share < taken < 0.991 * share


@pytest.mark.parametrize("found", [0.95, 0.99, 1.02])
def test_a_network_that_hardly_becomes_faster_is_out_of_reach(blocks, monkeypatch, found):
    """The next bound would be below zero: the fastest choice is tried in its place."""
    model, x = network()
    alone = in_runtime.seconds_of

    def seconds_of(runs, example):
        return [1.0, found] if len(runs) == 2 else alone(runs, example)

    monkeypatch.setattr(in_runtime, "seconds_of", seconds_of)
    with pytest.raises(decomp.OutOfReach, match=r"seconds=0\.7 cannot be reached in blocks"):
        decomp.plan(model, example_inputs=x, seconds=0.7, runtime=blocks.runtime, progress=False)


def heavy():
    """Layers that take long enough for ranks to decide, and not the calls."""
    return nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)), torch.randn(128, 1024)


def test_seconds_in_eager_are_kept():
    model, x = heavy()
    small = decomp.compress(model, x, seconds=0.9, runtime="eager", progress=False)
    before, after = small.decomp_plan.measured.seconds
    assert after <= 0.9 * before


def test_a_trade_off_is_timed_and_scored_in_the_runtime():
    model, x = network()
    halved = []

    def prepare(model, example_inputs, data, threads):
        halved.append(model)
        return lambda batch: 0.5 * model(batch)

    own = runtimes.Runtime("half", prepare)
    curve = decomp.tradeoff(model, x, budgets=(0.5,), progress=False, runtime=own)
    assert curve.dense.score == pytest.approx(0.5)  # 1/2 y in place of y
    assert curve.points[0].score > 0.4
    assert len(halved) == 5  # dense: time, score; the point: score, and both in turn
    model, x = heavy()
    timed = decomp.tradeoff(model, x, budgets=(0.9,), cost="seconds", runtime="eager", progress=False)
    assert timed.points[0].label == "seconds=0.9"
    assert timed.points[0].seconds > 0


def test_the_explorer_has_the_prices_of_the_runtime(blocks):
    model, x = network()
    state = Exploration(model, x, runtime=blocks.runtime, progress=False)
    assert state.totals.seconds.before == pytest.approx(1e-6 + blocks.seconds(model))
    state.choose_budget("seconds", 0.5)
    planned = state.totals.seconds.after
    built = 1e-6 + blocks.seconds(state.apply())
    plan = decomp.plan(
        model, seconds=decomp.seconds(planned), runtime=blocks.runtime, example_inputs=x, progress=False
    )
    assert planned == pytest.approx(built, rel=0.15)  # prices are interpolated between three ranks
    assert plan.measured.seconds.before == pytest.approx(state.totals.seconds.before)
    assert state.spread == pytest.approx(0.0, abs=1e-9)


def test_the_explorer_says_in_which_runtime_a_latency_is(blocks):
    model, x = network()
    explorer = decomp.explore(model, x, runtime=blocks.runtime, progress=False)
    assert "latency in blocks (estimate)" in explorer._cards.value
    with pytest.raises(ValueError, match="timed=False, but runtime="):
        decomp.explore(model, x, runtime=blocks.runtime, timed=False)

"""What the repair reports and keeps: errors on data that it was not fitted to."""

import copy

import pytest
import torch
from torch import nn

import decomp

QUIET = {"progress": False}


def trained():
    """A network whose BatchNorm statistics are those of its inputs, and a function that draws inputs."""
    mixing = torch.randn(32, 32) * torch.logspace(0, -1.5, 32)
    layers = [nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(64, 32) @ mixing)
    return model.eval(), lambda count: torch.randn(count, 32) @ mixing


@torch.no_grad()
def error(small, dense, x):
    return float((small(x) - dense(x)).norm() / dense(x).norm())


@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_the_errors_are_those_of_batches_that_nothing_was_fitted_to(count, nonlinear):
    model, draw = trained()
    data = [draw(64) for _ in range(count)]
    held_out = torch.cat(data[3::4] if count >= 4 else data[-1:])
    small = decomp.svd(model, ranks=8)
    before = error(small, model, held_out)
    report = decomp.repair(small, model, data, nonlinear=nonlinear, **QUIET)
    assert report.output_error_before == pytest.approx(before, rel=1e-5)
    assert report.output_error_after == pytest.approx(error(small, model, held_out), rel=1e-5)
    assert report.output_error_after < 0.95 * before
    unseen = error(small, model, draw(4000))
    assert report.output_error_after == pytest.approx(unseen, rel=0.15)


@pytest.mark.parametrize("worse", ["after the refit", "after BatchNorm as well"])
def test_a_repair_that_makes_the_output_worse_is_taken_back(monkeypatch, worse):
    model, draw = trained()
    small = decomp.svd(model, ranks=8)
    before = copy.deepcopy(small.state_dict())
    errors = iter([0.5, 0.75, 0.6 if worse == "after BatchNorm as well" else 0.8])
    monkeypatch.setattr("decomp.recovery.repair._output_error", lambda *_: next(errors))
    report = decomp.repair(small, model, [draw(64) for _ in range(4)], **QUIET)
    assert report.output_error_after == 0.5
    assert "kept as it was" in report.note
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert all(layer.error_after == layer.error_before for layer in report.values())


def test_too_little_data_is_said_with_what_would_be_enough():
    model, draw = trained()
    small = decomp.svd(model, ranks=8)
    # Three of four batches are fitted to, 8 rows each: 24 rows for 8 inputs and a constant.
    with pytest.warns(
        UserWarning, match=r"for '0' most of all: it has 24 rows to fit 9 unknowns .* 36 would be enough"
    ):
        decomp.repair(small, model, [draw(8) for _ in range(4)], **QUIET)
    decomp.repair(small, model, [draw(12) for _ in range(4)], **QUIET)  # 36 rows: no warning


@pytest.mark.parametrize("count", [0, 1])
def test_one_batch_is_refused_for_nothing_could_be_measured_on_another(count):
    model, draw = trained()
    small = decomp.svd(model, ranks=8)
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(ValueError, match=r"fewer than two batches.*split"):
        decomp.repair(small, model, [draw(64)] * count, **QUIET)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def test_statistics_that_would_overflow_are_kept():
    model, draw = trained()
    small = decomp.svd(model, ranks=8).requires_grad_(False)
    with torch.no_grad():
        next(small[0].parameters()).mul_(-3)  # so bad, and frozen, that constants are better
    data = [draw(64) for _ in range(4)]
    data[1] = data[1] * 1e20  # finite, but not the variance of it
    report = decomp.repair(small, model, data, **QUIET)
    assert all(torch.isfinite(tensor).all() for tensor in small.state_dict().values())
    assert "a variance overflows" in report.note
    assert torch.equal(small[1].running_var, model[1].running_var)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError, MemoryError])
def test_whatever_ends_a_repair_leaves_the_model_as_it_was(error):
    model, draw = trained()
    data = [draw(64) for _ in range(4)]

    class Ending:
        def __init__(self, passes):
            self.passes = passes

        def __iter__(self):
            self.passes -= 1
            yield data[0]
            if self.passes < 0:
                raise error("the end")
            yield from data[1:]

        def __len__(self):
            return len(data)

    ended = 0
    for passes in range(12):  # the tenth is that of the BatchNorm
        small = decomp.svd(model, ranks=8)
        before = copy.deepcopy(small.state_dict())
        try:
            decomp.repair(small, model, Ending(passes), **QUIET)
        except error:
            ended += 1
            assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
            assert small[1].momentum == model[1].momentum
            assert not any(module.training for module in small.modules())
    assert ended > 5


def test_batch_norm_is_re_estimated_over_all_positions_of_the_batches_of_the_fit():
    """Batches of unequal size and images count by their positions; every fourth batch is held out."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(12)).double()
    sizes = [(1, 5), (7, 4), (2, 9), (3, 6), (5, 3), (4, 8), (1, 12), (6, 5)]
    data = [torch.randn(count, 6, side, side, dtype=torch.float64) + 1 for count, side in sizes]
    for x in data:
        dense(x)
    small = decomp.tucker(dense.eval(), ranks=(5, 10))
    norm = small[2]
    norm.running_mean.add_(1.0)
    norm.running_var.mul_(3.0)
    report = decomp.repair(small, dense, data, **QUIET)
    assert report.note == "1 BatchNorm re-estimated"
    fitted = [x for index, x in enumerate(data) if index % 4 != 3]
    with torch.no_grad():
        outputs = [small[:2](x).transpose(0, 1).flatten(1) for x in fitted]
    rows = torch.cat(outputs, 1)
    torch.testing.assert_close(norm.running_mean, rows.mean(1), rtol=1e-12, atol=1e-12)
    variances = sum(y.shape[1] * y.var(1) for y in outputs) / rows.shape[1]
    torch.testing.assert_close(norm.running_var, variances, rtol=1e-12, atol=1e-12)
    assert norm.momentum == dense[2].momentum
    assert not norm.training

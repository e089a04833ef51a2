"""What is taken from data is better on rows that nothing was fitted to, at any size of the layers."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import decomp
from decomp.calibration.sampling import Sampling, little_data
from decomp.data.batches import Batches, FitSplit
from decomp.recovery import least_squares
from decomp.recovery.least_squares import NormalEquations, Refit, RowEquations

QUIET = {"progress": False}


@torch.no_grad()
def error(small, dense, data):
    x = data if isinstance(data, torch.Tensor) else torch.cat(data)
    return float((small(x) - dense(x)).norm() / dense(x).norm())


def recipes(model, data, ranks, method=decomp.tucker):
    """The model compressed without data, and in each of the ways that use data."""
    plain = method(model, ranks=ranks, **QUIET)
    repaired = copy.deepcopy(plain)
    decomp.repair(repaired, model, data, **QUIET)
    plan = decomp.plan(model, method.__name__, ranks, data=decomp.calibrate(model, data, **QUIET), **QUIET)
    return plain, {
        "from data": plan.apply(model, **QUIET),
        "sequential": method(model, plan, data=data, sequential=True, **QUIET),
        "repaired": repaired,
    }


class Tall(nn.Module):
    """Convolutions of 64 x 1 over 128 and 1,024 channels: patches of 8,192 and 65,536 inputs."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, (64, 1), padding=(32, 0)) for a, b in ((128, 128), (1024, 8)))
        with torch.no_grad():
            for conv in self.convs:  # smooth kernels with a falling spectrum, as trained ones have
                shape = conv.weight.shape
                left = torch.randn(shape[0], 12) * 0.6 ** torch.arange(12)
                taps = torch.cumsum(torch.randn(12, 64), 1) / 8
                right = torch.randn(12, shape[1]) / shape[1] ** 0.5
                kernel = torch.einsum("tr,rk,rs->tsk", left, taps, right)[..., None]
                conv.weight.copy_(kernel / kernel.norm() * 0.5 * shape[0] ** 0.5 + 0.02 * conv.weight)

    def forward(self, x):
        x = torch.nn.functional.max_pool2d(torch.relu(self.convs[0](x)), (2, 1))
        return self.convs[1](torch.cat([x.roll(steps, 2) for steps in range(8)], 1))


def waves(count, seed):
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    time = torch.arange(24.0)
    tones = torch.rand(count, 6, 1, generator=draws) * torch.sin(time * torch.rand(count, 6, 1, generator=draws))
    return torch.einsum("nct,cd->ndt", tones, mix)[..., None] + 0.1 * torch.randn(
        count, 128, 24, 1, generator=draws
    )


def test_large_patches_are_fitted_and_never_made_worse():
    model = Tall().eval()
    data = [waves(4, 1 + index) for index in range(8)]
    plain, others = recipes(model, data, ranks=(6, 6))
    unseen = waves(24, 100)
    before = error(plain, model, unseen)
    for name, small in others.items():
        assert error(small, model, unseen) <= 1.02 * before, name
    assert error(others["sequential"], model, unseen) < 0.7 * before


def trained(seed, widths, norm):
    """A small convolutional network after a few steps towards labels that its inputs have."""
    draws = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layers, channels = [], 3
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=not norm)]
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers += [nn.ReLU()]
        channels = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 6))
    patterns = torch.randn(6, 3, 8, 8, generator=draws)

    def draw(count):
        labels = torch.randint(0, 6, (count,), generator=draws)
        noise = torch.nn.functional.avg_pool2d(torch.randn(count, 3, 10, 10, generator=draws), 3, 1)
        return patterns[labels] + 2 * noise, labels

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(25):
        x, y = draw(32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), lambda count: draw(count)[0]


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 1000),
    widths=st.lists(st.sampled_from([8, 12, 16, 24]), min_size=2, max_size=3),
    norm=st.booleans(),
    share=st.sampled_from([0.3, 0.5]),
    samples=st.sampled_from([(8, 16), (4, 4), (2, 16), (1, 24)]),
    method=st.sampled_from([decomp.tucker, decomp.svd]),
)
def test_no_recipe_is_worse_on_unseen_data_than_no_data(seed, widths, norm, share, samples, method):
    model, draw = trained(seed, widths, norm)
    batches, size = samples
    data = [draw(size) for _ in range(max(2, batches))]
    plain, others = recipes(model, data, decomp.ranks.params(share), method)
    others["repaired after the ReLU"] = copy.deepcopy(plain)
    decomp.repair(others["repaired after the ReLU"], model, data, nonlinear=True, **QUIET)
    unseen = draw(512)
    before = error(plain, model, unseen)
    for name, small in others.items():
        assert error(small, model, unseen) <= 1.05 * before + 1e-6, name


@pytest.mark.parametrize("repeats", [1, 8])
def test_a_head_is_not_fitted_to_the_few_rows_of_data_that_repeats(repeats):
    """W^ goes through the 18 rows that it is fitted to, many times as large as W, which held-out rows show."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x = torch.randn(24, 64)
    small = decomp.svd(model, ranks={"0": 8, "2": 5}, data=[x] * repeats, sequential=True, **QUIET)
    plain = decomp.svd(model, ranks={"0": 8, "2": 5}, **QUIET)
    assert small.decomp_plan["2"].error < 1.5
    unseen = torch.randn(2000, 64)
    assert error(small, model, unseen) < 1.1 * error(plain, model, unseen)


def test_batches_that_repeat_are_held_out_together_or_by_their_rows():
    distinct = [torch.full((8, 2), float(i)) for i in range(8)]
    twice = Batches([batch.clone() for batch in distinct * 2]).fit_split()
    assert [index for index in range(16) if twice.fitted(index, 8) == 0] == [3, 7, 11, 15]
    once = Batches([distinct[0].clone() for _ in range(8)]).fit_split()
    assert {once.fitted(index, 8) for index in range(8)} == {6}
    assert Batches(iter(distinct), one_pass=True).fit_split().fitted(0, 8) == 6
    # Positions of samples are not divided among what is fitted and what is held out.
    assert FitSplit(1).fitted_rows(0, rows=40, samples=4) == 30
    assert FitSplit(1).fitted_rows(0, rows=40, samples=1) == 30


def test_moments_are_those_of_the_rows_that_are_not_held_out():
    conv, linear = nn.Conv1d(6, 8, 3, dtype=torch.float64), nn.Linear(6, 8, dtype=torch.float64)
    for count in (8, 2):
        data = [torch.randn(8, 6, 9, dtype=torch.float64) for _ in range(count)]
        kept = [x for i, x in enumerate(data) if i % 4 != 3] if count == 8 else [x[:6] for x in data]
        seen = decomp.calibrate(conv, data, **QUIET)[""]
        alone = decomp.calibrate(conv, kept, held_out=False, **QUIET)[""]
        for name in ("inputs", "outputs", "patches"):
            torch.testing.assert_close(getattr(seen, name), getattr(alone, name))
        torch.testing.assert_close(seen.means[0][0], alone.means[0][0])
        assert alone.held_out is None
        left = [data[3], data[7]] if count == 8 else [x[6:] for x in data]
        rows = torch.cat([x.unfold(2, 3, 1).movedim(1, 2).reshape(-1, 18) for x in left])
        torch.testing.assert_close(seen.held_out[0], rows.float().to(seen.held_out.dtype), rtol=1e-6, atol=1e-6)
        tokens = [x.movedim(1, 2) for x in data]
        assert decomp.calibrate(linear, tokens, **QUIET)[""].held_out.shape[1] == 9 * len(left) * len(left[0])


def test_the_equations_of_the_rows_have_the_solution_of_those_of_the_columns():
    z, y = torch.randn(2, 30, 12, dtype=torch.float64), torch.randn(2, 30, 5, dtype=torch.float64)
    z, y = z.float().double(), y.float().double()
    weight = torch.randn(2, 5, 12, dtype=torch.float64)
    columns, rows = NormalEquations(), RowEquations(100)
    others = NormalEquations(), RowEquations(100)
    for equations, held_out in zip((columns, rows), others, strict=True):
        equations.add(z[:, :10], y[:, :10])
        equations.add(z[:, 10:20], y[:, 10:20])
        held_out.add(z[:, 20:], y[:, 20:])
    ridges = (1e-3, 1.0, 100.0)
    for validations in ((columns, rows), others):
        for centred in (True, False):
            found = (
                each.candidates(weight, ridges, validation, centred=centred)
                for each, validation in zip((columns, rows), validations, strict=True)
            )
            for (error, state), (by_rows, state_by_rows) in zip(*found, strict=True):
                a, b = state(), state_by_rows()
                torch.testing.assert_close(a[0], b[0], rtol=1e-8, atol=1e-8)
                if centred:
                    torch.testing.assert_close(a[1], b[1], rtol=1e-8, atol=1e-8)
                assert error == pytest.approx(by_rows, rel=1e-9)
                for equations in validations:
                    assert equations.error(*a) == pytest.approx(error, rel=1e-9)


def test_wide_layers_are_refitted_from_a_sample_of_rows(monkeypatch):
    monkeypatch.setattr(least_squares, "LARGEST_NORMAL_EQUATIONS", 30)
    dense = nn.Linear(40, 6)
    layer = nn.Linear(40, 6)
    layer.weight.data = dense.weight.data + 0.3 * torch.randn(6, 40)
    refit = Refit(layer, FitSplit(8))
    assert refit.is_wide
    mix = torch.randn(10, 40)
    with torch.no_grad():
        for index in range(8):
            x = torch.randn(12, 10) @ mix
            refit.add(x, dense(x), batch=index)
        before = refit.error()
        assert refit.apply() < 0.2 * before
        x = torch.randn(100, 10) @ mix
        assert float((layer(x) - dense(x)).norm() / dense(x).norm()) < 0.2 * before


def test_rows_that_a_fit_was_judged_on_are_fitted_to_at_the_end():
    """Oracle: ridge regression towards the given weight, by torch.linalg.lstsq over all rows."""
    layer = nn.Linear(5, 3, dtype=torch.float64)
    given = layer.weight.detach().clone()
    x = torch.randn(8, 40, 5, dtype=torch.float64)
    y = x @ torch.randn(5, 3, dtype=torch.float64) + 0.1 * torch.randn(8, 40, 3, dtype=torch.float64) + 1
    refit, unfitted = Refit(layer, FitSplit(8)), Refit(nn.Linear(5, 3), FitSplit(8))
    with torch.no_grad():
        for index in range(8):
            refit.add(x[index], y[index], batch=index)
            unfitted.add(x[index].float(), y[index].float(), batch=index)
        refit.apply()
        assert refit.equations.rows == 240
        assert refit.use_held_out()
        assert not unfitted.use_held_out(), "a fit that was not made is not made at the end either"
    assert refit.equations.rows == 320
    assert not refit.use_held_out(), "nothing is held out any more"
    rows, targets = x.flatten(0, 1), y.flatten(0, 1)
    rows, targets = rows - rows.mean(0), targets - targets.mean(0)
    rho = (refit.ridge * rows.square().mean() * len(rows)) ** 0.5
    rows, targets = torch.cat([rows, rho * torch.eye(5, dtype=torch.float64)]), torch.cat([targets, rho * given.T])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(layer.bias.detach(), y.flatten(0, 1).mean(0) - expected @ x.flatten(0, 1).mean(0))


def test_rows_of_large_batches_count_as_often_as_they_are(monkeypatch):
    """Oracle: least squares over all rows, while ten of each batch are taken."""
    from decomp.calibration.sampling import Sampling

    layer = nn.Linear(3, 2, dtype=torch.float64)
    refit = Refit(layer, sampling=Sampling(20, batches=2))
    x = [torch.randn(1000, 3, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)]
    y = [torch.zeros(1000, 2, dtype=torch.float64), torch.ones(10, 2, dtype=torch.float64)]
    with torch.no_grad():
        for index in range(2):
            refit.add(x[index], y[index], batch=index)
        refit.apply()
    assert refit.equations.count == pytest.approx(1010)
    assert float(refit.state[1].mean()) == pytest.approx(10 / 1010, abs=0.03)  # 0.5 if each batch counted alike


def test_the_plan_says_how_much_data_would_be_enough():
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    small = decomp.svd(model, ranks=8, data=[torch.randn(6, 64) for _ in range(4)], sequential=True, **QUIET)
    assert little_data(18, 65) in small.decomp_plan["0"].note
    statistics = decomp.calibrate(model, [torch.randn(6, 64) for _ in range(4)], **QUIET)
    small = decomp.svd(model, ranks=8, data=statistics, **QUIET)
    assert "18 rows for 64 unknowns per output, 256 would be enough" in small.decomp_plan["0"].note
    enough = [torch.randn(100, 64) for _ in range(4)]
    small = decomp.svd(model, ranks=8, data=enough, sequential=True, **QUIET)
    assert "little data" not in small.decomp_plan["0"].note


def test_without_anything_held_out_nothing_is_judged_and_a_single_row_changes_nothing():
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    plain = decomp.svd(model, ranks=8, **QUIET)
    small = decomp.svd(model, ranks=8, data=[torch.randn(1, 64)], sequential=True, **QUIET)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value)


def test_batches_with_many_rows_make_up_for_those_with_few():
    layer = nn.Linear(8, 8)
    sampling = Sampling(400, batches=10)
    refit = Refit(layer, FitSplit(10), sampling=sampling)
    with torch.no_grad():
        for _ in range(2):  # the rows are the same in every pass
            taken = []
            for batch in range(10):
                x = torch.randn(8 if batch % 2 == 0 else 200, 8)
                taken.append(sum(z.shape[1] for z, *_ in refit.rows(x, layer(x), batch)))
            assert taken == [8, 72, 8, 72, 8, 72, 8, 72, 8, 72]

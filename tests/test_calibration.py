"""Moments from data, the factors made of them, and the repair: against brute force on small problems."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from layer_cases import KINDS, SPATIAL
from networks import plant_spectra
from rows import rows_of
from sklearn.covariance import oas
from torch import nn

import decomp
from decomp.calibration.unfold import patches_like
from decomp.calibration.whitening import output_error
from decomp.layers import group_kernels
from decomp.methods import METHODS
from decomp.planning.build import decomposed, from_moments
from decomp.recovery.least_squares import Refit


def correlated(samples, channels, *positions, dtype=torch.float64):
    """Inputs with a falling spectrum, a mean, and smooth positions."""
    mixing = (
        torch.linalg.qr(torch.randn(channels, channels, dtype=dtype))[0] * torch.arange(1, channels + 1) ** -1.0
    )
    x = torch.randn(samples, channels, *positions, dtype=dtype)
    for axis in range(2, 2 + len(positions)):
        x = x + x.roll(1, axis)
    return torch.einsum("ab,nb...->na...", mixing, x) + torch.randn(channels, *(1,) * len(positions), dtype=dtype)


def unshrunk(statistics):
    return decomp.Statistics(
        {name: replace(moments, shrinkage=0.0) for name, moments in statistics.items()}, statistics.example
    )


def lost(small, dense, data):
    """Mean square of what the outputs of two layers differ by."""
    with torch.no_grad():
        return float(sum((small(x) - dense(x)).square().sum() for x in data))


@pytest.mark.parametrize("sizes", [(20, 12), (12, 20)])
@pytest.mark.parametrize("bias", [True, False])
def test_svd_from_data_is_the_best_there_is(sizes, bias):
    """Oracle: reduced-rank regression by brute force, the truncated SVD of W X; with a bias X about its mean."""
    dense = nn.Linear(*sizes, bias=bias, dtype=torch.float64)
    data = [correlated(40, sizes[0]) for _ in range(6)]
    statistics = unshrunk(decomp.calibrate(dense, data, held_out=False, progress=False))
    x = torch.cat(data)
    for rank in (2, 5):
        small = decomp.plan(dense, ranks=rank, data=statistics).apply(dense)
        centred = x - x.mean(0) if bias else x
        tail = torch.linalg.svdvals(centred @ dense.weight.detach().T)[rank:].square().sum()
        assert lost(small, dense, data) == pytest.approx(float(tail), rel=1e-6)
        choice = small.decomp_plan[""]
        plain = decomp.plan(dense, ranks=rank)
        assert choice.error >= plain[""].error - 1e-12  # the weight pays, the output gains
        assert lost(plain.apply(dense), dense, data) > lost(small, dense, data)
        energy = (centred @ dense.weight.detach().T).square().sum()
        assert choice.output_error == pytest.approx(float(tail / energy) ** 0.5, rel=1e-6)
        predicted = decomp.plan(dense, ranks=rank, data=statistics)[""].output_error
        assert predicted == pytest.approx(choice.output_error, rel=1e-4)


CASES = [
    (name, kind, groups)
    for name in METHODS
    for kind in (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
    for groups in (1, 2)
    if not METHODS[name].why_not(kind(8, 12, 3 if name != "svd" else 1))
]


@pytest.mark.parametrize(
    ("name", "kind", "groups"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_factors_from_data_never_raise_the_error_of_the_output(name, kind, groups):
    kernel = 3 if name != "svd" else 1
    dense = kind(8, 12, kernel, padding=1, groups=groups, dtype=torch.float64)
    data = [correlated(8, 8, *(6,) * KINDS[kind]) for _ in range(4)]
    statistics = unshrunk(decomp.calibrate(dense, data, held_out=False, progress=False))
    limits = METHODS[name].limits(group_kernels(dense))
    ranks = tuple(max(1, min(limit - 1, 2)) for limit in limits)
    layer, moments = METHODS[name].layer_of(dense), statistics[""]
    plain = layer.from_factors(dense, METHODS[name].factors(group_kernels(dense).detach(), ranks))
    small = decomp.plan(dense, METHODS[name], ranks={"": ranks}, data=statistics)
    candidate = small._candidates[""][0]
    small = decomposed(
        {"": dense},
        {"": candidate.choose(ranks, "")},
        lambda _: METHODS[name],
        {"": [candidate]},
        {"": moments},
        False,
    )[""].layer
    assert small.ranks == plain.ranks == ranks
    patches = moments.patches if kernel > 1 else moments.inputs
    if patches is None:
        patches = exact_patches(dense, data)
    squares = [
        torch.einsum("gts,gsr,gtr->", difference, patches, difference)
        for difference in (
            (group_kernels(dense) - each.dense_kernels()).detach().flatten(2) for each in (plain, small)
        )
    ]
    assert squares[1] <= squares[0] + 1e-12


def exact_patches(dense, data):
    unfold = patches_like(dense)
    rows = [rows_of(x if unfold is None else unfold(x), len(dense.kernel_size), dense.groups) for x in data]
    rows = torch.cat(rows, 1).detach()
    rows = rows - rows.mean(1, keepdim=True)
    return rows.mT @ rows / rows.shape[1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_patches_times_the_kernel_are_the_convolution(kind, mode):
    if mode != "zeros" and issubclass(kind, nn.modules.conv._ConvTransposeNd):
        pytest.skip("torch pads transposed convolutions with zeros only")
    dense = kind(4, 6, 3, stride=2, padding=1, groups=2, padding_mode=mode, bias=False, dtype=torch.float64)
    x = torch.randn(2, 4, *(7,) * KINDS[kind], dtype=torch.float64)
    rows = rows_of(patches_like(dense)(x), KINDS[kind], 2)
    expected = rows_of(dense(x), KINDS[kind], 2)
    torch.testing.assert_close(rows @ group_kernels(dense).flatten(2).mT, expected, rtol=0, atol=1e-10)


FITTED = [name for name in METHODS if not METHODS[name].closed_form and name in SPATIAL]


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_to_data_is_taken_only_where_it_is_better(name):
    """A fit to whitened kernels may end in a worse minimum than one to the weight (cp: seed 2)."""
    method = METHODS[name]
    for seed in range(6):
        torch.manual_seed(seed)
        dense = nn.Conv2d(8, 12, 3, dtype=torch.float64)
        moments = unshrunk(
            decomp.calibrate(dense, [correlated(8, 8, 6, 6) for _ in range(4)], held_out=False, progress=False)
        )[""]
        limits = method.limits(group_kernels(dense))
        ranks = tuple(max(1, min(limit - 1, 2)) for limit in limits)
        plain = method.layer_of(dense).from_factors(dense, method.factors(group_kernels(dense).detach(), ranks))
        errors = [
            output_error(each, dense, moments)
            for each in (from_moments(dense, method, ranks, moments).layer, plain)
        ]
        assert errors[0] <= errors[1] * (1 + 1e-12), seed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(8, 6, 7), (8, 6)])
def test_moments_are_those_of_numpy_and_do_not_depend_on_the_batches(shape, dtype):
    """Products are taken in the dtype of the rows: in float32 two ways to add them differ by its rounding."""
    conv = len(shape) == 3
    dense = (nn.Conv1d(6, 10, 3) if conv else nn.Linear(6, 4)).to(dtype)
    x = torch.randn(32, *shape[1:], dtype=dtype)
    one = decomp.calibrate(dense, [x], held_out=False, progress=False)[""]
    many = decomp.calibrate(dense, list(x.split(4)), held_out=False, progress=False)[""]
    rows = x.movedim(1, -1).reshape(-1, 6).double()
    torch.testing.assert_close(
        one.inputs[0] if conv else many.outputs[0],
        (rows.T.cov(correction=0) if conv else (dense(x).double().detach().T.cov(correction=0))),
        rtol=1e-4,
        atol=1e-6,
    )
    for name in ("inputs", "outputs", "patches"):
        a, b = getattr(one, name), getattr(many, name)
        assert (a is None) == (b is None)
        if a is not None:
            exact = dtype == torch.float64
            torch.testing.assert_close(a, b, rtol=1e-9 if exact else 1e-5, atol=1e-12 if exact else 1e-6)


def test_singular_moments_are_ordinary():
    dense = nn.Linear(20, 30, dtype=torch.float64)
    x = torch.randn(50, 3, dtype=torch.float64) @ torch.randn(3, 20, dtype=torch.float64)
    statistics = unshrunk(decomp.calibrate(dense, [x], held_out=False, progress=False))
    small = decomp.plan(dense, ranks=3, data=statistics).apply(dense)
    torch.testing.assert_close(small(x), dense(x), rtol=0, atol=1e-5)
    assert all(torch.isfinite(p).all() for p in small.parameters())


def test_without_batches_held_out_the_shrinkage_is_that_of_scikit_learn():
    """Of the moments about the mean; each call is one sample, however many positions it has."""
    for samples, size in ((30, 6), (400, 20)):
        dense, x = nn.Linear(size, size, dtype=torch.float64), correlated(samples, size)
        found = decomp.calibrate(dense, list(x.split(samples // 3 + 1)), held_out=False, progress=False)[
            ""
        ].shrinkage
        second = x.numpy().T @ x.numpy() / samples - np.outer(x.mean(0), x.mean(0))
        squares, trace = np.sum(second**2), np.trace(second) ** 2
        left_out = 2 / size * squares / (squares - trace / size)  # scikit-learn drops 2/p as small
        expected = (oas(x.numpy())[1] * (samples + 1) - left_out) / (samples + 1 - 2 / size)
        assert 0 < found < 1
        assert found == pytest.approx(expected, rel=1e-9)
    images = correlated(30, 6, 4)
    conv = decomp.calibrate(nn.Conv1d(6, 8, 3).double(), [images], held_out=False, progress=False)[""].shrinkage
    rows = decomp.calibrate(
        nn.Linear(6, 8).double(), [images.movedim(1, 2).reshape(120, 6)], held_out=False, progress=False
    )[""]
    assert conv > rows.shrinkage


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.bn2 = nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 16)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x)) + x).mean((2, 3)))


@pytest.fixture
def net():
    model = plant_spectra(Net())
    for norm in (model.bn1, model.bn2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def data():
    return [correlated(8, 8, 6, 6, dtype=torch.float32) for _ in range(8)]


def error(small, dense, data):
    return lost(small, dense, data) / sum(float(dense(x).detach().square().sum()) for x in data)


def test_the_batch_norm_behind_a_layer_takes_up_the_shift_of_its_mean(net, data):
    statistics = decomp.calibrate(net, data, held_out=False, progress=False)
    assert {name: moments.normalization for name, moments in statistics.items()} == {
        "conv1": "bn1",
        "conv2": "bn2",
        "fc": "",
    }
    means = net.bn1.running_mean.clone()
    small = decomp.tucker(net, ranks=4, data=statistics)
    assert torch.equal(net.bn1.running_mean, means), "the given model is left alone"
    assert not torch.equal(small.bn1.running_mean, means)
    x = torch.cat(data)
    with torch.no_grad():
        shift = (net.bn1(net.conv1(x)) - small.bn1(small.conv1(x))).mean((0, 2, 3))
    assert float(shift.abs().max()) < 1e-4


def test_data_then_repair_then_nothing_gets_worse(net, data):
    plain = decomp.tucker(net, ranks=6)
    small = decomp.tucker(net, ranks=6, data=data)
    held_out = [data[3], data[7]]
    before = [error(plain, net, data), error(small, net, data)]
    report = decomp.repair(small, net, data, progress=False)
    assert before[1] < before[0]
    assert error(small, net, data) <= before[1]
    assert report.output_error_after == pytest.approx(error(small, net, held_out) ** 0.5, rel=1e-4)
    assert list(report) == ["conv1", "conv2", "fc"]
    assert all(r.error_after <= r.error_before for r in report.values())
    assert "whole model" in str(report)
    decomp.repair(plain, net, data, progress=False)
    assert error(plain, net, data) < 0.5 * before[0]


@pytest.mark.parametrize("name", SPATIAL)
def test_the_refitted_factor_is_the_least_squares_solution(name):
    """Oracle: torch.linalg.lstsq on the patches that reach the last factor, and a column of ones for the bias."""
    dense = nn.Conv2d(6, 8, 3, padding=1, dtype=torch.float64)
    x = torch.randn(12, 6, 5, 5, dtype=torch.float64)
    limits = METHODS[name].limits(group_kernels(dense))
    ranks = tuple(max(1, min(limit - 1, 2)) for limit in limits)
    small = (
        METHODS[name]
        .layer_of(dense)
        .from_factors(dense, METHODS[name].factors(group_kernels(dense).detach(), ranks))
    )
    refit = Refit(small)
    target = dense(x).detach()
    with torch.no_grad():
        for part, wanted in zip(x.split(5), target.split(5), strict=True):
            refit.add(part, wanted)
        first = float((small(x) - target).square().sum())
        assert refit.error() == pytest.approx((first / float(target.square().sum())) ** 0.5, rel=1e-9)
        refit.apply()
        after = float((small(x) - target).square().sum())
    last = list(small.children())[-1]
    reaching = refit._input_of_last(x)
    unfold = patches_like(last)
    z = rows_of(reaching if unfold is None else unfold(reaching), 2, last.groups).detach()
    y = rows_of(target, 2, last.groups)
    ones = torch.ones(*z.shape[:2], 1, dtype=z.dtype)
    design = torch.cat([z, ones], 2)
    best = sum(
        float((one @ torch.linalg.lstsq(one, goal).solution - goal).square().sum())
        for one, goal in zip(design, y, strict=True)
    )
    assert best - 1e-9 <= after <= best * (1 + 1e-4) + 1e-9
    assert after <= first


def test_fisher_weights_count_what_the_loss_feels():
    """A loss that reads only the first outputs: these are kept best."""
    dense = nn.Linear(20, 12, dtype=torch.float64)
    data = [torch.randn(40, 20, dtype=torch.float64) for _ in range(4)]

    def loss(model, batch):
        return model(batch)[:, :4].square().mean()

    plain = decomp.calibrate(dense, data, progress=False)
    fisher = decomp.calibrate(dense, data, loss=loss, progress=False)
    counts = (fisher[""].row_metric[0] @ fisher[""].row_metric[0]).diagonal()
    assert float(counts[:4].min()) > 50 * float(counts[4:].max())
    layers = [decomp.plan(dense, ranks=4, data=statistics).apply(dense) for statistics in (plain, fisher)]
    errors = [float((small(data[0]) - dense(data[0])).detach()[:, :4].square().sum()) for small in layers]
    assert errors[1] < 0.05 * errors[0]


def test_statistics_are_used_again_and_those_of_another_model_refused(net, data):
    statistics = decomp.calibrate(net, data, progress=False)
    for ranks in (4, decomp.ranks.energy(0.8), decomp.ranks.error(0.5), "vbmf"):
        plan = decomp.plan(net, ranks=ranks, data=statistics)
        assert dict(plan) == dict(decomp.plan(net, ranks=ranks, data=data, progress=False))
        replaced = [choice for choice in plan.values() if choice.ranks]
        assert replaced
        assert all(choice.output_error is not None for choice in replaced)
    small = decomp.compress(net, macs=0.5, data=statistics)
    assert small.decomp_plan.macs.after <= 0.5 * small.decomp_plan.macs.before
    other = nn.Sequential()
    other.add_module("fc", nn.Linear(30, 30))
    with pytest.raises(
        ValueError, match=r"data: the statistics are of another model, layer 'conv1' had weight \(24, 8, 3, 3\)"
    ):
        decomp.plan(other, ranks=4, data=statistics)


def test_in_one_line(net, data):
    small = decomp.tucker(net, ranks=6, data=data, finetune={"steps": 20})
    assert set(small.decomp_finetuning) == {"conv1", "conv2", "fc"}
    labelled = [(x, torch.zeros(len(x))) for x in data]
    with pytest.raises(TypeError, match=r"inputs=lambda batch: batch\[0\]"):
        decomp.tucker(net, ranks=6, data=labelled)
    decomp.tucker(net, ranks=6, data=labelled, inputs=lambda batch: batch[0])
    with pytest.raises(ValueError, match="finetune= needs batches: give data="):
        decomp.tucker(net, ranks=6, finetune=True)
    with pytest.raises(ValueError, match="inplace=True changes"):
        decomp.tucker(copy.deepcopy(net), ranks=6, data=data, finetune=True, inplace=True)
    with pytest.raises(ValueError, match="data is empty"):
        decomp.tucker(net, ranks=6, data=[])


def test_calibration_changes_nothing(net, data):
    net.train()
    before = copy.deepcopy(net.state_dict())
    decomp.calibrate(net, data, progress=False)
    assert net.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_factorized_embedding_is_calibrated_repaired_and_fine_tuned():
    model = nn.Sequential(nn.Embedding(60, 16), nn.Flatten(), nn.Linear(80, 10)).eval()
    data = [(60 * torch.rand(32, 5) ** 3).long() for _ in range(6)]  # some words are rare
    for given in (None, data):
        small = decomp.svd(model, ranks=4, layers=[nn.Embedding, nn.Linear], data=given)
        before = error(small, model, data)
        decomp.repair(small, model, data, progress=False)
        repaired = error(small, model, data)
        assert repaired <= before * (1 + 1e-6)
        assert repaired < before or given is data
        fresh = decomp.svd(model, ranks=4, layers=[nn.Embedding, nn.Linear])
        report = decomp.finetune_layerwise(fresh, model, data, steps=60, lr=1e-2, progress=False)
        assert list(report) == ["0", "2"]
        assert all(layer.error_after < layer.error_before for layer in report.values())


@pytest.mark.parametrize("inplace", [True, False])
def test_an_activation_before_the_batch_norm_is_no_feed(inplace):
    model = nn.Sequential(nn.Conv2d(8, 12, 3, bias=False), nn.ReLU(inplace), nn.BatchNorm2d(12)).eval()
    statistics = decomp.calibrate(model, [torch.randn(4, 8, 6, 6)], progress=False)
    assert statistics["0"].normalization == ""
    tokens = nn.Sequential(nn.Linear(12, 12, bias=False), nn.BatchNorm1d(12)).eval()
    assert decomp.calibrate(tokens, [torch.randn(4, 12, 12)], progress=False)["0"].normalization == ""
    assert decomp.calibrate(tokens, [torch.randn(4, 12)], progress=False)["0"].normalization == "1"


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(20, 12), lambda: nn.Linear(12, 20), lambda: nn.Conv2d(8, 12, 3)]
)
def test_inputs_that_do_not_move_leave_the_metric_of_the_weight(make):
    dense = make()
    x = torch.full((1, 8, 7, 7), 0.3) if isinstance(dense, nn.Conv2d) else torch.randn(1, dense.in_features)
    plan = decomp.plan(dense, ranks=3)
    plain = plan.apply(dense)

    def weight_error(layer):
        return float((layer.dense_weight() - dense.weight).detach().norm() / dense.weight.detach().norm())

    for data in ([x], [x] * 5, [0 * x]):
        small = decomp.plan(dense, ranks=3, data=data).apply(dense)
        if isinstance(dense, nn.Linear):
            torch.testing.assert_close(small.dense_weight(), plain.dense_weight(), rtol=0, atol=1e-5)
        # A Tucker-2 of the weight as well, with fewer sweeps: no worse than the truncated HOSVD.
        assert weight_error(plain) * (1 - 1e-5) <= weight_error(small) <= plan[""].error * (1 + 1e-5)
        assert small.decomp_plan[""].error == pytest.approx(weight_error(small), rel=1e-5)


def test_a_repair_that_cannot_renormalize_keeps_the_statistics(net, data):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16))
            self.unused = nn.BatchNorm1d(4)
            self.unused.running_mean.fill_(3.0)

        def forward(self, x):
            return self.layers(x)

    model = Branch().eval()
    for rows in ([16, 1, 16], [16, 16, 16]):  # the last is held out
        small = decomp.svd(model, ranks=3)
        report = decomp.repair(small, model, [torch.randn(count, 16) for count in rows], progress=False)
        assert small.layers[1].momentum == 0.1
        assert float(small.unused.running_mean[0]) == 3.0
        if 1 in rows:
            assert "were kept" in report.note
            assert torch.equal(small.layers[1].running_mean, model.layers[1].running_mean)


def test_unbatched_inputs_are_refitted():
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    data = list(torch.randn(64, 16) @ torch.randn(16, 16))
    alone, together = decomp.svd(model, ranks=4), decomp.svd(model, ranks=4)
    report = decomp.repair(alone, model, data, progress=False)
    of_one = decomp.repair(together, model, [x[None] for x in data], progress=False)
    for name, layer in report.items():
        assert (layer.note, of_one[name].note) == ("", "")
        assert layer.error_after == pytest.approx(of_one[name].error_after, rel=1e-6)
        assert layer.error_after < layer.error_before
    for ours, theirs in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    upscale = nn.ConvTranspose2d(6, 8, 3, stride=2)

    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = upscale

        def forward(self, x):
            return self.up(x, [12, 12])

    model = Up()
    small = decomp.tucker(model, ranks=3)
    report = decomp.repair(small, model, [torch.randn(2, 6, 5, 5) for _ in range(4)], progress=False)
    assert report["up"].note == "called with an output_size: not refitted"

"""Errors of layers weighed by what they do to the network: gradients, budgets, and the metric of patches."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from networks import plant_spectra
from torch import nn

import decomp
from decomp.calibration.moments import Moments
from decomp.calibration.whitening import output_error, output_kernels
from decomp.layers import group_kernels
from decomp.methods import METHODS


def linear_network():
    """Two matrices in a row: what an error of the first does to the output is known exactly."""
    net = nn.Sequential(nn.Linear(20, 16, bias=False), nn.Linear(16, 12, bias=False)).double()
    net.requires_grad_(False)
    with torch.no_grad():
        net[1].weight.copy_(net[1].weight * torch.logspace(0, -2, 16, dtype=torch.float64))
    return net


def standard_error(quadratic, rows):
    """Relative standard error of a mean of v^T B v over ``rows`` normal v: sqrt(2 tr(B^2) / rows) / tr(B)."""
    return float((2 * quadratic.square().sum() / rows).sqrt() / quadratic.trace())


def test_random_directions_give_the_jacobian_of_the_output():
    """Oracle: J = W2, so that gradients by the first layer's outputs have the moments C = W2^T W2.

    A sample S of C from n directions has E ||S - C||^2 = (tr(C)^2 + tr(C^2)) / n.
    """
    net, rows = linear_network(), 80_000
    data = list(torch.randn(rows, 20, dtype=torch.float64).split(4000))
    moments = decomp.calibrate(net, data, loss="output", progress=False)["0"]
    exact = net[1].weight.T @ net[1].weight
    energy = sum(float(net(x).square().sum()) for x in data)
    metric = moments.row_metric[0] @ moments.row_metric[0]
    share = standard_error(net[1].weight @ net[1].weight.T, rows)
    assert moments.importance == pytest.approx(float(exact.trace()) / 16 * rows / energy, rel=4 * share)
    spread = float(((exact.trace().square() + exact.square().sum()) / rows).sqrt() / exact.norm())
    assert 4 * share < 0.02
    assert 4 * spread < 0.03
    expected = 0.98 * exact * 16 / exact.trace() + 0.02 * torch.eye(16)
    assert float((metric - expected).norm() / expected.norm()) < 4 * spread


def test_what_is_predicted_for_the_network_is_what_it_loses():
    """The metric of the network is known from 40,000 random directions: to within four standard errors."""
    net, rows = linear_network(), 40_000
    x = torch.randn(rows, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64)
    data = list(x.split(5000))
    statistics, plain = (
        decomp.Statistics({name: replace(each, shrinkage=0.0) for name, each in found.items()}, found.example)
        for found in (
            decomp.calibrate(net, data, loss="output", progress=False),
            decomp.calibrate(net, data, progress=False),
        )
    )
    for rank in (2, 4, 6):
        smaller = [
            decomp.plan(net, ranks=rank, layers="0", data=found).apply(net) for found in (statistics, plain)
        ]
        energy = net(x).square().sum()
        errors = [small[0](x) - net[0](x) for small in smaller]
        lost = [float((error @ net[1].weight.T).square().sum() / energy) for error in errors]
        of_layer = float(errors[0].square().sum() / energy) * float(net[1].weight.square().sum()) / 16
        candidate = decomp.plan(net, ranks=rank, layers="0", data=statistics).candidates["0"][0]
        predicted = statistics["0"].importance * candidate.analysis.squared_error((rank,))
        outputs = errors[0] @ net[1].weight.T
        allowed = 0.98 * lost[0] * standard_error(outputs.T @ outputs, rows)
        allowed += 0.02 * of_layer * standard_error(net[1].weight @ net[1].weight.T, rows)
        assert predicted == pytest.approx(0.98 * lost[0] + 0.02 * of_layer, abs=4 * allowed)
        assert 4 * allowed < 0.03 * predicted
        assert lost[0] < 0.8 * lost[1], "the best for the layer is not the best for the network"


def test_a_budget_spends_where_the_network_feels_it():
    """Two equal layers side by side, of which one is scaled down: the other one gets the ranks."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.loud, self.quiet = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.loud(x) + 0.01 * self.quiet(x)

    net = plant_spectra(Sum(), decay=0.5)
    net.quiet.load_state_dict(net.loud.state_dict())
    net.requires_grad_(False)
    data = [torch.randn(64, 32) for _ in range(8)]
    statistics = decomp.calibrate(net, data, loss="output", progress=False)
    told = decomp.plan(net, params=0.6, data=statistics)
    assert told["quiet"].ranks
    assert told["quiet"].ranks < (told["loud"].ranks or (32,))
    same = decomp.plan(net, params=0.6, data=statistics, objective="product")
    assert same["quiet"].ranks == same["loud"].ranks
    errors = []
    for plan in (told, same):
        small = plan.apply(net)
        errors.append(float((small(data[0]) - net(data[0])).norm()))
    assert errors[0] < 0.7 * errors[1]


def test_the_objective_says_what_it_needs():
    net = linear_network()
    with pytest.raises(ValueError, match=r"objective='network'.*loss='output'"):
        decomp.compress(net, params=0.5, objective="network")
    with pytest.raises(ValueError, match="objective='nothing' is unknown: write one of"):
        decomp.compress(net, params=0.5, objective="nothing")
    with pytest.raises(ValueError, match=r'loss=\'outputs\': write "output"'):
        decomp.calibrate(net, [torch.randn(4, 20).double()], loss="outputs", progress=False)
    with pytest.raises(TypeError, match="loss= must return a tensor, not float"):
        decomp.calibrate(net, [torch.randn(4, 20).double()], loss=lambda model, x: 1.0, progress=False)


def test_part_of_the_output_can_be_what_counts_and_gradients_stay_away():
    net = linear_network()
    data = [torch.randn(64, 20, dtype=torch.float64) for _ in range(4)]
    moments = decomp.calibrate(net, data, loss=lambda model, x: model(x)[:, :3], progress=False)["1"]
    metric = (moments.row_metric[0] @ moments.row_metric[0]).diagonal()
    # 2 % of the mean for what counts for nothing; the rest is shared by three outputs, as 256 directions say.
    torch.testing.assert_close(metric[3:], torch.full((9,), 0.02, dtype=torch.float64))
    assert float(metric.sum()) == pytest.approx(12)
    assert float((metric[:3] - 0.02 - 0.98 * 4).abs().max()) < 4 * 0.98 * 4 * (2 / 256) ** 0.5
    again = decomp.calibrate(net, data, loss=lambda model, x: model(x)[:, :3], progress=False)["1"]
    assert torch.equal(again.row_metric, moments.row_metric), "directions are drawn from a seed of their own"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_are_mixed_by_every_layer(name, groups):
    kernel = 1 if name == "svd" else 3
    dense = nn.Conv2d(8, 12, kernel, groups=groups, dtype=torch.float64)
    if METHODS[name].why_not(dense):
        pytest.skip("not for this layer")
    layer = METHODS[name].layer_of(dense)
    limits = METHODS[name].limits(group_kernels(dense))
    ranks = tuple(max(1, min(limit - 1, 2)) for limit in limits)
    kernels = layer.factor_kernels(dense, METHODS[name].factors(group_kernels(dense).detach(), ranks))
    mixing = torch.randn(groups, 12 // groups, 12 // groups, dtype=torch.float64)
    before = layer.from_kernels(dense, kernels).dense_kernels()
    after = layer.from_kernels(dense, layer.mix_outputs(kernels, mixing)).dense_kernels()
    if layer.absorbs_outputs == "diagonal":
        mixing = torch.diag_embed(mixing.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(after, torch.einsum("gtu,gu...->gt...", mixing, before), rtol=0, atol=1e-12)


def positive(size):
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T


def test_the_metric_of_patches_is_exact_where_it_is_a_product():
    """Moments S (x) K1 (x) K2: errors of kernels in the Frobenius norm are those of the outputs."""
    dense = nn.Conv2d(6, 8, (3, 2), dtype=torch.float64)
    patches = torch.kron(positive(6), torch.kron(positive(3), positive(2)))[None]
    moments = Moments(tuple(dense.weight.shape), 100, patches[:, ::6, ::6], None, (), 0.0, patches=patches)
    layer = METHODS["tucker"].layer_of(dense)
    kernels = group_kernels(dense).detach()
    white = output_kernels(layer, kernels, moments)
    for ranks in ((2, 2), (4, 3)):
        small = layer.from_factors(dense, METHODS["tucker"].factors(kernels, ranks))
        other = output_kernels(layer, small.dense_kernels().detach(), moments)
        # Each is scaled to its own energy: the angle between them is what both metrics share.
        inner = (white * other).sum() / white.norm() / other.norm()
        flat, cut = kernels.flatten(2), small.dense_kernels().detach().flatten(2)
        product = ((flat @ patches) * cut).sum()
        norms = (((flat @ patches) * flat).sum() * ((cut @ patches) * cut).sum()).sqrt()
        assert float(inner) == pytest.approx(float(product / norms), rel=1e-4)


def hosvd_error(kernels, ranks):
    """Relative error of the truncated HOSVD of (T, S, ...) in NumPy: leading left vectors of both unfoldings."""
    tensor = kernels.numpy()
    projected = tensor
    for mode, rank in enumerate(ranks):
        unfolded = np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)
        basis = np.linalg.svd(unfolded, full_matrices=False)[0][:, :rank]
        moved = np.tensordot(basis @ basis.T, np.moveaxis(projected, mode, 0), 1)
        projected = np.moveaxis(moved, 0, mode)
    return float(np.linalg.norm(tensor - projected) / np.linalg.norm(tensor))


def root(matrix):
    return torch.tensor(scipy.linalg.sqrtm(matrix.numpy()).real)


# Moments of three neighbours in white noise that was summed over three.
SMOOTH = torch.tensor([[3.0, 2, 1], [2, 3, 2], [1, 2, 3]], dtype=torch.float64)


@pytest.mark.parametrize("ranks", [(6, 6), (12, 8), (12, 16)])
@pytest.mark.parametrize("kernel", [SMOOTH, torch.eye(3, dtype=torch.float64)], ids=["smooth", "white"])
def test_the_error_of_spatial_kernels_is_predicted_from_patches(kernel, ranks):
    """Patches whose sample moments are S (x) K (x) K: the error is that of the HOSVD of the whitened kernel.

    No kernel of these ranks has less than 1 / sqrt(2) of it (De Lathauwer et al. 2000).
    """
    dense = plant_spectra(nn.Sequential(nn.Conv2d(16, 24, 3)), decay=0.5)[0].double().requires_grad_(False)
    channels = positive(16)
    white = torch.randn(400, 144, dtype=torch.float64)
    white = torch.linalg.qr(white - white.mean(0))[0] * 20
    x = (white @ torch.kron(root(channels), torch.kron(root(kernel), root(kernel)))).reshape(400, 16, 3, 3)
    statistics = decomp.calibrate(dense, list(x.split(50)), held_out=False, progress=False)
    statistics = decomp.Statistics({"": replace(statistics[""], shrinkage=0.0)}, statistics.example)
    plan = decomp.plan(dense, ranks=ranks, data=statistics)
    planned = plan[""].output_error
    whitened = torch.einsum("tsij,sr,ik,jl->trkl", dense.weight, root(channels), root(kernel), root(kernel))
    assert planned == pytest.approx(hosvd_error(whitened, ranks), rel=1e-5)
    layer = plan.apply(dense).requires_grad_(False)
    blind = decomp.plan(dense, ranks=ranks).apply(dense).requires_grad_(False)
    exact = dense(x) - dense(x).mean(0)
    measured, unaware = (
        float(((dense(x) - each(x)) - (dense(x) - each(x)).mean(0)).norm() / exact.norm())
        for each in (layer, blind)
    )
    assert output_error(layer, dense, statistics[""]) == pytest.approx(measured, rel=1e-9)
    assert planned / 2**0.5 <= measured < unaware
    if kernel is not SMOOTH:  # the first factor is made for the moments of the channels alone
        assert measured <= planned * (1 + 1e-5)
    if ranks[1] == 16:  # one mode is cut: the HOSVD is the SVD, and the best there is
        assert measured == pytest.approx(planned, rel=1e-5)


def test_smooth_images_are_predicted_better_from_patches_than_from_the_weight():
    """Overlapping patches with borders are no product: what an image loses varies from one to the next."""
    dense = plant_spectra(nn.Sequential(nn.Conv2d(16, 24, 3, padding=1)), decay=0.5)[0].double()
    dense.requires_grad_(False)
    x = torch.randn(64, 16, 10, 10, dtype=torch.float64)
    for axis in (2, 3):
        x = x + x.roll(1, axis) + x.roll(2, axis)
    statistics = decomp.calibrate(dense, list(x.split(8)), held_out=False, progress=False)
    statistics = decomp.Statistics({"": replace(statistics[""], shrinkage=0.0)}, statistics.example)
    for ranks in ((6, 6), (12, 8)):
        plan = decomp.plan(dense, ranks=ranks, data=statistics)
        layer = plan.apply(dense)
        measured = output_error(layer, dense, statistics[""])
        each = (dense(x) - layer(x)).square().sum((1, 2, 3))
        share = float(each.std() / each.mean() / len(x) ** 0.5)
        assert 4 * share < 0.1
        low, high = measured**2 * (1 - 4 * share), 2 * measured**2 * (1 + 4 * share)
        assert low <= plan[""].output_error ** 2 <= high
        assert abs(plan[""].output_error - measured) < abs(plan[""].error - measured)


@pytest.mark.parametrize("inputs", [32, 257])
@pytest.mark.parametrize("scale", [0.05, 20.0])
def test_what_is_predicted_for_a_convolution_is_in_units_of_the_network(inputs, scale):
    """On both sides of the largest patches whose moments are kept (2,304): a budget compares the two.

    The images are white to the last digit, of one patch each, so that only the random directions have an error.
    """
    dense = plant_spectra(nn.Sequential(nn.Conv2d(inputs, 24, 3)), decay=0.7).requires_grad_(False)
    units = scale * torch.eye(9 * inputs).reshape(-1, inputs, 3, 3)
    data = [part for each in (units, -units) for part in each.split(256)] * (2313 // (9 * inputs))
    statistics = decomp.calibrate(dense, data, loss="output", progress=False)
    assert (statistics["0"].patches is None) == (inputs == 257)
    energy, rows = sum(float(dense(x).square().sum()) for x in data), sum(map(len, data))
    for ranks in ((12, inputs), (12, 12)):
        plan = decomp.plan(dense, ranks=ranks, data=statistics)
        candidate = plan.candidates["0"][0]
        predicted = candidate.importance * plan["0"].output_error ** 2
        small = plan.apply(dense)
        outputs = torch.cat([(small(x) - dense(x)).flatten(1).double() for x in data])
        lost = float(outputs.square().sum()) / energy
        allowed = 4 * standard_error(outputs.T @ outputs, rows)
        assert allowed < 0.05
        if ranks == (12, inputs):  # one mode is cut: the HOSVD is the SVD, and the best there is
            assert predicted == pytest.approx(lost, rel=allowed)
        assert lost * (1 - allowed) <= predicted <= 2 * lost * (1 + allowed)


def test_wide_outputs_are_counted_one_by_one(monkeypatch):
    """Products of so many outputs would not fit: their squares alone, the same as the diagonal."""
    net = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 6)).double().requires_grad_(False)
    data = [torch.randn(50, 12, dtype=torch.float64) for _ in range(4)]
    full = decomp.calibrate(net, data, loss="output", progress=False)["0"]
    monkeypatch.setattr("decomp.calibration.moments.LARGEST_ROW_METRIC", 30)
    narrow = decomp.calibrate(net, data, loss="output", progress=False)
    assert narrow["0"].row_metric.shape == (1, 40)
    torch.testing.assert_close(
        narrow["0"].row_metric.square(), (full.row_metric @ full.row_metric).diagonal(0, 1, 2)
    )
    assert narrow["0"].importance == pytest.approx(full.importance)
    plain = decomp.calibrate(net, data, progress=False)
    lost = []
    for found in (narrow, plain):
        small = decomp.plan(net, ranks=3, layers="0", data=found).apply(net)
        lost.append(
            sum(float(((small[0](x) - net[0](x)) * narrow["0"].row_metric[0]).square().sum()) for x in data)
        )
    assert lost[0] < lost[1]


def test_gradients_are_taken_and_none_is_left(monkeypatch):
    net = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 6))
    with torch.inference_mode():
        decomp.calibrate(net, [torch.randn(8, 12)], loss="output", progress=False)
    with torch.no_grad():
        decomp.calibrate(net, [torch.randn(8, 12)], loss="output", progress=False)
    assert all(parameter.grad is None for parameter in net.parameters())

    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        @torch.no_grad()
        def forward(self, x):
            return self.net(x)

    with pytest.raises(ValueError, match=r"no gradient, because the model runs under torch.no_grad.*loss=None"):
        decomp.calibrate(Closed(), [torch.randn(8, 12)], loss="output", progress=False)
    with pytest.raises(ValueError, match="the model returns no float tensor"):
        decomp.calibrate(nn.Sequential(net, Argmax()), [torch.randn(8, 12)], loss="output", progress=False)


class Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(1)


def test_a_layer_that_no_gradient_reaches_is_named():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.aside = nn.Linear(24, 24), nn.Linear(24, 12), nn.Linear(24, 24)

        def forward(self, x):
            x = self.body(x)
            self.last = self.aside(x)
            return self.head(x)

    net, data = Aside(), [torch.randn(32, 24) for _ in range(4)]
    statistics = decomp.calibrate(net, data, loss="output", progress=False)
    del net.last
    with pytest.raises(ValueError, match=r"layer 'aside' is not known.*no gradient reached it.*exclude="):
        decomp.plan(net, params=0.6, data=statistics)
    assert not decomp.plan(net, params=0.6, data=statistics, exclude="aside")["aside"].ranks
    assert decomp.plan(net, params=0.6, data=statistics, objective="product")["aside"].ranks

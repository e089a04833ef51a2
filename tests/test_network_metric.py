"""Errors of layers weighed by what they do to the network: gradients, budgets, and the metric of patches."""

from dataclasses import replace

import pytest
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


def test_random_directions_give_the_jacobian_of_the_output():
    """Oracle: J = W2, so that gradients by the first layer's outputs have the moments W2^T W2."""
    net = linear_network()
    data = [torch.randn(400, 20, dtype=torch.float64) for _ in range(20)]
    moments = decomp.calibrate(net, data, loss="output", progress=False)["0"]
    exact = net[1].weight.T @ net[1].weight
    energy = sum(float(net(x).square().sum()) for x in data)
    metric = moments.row_metric[0] @ moments.row_metric[0]
    assert moments.importance == pytest.approx(float(exact.diagonal().mean()) * 8000 / energy, rel=0.05)
    exact = 0.98 * exact / exact.diagonal().mean() + 0.02 * torch.eye(16)
    assert float((metric - exact).norm() / exact.norm()) < 0.05


def test_what_is_predicted_for_the_network_is_what_it_loses():
    net = linear_network()
    x = torch.randn(4000, 20, dtype=torch.float64) @ torch.randn(20, 20, dtype=torch.float64)
    data = list(x.split(500))
    statistics = decomp.calibrate(net, data, loss="output", progress=False)
    plain = decomp.calibrate(net, data, progress=False)
    for rank in (2, 4, 6):
        smaller = [
            decomp.plan(net, ranks=rank, layers="0", data=found).apply(net) for found in (statistics, plain)
        ]
        energy = net(x).square().sum()
        lost = [float((small(x) - net(x)).square().sum() / energy) for small in smaller]
        of_layer = float((smaller[0][0](x) - net[0](x)).square().sum() / energy)
        counted = 0.98 * lost[0] + 0.02 * of_layer * float(net[1].weight.square().sum()) / 16
        candidate = decomp.plan(net, ranks=rank, layers="0", data=statistics).candidates["0"][0]
        predicted = statistics["0"].importance * candidate.analysis.squared_error((rank,))
        assert predicted == pytest.approx(counted, rel=0.1)
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
    with pytest.raises(TypeError, match="loss must give a tensor, not float"):
        decomp.calibrate(net, [torch.randn(4, 20).double()], loss=lambda model, x: 1.0, progress=False)


def test_part_of_the_output_can_be_what_counts_and_gradients_stay_away():
    net = linear_network()
    data = [torch.randn(64, 20, dtype=torch.float64) for _ in range(4)]
    moments = decomp.calibrate(net, data, loss=lambda model, x: model(x)[:, :3], progress=False)["1"]
    metric = (moments.row_metric[0] @ moments.row_metric[0]).diagonal()
    assert float(metric[:3].min()) > 20 * float(metric[3:].max())
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


def test_the_error_of_spatial_kernels_is_predicted_from_patches():
    """Smooth images: the weight alone is far off, the channels alone are as well."""
    torch.manual_seed(0)
    dense = plant_spectra(nn.Sequential(nn.Conv2d(16, 24, 3, padding=1)), decay=0.5)[0].double()
    x = torch.randn(64, 16, 10, 10, dtype=torch.float64)
    for axis in (2, 3):
        x = x + x.roll(1, axis) + x.roll(2, axis)
    statistics = decomp.calibrate(dense, list(x.split(8)), progress=False)
    statistics = decomp.Statistics(
        {name: replace(moments, shrinkage=0.0) for name, moments in statistics.items()}, statistics.example
    )
    for ranks in ((6, 6), (12, 8)):
        plan = decomp.plan(dense, ranks=ranks, data=statistics)
        layer = plan.apply(dense)
        measured = output_error(layer, dense, statistics[""])
        assert plan[""].output_error == pytest.approx(measured, rel=0.35)
        assert abs(plan[""].output_error - measured) < abs(plan[""].error - measured)


@pytest.mark.parametrize("inputs", [32, 257])
@pytest.mark.parametrize("scale", [0.05, 20.0])
def test_what_is_predicted_for_a_convolution_is_in_units_of_the_network(inputs, scale):
    """On both sides of the largest patches whose moments are kept (2,304): a budget compares the two."""
    torch.manual_seed(0)
    dense = plant_spectra(nn.Sequential(nn.Conv2d(inputs, 24, 3)), decay=0.7).requires_grad_(False)
    data = [scale * torch.randn(4, inputs, 5, 5) for _ in range(4)]
    statistics = decomp.calibrate(dense, data, loss="output", progress=False)
    assert (statistics["0"].patches is None) == (inputs == 257)
    plan = decomp.plan(dense, ranks=(12, 12), data=statistics)
    candidate = plan.candidates["0"][0]
    predicted = candidate.importance * plan["0"].output_error ** 2
    small, energy = plan.apply(dense), sum(float(dense(x).square().sum()) for x in data)
    lost = sum(float((small(x) - dense(x)).square().sum()) for x in data) / energy
    assert lost / 2 < predicted < 2 * lost


def test_wide_outputs_are_counted_one_by_one(monkeypatch):
    """Products of so many outputs would not fit: their squares alone, the same as the diagonal."""
    net = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 6)).double().requires_grad_(False)
    data = [torch.randn(50, 12, dtype=torch.float64) for _ in range(4)]
    full = decomp.calibrate(net, data, loss="output", progress=False)["0"]
    monkeypatch.setattr("decomp.calibration.accumulators.LARGEST_ROW_METRIC", 30)
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
    with pytest.raises(ValueError, match="no tensor of floats"):
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

"""Sensitivity weights against what they say they are."""

import pytest
import torch
from networks import plant_spectra
from torch import nn

import decomp


def test_measured_weight_is_the_change_of_the_output_over_that_of_the_layer():
    """A linear network: the last layer's cut changes the output as much as the layer, the rest by closed form."""
    model = plant_spectra(nn.Sequential(nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)))
    data = [torch.randn(50, 24) for _ in range(2)]
    weights = decomp.sensitivity(model, data)
    for name, layer in (("0", model[0]), ("1", model[1])):
        weight = layer.weight.detach().double()
        u, s, v = torch.linalg.svd(weight)
        energy = s.square().cumsum(0) / s.square().sum()
        rank = int((energy < 0.75).sum()) + 1
        cut = (u[:, :rank] * s[:rank]) @ v[:rank]
        squared_error = float((weight - cut).square().sum() / weight.square().sum())
        x = torch.cat(data).double()
        with torch.no_grad():
            product = {n: m.weight.double() for n, m in model.named_children()}
            exact = x @ product["0"].T @ product["1"].T
            product[name] = cut
            lost = x @ product["0"].T @ product["1"].T - exact
        expected = float(lost.square().sum() / exact.square().sum()) / squared_error
        assert weights[name] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_fisher_weight_is_gradient_energy_times_output_energy(inplace, frozen):
    model = plant_spectra(nn.Sequential(nn.Linear(24, 24), nn.ReLU(inplace), nn.Linear(24, 5)))
    model.requires_grad_(not frozen)
    data = [(torch.randn(20, 24), torch.randint(0, 5, (20,)))]

    def loss(network, batch):
        return nn.functional.cross_entropy(network(batch[0]), batch[1])

    weights = decomp.sensitivity(model, data, loss=loss, inputs=lambda batch: batch[0])
    hidden = model[0](data[0][0]).detach().requires_grad_()
    grad = torch.autograd.grad(nn.functional.cross_entropy(model[2](hidden.relu()), data[0][1]), hidden)[0]
    expected = float(grad.square().sum() * hidden.detach().square().mean())
    assert weights["0"] == pytest.approx(expected, rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_is_changed_and_dead_layers_weigh_nothing():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.ignored, self.bn = nn.Linear(16, 16), nn.Linear(16, 16), nn.BatchNorm1d(16)

        def forward(self, x):
            self.ignored(x)
            return self.bn(self.used(x))

    model = plant_spectra(Half())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [torch.randn(8, 16)]
    for weights in (
        decomp.sensitivity(model, data),
        decomp.sensitivity(model, data, loss=lambda network, batch: network(batch).square().mean()),
    ):
        assert weights["ignored"] == 0
        assert weights["used"] > 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not model.used._forward_hooks
    small = decomp.compress(model, data[0], params=0.8, weights=decomp.sensitivity(model, data))
    assert small.decomp_plan["used"].error <= small.decomp_plan["ignored"].error
    with pytest.raises(ValueError, match="data is empty"):
        decomp.sensitivity(model, [])

"""Weights of extreme scale: errors are relative, and factors are those of the weight at a moderate scale."""

import pytest
import torch
from torch import nn

import decomp
from decomp.methods import METHODS


def model(name):
    matrix = name in ("svd", "kronecker")
    layer = nn.Linear(24, 20) if matrix else nn.Conv2d(12, 12, 3)
    return nn.Sequential(layer).double()


@pytest.mark.parametrize("scale", [1e-300, 1e-165, 1e155, 1e300])
@pytest.mark.parametrize("name", [name for name in METHODS if "rnn" not in name])
def test_a_weight_of_extreme_scale_is_decomposed_like_that_of_scale_one(name, scale):
    dense = model(name)
    expected = decomp.plan(dense, name, ranks=1).apply(dense)
    weight = dense[0].weight.detach().clone()
    with torch.no_grad():
        dense[0].weight.mul_(scale)
    plan = decomp.plan(dense, name, ranks=1)
    assert plan["0"].error == pytest.approx(expected.decomp_plan["0"].error, rel=1e-6)
    small = plan.apply(dense)
    difference = small[0].dense_weight().detach() / scale - expected[0].dense_weight().detach()
    assert float(difference.norm()) <= 1e-6 * float(weight.norm())
    assert small.decomp_plan["0"].error == pytest.approx(expected.decomp_plan["0"].error, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize(("name", "shape"), [("svd", (600, 640)), ("tucker", (288, 256, 3, 3))])
def test_a_large_float32_weight_may_have_squares_outside_of_float32(name, shape, scale):
    weight = torch.randn(shape) / torch.arange(1, shape[0] + 1.0).reshape(-1, *(1,) * (len(shape) - 1))
    layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], 3)
    errors = []
    for each in (1.0, scale):
        with torch.no_grad():
            layer.weight.copy_(weight * each)
        small = decomp.plan(nn.Sequential(layer), name, ranks=32).apply(nn.Sequential(layer))
        errors.append(small.decomp_plan["0"].error)
        weight64 = layer.weight.detach().double()
        measured = (small[0].dense_weight().detach().double() - weight64).norm() / weight64.norm()
        assert float(measured) <= errors[-1] * (1 + 1e-3)
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)

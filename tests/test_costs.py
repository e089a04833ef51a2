"""Prices against built layers and published counts."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import alexnet, resnet18, resnet50, vgg16
from torch import nn

import decomp
from decomp.analysis.profile import profile
from decomp.layers import group_kernels
from decomp.methods import METHODS
from decomp.network.flops import Call, observe
from decomp.planning.cost import Price, count_macs, count_params, on_meta

PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_cases.json").read_text())
REFERENCE = PUBLISHED["reference_macs"]


@pytest.mark.parametrize("row", PUBLISHED["resnet18_tucker2_params"]["rows"], ids=str)
def test_published_parameters_of_tucker2_layers(row):
    inputs, outputs, rank_in, rank_out, params = row
    dense = nn.Conv2d(inputs, outputs, 3, bias=False)
    price = Price(dense, METHODS["tucker"].layers[nn.Conv2d], (outputs, inputs))
    assert price((rank_out, rank_in)).params == params
    assert count_params(METHODS["tucker"].layers[nn.Conv2d].like(dense, (rank_out, rank_in))) == params


def meta_macs(network, size):
    with torch.device("meta"):
        model, image = network(), torch.empty(1, 3, size, size)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    seen = observe(model, image, modules)
    return modules, seen


def test_reference_macs_of_vgg16():
    modules, seen = meta_macs(vgg16, 224)
    convolutions = sum(seen.macs[name] for name, m in modules.items() if isinstance(m, nn.Conv2d))
    assert convolutions == REFERENCE["VGG16_conv"]
    assert seen.total_macs - convolutions == REFERENCE["VGG16_fc"]


def test_reference_macs_and_parameters_of_grouped_alexnet():
    modules, seen = meta_macs(alexnet, 227)
    assert seen.total_macs == REFERENCE["AlexNet_caffe_grouped"]
    assert sum(count_params(module) for module in modules.values()) == REFERENCE["AlexNet_caffe_params"]


@pytest.mark.parametrize(("network", "name"), [(resnet18, "ResNet18"), (resnet50, "ResNet50_v1.5")])
def test_reference_macs_of_resnets(network, name):
    _, seen = meta_macs(network, 224)
    assert seen.total_macs == REFERENCE[name]


LAYERS = [
    (nn.Conv2d(12, 18, (3, 5), stride=(2, 1), padding=1, dilation=(1, 2), groups=2), "tucker", (3, 12, 20, 17)),
    (nn.Conv2d(2, 7, 3, bias=False), "tucker", (1, 2, 9, 9)),
    (nn.Conv1d(6, 5, 3), "tucker", (2, 6, 11)),
    (nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), "tucker", (1, 8, 5, 5)),
    (nn.Conv2d(6, 9, 1, stride=2), "svd", (1, 6, 8, 8)),
    (nn.ConvTranspose1d(6, 4, 1, stride=2), "svd", (1, 6, 8)),
    (nn.Linear(10, 7), "svd", (2, 5, 10)),
    (nn.Linear(12, 18), "kronecker", (2, 5, 12)),
    (nn.Linear(10, 7, bias=False), "kronecker", (10,)),
]


@pytest.mark.parametrize(("dense", "name", "shape"), LAYERS, ids=lambda value: str(value)[:40])
def test_price_equals_every_layer_that_can_be_built(dense, name, shape):
    """The polynomial through a few meta builds, against parameters and a really counted forward pass."""
    method = METHODS[name]
    limits = method.limits(group_kernels(dense))
    price = Price(dense, method.layer_of(dense), limits, [Call(shape)])
    assert price.dense.params == count_params(dense)
    x = torch.randn(shape)
    assert price.dense.macs == profile(dense, x).total.macs
    every = np.array(list(product(*(range(1, limit + 1) for limit in limits))))
    costs = price.at(every)
    for place, ranks in enumerate(every.tolist()):
        built = method.layer_of(dense).like(dense, tuple(ranks))
        counted = observe(built, x, {}).total_macs
        expected = {"params": count_params(built), "macs": counted, "bytes": 4 * count_params(built)}
        assert price(tuple(ranks)) == expected
        assert {kind: counts[place] for kind, counts in costs.items()} == expected


def test_a_layer_called_twice_costs_twice():
    dense = nn.Linear(10, 7)
    once, twice = [Call((2, 10))], [Call((2, 10)), Call((3, 10))]
    layer = METHODS["svd"].layers[nn.Linear]
    assert Price(dense, layer, (7,), once)((3,)).macs == 2 * 3 * 17
    assert Price(dense, layer, (7,), twice)((3,)).macs == 5 * 3 * 17


def test_shares_without_a_shape_are_those_of_large_inputs():
    """Stride 2: the reduction runs on all positions, core and expansion on a quarter of them."""
    dense = nn.Conv2d(64, 96, 3, stride=2, padding=1, bias=False)
    price = Price(dense, METHODS["tucker"].layers[nn.Conv2d], (96, 64))
    expected = (4 * 64 * 16 + 9 * 16 * 24 + 24 * 96) / (9 * 64 * 96)
    assert price((24, 16)).macs / price.dense.macs == pytest.approx(expected, rel=1e-3)


def test_counting_touches_no_memory_of_the_layer():
    meta = on_meta(nn.Conv2d(3, 5, 3))
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert count_macs(meta, [Call((1, 3, 5, 5))]) == 9 * 3 * 5 * 9


def test_every_call_measures_seconds_anew(monkeypatch):
    measured = []

    def measure(layer, calls, layout):
        measured.append(str(layer))
        return 1.0

    monkeypatch.setattr("decomp.planning.latency._measure", measure)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    decomp.plan(model, seconds=1e9, example_inputs=torch.zeros(1, 64), progress=False)
    first = list(measured)
    assert len(set(first)) == len(first), "layers of one structure are measured once in a call"
    decomp.plan(model, seconds=1e9, example_inputs=torch.zeros(1, 64), progress=False)
    assert measured == first * 2, "nothing is kept from an earlier call"

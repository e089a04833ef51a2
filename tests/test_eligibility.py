"""Which layers may be replaced: subclasses of convolutions, tensors of other types, parametrizations."""

import copy
import warnings

import pytest
import torch
from planting import RANK, plant
from torch import nn

import decomp
from decomp.layers import Factorized, TuckerConv


class Conv3DSimple(nn.Conv3d):
    """A convolution with another constructor, as torchvision's video networks have."""

    def __init__(self, in_planes, out_planes, midplanes=None, stride=1, padding=1):
        super().__init__(in_planes, out_planes, (3, 3, 3), stride, padding, bias=False)

    @staticmethod
    def get_downsample_stride(stride):
        return stride, stride, stride


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std()
        return self._conv_forward(x, weight, self.bias)


class StandardizedInside(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.std(), bias)


class Video(nn.Module):
    """The shape of torchvision's r3d_18, small: a stem, residual blocks of Conv3DSimple, a classifier."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False), nn.ReLU())
        self.conv1 = nn.Sequential(Conv3DSimple(width, 2 * width, stride=2), nn.BatchNorm3d(2 * width), nn.ReLU())
        self.conv2 = nn.Sequential(Conv3DSimple(2 * width, 2 * width), nn.BatchNorm3d(2 * width))
        self.downsample = nn.Sequential(nn.Conv3d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm3d(2 * width))
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.conv2(self.conv1(x)) + self.downsample(x))
        return self.fc(x.mean((2, 3, 4)))


CLIP = torch.rand(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layers", [None, Conv3DSimple, "conv?.0"])
def test_a_convolution_that_differs_in_its_constructor_is_decomposed(layers):
    model, clip = plant(Video()), CLIP.double()
    small = decomp.tucker(model, ranks=RANK, layers=layers, example_inputs=clip)
    for layer in (small.conv1[0], small.conv2[0]):
        assert isinstance(layer, TuckerConv)
    torch.testing.assert_close(small(clip), model(clip), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(decomp.densify(small)(clip), model(clip), rtol=1e-9, atol=1e-9)
    dense = decomp.densify(small).conv1[0]
    assert (type(dense), dense.stride, dense.bias) == (nn.Conv3d, (2, 2, 2), None)
    comparison = decomp.compare(small, model, clip)
    macs = small.decomp_plan.macs
    assert comparison.ratio("macs") == macs.before / macs.after > 1
    rebuilt = decomp.Plan.from_json(small.decomp_plan.to_json()).build(Video()).double().eval()
    rebuilt.load_state_dict(small.state_dict())
    torch.testing.assert_close(rebuilt(clip), small(clip))


@pytest.mark.parametrize("method", ["svd_channel", "svd_input", "cp", "cp4", "block_term", "depthwise_pointwise"])
def test_every_factor_of_such_a_convolution_is_one_of_torch(method):
    model = Video().double().eval()
    small = decomp.plan(model, method, 2, layers="conv?.0").apply(model)
    layer = small.conv1[0]
    assert isinstance(layer, Factorized)
    assert {type(factor) for factor in layer.children()} == {nn.Conv3d}
    clip = CLIP.double()
    torch.testing.assert_close(small(clip), decomp.densify(small)(clip))


@pytest.mark.parametrize("kind", [Standardized, StandardizedInside])
def test_a_convolution_that_computes_something_else_stays_dense(kind):
    plan = decomp.plan(nn.Sequential(kind(16, 16, 3), nn.Conv2d(16, 16, 3)), ranks=4)
    assert "its forward may differ" in plan["0"].reason
    assert plan["1"].ranks == (4, 4)


def quantized(count):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library that is imported
        quantization = pytest.importorskip("torchao.quantization")
    layers = [nn.Linear(64, 64) for _ in range(count)]
    model = nn.Sequential(*layers, nn.Conv2d(1, 1, 1), nn.Linear(64, 32))
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, config, filter_fn=lambda module, name: name.isdigit() and int(name) < count)
    return model


@pytest.mark.parametrize("count", [1, 2])
def test_quantized_weights_stay_dense_and_the_others_are_decomposed(count):
    model = quantized(count)
    x = torch.randn(1, 8, 64)
    small = decomp.svd(model, ranks=8, example_inputs=x)
    reasons = [small.decomp_plan[str(index)].reason for index in range(count)]
    assert all("quantized" in reason and "decompose first" in reason for reason in reasons)
    last = str(count + 1)
    assert small.decomp_plan[last].ranks == (8,)
    assert small(x).shape == (1, 8, 32)
    macs = small.decomp_plan.macs
    assert macs.before - macs.after == 8 * (64 * 32 - 8 * (64 + 32))
    shown = decomp.profile(model, x).rows["0"]
    assert 64 * 64 <= shown.bytes < 2 * 64 * 64, "one byte per weight, and the scales"


def test_sharded_layers_say_that_they_come_last(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        fully_shard(model[0], mesh=mesh)
        plan = decomp.plan(model, ranks=8)
        assert plan["0"].reason == "sharded (its weight is a DTensor): decompose before sharding"
        assert plan["1"].ranks == (8,)
        fully_shard(model, mesh=mesh)
        with pytest.raises(decomp.NothingToDecompose, match=r"2 x sharded .*decompose before sharding"):
            decomp.svd(model, ranks=8)
    finally:
        torch.distributed.destroy_process_group()


def test_the_tensors_of_a_parametrization_are_no_layers():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    nn.utils.parametrizations.weight_norm(model[0])
    plan = decomp.plan(model, ranks=4)
    assert list(plan) == ["0", "1"]
    assert "remove_parametrizations" in plan["0"].reason


def test_a_parametrization_that_holds_a_layer_keeps_it():
    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(32, 32)

        def forward(self, weight):
            return self.mix(weight)

    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Through())
    before = copy.deepcopy(model.state_dict())
    small = decomp.svd(model, ranks=4)
    assert list(small.decomp_plan) == ["0", "1"]
    assert all(torch.equal(small.state_dict()[name], before[name]) for name in before if name.startswith("0."))


def test_a_parameter_of_a_class_of_the_users_is_a_parameter():
    class Tagged(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight = Tagged(model[0].weight.detach())
    assert type(model[0].weight) is Tagged
    assert decomp.svd(model, ranks=4)[0].ranks == (4,)


def test_ranks_of_two_and_more_can_be_quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library that is imported
        quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.copy_(torch.outer(torch.randn(64), torch.randn(64)))
    small = decomp.svd(model, ranks=decomp.ranks.energy(0.9), multiple_of=2)
    assert small[0].ranks == (2,)
    x = torch.randn(8, 64)
    expected = small(x)
    quantization.quantize_(small, quantization.Int8DynamicActivationInt8WeightConfig())
    assert (small(x) - expected).norm() < 0.05 * expected.norm()

"""One conformance suite over methods x kinds of layer x options of a convolution."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from decomp.layers import Factorized, group_kernels, join_kernels
from decomp.methods import METHODS

TUCKER, SVD = METHODS["tucker"], METHODS["svd"]
DIMENSIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
TRANSPOSED = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
SIZES = (9, 8, 7)


def options(dimensions, transposed):
    """Strides, paddings, dilations (asymmetric ones included), groups, padding modes, bias or none."""
    strides = [1, 2] if dimensions == 1 else [1, 2, (2, 1, 2)[:dimensions]]
    paddings = [0, (2, 1, 0)[:dimensions], *([] if transposed else ["same", "valid"])]
    dilations = [1, (1, 2, 1)[:dimensions]]
    modes = ["zeros"] if transposed else ["zeros", "reflect", "replicate", "circular"]
    for stride, padding, dilation, groups, mode, bias in product(
        strides, paddings, dilations, (1, 2), modes, (True, False)
    ):
        if padding == "same" and stride != 1:
            continue
        names = ("stride", "padding", "dilation", "groups", "padding_mode", "bias")
        yield dict(zip(names, (stride, padding, dilation, groups, mode, bias), strict=True))


def cases(kinds):
    for kind, dimensions in kinds.items():
        for option in options(dimensions, kind in TRANSPOSED):
            kernel = (3, 2, 3)[:dimensions] if option["padding_mode"] == "zeros" else (3, 3, 2)[:dimensions]
            yield kind, dimensions, kernel, option


def planted(dense, ranks):
    """Give ``dense`` a kernel that has exactly these Tucker ranks."""
    kernels = group_kernels(dense)
    groups, outputs, inputs = kernels.shape[:3]
    core = torch.randn(groups, *ranks, *kernels.shape[3:], dtype=torch.float64)
    left = torch.randn(groups, outputs, ranks[0], dtype=torch.float64)
    right = torch.randn(groups, inputs, ranks[1], dtype=torch.float64)
    kernels = torch.einsum("gta,gab...,gsb->gts...", left, core, right)
    dense.weight.data = join_kernels(kernels, transposed=getattr(dense, "transposed", False)).contiguous()
    return dense


def factorized(method, dense, ranks) -> Factorized:
    kernels = group_kernels(dense)
    return method.layers[type(dense)].from_factors(dense, method.factors(kernels, ranks))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", [*DIMENSIONS, *TRANSPOSED], ids=lambda kind: kind.__name__)
def test_tucker_is_exact_at_sufficient_rank_and_equals_its_dense_weight(kind):
    """Parity at the ranks of the kernel and at full ranks, every option; truncated, the oracle is dense_weight."""
    kinds = {kind: {**DIMENSIONS, **TRANSPOSED}[kind]}
    count = 0
    for _, dimensions, kernel, option in cases(kinds):
        extra = {"output_padding": 1} if kind in TRANSPOSED and option["stride"] == 2 else {}
        dense = kind(8, 12, kernel, **option, **extra).double()
        planted(dense, (3, 2))
        x = torch.randn(2, 8, *SIZES[:dimensions], dtype=torch.float64)
        expected = dense(x)
        groups = option["groups"]
        for ranks in ((3, 2), (12 // groups, 2), (3, 8 // groups), (12 // groups, 8 // groups)):
            torch.testing.assert_close(factorized(TUCKER, dense, ranks)(x), expected, rtol=0, atol=1e-10)
        small = factorized(TUCKER, dense, (2, 1))
        oracle = copy.deepcopy(dense)
        oracle.weight.data = small.dense_weight().data
        torch.testing.assert_close(small(x), oracle(x), rtol=0, atol=1e-10)
        assert (small(x) - expected).abs().max() > 1e-3, "the truncated layer must differ, or nothing was tested"
        count += 1
    assert count >= 16


@pytest.mark.parametrize("kind", [*DIMENSIONS, *TRANSPOSED], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_svd_of_1x1_is_exact_at_full_rank_and_equals_its_dense_weight(kind, groups, bias, stride):
    dimensions = {**DIMENSIONS, **TRANSPOSED}[kind]
    for padding in (0, 1):
        extra = {"output_padding": 1} if kind in TRANSPOSED and stride == 2 else {}
        dense = kind(8, 12, 1, stride=stride, padding=padding, groups=groups, bias=bias, **extra).double()
        x = torch.randn(2, 8, *SIZES[:dimensions], dtype=torch.float64)
        full = min(12, 8) // groups
        torch.testing.assert_close(factorized(SVD, dense, (full,))(x), dense(x), rtol=0, atol=1e-10)
        small = factorized(SVD, dense, (2,))
        oracle = copy.deepcopy(dense)
        oracle.weight.data = small.dense_weight().data
        torch.testing.assert_close(small(x), oracle(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_svd_of_a_linear_layer_is_the_truncated_svd(bias):
    dense = nn.Linear(20, 12, bias=bias).double()
    x = torch.randn(5, 3, 20, dtype=torch.float64)
    torch.testing.assert_close(factorized(SVD, dense, (12,))(x), dense(x), rtol=0, atol=1e-10)
    u, s, v = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    small = factorized(SVD, dense, (4,))
    torch.testing.assert_close(small.dense_weight(), (u[:, :4] * s[:4]) @ v[:4], rtol=0, atol=1e-12)
    torch.testing.assert_close(small.reduce.weight.norm(), small.expand.weight.norm())  # balanced


def test_strided_1x1_convolution_is_strided_in_its_first_factor():
    small = factorized(SVD, nn.Conv2d(8, 8, 1, stride=(2, 3)), (2,))
    assert small.reduce.stride == (2, 3)
    assert small.expand.stride == (1, 1)


def test_only_the_last_factor_has_a_bias_and_none_appears():
    with_bias = factorized(TUCKER, nn.Conv2d(8, 12, 3), (4, 3))
    assert with_bias.reduce.bias is None
    assert with_bias.core.bias is None
    assert with_bias.bias is with_bias.expand.bias
    without = factorized(TUCKER, nn.Conv2d(8, 12, 3, bias=False), (4, 3))
    assert without.bias is None
    assert factorized(TUCKER, nn.Conv2d(8, 12, 3), (12, 3)).core.bias is not None


@pytest.mark.parametrize(
    ("method", "dense", "ranks", "shape"),
    [
        (TUCKER, nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 1), (1, 4, 5, 5)),
        (TUCKER, nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 3), (1, 4, 3, 3)),
        (SVD, nn.Conv2d(4, 6, 1, stride=2), (2,), (1, 4, 5, 5)),
        (SVD, nn.Linear(5, 4), (2,), (3, 5)),
    ],
    ids=["tucker", "tucker-transposed", "svd-1x1", "svd-linear"],
)
def test_gradients_reach_input_and_every_factor(method, dense, ranks, shape):
    small = factorized(method, dense.double(), ranks)
    parameters = dict(small.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(small, dict(zip(parameters, values, strict=True)), (x,))

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_flags_and_frozen_parameters_are_kept(dtype):
    dense = nn.Conv2d(8, 12, 3).to(dtype).eval()
    dense.weight.requires_grad_(False)
    small = factorized(TUCKER, dense, (4, 3))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert not small.training
    assert not any(module.training for module in small.modules())
    assert {n: p.requires_grad for n, p in small.named_parameters()} == {
        "reduce.weight": False,
        "core.weight": False,
        "expand.weight": False,
        "expand.bias": True,
    }
    assert dense.bias.data_ptr() != small.bias.data_ptr()
    torch.testing.assert_close(dense.bias, small.bias)


def test_channels_last_is_kept():
    dense = nn.Conv2d(8, 12, 3).to(memory_format=torch.channels_last)
    small = factorized(TUCKER, dense, (4, 3))
    assert small.core.weight.is_contiguous(memory_format=torch.channels_last)
    assert not small.core.weight.is_contiguous()
    assert type(small).like(dense, (4, 3)).core.weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 9, 7).to(memory_format=torch.channels_last)
    assert small(x).is_contiguous(memory_format=torch.channels_last)
    assert small(x.transpose(2, 3)).shape == (2, 12, 5, 7)


def test_attributes_that_code_around_a_layer_reads():
    dense = nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
    small = factorized(TUCKER, dense, (3, 2))
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(small, name) == getattr(dense, name)
    linear = factorized(SVD, nn.Linear(9, 7), (2,))
    assert (linear.in_features, linear.out_features) == (9, 7)
    assert linear.weight.shape == (7, 9)


def test_state_dict_round_trip_and_load_into_a_fresh_structure():
    dense = nn.Conv2d(8, 12, 3)
    small = factorized(TUCKER, dense, (4, 3))
    fresh = type(small).like(nn.Conv2d(8, 12, 3), (4, 3))
    fresh.load_state_dict(small.state_dict())
    x = torch.randn(2, 8, 9, 9)
    assert torch.equal(fresh(x), small(x))


@pytest.mark.parametrize(
    ("method", "dense", "ranks", "shape"),
    [(TUCKER, nn.Conv2d(8, 12, 3), (4, 3), (2, 8, 9, 9)), (SVD, nn.Linear(8, 12), (4,), (2, 8))],
)
def test_exports_to_a_graph_of_ordinary_layers(method, dense, ranks, shape):
    small = factorized(method, dense, ranks).eval()
    x = torch.randn(shape)
    exported = torch.export.export(small, (x,))
    torch.testing.assert_close(exported.module()(x), small(x))


def test_factors_that_do_not_fit_are_an_error():
    core, factors = TUCKER.factors(group_kernels(nn.Conv2d(8, 12, 3)), (4, 3))
    with pytest.raises(ValueError, match=r"TuckerConv.reduce.*\(3, 8, 1, 1\)"):
        TUCKER.layers[nn.Conv2d].from_factors(nn.Conv2d(9, 12, 3), (core, factors))


def test_top_level_import_of_the_folder_is_refused(monkeypatch):
    import importlib.util
    from pathlib import Path

    import decomp.layers

    file = Path(decomp.layers.__file__)
    spec = importlib.util.spec_from_file_location("layers", file)
    with pytest.raises(ImportError, match=r"decomp\.layers"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

"""Layers and options that the conformance suite and the property test go over."""

from itertools import product

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from decomp.layers import group_kernels, join_kernels
from decomp.layers.kernels import is_input_first
from decomp.methods import METHODS

PLAIN = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
TRANSPOSED = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
KINDS = PLAIN | TRANSPOSED
SIZES = (9, 8, 7)
SPATIAL = [name for name in METHODS if not METHODS[name].why_not(nn.Conv2d(8, 12, 3))]
MATRIX = [name for name in METHODS if not METHODS[name].why_not(nn.Linear(8, 12))]


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


def cases(kind):
    """Every layer of a kind in float64, with an input."""
    dimensions = KINDS[kind]
    for option in options(dimensions, kind in TRANSPOSED):
        kernel = (3, 2, 3)[:dimensions] if option["padding_mode"] == "zeros" else (3, 3, 2)[:dimensions]
        extra = {"output_padding": 1} if kind in TRANSPOSED and option["stride"] == 2 else {}
        dense = kind(8, 12, kernel, **option, **extra, dtype=torch.float64)
        yield dense, torch.randn(2, 8, *SIZES[:dimensions], dtype=torch.float64)


def matrices(dtype=torch.float64):
    """Linear layers with 8 inputs and 12 outputs, of torch and of Hugging Face."""
    turned = Conv1D(12, 8)
    nn.init.normal_(turned.bias)
    return [layer.to(dtype) for layer in (nn.Linear(8, 12), nn.Linear(8, 12, bias=False), turned)]


def takes(name, kind):
    """Whether a method is for the kernels of ``cases(kind)``."""
    return not METHODS[name].why_not(kind(8, 12, (3,) * KINDS[kind]))


def factorized(name, dense, ranks):
    """Decompose ``dense`` at these ranks."""
    method = METHODS[name]
    return method.layer_of(dense).from_factors(dense, method.factors(group_kernels(dense).detach(), ranks))


def small_ranks(name, dense):
    """Ranks well below the limits, different from each other where there are several."""
    limits = METHODS[name].limits(group_kernels(dense))
    return tuple(max(1, min(limit - 1, 3 - place)) for place, limit in enumerate(limits))


def with_weight(dense, kernels):
    """Give ``dense`` other kernels (groups, T, S, ...)."""
    dense.weight.data = join_kernels(kernels, input_first=is_input_first(dense)).contiguous()
    return dense

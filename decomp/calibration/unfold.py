"""Patches of a convolution's input as rows of a matrix (im2col), for every spatial option."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from decomp.layers import join_kernels
from decomp.layers.kernels import is_input_first, spatial_like


def patches_like(dense: Any) -> nn.Module | None:
    """A convolution with unit kernels that returns the patches which ``dense`` multiplies by its kernel.

    None where the patches are the input itself. Output channels are (input channel, position in the kernel), in
    the order of ``group_kernels(dense).flatten(2)``.
    """
    kernel_size = getattr(dense, "kernel_size", ())
    neutral = {"stride": 1, "padding": 0, "output_padding": 0}
    plain = all(set(getattr(dense, name, ())) <= {value} for name, value in neutral.items())
    if set(kernel_size) <= {1} and plain:
        return None
    taps = math.prod(kernel_size)
    channels = dense.in_channels
    # By way of the meta device: to initialize a convolution would draw random numbers, which are the caller's.
    empty: Any = spatial_like(dense, channels, channels * taps, bias=False, device="meta", groups=channels)
    patches: Any = empty.to_empty(device=dense.weight.device)
    units = torch.eye(taps, dtype=dense.weight.dtype, device=dense.weight.device).reshape(taps, 1, *kernel_size)
    with torch.no_grad():
        kernels = units.expand(channels, *units.shape)
        patches.weight.copy_(join_kernels(kernels, input_first=is_input_first(dense)))
    return patches  # type: ignore[no-any-return]


def rows_of(tensor: Tensor, axes: int, groups: int) -> Tensor:
    """(batch, channels, *positions), or (..., channels), to (groups, rows, channels of a group) in float64."""
    channels = tensor.dim() - axes - 1
    rows = tensor.movedim(channels, -1).reshape(-1, groups, tensor.shape[channels] // groups)
    return rows.transpose(0, 1).to(torch.float64)

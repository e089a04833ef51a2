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
    patches: Any = spatial_like(
        dense, channels, channels * taps, bias=False, device=dense.weight.device, groups=channels
    )
    units = torch.eye(taps, dtype=dense.weight.dtype, device=dense.weight.device).reshape(taps, 1, *kernel_size)
    with torch.no_grad():
        kernels = units.expand(channels, *units.shape)
        patches.weight.copy_(join_kernels(kernels, input_first=is_input_first(dense)))
    return patches  # type: ignore[no-any-return]


def rows_of_experts(rows: Tensor, experts: Tensor, count: int) -> Tensor:
    """Rows (N, channels) to (count, most, channels) in float64: those of each expert, then zeros.

    >>> rows_of_experts(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 0, 2]), 3)[:, :, 0].tolist()
    [[2.0, 0.0], [0.0, 0.0], [1.0, 3.0]]
    """
    ordered, order = experts.sort(stable=True)
    counts = torch.bincount(experts, minlength=count)
    places = torch.arange(len(ordered), device=ordered.device) - (counts.cumsum(0) - counts)[ordered]
    padded = torch.zeros((count, int(counts.max()), rows.shape[1]), dtype=torch.float64, device=rows.device)
    padded[ordered, places] = rows[order].to(torch.float64)
    return padded


def rows_of(tensor: Tensor, axes: int, groups: int) -> Tensor:
    """(batch, channels, *positions), or (..., channels), to (groups, rows, channels of a group) in float64."""
    channels = tensor.dim() - axes - 1
    rows = tensor.movedim(channels, -1).reshape(-1, groups, tensor.shape[channels] // groups)
    return rows.transpose(0, 1).to(torch.float64)

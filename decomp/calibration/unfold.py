"""Rows of channels, and patches of a convolution's input as rows (im2col), for every spatial option."""

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
    patches = _uninitialized(dense, channels, channels * taps, groups=channels).to_empty(
        device=dense.weight.device
    )
    units = torch.eye(taps, dtype=dense.weight.dtype, device=dense.weight.device).reshape(taps, 1, *kernel_size)
    with torch.no_grad():
        kernels = units.expand(channels, *units.shape)
        patches.weight.copy_(join_kernels(kernels, input_first=is_input_first(dense)))
    return patches  # type: ignore[no-any-return]


def _uninitialized(dense: Any, inputs: int, outputs: int, groups: int) -> Any:
    """A convolution like ``dense`` on the meta device: no random numbers are drawn for its weight."""
    return spatial_like(dense, inputs, outputs, bias=False, device="meta", groups=groups)


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


def count_rows(tensor: Tensor, axes: int) -> int:
    """The number of rows of :func:`some_rows`."""
    return tensor.numel() // max(1, tensor.shape[tensor.dim() - axes - 1])


def some_rows(tensor: Tensor, axes: int, groups: int, indices: Tensor | None) -> Tensor:
    """(batch, channels, *positions), or (..., channels), to rows (groups, rows, channels of a group).

    Those with these indices, None for all, in the dtype that they are multiplied in.
    """
    if indices is None:
        rows = _flat(_channels_last(tensor, axes))
    elif axes > 0:
        positions = tensor.reshape(-1, *tensor.shape[-axes - 1 :]).flatten(2)
        image, place = _split(indices.to(tensor.device), positions.shape[2])
        rows = positions[image, :, place]
    else:
        rows = tensor.reshape(-1, tensor.shape[-1])[indices.to(tensor.device)]
    return _grouped(rows, groups).to(product_dtype(tensor))


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which rows of a tensor are multiplied; the products are summed in float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _channels_last(tensor: Tensor, axes: int) -> Tensor:
    return tensor.movedim(tensor.dim() - axes - 1, -1)


def _flat(tensor: Tensor) -> Tensor:
    flat: Tensor = tensor.reshape(-1, tensor.shape[-1])
    return flat


def _grouped(rows: Tensor, groups: int) -> Tensor:
    grouped: Tensor = rows.unflatten(-1, (groups, -1)).transpose(0, 1)
    return grouped


def _split(indices: Tensor, length: int) -> tuple[Tensor, Tensor]:
    return indices // length, indices % length


class Patches:
    """Rows of patches at chosen output positions, without unfolding the others.

    The convolution with unit kernels of :func:`patches_like`, applied to one image that holds the number of each
    input position, says which input positions a patch reads; so every option of the layer is taken into account.
    """

    def __init__(self, dense: Any) -> None:
        self._unfold = patches_like(dense)
        self._axes, self._groups = len(dense.kernel_size), dense.groups
        taps = math.prod(dense.kernel_size)
        self._number: Any = _uninitialized(dense, 1, taps, groups=1).to_empty(device="cpu").double()
        units = torch.eye(taps, dtype=torch.float64, device="cpu").reshape(1, taps, 1, *dense.kernel_size)
        with torch.no_grad():
            self._number.weight.copy_(join_kernels(units, input_first=is_input_first(dense)))
        self._read: tuple[tuple[int, ...], Tensor] = ((), torch.empty(0, device="cpu"))

    def positions_read(self, size: tuple[int, ...]) -> Tensor:
        """(taps, output positions): one plus the index of the input position, 0 where the patch reads padding."""
        if self._read[0] != size:
            numbers = torch.arange(1, math.prod(size) + 1, dtype=torch.float64, device="cpu").reshape(1, 1, *size)
            with torch.no_grad():
                self._read = size, self._number(numbers)[0].flatten(1).to(torch.int32)
        return self._read[1]

    def count(self, received: Tensor) -> int:
        """The number of patches of a batch of inputs (batch, channels, *positions)."""
        return len(received) * self.positions_read(tuple(received.shape[2:])).shape[1]

    def rows(self, received: Tensor, indices: Tensor | None) -> Tensor:
        """Rows (groups, rows, channels x taps of a group) of the patches with these indices, None for all."""
        dtype = product_dtype(received)
        if indices is None:
            patches = received if self._unfold is None else self._unfold(received)
            return _grouped(_flat(_channels_last(patches, self._axes)), self._groups).to(dtype)
        read = self.positions_read(tuple(received.shape[2:]))
        image, place = _split(indices, read.shape[1])
        source = read[:, place].T.long().to(received.device)  # (rows, taps)
        values = received.flatten(2)[image.to(received.device)[:, None], :, (source - 1).clamp(min=0)]
        values = torch.where(source[:, :, None] > 0, values, 0)  # (rows, taps, channels)
        return _grouped(values.transpose(1, 2).flatten(1), self._groups).to(dtype)

"""Tensors as rows of channels, written without the library: what tests compare it with."""

import torch


def rows_of(tensor, axes, groups):
    """(batch, channels, *positions), or (..., channels), to (groups, rows, channels of a group) in float64."""
    last = tensor.movedim(tensor.dim() - axes - 1, -1)
    return last.reshape(-1, groups, last.shape[-1] // groups).transpose(0, 1).to(torch.float64)


def target_of(norm_shift, output):
    """The targets of an output (batch, channels, *positions) before a BatchNorm."""
    rows = output.movedim(1, -1)
    return norm_shift.target_rows(rows.flatten(0, -2)[None]).reshape(rows.shape).movedim(-1, 1)

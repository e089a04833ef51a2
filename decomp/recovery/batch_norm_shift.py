"""Targets for a layer whose BatchNorm has other parameters or statistics than the one after the dense layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decomp.data.batches import Batches
from decomp.network.forward import norm_scale
from decomp.network.tracing import following_norms


class BatchNormShift:
    """The outputs t of a layer for which BN(t) = BN_dense(y), with y the output of the dense layer.

    t = (s_d (y - mean_d) + beta_d - beta) / s + mean with s = gamma / sqrt(var + eps), channel by channel. t =
    y where both BatchNorms are equal, and in channels with gamma = 0. The BatchNorm can also stand in for the
    bias of a layer without one: :meth:`absorb`. ``scale`` is |s|: errors of t count with it after the BatchNorm.
    """

    def __init__(self, norm: Any, norm_of_dense: Any) -> None:
        self._mean = norm.running_mean
        scale, beta = _affine(norm)
        scale_of_dense, beta_of_dense = _affine(norm_of_dense)
        self.scale = scale.abs()
        self._original_mean = self._mean.detach().to(torch.float64).clone()
        is_constant = scale == 0
        ratio = scale_of_dense / torch.where(is_constant, 1.0, scale)
        offset = (beta_of_dense - beta) / torch.where(is_constant, 1.0, scale)
        offset = offset + self._original_mean - ratio * norm_of_dense.running_mean.to(torch.float64)
        self._ratio, self._offset = torch.where(is_constant, 1.0, ratio), torch.where(is_constant, 0.0, offset)

    def target_rows(self, rows: Tensor) -> Tensor:
        """The targets of rows (groups, n, channels) of an output of the dense layer."""
        shape = (len(rows), 1, -1)
        return rows.to(torch.float64) * self._ratio.reshape(shape) + self._offset.reshape(shape)

    def absorb(self, bias: Tensor) -> None:
        """Set the running mean to its original value minus ``bias``, which adds the bias to the layer's output."""
        self._mean.copy_(self._original_mean - bias.flatten())


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    scale = norm_scale(norm.running_var, norm.eps, norm.weight)
    return scale, torch.zeros_like(scale) if norm.bias is None else norm.bias.detach().to(torch.float64)


def batch_norm_shifts(
    small: nn.Module, dense: nn.Module, batches: Batches, pairs: Mapping[str, tuple[nn.Module, nn.Module]]
) -> dict[str, "BatchNormShift"]:
    """The shift of each layer that the same BatchNorm follows in both networks, as seen on the first batch."""
    first = next(iter(batches))
    small_norms, dense_norms = (
        following_norms(model, first, {name: pair[which] for name, pair in pairs.items()})
        for which, model in enumerate((small, dense))
    )
    return {
        name: BatchNormShift(small.get_submodule(norm), dense.get_submodule(norm))
        for name, norm in small_norms.items()
        if dense_norms.get(name) == norm
    }

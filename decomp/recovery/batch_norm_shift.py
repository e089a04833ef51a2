"""What the BatchNorm behind a layer has to get, where it has moved since it stood behind the dense one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decomp.data.batches import Batches
from decomp.network.forward import slope_of_norm
from decomp.network.tracing import norms_behind


class Frame:
    """Outputs t of a layer that its BatchNorm turns into what the dense one makes of y: BN(t) = BN_dense(y).

    t = (s_d (y - mean_d) + beta_d - beta) / s + mean with s = gamma / sqrt(var + eps), channel by channel; t = y
    where the BatchNorm has not moved, and in channels that it sets to a constant. A layer without a bias can have
    one there: ``take``.
    """

    def __init__(self, norm: Any, norm_of_dense: Any) -> None:
        self._mean = norm.running_mean
        scale, beta = _affine(norm)
        scale_of_dense, beta_of_dense = _affine(norm_of_dense)
        self._start = self._mean.detach().to(torch.float64).clone()
        dead = scale == 0
        ratio = scale_of_dense / torch.where(dead, 1.0, scale)
        offset = (beta_of_dense - beta) / torch.where(dead, 1.0, scale)
        offset = offset + self._start - ratio * norm_of_dense.running_mean.to(torch.float64)
        self._ratio, self._offset = torch.where(dead, 1.0, ratio), torch.where(dead, 0.0, offset)

    def target(self, output: Tensor) -> Tensor:
        """What the layer has to give for an output of the dense one, channels on axis 1."""
        shape = (-1, *(1,) * (output.dim() - 2))
        return output.to(torch.float64) * self._ratio.reshape(shape) + self._offset.reshape(shape)

    def take(self, bias: Tensor) -> None:
        """Let the norm add a bias to what the layer gives, counted from where the norm was."""
        self._mean.copy_(self._start - bias.flatten())


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    scale = slope_of_norm(norm.running_var, norm.eps, norm.weight)
    return scale, torch.zeros_like(scale) if norm.bias is None else norm.bias.detach().to(torch.float64)


def frames_of(
    small: nn.Module, dense: nn.Module, batches: Batches, pairs: Mapping[str, tuple[nn.Module, nn.Module]]
) -> dict[str, "Frame"]:
    """The frames of the layers that feed the same BatchNorm in both networks, as the first batch shows."""
    first = next(iter(batches))
    ours, theirs = (
        norms_behind(model, first, {name: pair[which] for name, pair in pairs.items()})
        for which, model in enumerate((small, dense))
    )
    return {
        name: Frame(small.get_submodule(norm), dense.get_submodule(norm))
        for name, norm in ours.items()
        if theirs.get(name) == norm
    }

"""Three factors for a convolution: 1x1 in, a small spatial core, 1x1 out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decomp.layers.factorized import Factorized
from decomp.layers.kernels import ConvNd, group_kernels, pointwise_like, spatial_like


class TuckerConv(Factorized):
    """``1x1 (S -> R3)``, ``k x k (R3 -> R4)`` with every spatial option, ``1x1 (R4 -> T)`` with the bias.

    K[t, s, i, j] = sum_{a, b} U[t, a] C[a, b, i, j] V[s, b], ranks (R4, R3) = (out, in) per group. A rank
    equal to its mode means that there is no 1x1 convolution on that side (Tucker-1).

    Factors are what TensorLy's ``partial_tucker`` over the modes (0, 1) returns: ``(core, [U, V])``; with a
    leading axis of groups on each for a grouped convolution.

    Source: Kim et al. 2016 (Compression of deep convolutional neural networks), section 3.1.

    >>> conv = nn.Conv2d(64, 128, 3, stride=2, padding=1)
    >>> layer = TuckerConv.like(conv, (32, 16))
    >>> [(role, tuple(factor.weight.shape)) for role, factor in layer.named_children()]
    [('reduce', (16, 64, 1, 1)), ('core', (32, 16, 3, 3)), ('expand', (128, 32, 1, 1))]
    """

    method = "tucker"
    core: nn.Module

    def build(self, dense: ConvNd, device: Any) -> None:
        groups, has_bias = dense.groups, dense.bias is not None
        rank_out, rank_in = self.ranks[0] * groups, self.ranks[1] * groups
        expands = rank_out < dense.out_channels
        if rank_in < dense.in_channels:
            self.reduce = pointwise_like(dense, dense.in_channels, rank_in, bias=False, device=device)
        self.core = spatial_like(dense, rank_in, rank_out, bias=has_bias and not expands, device=device)
        if expands:
            self.expand = pointwise_like(dense, rank_out, dense.out_channels, bias=has_bias, device=device)

    @classmethod
    def factor_kernels(cls, dense: nn.Module, factors: Any) -> Mapping[str, Tensor]:
        core, (left, right) = factors
        if core.dim() == group_kernels(dense).dim() - 1:
            core, left, right = core[None], left[None], right[None]
        if left.shape[-1] == left.shape[-2]:
            core, left = torch.einsum("gta,gab...->gtb...", left, core), None
        if right.shape[-1] == right.shape[-2]:
            core, right = torch.einsum("gab...,gsb->gas...", core, right), None
        kernels = {} if right is None else {"reduce": right.mT}
        kernels["core"] = core
        return kernels if left is None else kernels | {"expand": left}

    @classmethod
    def refittable(cls, kernels: Mapping[str, Tensor]) -> tuple[str, ...]:
        return ("core", "expand") if {"reduce", "expand"} <= set(kernels) else super().refittable(kernels)

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (kernels["core"].shape[1], kernels["core"].shape[2])

    def dense_kernels(self) -> Tensor:
        kernels = group_kernels(self.core)
        if hasattr(self, "expand"):
            kernels = torch.einsum("gta,gab...->gtb...", group_kernels(self.expand).flatten(2), kernels)
        if hasattr(self, "reduce"):
            kernels = torch.einsum("gab...,gbs->gas...", kernels, group_kernels(self.reduce).flatten(2))
        return kernels

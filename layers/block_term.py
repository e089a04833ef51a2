"""Block-term decomposition of a convolution kernel: 1x1, grouped k x k, 1x1."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decomp.layers.factorized import Factorized
from decomp.layers.kernels import ConvNd, group_kernels, pointwise_like, spatial_like


class BlockTermConv(Factorized):
    """``1x1 (S -> G R3)``, ``k x k`` in G groups with every spatial option, ``1x1 (G R4 -> T)`` with the bias.

    K[t, s, i, j] = sum_{g, a, b} U_g[t, a] C_g[a, b, i, j] V_g[s, b], ranks (G, R4, R3): blocks, out and in of
    each block, per group of the dense layer. Params G (S R3 + k^2 R3 R4 + T R4) per group.

    Factors are (U, C, V) of shapes (groups, G, T, R4), (groups, G, R4, R3, *kernel) and (groups, G, S, R3).

    Source: De Lathauwer 2008 (Decompositions of a higher-order tensor in block terms, part II).

    >>> layer = BlockTermConv.like(nn.Conv2d(64, 128, 3, stride=2), (4, 8, 6))
    >>> [(role, tuple(factor.weight.shape)) for role, factor in layer.named_children()]
    [('reduce', (24, 64, 1, 1)), ('core', (32, 6, 3, 3)), ('expand', (128, 32, 1, 1))]
    """

    method = "block_term"
    reduce: nn.Module
    core: nn.Module
    expand: nn.Module

    def build(self, dense: ConvNd, device: Any) -> None:
        blocks, rank_out, rank_in = self.ranks
        groups = dense.groups * blocks
        inside, out = groups * rank_in, groups * rank_out
        self.reduce = pointwise_like(dense, dense.in_channels, inside, bias=False, device=device)
        self.core = spatial_like(dense, inside, out, bias=False, device=device, groups=groups)
        self.expand = pointwise_like(dense, out, dense.out_channels, bias=dense.bias is not None, device=device)

    @classmethod
    def factor_kernels(cls, dense: nn.Module, factors: Any) -> Mapping[str, Tensor]:
        left, core, right = factors
        return {
            "reduce": right.transpose(2, 3).flatten(1, 2),
            "core": core.flatten(0, 1),
            "expand": left.transpose(1, 2).flatten(2, 3),
        }

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        core = kernels["core"]
        return (core.shape[0] // kernels["reduce"].shape[0], core.shape[1], core.shape[2])

    def dense_kernels(self) -> Tensor:
        blocks, rank_out, rank_in = self.ranks
        left = group_kernels(self.expand).flatten(2).unflatten(2, (blocks, rank_out))
        core = group_kernels(self.core).unflatten(0, (-1, blocks))
        right = group_kernels(self.reduce).flatten(2).unflatten(1, (blocks, rank_in))
        return torch.einsum("gtna,gnab...,gnbs->gts...", left, core, right)

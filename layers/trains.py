"""Chains of convolutions along one spatial axis each: tensor train, asymmetric 3D, spatial SVD."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decomp.layers.factorized import Factorized
from decomp.layers.kernels import (
    ConvNd,
    group_kernels,
    pointwise_like,
    spatial_like,
    spatial_steps,
    step_sizes,
)


class TensorTrainConv(Factorized):
    """``1x1 (S -> r1)``, ``k x 1 (r1 -> r2)``, ``1 x k (r2 -> r3)``, ``1x1 (r3 -> T)`` with the bias.

    K[t, s, i, j] = sum_{a, b, c} G1[a, s] G2[b, a, i] G3[c, b, j] G4[t, c]: a tensor train over the modes
    (S, kh, kw, T), ranks (r1, r2, r3) per group. Each axis keeps its own stride, padding and dilation. A rank r1
    or r3 equal to its mode means that there is no 1x1 convolution on that side.

    Factors are (G1, G2, G3, G4) in these index orders, each with a leading axis of groups; G1 and G4 are None
    where there is no 1x1. Source: Oseledets 2011 (Tensor-train decomposition).

    >>> layer = TensorTrainConv.like(nn.Conv2d(64, 128, 3, stride=(2, 1)), (16, 24, 32))
    >>> for role, factor in layer.named_children():
    ...     print(role, tuple(factor.weight.shape))
    reduce (16, 64, 1, 1)
    first (24, 16, 3, 1)
    second (32, 24, 1, 3)
    expand (128, 32, 1, 1)
    """

    method = "tensor_train"
    first: nn.Module
    second: nn.Module

    def train_ranks(self, dense: ConvNd) -> tuple[int, int, int]:
        """The ranks (r1, r2, r3) of the train, per group."""
        first, middle, last = self.ranks
        return first, middle, last

    def build(self, dense: ConvNd, device: Any) -> None:
        inside, middle, out = (rank * dense.groups for rank in self.train_ranks(dense))
        has_bias, expands = dense.bias is not None, out < dense.out_channels
        steps = spatial_steps(dense.kernel_size)
        if inside < dense.in_channels:
            self.reduce = pointwise_like(dense, dense.in_channels, inside, bias=False, device=device)
        self.first = spatial_like(dense, inside, middle, bias=False, device=device, axes=steps[0])
        self.second = spatial_like(dense, middle, out, bias=has_bias and not expands, device=device, axes=steps[1])
        if expands:
            self.expand = pointwise_like(dense, out, dense.out_channels, bias=has_bias, device=device)

    @classmethod
    def factor_kernels(cls, dense: Any, factors: Any) -> Mapping[str, Tensor]:
        reduce, first, second, expand = factors
        before, after = step_sizes(dense.kernel_size, spatial_steps(dense.kernel_size))
        kernels = {} if reduce is None else {"reduce": reduce}
        kernels |= {"first": first.unflatten(-1, before), "second": second.unflatten(-1, after)}
        if expand is not None:
            kernels["expand"] = expand
        return kernels

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (kernels["first"].shape[2], kernels["first"].shape[1], kernels["second"].shape[1])

    def dense_kernels(self) -> Tensor:
        first, second = group_kernels(self.first), group_kernels(self.second)
        kernels = torch.einsum("gtaj,gasi->gtsij", second.flatten(3), first.flatten(3))
        # Along each axis one of the two has length 1.
        axes = [first.shape[axis] * second.shape[axis] for axis in range(3, first.dim())]
        kernels = kernels.reshape(*kernels.shape[:3], *axes)
        if hasattr(self, "expand"):
            kernels = torch.einsum("gta,gas...->gts...", group_kernels(self.expand).flatten(2), kernels)
        if hasattr(self, "reduce"):
            kernels = torch.einsum("gta...,gas->gts...", kernels, group_kernels(self.reduce).flatten(2))
        return kernels


class AsymmetricConv(TensorTrainConv):
    """``k x 1 (S -> d2)``, ``1 x k (d2 -> d1)``, ``1x1 (d1 -> T)``: a tensor train whose first rank is full.

    K[t, s, i, j] = sum_{b, c} G2[b, s, i] G3[c, b, j] G4[t, c], ranks (d2, d1) per group. Source: Zhang et al.
    2016, section 3.3 ("asymmetric 3d decomposition").
    """

    method = "asymmetric"

    def train_ranks(self, dense: ConvNd) -> tuple[int, int, int]:
        return dense.in_channels // dense.groups, self.ranks[0], self.ranks[1]

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (kernels["first"].shape[1], kernels["second"].shape[1])


class SpatialSVDConv(TensorTrainConv):
    """``k x 1 (S -> r)``, then ``1 x k (r -> T)``: params r (S kh + T kw) per group.

    K[t, s, i, j] = sum_a G2[a, s, i] G3[t, a, j]: the SVD of the (S kh) x (T kw) unfolding. Source: Jaderberg et
    al. 2014, scheme 2.
    """

    method = "svd_spatial"

    def train_ranks(self, dense: ConvNd) -> tuple[int, int, int]:
        return dense.in_channels // dense.groups, self.ranks[0], dense.out_channels // dense.groups

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (kernels["first"].shape[1],)

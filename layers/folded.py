"""Two factors for a convolution kernel that is folded to a matrix: one k x k and one 1x1 convolution."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from decomp.layers.factorized import Factorized
from decomp.layers.kernels import ConvNd, group_kernels, pointwise_like, spatial_like


class ChannelSVDConv(Factorized):
    """``k x k (S -> r)`` with every spatial option, then ``1x1 (r -> T)``: params r (S k^2 + T) per group.

    K[t, s, i, j] = sum_a U[t, a] C[a, s, i, j]: the SVD of the T x (S k^2) unfolding. Factors are (U, C), with a
    leading axis of groups. Source: Zhang et al. 2016, section 3.1; Denton et al. 2014, section 3.2.

    >>> layer = ChannelSVDConv.like(nn.Conv2d(64, 128, 3, stride=2), (16,))
    >>> [(role, tuple(factor.weight.shape)) for role, factor in layer.named_children()]
    [('core', (16, 64, 3, 3)), ('expand', (128, 16, 1, 1))]
    """

    method = "svd_channel"
    core: nn.Module
    expand: nn.Module

    def build(self, dense: ConvNd, device: Any) -> None:
        middle = self.ranks[0] * dense.groups
        self.core = spatial_like(dense, dense.in_channels, middle, bias=False, device=device)
        self.expand = pointwise_like(dense, middle, dense.out_channels, bias=dense.bias is not None, device=device)

    @classmethod
    def factor_kernels(cls, dense: nn.Module, factors: Any) -> Mapping[str, Tensor]:
        expand, core = factors
        return {"core": core, "expand": expand}

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (kernels["core"].shape[1],)

    def dense_kernels(self) -> Tensor:
        core, expand = group_kernels(self.core), group_kernels(self.expand).flatten(2)
        kernels: Tensor = (expand @ core.flatten(2)).unflatten(2, core.shape[2:])
        return kernels


class InputSVDConv(Factorized):
    """``1x1 (S -> r)``, then ``k x k (r -> T)`` with every spatial option: params r (S + T k^2) per group.

    K[t, s, i, j] = sum_a C[t, a, i, j] V[s, a]: the SVD of the S x (T k^2) unfolding. Factors are (C, V), with a
    leading axis of groups. Source: Liebenwein et al. 2021 (ALDS), scheme 3.

    >>> layer = InputSVDConv.like(nn.Conv2d(64, 128, 3, stride=2), (16,))
    >>> [(role, tuple(factor.weight.shape)) for role, factor in layer.named_children()]
    [('reduce', (16, 64, 1, 1)), ('core', (128, 16, 3, 3))]
    """

    method = "svd_input"
    reduce: nn.Module
    core: nn.Module

    def build(self, dense: ConvNd, device: Any) -> None:
        middle = self.ranks[0] * dense.groups
        self.reduce = pointwise_like(dense, dense.in_channels, middle, bias=False, device=device)
        self.core = spatial_like(dense, middle, dense.out_channels, bias=dense.bias is not None, device=device)

    @classmethod
    def factor_kernels(cls, dense: nn.Module, factors: Any) -> Mapping[str, Tensor]:
        core, right = factors
        return {"reduce": right.mT, "core": core}

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (kernels["core"].shape[2],)

    def dense_kernels(self) -> Tensor:
        core, reduce = group_kernels(self.core), group_kernels(self.reduce).flatten(2)
        kernels = core.flatten(3).transpose(2, 3) @ reduce[:, None]
        unfolded: Tensor = kernels.transpose(2, 3).unflatten(3, core.shape[3:])
        return unfolded

"""CP of a convolution kernel: 1x1, depthwise convolutions over the spatial axes, 1x1."""

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


class CPConv(Factorized):
    """``1x1 (S -> R)``, ``k x k`` depthwise with every spatial option, ``1x1 (R -> T)`` with the bias.

    K[t, s, i, j] = sum_r A[t, r] B[s, r] C[i, j, r]: the CP of the T x S x k^2 tensor, rank R per group.
    Params R (S + k^2 + T) per group.

    Factors are what TensorLy's ``parafac`` returns for that tensor, ``(weights, [A, B, C])``; with a leading axis
    of groups on each for a grouped convolution. Weights may be None.

    Source: Gusak et al. 2019 (MUSCO, "cp3"); Phan et al. 2020.

    >>> layer = CPConv.like(nn.Conv2d(64, 128, 3, stride=2), (32,))
    >>> [(role, tuple(factor.weight.shape)) for role, factor in layer.named_children()]
    [('reduce', (32, 64, 1, 1)), ('axis0', (32, 1, 3, 3)), ('expand', (128, 32, 1, 1))]
    """

    method = "cp"
    reduce: nn.Module
    expand: nn.Module

    @classmethod
    def steps(cls, dense: Any) -> list[tuple[int, ...]]:
        """The spatial axes of each depthwise convolution."""
        return [tuple(range(len(dense.kernel_size)))]

    def build(self, dense: ConvNd, device: Any) -> None:
        middle = self.ranks[0] * dense.groups
        self.reduce = pointwise_like(dense, dense.in_channels, middle, bias=False, device=device)
        for place, axes in enumerate(self.steps(dense)):
            depthwise = spatial_like(dense, middle, middle, bias=False, device=device, groups=middle, axes=axes)
            self.add_module(f"axis{place}", depthwise)
        self.expand = pointwise_like(dense, middle, dense.out_channels, bias=dense.bias is not None, device=device)

    @classmethod
    def factor_kernels(cls, dense: Any, factors: Any) -> Mapping[str, Tensor]:
        weights, (left, right, *spatial) = factors
        if left.dim() == 2:
            left, right, spatial = left[None], right[None], [factor[None] for factor in spatial]
        if weights is not None:
            left = left * weights.reshape(-1, 1, left.shape[-1])
        kernels = {"reduce": right.mT}
        sizes = step_sizes(dense.kernel_size, cls.steps(dense))
        for place, (size, factor) in enumerate(zip(sizes, spatial, strict=True)):
            kernels[f"axis{place}"] = factor.mT.reshape(-1, 1, 1, *size)
        return kernels | {"expand": left}

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (kernels["reduce"].shape[1],)

    def dense_kernels(self) -> Tensor:
        reduce, expand = group_kernels(self.reduce).flatten(2), group_kernels(self.expand).flatten(2)
        spatial: Any = 1
        for role, child in self.named_children():
            if role.startswith("axis"):
                spatial = spatial * group_kernels(child).flatten(0, 2)
        spatial = spatial.reshape(reduce.shape[0], reduce.shape[1], *spatial.shape[1:])
        return torch.einsum("gtr,grs,gr...->gts...", expand, reduce, spatial)


class CP4Conv(CPConv):
    """``1x1 (S -> R)``, ``k x 1`` and ``1 x k`` depthwise, ``1x1 (R -> T)``: params R (S + kh + kw + T) per group.

    K[t, s, i, j] = sum_r A[t, r] B[s, r] H[i, r] W[j, r]. Source: Lebedev et al. 2015.

    >>> layer = CP4Conv.like(nn.Conv2d(64, 128, 3, stride=(2, 1)), (32,))
    >>> tuple(layer.axis0.weight.shape), tuple(layer.axis1.weight.shape)
    ((32, 1, 3, 1), (32, 1, 1, 3))
    """

    method = "cp4"

    @classmethod
    def steps(cls, dense: Any) -> list[tuple[int, ...]]:
        return spatial_steps(dense.kernel_size)

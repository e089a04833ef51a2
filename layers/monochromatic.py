"""Filters on one colour each: 1x1 to a few colours, selection by an index buffer, depthwise k x k."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decomp.layers.factorized import Factorized
from decomp.layers.kernels import ConvNd, group_kernels, pointwise_like, spatial_like


class Channels(nn.Module):
    """Selects input channels by a buffer of indices, with repetitions."""

    index: Tensor

    def __init__(self, index: Tensor, axes: int) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.axis = -1 - axes

    def forward(self, input: Tensor) -> Tensor:
        return input.index_select(self.axis, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.index)} channels"


class MonochromaticConv(Factorized):
    """``1x1 (S -> C)``, the colour of each filter by an index, then ``k x k`` depthwise with T filters.

    K[t, s] = c[q(t), s] F[t]: every filter is a colour, shared by its cluster, times a spatial filter. Rank C is
    the number of colours per group. Params C S + T k^2 per group.

    Factors are (c, q, F) of shapes (groups, C, S), (groups, T) with integers below C, and (groups, T, *kernel).

    Source: Denton et al. 2014, section 3.1.1 (monochromatic convolution approximation).

    >>> layer = MonochromaticConv.like(nn.Conv2d(3, 96, 11, stride=4), (6,))
    >>> [role for role, _ in layer.named_children()], layer.filters.groups
    (['reduce', 'colour', 'filters'], 96)
    """

    method = "monochromatic"
    absorbs_outputs = "diagonal"
    reduce: nn.Module
    colour: Channels
    filters: nn.Module

    def build(self, dense: ConvNd, device: Any) -> None:
        (colours,) = self.ranks
        outputs, groups = dense.out_channels, dense.groups
        self.reduce = pointwise_like(dense, dense.in_channels, colours * groups, bias=False, device=device)
        spread = torch.arange(outputs, device=device) * (colours * groups) // outputs
        self.colour = Channels(spread, len(dense.kernel_size))
        self.filters = spatial_like(
            dense, outputs, outputs, bias=dense.bias is not None, device=device, groups=outputs
        )

    @classmethod
    def factor_kernels(cls, dense: nn.Module, factors: Any) -> Mapping[str, Tensor]:
        colours, cluster, filters = factors
        first = torch.arange(len(colours), device=cluster.device)[:, None] * colours.shape[1]
        return {
            "reduce": colours,
            "colour": (cluster + first).flatten(),
            "filters": filters.flatten(0, 1)[:, None, None],
        }

    def fill(self, child: Any, kernel: Tensor | None, dense: Any, where: str) -> None:
        if isinstance(child, Channels) and kernel is not None:
            child.index = kernel.to(dense.weight.device, copy=True)
        else:
            super().fill(child, kernel, dense, where)

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (kernels["reduce"].shape[1],)

    def dense_kernels(self) -> Tensor:
        colours = group_kernels(self.reduce).flatten(2)
        chosen = colours.flatten(0, 1)[self.colour.index].unflatten(0, (len(colours), -1))
        filters = group_kernels(self.filters).flatten(0, 2).unflatten(0, (len(colours), -1))
        return torch.einsum("gts,gt...->gts...", chosen, filters)

"""Few filters per input or output channel: depthwise convolutions and one 1x1 convolution."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from decomp.layers.factorized import Factorized, run_factor
from decomp.layers.kernels import (
    ConvNd,
    group_kernels,
    pointwise_like,
    spatial_like,
    spatial_steps,
    step_sizes,
)


class _Filters(Factorized):
    """m filters per channel, whole (one step) or as a product of filters along each axis (``split``)."""

    split: ClassVar[bool] = False

    @classmethod
    def steps(cls, dense: Any) -> list[tuple[int, ...]]:
        """The spatial axes of each depthwise convolution."""
        return spatial_steps(dense.kernel_size) if cls.split else [tuple(range(len(dense.kernel_size)))]

    @classmethod
    def lengths(cls, dense: Any) -> list[tuple[int, ...]]:
        """The kernel size of each step."""
        return step_sizes(dense.kernel_size, cls.steps(dense))

    def filters(self) -> Tensor:
        """The m filters of every channel: (channels, m, *kernel)."""
        product: Any = 1
        for role, child in self.named_children():
            if role.startswith("axis"):
                kernel = group_kernels(child)
                product = product * kernel.reshape(-1, self.ranks[0], *kernel.shape[3:])
        return product  # type: ignore[no-any-return]


class _FiltersFirst(_Filters):
    """Filters on each input channel, then one 1x1 convolution: factors (A, filters of each step)."""

    absorbs_inputs = "diagonal"

    @classmethod
    def factor_kernels(cls, dense: Any, factors: Any) -> Mapping[str, Tensor]:
        expand, *spatial = factors
        kernels = {}
        for place, (lengths, factor) in enumerate(zip(cls.lengths(dense), spatial, strict=True)):
            several = (1, 1) if place else (expand.shape[-1], 1)
            kernels[f"axis{place}"] = factor.reshape(-1, *several, *lengths)
        return kernels | {"expand": expand.flatten(2)}

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (kernels["axis0"].shape[1],)


class DepthwisePointwiseConv(_FiltersFirst):
    """``k x k`` depthwise with m filters per input channel, then ``1x1 (S m -> T)``: params S m (k^2 + T).

    K[t, s] = sum_m A[t, s, m] F[s, m]: exact at m = min(k^2, T). Factors are (A, F) of shapes (groups, T, S, m)
    and (groups, S, m, *kernel). Source: Guo et al. 2018 (Network decoupling), section 3.

    >>> layer = DepthwisePointwiseConv.like(nn.Conv2d(64, 128, 3, stride=2), (2,))
    >>> [(role, tuple(factor.weight.shape)) for role, factor in layer.named_children()]
    [('axis0', (128, 1, 3, 3)), ('expand', (128, 128, 1, 1))]
    """

    method = "depthwise_pointwise"
    expand: nn.Module

    def build(self, dense: ConvNd, device: Any) -> None:
        width = dense.in_channels * self.ranks[0]
        for place, axes in enumerate(self.steps(dense)):
            inputs = width if place else dense.in_channels
            filters = spatial_like(dense, inputs, width, bias=False, device=device, groups=inputs, axes=axes)
            self.add_module(f"axis{place}", filters)
        self.expand = pointwise_like(dense, width, dense.out_channels, bias=dense.bias is not None, device=device)

    def dense_kernels(self) -> Tensor:
        (terms,) = self.ranks
        expand = group_kernels(self.expand).flatten(2).unflatten(2, (-1, terms))
        filters = self.filters().unflatten(0, (expand.shape[0], -1))
        return torch.einsum("gtsm,gsm...->gts...", expand, filters)


class SeparableConv(DepthwisePointwiseConv):
    """``k x 1`` and ``1 x k`` depthwise with m filters per input channel, then ``1x1 (S m -> T)``.

    K[t, s] = sum_m A[t, s, m] v[s, m] h[s, m]^T: params S m (kh + kw + T). Factors are (A, v, h) of shapes
    (groups, T, S, m), (groups, S, m, kh) and (groups, S, m, kw). Source: Jaderberg et al. 2014, scheme 1.
    """

    method = "separable_channelwise"
    split = True


class PointwiseDepthwiseConv(_Filters):
    """``1x1 (S -> T m)``, then ``k x k`` with m inputs per output channel: params T m (S + k^2).

    K[t, s] = sum_m A[t, m, s] F[t, m]: exact at m = min(k^2, S). Factors are (A, F) of shapes (groups, T, m, S)
    and (groups, T, m, *kernel). Source: Guo et al. 2018 (Network decoupling), section 3.

    >>> layer = PointwiseDepthwiseConv.like(nn.Conv2d(64, 128, 3, stride=2), (2,))
    >>> [(role, tuple(factor.weight.shape)) for role, factor in layer.named_children()]
    [('reduce', (256, 64, 1, 1)), ('axis0', (128, 2, 3, 3))]
    """

    method = "pointwise_depthwise"
    absorbs_outputs = "diagonal"
    reduce: nn.Module

    def build(self, dense: ConvNd, device: Any) -> None:
        width = dense.out_channels * self.ranks[0]
        self.reduce = pointwise_like(dense, dense.in_channels, width, bias=False, device=device)
        steps = self.steps(dense)
        for place, axes in enumerate(steps):
            last = place == len(steps) - 1
            outputs = dense.out_channels if last else width
            filters = spatial_like(
                dense,
                width,
                outputs,
                bias=last and dense.bias is not None,
                device=device,
                groups=outputs,
                axes=axes,
            )
            self.add_module(f"axis{place}", filters)

    @classmethod
    def factor_kernels(cls, dense: Any, factors: Any) -> Mapping[str, Tensor]:
        reduce, *spatial = factors
        kernels = {"reduce": reduce.flatten(1, 2)}
        for place, (lengths, factor) in enumerate(zip(cls.lengths(dense), spatial, strict=True)):
            several = (1, factor.shape[2]) if place == len(spatial) - 1 else (1, 1)
            kernels[f"axis{place}"] = factor.reshape(-1, *several, *lengths)
        return kernels

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        last = max(role for role in kernels if role.startswith("axis"))
        return (kernels[last].shape[2],)

    def dense_kernels(self) -> Tensor:
        (terms,) = self.ranks
        reduce = group_kernels(self.reduce).flatten(2).unflatten(1, (-1, terms))
        filters = self.filters().unflatten(0, (reduce.shape[0], -1))
        return torch.einsum("gtms,gtm...->gts...", reduce, filters)


class FlattenedConv(PointwiseDepthwiseConv):
    """``1x1 (S -> T m)``, ``k x 1`` depthwise, ``1 x k`` with m inputs per output channel.

    Params T m (S + kh + kw). K[t, s, i, j] = sum_m a[t, m, s] v[t, m, i] h[t, m, j]: m terms of rank 1 per
    filter. Factors are (a, v, h) of shapes (groups, T, m, S), (groups, T, m, kh) and (groups, T, m, kw).
    Source: Jin et al. 2015, for m = 1.
    """

    method = "flattened"
    split = True


class SharedBankConv(_FiltersFirst):
    """A bank of M separable filters, the same for every input channel, then ``1x1 (S M -> T)``.

    K[t, s] = sum_m A[t, s, m] v[m] h[m]^T: params T S M per group, and M (kh + kw) once. The filters are
    applied to each channel as a separate one-channel image. Factors are (A, v, h) of shapes (groups, T, S, M),
    (M, kh) and (M, kw).

    Source: Rigamonti et al. 2013 (Learning separable filters).

    >>> layer = SharedBankConv.like(nn.Conv2d(64, 128, 3, stride=2), (4,))
    >>> [(role, tuple(factor.weight.shape)) for role, factor in layer.named_children()]
    [('axis0', (4, 1, 3, 1)), ('axis1', (4, 1, 1, 3)), ('expand', (128, 256, 1, 1))]
    """

    method = "shared_bank"
    split = True
    expand: Any

    def build(self, dense: ConvNd, device: Any) -> None:
        (terms,) = self.ranks
        for place, axes in enumerate(self.steps(dense)):
            inputs = terms if place else 1
            filters = spatial_like(dense, inputs, terms, bias=False, device=device, groups=inputs, axes=axes)
            self.add_module(f"axis{place}", filters)
        width = dense.in_channels * terms
        self.expand = pointwise_like(dense, width, dense.out_channels, bias=dense.bias is not None, device=device)

    @classmethod
    def mix_inputs(cls, kernels: Mapping[str, Tensor], mixing: Tensor) -> dict[str, Tensor]:
        scale = mixing.diagonal(dim1=1, dim2=2)[:, None, :, None]
        expand = kernels["expand"].unflatten(2, (scale.shape[2], -1)) * scale
        return {**kernels, "expand": expand.flatten(2)}

    def dense_kernels(self) -> Tensor:
        expand = group_kernels(self.expand).flatten(2).unflatten(2, (-1, self.ranks[0]))
        return torch.einsum("gtsm,m...->gts...", expand, self.filters()[0])

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        axes = len(self.dense_shape) - 2
        x = input.flatten(0, -axes - 1).unsqueeze(1)
        for role, child in self.named_children():
            if role.startswith("axis"):
                x = run_factor(child, x, output_size)
        # Sizes are added, not unpacked: torch.fx traces that.
        x = x.reshape(input.shape[: -axes - 1] + (self.expand.in_channels,) + x.shape[-axes:])  # noqa: RUF005
        return self.expand(x)  # type: ignore[no-any-return]

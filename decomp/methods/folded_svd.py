"""SVD of a convolution kernel folded to matrices; one SVD gives the error at every rank."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from decomp.layers import (
    ChannelSVDConv,
    DepthwisePointwiseConv,
    Factorized,
    InputSVDConv,
    PointwiseDepthwiseConv,
    SpatialSVDConv,
)
from decomp.layers.kernels import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, step_lengths
from decomp.methods import svd
from decomp.methods.record import Analysis, Method, Ranks, needs_two_axes, spatial


class _Fold(NamedTuple):
    """Fold kernels (groups, T, S, *kernel) to matrices (batch, rows, columns), and unfold factors to a layer's."""

    matrices: Callable[[Tensor], Tensor]
    factors: Callable[[Tensor, Tensor, Tensor], Any]


def _channel(kernels: Tensor) -> Tensor:
    return kernels.flatten(2)


def _of_channel(left: Tensor, right: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    return left, right.unflatten(2, kernels.shape[2:])


def _input(kernels: Tensor) -> Tensor:
    return kernels.transpose(1, 2).flatten(2)


def _of_input(left: Tensor, right: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    return right.unflatten(2, (kernels.shape[1], *kernels.shape[3:])).transpose(1, 2), left


def _spatial(kernels: Tensor) -> Tensor:
    """Rows (S, axes of the first step), columns (T, axes of the second)."""
    first, _ = step_lengths(kernels.shape[3:])
    axes: Tensor = kernels.flatten(3).unflatten(3, (first, -1))
    return axes.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)


def _of_spatial(left: Tensor, right: Tensor, kernels: Tensor) -> tuple[None, Tensor, Tensor, None]:
    first, second = step_lengths(kernels.shape[3:])
    inside = left.unflatten(1, (-1, first)).permute(0, 3, 1, 2)
    return None, inside, right.unflatten(2, (-1, second)).transpose(1, 2), None


def _per_input(kernels: Tensor) -> Tensor:
    return kernels.transpose(1, 2).flatten(3).flatten(0, 1)


def _of_per_input(left: Tensor, right: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    groups = (kernels.shape[0], -1)
    filters = right.unflatten(2, kernels.shape[3:]).unflatten(0, groups)
    return left.unflatten(0, groups).transpose(1, 2), filters


def _per_output(kernels: Tensor) -> Tensor:
    return kernels.flatten(3).flatten(0, 1)


def _of_per_output(left: Tensor, right: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    groups = (kernels.shape[0], -1)
    filters = right.unflatten(2, kernels.shape[3:]).unflatten(0, groups)
    return left.mT.unflatten(0, groups), filters


def _folded(name: str, rank_name: str, fold: _Fold, layer: type[Factorized], *, two_axes: bool = False) -> Method:
    def limits(kernels: Tensor) -> Ranks:
        return (min(fold.matrices(kernels).shape[1:]),)

    def analyse(kernels: Tensor) -> Analysis:
        return svd.analyse(fold.matrices(kernels))

    def factors(kernels: Tensor, ranks: Ranks, bases: Sequence[Tensor] = ()) -> Any:
        left, right = svd.factors(fold.matrices(kernels), ranks, bases)
        return fold.factors(left, right, kernels)

    layers = dict.fromkeys(CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS, layer)
    refuses = needs_two_axes(name) if two_axes else spatial(name)
    return Method(name, (rank_name,), layers, refuses, limits, analyse, factors)


CHANNEL = replace(_folded("svd_channel", "r", _Fold(_channel, _of_channel), ChannelSVDConv), out_rank=0)
INPUT = _folded("svd_input", "r", _Fold(_input, _of_input), InputSVDConv)
SPATIAL = _folded("svd_spatial", "r", _Fold(_spatial, _of_spatial), SpatialSVDConv, two_axes=True)
DEPTHWISE_POINTWISE = _folded("depthwise_pointwise", "m", _Fold(_per_input, _of_per_input), DepthwisePointwiseConv)
POINTWISE_DEPTHWISE = _folded(
    "pointwise_depthwise", "m", _Fold(_per_output, _of_per_output), PointwiseDepthwiseConv
)
FOLDS: Mapping[str, Method] = {"channel": CHANNEL, "input": INPUT, "spatial": SPATIAL}

"""The channels between the factors of a layer, brought to like ranges, so that int8 costs them little."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from decomp.layers import Factorized
from decomp.layers.factorized import copy_alone
from decomp.layers.kernels import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    group_kernels,
    is_input_first,
    join_kernels,
)
from decomp.network.forward import call, evaluating, hooked, to_device_of
from decomp.network.surgery import hooks_of, outside_inference_mode, refusal, shared_parameters, swap

EXPONENTS = (0.25, 0.5, 0.75, 1.0)


@outside_inference_mode()
def with_like_ranges(model: nn.Module, batches: Sequence[Any]) -> nn.Module:
    """Return a copy of the model that computes the same, with like ranges of the channels between factors.

    A quantizer gives one range to an activation, and one to each output channel of a weight. The channels between
    two factors, often those of singular values from large to small, have ranges far apart, and the small ones are
    left with few of the 255 steps. Nothing stands between two factors, so that channel j of the first one's output
    h can be divided by

        s_j = max|h_j|^a / max|W_j|^(1 - a),

    to the nearest power of two, so that nothing is rounded, and W_j, what the second factor W takes of it,
    multiplied by the same number. Factors that have hooks, or share their weights, stay. Of the exponents 1/4,
    1/2, 3/4 and 1, and of s = 1, that is taken which leaves the least rounding noise of activation and weight:

        (max_j |h_j| / s_j)^2 sum_j s_j^2 ||W_j||^2 + sum_t (max_j s_j |W_tj|)^2 sum_j k E[h_j^2] / s_j^2

    for k taps of the kernel.

    Args:
        model: any model; it is not changed.
        batches: batches as the model is called with, on which the ranges of the channels are measured.

    Source: Xiao et al. 2023 (SmoothQuant), equation 4, there between a normalization and a linear layer, with one
    exponent for all.
    """
    shared = shared_parameters(model)
    pairs = {
        f"{name}.{role}".lstrip("."): pair
        for name, layer in model.named_modules()
        for role, pair in _pairs(layer)
        if not hooks_of(layer) and not any(refusal(factor, shared) for factor in pair)
    }
    channels = _measured(model, {name: first for name, (first, _) in pairs.items()}, batches)
    if not channels:
        return model
    new: dict[str, nn.Module] = {}
    for name, found in channels.items():
        holder, _, role = name.rpartition(".")
        if holder not in new:
            new[holder] = copy_alone(model.get_submodule(holder))
        _rescale(*dict(_pairs(new[holder]))[role], found)
    try:
        return swap(model, new, inplace=False)
    except TypeError:  # it cannot be copied
        return model


@dataclass
class _Channels:
    """What the batches gave each channel: the largest absolute value, the sum of squares, and how many values."""

    largest: Tensor
    squares: Tensor
    count: int

    @property
    def mean_square(self) -> Tensor:
        return self.squares / self.count


def _pairs(layer: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, nn.Module]]]:
    """Neighbouring factors of a layer that runs them one after the other, by the name of the first."""
    if isinstance(layer, Factorized) and type(layer).forward is Factorized.forward:
        for (role, first), (_, second) in pairwise(layer.named_children()):
            if _is_product(first) and _is_product(second):
                yield role, (first, second)


def _is_product(factor: nn.Module) -> bool:
    return type(factor) in (nn.Linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)


@torch.no_grad()
def _measured(model: nn.Module, factors: Mapping[str, nn.Module], batches: Sequence[Any]) -> dict[str, _Channels]:
    """The output channels of these factors, of those that the batches reach."""
    channels: dict[str, _Channels] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            axis = -1 if isinstance(module, nn.Linear) else 1 - module.get_parameter("weight").dim()
            values = output.detach().movedim(axis, 0).flatten(1).float()
            if not values.numel():
                return
            largest, squares = values.abs().amax(1), values.square().sum(1)
            if name in channels:
                largest, squares = torch.maximum(largest, channels[name].largest), squares + channels[name].squares
            before = channels[name].count if name in channels else 0
            channels[name] = _Channels(largest, squares, before + values.shape[1])

        return hook

    if factors:
        with hooked(after=[(factor, watch(name)) for name, factor in factors.items()]), evaluating(model):
            for batch in batches:
                call(model, to_device_of(model, batch))
    return channels


@torch.no_grad()
def _rescale(first: nn.Module, second: nn.Module, channels: _Channels) -> None:
    """Divide what the first factor writes by the scale that is best, and multiply what the second one reads."""
    before, after = group_kernels(first), group_kernels(second)
    weight = after.transpose(1, 2).reshape(len(after), after.shape[2], after.shape[1], -1)  # (groups, S, T, taps)
    reads = weight.flatten(0, 1).flatten(1).float()  # (input channels, what reads them)
    largest = reads.abs().amax(1)
    scales = [channels.largest**share / largest ** (1 - share) for share in EXPONENTS]
    usable = (channels.largest > 0) & (largest > 0)  # not a channel that is zero, or that nothing reads
    scales = [torch.where(usable, scale, 1.0).log2().round().exp2() for scale in scales]
    scales.insert(0, torch.ones_like(largest))
    scale = min(scales, key=lambda scale: _noise(weight.float(), channels, scale)).to(before)
    before = before / scale.reshape(*before.shape[:2], *[1] * (before.dim() - 2))
    after = after * scale.reshape(len(after), 1, after.shape[2], *[1] * (after.dim() - 3))
    for factor, kernels in ((first, before), (second, after)):
        factor.get_parameter("weight").copy_(join_kernels(kernels, input_first=is_input_first(factor)))
    if first.bias is not None:
        first.get_parameter("bias").div_(scale)


def _noise(weight: Tensor, channels: _Channels, scale: Tensor) -> float:
    """The rounding noise in the output of a factor with ``weight`` (groups, S, T, taps), up to a constant."""
    groups, inputs = weight.shape[:2]
    scaled = weight * scale.reshape(groups, inputs, 1, 1)
    of_activation = (channels.largest / scale).amax().square() * scaled.square().sum()
    energy = (channels.mean_square / scale.square()).reshape(groups, inputs).sum(1) * weight.shape[3]
    of_weight = (scaled.abs().amax((1, 3)).square().sum(1) * energy).sum()
    return float(of_activation + of_weight)

"""What a layer costs: parameters and MACs (one multiply-add = 1), counted by torch on the meta device."""

import copy
from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from decomp.layers import Factorized

Ranks = tuple[int, ...]

LARGE_POSITIONS = {0: 1, 1: 2**20, 2: 2**14, 3: 2**10}


class Cost(NamedTuple):
    """Parameters and MACs of a layer, biases included in the parameters."""

    params: int
    macs: int


def count_params(module: nn.Module) -> int:
    """Number of parameters; one that is shared counts once, one that has no shape yet does not count."""
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))


def count_macs(module: nn.Module, shapes: Sequence[Sequence[int]]) -> int:
    """MACs of calling ``module``, which is on the meta device, once with an input of each shape."""
    dtype = next(module.parameters()).dtype
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for shape in shapes:
            module(torch.empty(*shape, device="meta", dtype=dtype))
    return int(counter.get_total_flops()) // 2


def on_meta(module: nn.Module) -> nn.Module:
    """Copy a module without its values: same options, parameters on the meta device."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def large_input_shape(dense: nn.Module) -> tuple[int, ...]:
    """An input so large that the border does not count: shares of MACs there are those of the limit."""
    if isinstance(dense, nn.Linear):
        return (1, dense.in_features)
    conv = cast(nn.Conv2d, dense)
    axes = LARGE_POSITIONS[len(conv.kernel_size)]
    sizes = [axes if conv.transposed else axes * stride for stride in conv.stride]
    return (1, conv.in_channels, *sizes)


class Price:
    """Cost of one layer at any ranks, from a few structures built on the meta device.

    Once it is settled which ranks are full, parameters and MACs are of degree one in each remaining rank: the
    costs at ranks 1 and 2 of each give all others exactly.
    """

    def __init__(
        self,
        dense: nn.Module,
        layer: type[Factorized],
        limits: Ranks,
        shapes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._spec = on_meta(dense)
        self._layer = layer
        self._limits = limits
        self._shapes = [tuple(shape) for shape in shapes or [large_input_shape(dense)]]
        self._corners: dict[Ranks, Cost] = {}
        self.dense = Cost(count_params(self._spec), count_macs(self._spec, self._shapes))

    def __call__(self, ranks: Ranks) -> Cost:
        """Cost of the factorized layer at these ranks."""
        axes = []
        for rank, limit in zip(ranks, self._limits, strict=True):
            if rank == limit:
                axes.append([(limit, 1)])
            elif limit == 2:
                axes.append([(1, 1)])
            else:
                axes.append([(1, 2 - rank), (2, rank - 1)])
        total_params = total_macs = 0
        for corner in product(*axes):
            weight = prod(factor for _, factor in corner)
            cost = self._built(tuple(rank for rank, _ in corner))
            total_params += weight * cost.params
            total_macs += weight * cost.macs
        return Cost(total_params, total_macs)

    def _built(self, ranks: Ranks) -> Cost:
        if ranks not in self._corners:
            layer = self._layer.like(self._spec, ranks)
            self._corners[ranks] = Cost(count_params(layer), count_macs(layer, self._shapes))
        return self._corners[ranks]

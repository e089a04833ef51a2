"""What a layer costs: parameters and MACs (one multiply-add = 1), counted by torch on the meta device."""

import copy
from collections.abc import Sequence
from functools import reduce
from itertools import product
from operator import mul
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parameter import is_lazy

from decomp.layers import Factorized, group_kernels
from decomp.network.flops import Call, MacCounter

Ranks = tuple[int, ...]
Counts = NDArray[np.int64]

LARGE_POSITIONS = {1: 2**20, 2: 2**14, 3: 2**10}


class Cost(NamedTuple):
    """Parameters and MACs of a layer, biases included in the parameters."""

    params: int
    macs: int


def count_params(module: nn.Module, *, recurse: bool = True) -> int:
    """Number of parameters; one that is shared counts once, one that has no shape yet does not count."""
    return sum(p.numel() for p in module.parameters(recurse) if not is_lazy(p))


def count_macs(module: nn.Module, calls: Sequence[Call]) -> int:
    """MACs of calling ``module``, which is on the meta device, as often and with such inputs as in ``calls``."""
    counter = MacCounter()
    with counter, torch.no_grad():
        for shape, output_size in calls:
            sizes = {} if output_size is None else {"output_size": output_size}
            module(example_input(module, shape), **sizes)
    return counter.macs


def example_input(module: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """An input of a layer, dense or factorized, on its device: ones, or the first entry of an embedding."""
    parameter = next(module.parameters())
    if isinstance(next(module.children(), module), nn.Embedding):
        return torch.zeros(shape, device=parameter.device, dtype=torch.long)
    return torch.ones(shape, device=parameter.device, dtype=parameter.dtype)


def on_meta(module: nn.Module) -> nn.Module:
    """Copy a module without its values: same options, parameters on the meta device."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def large_input_shape(dense: nn.Module) -> tuple[int, ...]:
    """An input so large that the border does not count: shares of MACs there are those of the limit."""
    if isinstance(dense, nn.Embedding):
        return (1,)
    if not hasattr(dense, "kernel_size"):
        return (1, group_kernels(dense).shape[2])
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
        calls: Sequence[Call] | None = None,
    ) -> None:
        self.spec = on_meta(dense)
        self._layer = layer
        self._limits = limits
        self._calls = list(calls or [Call(large_input_shape(dense))])
        self._corners: dict[Ranks, Cost] = {}
        self.dense = Cost(count_params(self.spec), count_macs(self.spec, self._calls))

    def __call__(self, ranks: Ranks) -> Cost:
        """Cost of the factorized layer at these ranks."""
        pairs = zip(ranks, self._limits, strict=True)
        return Cost(*self._interpolate([self._terms(r, limit, full=r == limit) for r, limit in pairs]))

    def at(self, ranks: NDArray[np.integer[Any]]) -> tuple[Counts, Counts]:
        """Parameters and MACs at many ranks (n, modes) at once."""
        params, macs = np.empty(len(ranks), np.int64), np.empty(len(ranks), np.int64)
        full = ranks == np.array(self._limits)
        for pattern in product((False, True), repeat=len(self._limits)):
            rows = np.flatnonzero((full == np.array(pattern)).all(1))
            if len(rows):
                columns = ranks[rows].astype(np.int64).T
                given = zip(columns, self._limits, pattern, strict=True)
                terms = [self._terms(r, limit, full=is_full) for r, limit, is_full in given]
                params[rows], macs[rows] = self._interpolate(terms)
        return params, macs

    @staticmethod
    def _terms(ranks: Any, limit: int, *, full: bool) -> list[tuple[int, Any]]:
        """The ranks to build at, each with its weight in the interpolation, of one rank or of an array of them."""
        if full:
            return [(limit, 1)]
        if limit == 2:
            return [(1, 1)]
        return [(1, 2 - ranks), (2, ranks - 1)]

    def _interpolate(self, terms: list[list[tuple[int, Any]]]) -> tuple[Any, Any]:
        params: Any = 0
        macs: Any = 0
        for corner in product(*terms):
            weight = reduce(mul, [weight for _, weight in corner])
            cost = self._built(tuple(rank for rank, _ in corner))
            params, macs = params + weight * cost.params, macs + weight * cost.macs
        return params, macs

    def structure(self, ranks: Ranks) -> Factorized:
        """The factorized layer at these ranks, on the meta device."""
        return self._layer.like(self.spec, ranks)

    def _built(self, ranks: Ranks) -> Cost:
        if ranks not in self._corners:
            layer = self.structure(ranks)
            self._corners[ranks] = Cost(count_params(layer), count_macs(layer, self._calls))
        return self._corners[ranks]

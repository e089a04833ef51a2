"""What a layer costs: parameters and MACs (one multiply-add = 1), counted by torch on the meta device."""

import copy
from collections.abc import Sequence
from functools import reduce
from itertools import product
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parameter import is_lazy

from decomp.layers import Factorized
from decomp.observing import Call, MacCounter

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
    dtype = next(module.parameters()).dtype
    counter = MacCounter()
    with counter, torch.no_grad():
        for shape, output_size in calls:
            sizes = {} if output_size is None else {"output_size": output_size}
            module(torch.empty(*shape, device="meta", dtype=dtype), **sizes)
    return counter.macs


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
        terms = [self._terms(np.array([rank]), limit) for rank, limit in zip(ranks, self._limits, strict=True)]
        params, macs = self._interpolate(terms)
        return Cost(int(params.item()), int(macs.item()))

    def grid(self) -> tuple[Counts, Counts]:
        """Parameters and MACs at all ranks at once: arrays of the shape of the limits, rank r at index r - 1."""
        params, macs = np.empty(self._limits, np.int64), np.empty(self._limits, np.int64)
        for full in product((False, True), repeat=len(self._limits)):
            parts = tuple(slice(-1, None) if f else slice(0, -1) for f in full)
            if params[parts].size:
                ranks = [np.arange(1, limit + 1)[part] for limit, part in zip(self._limits, parts, strict=True)]
                terms = [self._terms(r, limit) for r, limit in zip(ranks, self._limits, strict=True)]
                params[parts], macs[parts] = self._interpolate(terms)
        return params, macs

    @staticmethod
    def _terms(ranks: Counts, limit: int) -> list[tuple[int, Counts]]:
        """The ranks to build at, each with its weight in the interpolation; ``ranks`` are all full or none is."""
        if ranks[0] == limit:
            return [(limit, np.ones_like(ranks))]
        if limit == 2:
            return [(1, np.ones_like(ranks))]
        return [(1, 2 - ranks), (2, ranks - 1)]

    def _interpolate(self, terms: list[list[tuple[int, Counts]]]) -> tuple[Counts, Counts]:
        params, macs = np.zeros((), np.int64), np.zeros((), np.int64)
        for corner in product(*terms):
            weight = reduce(np.multiply.outer, [weight for _, weight in corner])
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

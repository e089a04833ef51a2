"""Costs of layers and models: the table of the kinds of cost, and the cost of a layer at any ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import prod
from operator import mul
from typing import Annotated, Any, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from decomp._util import tables
from decomp._util.arguments import Argument
from decomp.layers import Factorized, InputSVDRNN, group_kernels
from decomp.layers.factorized import copy_alone
from decomp.network.flops import Call, MacCounter
from decomp.network.restoring import LOCK

Ranks = tuple[int, ...]
Counts = NDArray[np.int64]

LARGE_POSITIONS = {1: 2**20, 2: 2**14, 3: 2**10}


class Bounds(TypedDict, total=False):
    """Bounds on costs, of which a call accepts one at a time: a key for every row of ``COSTS``."""

    macs: Annotated[
        float | None,
        Argument(
            None, "multiply-adds of one pass on ``example_inputs``: a float in (0, 1) is a share, an int absolute."
        ),
    ]
    params: Annotated[float | None, Argument(None, "parameters of the model, as a share or absolute.")]
    bytes: Annotated[
        float | None, Argument(None, "bytes of the parameters in their dtypes, as a share or absolute.")
    ]
    seconds: Annotated[
        float | None,
        Argument(
            None,
            "seconds of one pass on ``example_inputs``, predicted from layers measured on this machine.",
        ),
    ]


class Cost(dict[str, int]):
    """The counted costs of a layer or a model, by kind; biases count as parameters."""

    def __reduce__(self) -> tuple[type["Cost"], tuple[dict[str, int]]]:
        """Pickle as a call with a dict: ``torch.load`` with ``weights_only=True`` fills no other mapping."""
        return Cost, (dict(self),)

    @property
    def params(self) -> int:
        """Number of parameters."""
        return self["params"]

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self["macs"]

    @classmethod
    def of(cls, module: nn.Module, calls: Sequence[Call] = (), *, recurse: bool = True) -> "Cost":
        """Count every kind of cost of a module, which must be on the meta device if there are calls."""
        return cls({name: count(module, calls, recurse) for name, count in COUNTED.items()})


def count_params(module: nn.Module, recurse: bool = True) -> int:
    """Number of parameters; shared ones count once, lazy ones without a shape do not count."""
    return sum(p.numel() for p in module.parameters(recurse) if not is_lazy(p))


def count_bytes(module: nn.Module, recurse: bool = True) -> int:
    """Bytes of the parameters in their dtypes; shared ones count once, lazy ones do not count.

    >>> count_bytes(nn.Linear(8, 4, dtype=torch.bfloat16))
    72
    """
    return sum(bytes_of(p) for p in module.parameters(recurse) if not is_lazy(p))


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of one that wraps others (quantized values and their scales), those of its parts."""
    if is_traceable_wrapper_subclass(tensor):
        parts, _ = tensor.__tensor_flatten__()
        inner = (getattr(tensor, part) for part in parts)
        return sum(bytes_of(part) for part in inner if isinstance(part, torch.Tensor))
    return tensor.numel() * tensor.element_size()


def count_macs(module: nn.Module, calls: Sequence[Call]) -> int:
    """MACs of these calls of ``module``, which must be on the meta device."""
    if not calls:
        return 0
    counter = MacCounter()
    # Made before: under a counter torch runs the Python version of torch.ones, which imports its compiler.
    one_step = [_as_one_step(module, each) for each in calls]
    inputs = [example_input(module, each) for each in one_step]
    with counter, torch.no_grad():
        for x, each in zip(inputs, one_step, strict=True):
            sizes = {} if each.output_size is None else {"output_size": each.output_size}
            module(x, **sizes)
    return counter.macs


@dataclass(frozen=True)
class CostKind:
    """A kind of cost, as budgets, plans and tables use it.

    ``label`` is its name in text, and ``write`` formats an amount with its unit. ``count(module, calls, recurse)``
    counts it for a module called with inputs of these shapes; a kind with None is measured.
    """

    name: str
    label: str
    write: Callable[[float], str]
    count: Callable[[nn.Module, Sequence[Call], bool], int] | None
    needs_inputs: bool = False


_KINDS = (
    CostKind("macs", "MACs", tables.number, lambda module, calls, _: count_macs(module, calls), needs_inputs=True),
    CostKind("params", "parameters", tables.number, lambda module, _, recurse: count_params(module, recurse)),
    CostKind("bytes", "bytes", tables.number, lambda module, _, recurse: count_bytes(module, recurse)),
    CostKind("seconds", "seconds", tables.milliseconds, None, needs_inputs=True),
)
COSTS = {kind.name: kind for kind in _KINDS}
COUNTED = {kind.name: kind.count for kind in _KINDS if kind.count is not None}


def example_input(module: nn.Module, given: Call) -> Any:
    """An input of a layer, dense or factorized, on its device: ones, or the first entry of an embedding."""
    parameter = next(module.parameters())
    if isinstance(next(module.children(), module), nn.Embedding):
        return torch.zeros(given.shape, device=parameter.device, dtype=torch.long)
    ones = torch.ones(given.shape, device=parameter.device, dtype=parameter.dtype)
    return ones if given.batch_sizes is None else PackedSequence(ones, torch.tensor(given.batch_sizes))


def _as_one_step(module: nn.Module, given: Call) -> Call:
    """A call with as many MACs that takes one step of a loop: a recurrent layer multiplies every row alike."""
    if not isinstance(module, nn.RNNBase | InputSVDRNN):
        return given
    *rows, inputs = given.shape
    count = prod(rows)
    return Call((count, 1, inputs) if module.batch_first else (1, count, inputs))


def on_meta(module: nn.Module) -> nn.Module:
    """Copy a module with its parameters on the meta device."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in module.parameters()
    }
    with LOCK:  # other threads may set hooks on the module, for the time of a call
        return copy_alone(module, memo)


def large_input_shape(dense: nn.Module) -> tuple[int, ...]:
    """The shape of an input so large that borders are negligible: MAC shares are those of the limit."""
    if isinstance(dense, nn.Embedding):
        return (1,)
    if isinstance(dense, nn.RNNBase):
        return (1, 1, dense.input_size)
    if not hasattr(dense, "kernel_size"):
        return (1, group_kernels(dense).shape[2])
    conv = cast(nn.Conv2d, dense)
    axes = LARGE_POSITIONS[len(conv.kernel_size)]
    sizes = [axes if conv.transposed else axes * stride for stride in conv.stride]
    return (1, conv.in_channels, *sizes)


class Price:
    """Cost of one layer at any ranks, from a few structures built on the meta device.

    For a given set of full ranks, costs are polynomials of degree one in each remaining rank: the costs at ranks 1
    and 2 of each determine all others exactly.
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
        self.dense = Cost.of(self.spec, self._calls)

    def __call__(self, ranks: Ranks) -> Cost:
        """Cost of the factorized layer at these ranks."""
        pairs = zip(ranks, self._limits, strict=True)
        return Cost(self._interpolate([self._terms(r, limit, full=r == limit) for r, limit in pairs]))

    def at(self, ranks: NDArray[np.integer[Any]]) -> dict[str, Counts]:
        """Every counted kind of cost at many ranks (n, modes) at once."""
        costs = {kind: np.empty(len(ranks), np.int64) for kind in COUNTED}
        full = ranks == np.array(self._limits)
        for pattern in product((False, True), repeat=len(self._limits)):
            rows = np.flatnonzero((full == np.array(pattern)).all(1))
            if len(rows):
                columns = ranks[rows].astype(np.int64).T
                modes = zip(columns, self._limits, pattern, strict=True)
                terms = [self._terms(r, limit, full=is_full) for r, limit, is_full in modes]
                for kind, counts in self._interpolate(terms).items():
                    costs[kind][rows] = counts
        return costs

    @staticmethod
    def _terms(ranks: Any, limit: int, *, full: bool) -> list[tuple[int, Any]]:
        """Pairs of a rank to build at and its weight in the interpolation, for one rank or an array of ranks."""
        if full:
            return [(limit, 1)]
        if limit == 2:
            return [(1, 1)]
        return [(1, 2 - ranks), (2, ranks - 1)]

    def _interpolate(self, terms: list[list[tuple[int, Any]]]) -> dict[str, Any]:
        costs: dict[str, Any] = dict.fromkeys(COUNTED, 0)
        for corner in product(*terms):
            weight = reduce(mul, [weight for _, weight in corner])
            for kind, count in self._built(tuple(rank for rank, _ in corner)).items():
                costs[kind] = costs[kind] + weight * count
        return costs

    def structure(self, ranks: Ranks) -> Factorized:
        """The factorized layer at these ranks, on the meta device."""
        return self._layer.like(self.spec, ranks)

    def _built(self, ranks: Ranks) -> Cost:
        if ranks not in self._corners:
            self._corners[ranks] = Cost.of(self.structure(ranks), self._calls)
        return self._corners[ranks]

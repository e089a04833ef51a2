"""One layer under one method: errors and costs at all ranks, and the choice of the ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from operator import index
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from decomp._util.io import digest
from decomp._util.naming import naming, require_finite
from decomp.calibration.moments import Moments
from decomp.calibration.whitening import output_kernels
from decomp.layers import Factorized, group_kernels
from decomp.linalg import Spectrum, Values
from decomp.methods import Analysis, Method, Ranks, spectral_reference
from decomp.methods.fitted import Unchanged
from decomp.network.flops import Call
from decomp.planning.allocation import Front
from decomp.planning.choice import DENSE, Change, Choice, describe
from decomp.planning.cost import COUNTED, Cost, Price
from decomp.planning.latency import Stopwatch, Timings
from decomp.ranks import Fixed, Rule


@dataclass(frozen=True)
class Grid:
    """Costs and errors of a candidate at many ranks: row i of every array belongs to ``ranks[i]``, (n, modes)."""

    ranks: NDArray[np.int32]
    costs: Mapping[str, NDArray[np.int64]]
    dense: Cost
    error: NDArray[np.float64]

    def share(self, kind: str) -> NDArray[np.float64]:
        """A kind of cost as a share of the dense layer's; 0 where that has none."""
        dense, costs = self.dense[kind], self.costs[kind]
        return costs / dense if dense else np.zeros(costs.shape)

    @property
    def params_share(self) -> NDArray[np.float64]:
        """Parameters as a share of the dense layer's."""
        return self.share("params")

    @property
    def macs_share(self) -> NDArray[np.float64]:
        """MACs as a share of the dense layer's."""
        return self.share("macs")

    @property
    def pays(self) -> NDArray[np.bool_]:
        """Where both costs are below the dense layer's, or parameters where that has no MACs."""
        return (self.params_share < 1) & (self.macs_share < 1)


def undominated(
    grid: Grid,
    costs: NDArray[np.float64],
    dense_cost: float,
    limits: Sequence[int],
    multiple_of: int,
    is_preset: Sequence[bool],
) -> NDArray[np.int64]:
    """The Pareto-optimal rows in cost and error, among those that pay and cost less than the dense layer.

    Ranks are multiples of ``multiple_of``, or full, or preset by the method.
    """
    allowed = grid.pays & (costs < dense_cost)
    for mode, limit in enumerate(limits):
        ranks = grid.ranks[:, mode]
        allowed &= (ranks % multiple_of == 0) | (ranks == limit) | is_preset[mode]
    places = np.flatnonzero(allowed)
    return places[Front.of(costs[places], grid.error[places] ** 2).places] if len(places) else places


@dataclass(frozen=True)
class Candidate:
    """One layer under one method, analysed once: afterwards error and cost at any ranks are known immediately.

    ``importance`` is the squared relative change of the network's output, or the change of the loss, per squared
    relative error of the layer; None without gradients.
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    method: Method
    limits: Ranks
    weight_analysis: Analysis
    analysis: Analysis
    price: Price
    absolute_macs: bool
    stopwatch: Stopwatch | None = None
    tucker_reference: "Callable[[], Candidate] | None" = None
    importance: float | None = None
    digest: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        module: nn.Module,
        method: Method,
        calls: list[Call] | None,
        *,
        timings: Timings | None = None,
        moments: Moments | None = None,
    ) -> "Candidate":
        """Analyse the weight of ``module``, and with moments of the data its output.

        ``calls`` are the calls of the layer in one pass of the example inputs. With ``timings``, what the call
        has measured so far, the layer is timed as well.
        """
        require_finite(name, module)
        kernels = group_kernels(module).detach()
        limits = method.limits(kernels)
        with naming(name):
            layer = cast(type[Factorized], method.layer_of(module))
            price = Price(module, layer, limits, calls)
            weight_analysis = analysis = method.analyse(kernels)
            outputs = None if moments is None else output_kernels(layer, kernels, moments)
            if outputs is not None:
                analysis = method.analyse(outputs)
            stopwatch = None
            if timings is not None:
                stopwatch = Stopwatch(price, limits, calls or [], kernels.device, timings)
        # A method without spectra takes its ranks from the Tucker-2 that a spectral rule chooses, with moments by
        # the spectra of the outputs if the rule reads them.
        tucker_reference = None
        if not analysis.spectra:
            unchanged = Unchanged(kernels)
            tucker_reference = cache(partial(cls._tucker_reference, unchanged, name, module, calls, moments))
        importance = None if moments is None else moments.importance
        return cls(
            name=name,
            layer=describe(module),
            shape=tuple(module.weight.shape),  # type: ignore[arg-type]
            method=method,
            limits=limits,
            weight_analysis=weight_analysis,
            analysis=analysis,
            price=price,
            absolute_macs=calls is not None,
            stopwatch=stopwatch,
            tucker_reference=tucker_reference,
            importance=None if importance is None else importance * analysis.energy,
            digest=digest(kernels),
        )

    @classmethod
    def _tucker_reference(
        cls,
        kernels: Unchanged,
        name: str,
        module: nn.Module,
        calls: list[Call] | None,
        moments: Moments | None,
    ) -> "Candidate":
        kernels()
        return cls.of(name, module, spectral_reference(module), calls, moments=moments)

    @property
    def spectra(self) -> tuple[Spectrum, ...]:
        """The spectra of the weight, for rules that separate signal from noise."""
        return self.weight_analysis.spectra

    @property
    def output_spectra(self) -> tuple[Spectrum, ...]:
        """The spectra of the whitened weight, whose error is that of the output; without data of the weight."""
        return self.analysis.spectra

    @cached_property
    def _costs(self) -> dict[str, NDArray[np.int64]]:
        return self.price.at(self.analysis.ranks)

    @property
    def grid(self) -> Grid:
        """Costs and errors at the ranks of the analysis; interpolated errors improve with every fit."""
        energy = self.analysis.energy
        error = np.sqrt(self.analysis.squared_errors() / energy) if energy else np.zeros(len(self.analysis.ranks))
        return Grid(self.analysis.ranks, self._costs, self.price.dense, error)

    def dense_cost(self, kind: str) -> float:
        """Cost of the dense layer of a counted kind, or its measured seconds."""
        return float(self.price.dense[kind]) if kind in COUNTED else self._stopwatch.dense

    def seconds(self, ranks: Ranks) -> float:
        """Predicted seconds at these ranks, interpolated between measured ones."""
        return float(self._stopwatch(np.array(self.price(ranks).macs)))

    @cached_property
    def _fronts(self) -> dict[tuple[str, int], tuple[list[Ranks], Values, Values]]:
        return {}

    def front(self, kind: str, multiple_of: int) -> tuple[list[Ranks], Values, Values]:
        """The Pareto-optimal ranks among those that pay, with their costs and squared relative errors.

        Ranks are multiples of ``multiple_of``, or full.
        """
        key = (kind, multiple_of)
        if key not in self._fronts:
            grid = self.grid
            counted = grid.costs.get(kind)
            costs = self._stopwatch(grid.costs["macs"]) if counted is None else counted.astype(np.float64)
            is_preset = tuple(preset is not None for preset in self._preset)
            places = undominated(grid, costs, self.dense_cost(kind), self.limits, multiple_of, is_preset)
            ranks = [tuple(row) for row in grid.ranks[places].tolist()]
            self._fronts[key] = (ranks, costs[places], grid.error[places] ** 2)
        return self._fronts[key]

    @property
    def _preset(self) -> tuple[int | None, ...]:
        preset = self.method.preset or (None,) * len(self.limits)
        return tuple(p and min(p, limit) for p, limit in zip(preset, self.limits, strict=True))

    @property
    def _stopwatch(self) -> Stopwatch:
        if self.stopwatch is None:
            raise ValueError(f"layer {self.name!r} was not timed: make the plan with seconds=")
        return self.stopwatch

    def choose(self, ranks: Ranks, reason: str) -> Choice:
        """The choice of these ranks; empty ranks mean that the layer stays dense, for this reason."""
        return self._choice(ranks, reason="" if ranks else reason)

    def error(self, ranks: Ranks) -> float:
        """Relative error at these ranks: of the output with data, else of the weight."""
        return self.analysis.error(ranks)

    def params_share(self, ranks: Ranks) -> float:
        """Parameters at these ranks, as a share of the dense layer's."""
        return self.price(ranks).params / self.price.dense.params

    def macs_share(self, ranks: Ranks) -> float:
        """MACs at these ranks, as a share of the dense layer's."""
        dense = self.price.dense.macs
        return self.price(ranks).macs / dense if dense else 0.0

    def decide(self, request: "Rule | Fixed | None") -> Choice:
        """Choose the ranks of a rule or of the user, or to stay dense, with the reason.

        Raises:
            ValueError: the ranks do not fit this layer; the message names it.
        """
        if request is None:
            return self._choice((), reason="no glob of ranks= matches it")
        if isinstance(request, Fixed):
            ranks, note = self._fitted(request)
            return self._unless_worse(ranks, note)
        if self.tucker_reference is not None and request.reads_spectra:
            return self._no_more_expensive_than(self.tucker_reference(), request)
        given = request(self)
        try:
            ranks = tuple(map(index, given))
        except TypeError:
            ranks = ()
        if len(ranks) != len(self.limits) or any(not 0 <= r <= m for r, m in zip(ranks, self.limits, strict=True)):
            raise ValueError(
                f"layer {self.name!r}: {request!r} gave ranks {given}, allowed are 0 to {self.limits}"
            )
        if 0 in ranks:
            return self._choice((), reason=request.nothing)
        return self._unless_worse(ranks, "")

    def _fitted(self, request: Fixed) -> tuple[Ranks, str]:
        try:
            ranks, clamped = request.fit(self.limits, self._preset, is_matrix=set(self.shape[2:]) <= {1})
        except ValueError as error:
            raise ValueError(f"layer {self.name!r}: {error}") from None
        return ranks, f"clamped to {_ranks(ranks)}" if clamped else ""

    def _no_more_expensive_than(self, reference: "Candidate", rule: Rule) -> Choice:
        """The ranks with the most parameters that cost no more than the Tucker-2 which a spectral rule chooses."""
        tucker = reference.decide(rule)
        if not tucker.ranks:
            return self._choice((), reason=tucker.reason)
        params, macs = self._costs["params"], self._costs["macs"]
        bound = reference.price(tucker.ranks)
        places = np.flatnonzero((params <= bound.params) & (macs <= bound.macs))
        if not len(places):
            return self._choice(
                (), reason=f"more expensive at every rank than the Tucker-2 {_ranks(tucker.ranks)} of {rule!r}"
            )
        return self._choice(tuple(self.analysis.ranks[places[params[places].argmax()]].tolist()))

    def _unless_worse(self, ranks: Ranks, note: str) -> Choice:
        cost, dense = self.price(ranks), self.price.dense
        params, macs = self.params_share(ranks), self.macs_share(ranks)
        if cost.params < dense.params and (cost.macs < dense.macs or not dense.macs):
            return self._choice(ranks, note=note)
        return self._choice((), reason=f"not cheaper at {_ranks(ranks)}: params x{params:.2f}, MACs x{macs:.2f}")

    def _choice(self, ranks: Ranks, reason: str = "", note: str = "") -> Choice:
        dense = self.price.dense
        cost = self.price(ranks) if ranks else dense
        costs = {kind: Change(dense[kind], cost[kind]) for kind in dense}
        if not self.absolute_macs:
            before = min(1.0, float(dense.macs))
            costs["macs"] = Change(before, self.macs_share(ranks) if ranks else before)
        notes = (note, self.analysis.note(ranks) if ranks else "")
        return Choice(
            self.layer,
            self.shape,
            self.method.name if ranks else DENSE,
            ranks,
            costs,
            self.weight_analysis.error(ranks) if ranks else 0.0,
            reason,
            "; ".join(filter(None, notes)),
            None if self.analysis is self.weight_analysis else self.error(ranks) if ranks else 0.0,
        )


def _ranks(ranks: Ranks) -> str:
    return str(ranks[0]) if len(ranks) == 1 else str(ranks)

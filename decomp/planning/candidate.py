"""One layer under one method: errors and costs at all ranks, and the choice of the ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from operator import index
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from decomp._util.io import fingerprint
from decomp._util.naming import naming, require_finite
from decomp.calibration.recurrent import AnyMoments
from decomp.calibration.whitening import output_kernels
from decomp.layers import Factorized
from decomp.layers.kernels import weight_of
from decomp.linalg import Spectrum, Values, safe_scale
from decomp.methods import Analysis, Method, Ranks, spectral_reference
from decomp.methods.fitted import Unchanged
from decomp.network.flops import Call
from decomp.planning.allocation import Front
from decomp.planning.choice import DENSE, Change, Choice, describe
from decomp.planning.cost import COUNTED, Cost, Price
from decomp.planning.latency import RANK_SHARES, Measure, Stopwatch
from decomp.ranks import Fixed, Rule


@dataclass(frozen=True)
class Grid:
    """Costs and errors of a candidate at many ranks: row i of every array belongs to ``ranks[i]``, (n, modes)."""

    ranks: NDArray[np.int32]
    costs: Mapping[str, NDArray[np.int64]]
    dense: Cost
    error: NDArray[np.float64]
    least_gain: float = 0.0

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
        """Where both costs are below the dense layer's, or parameters where that has no MACs.

        One of them must be so by the least gain.
        """
        params, macs = self.params_share, self.macs_share
        enough: NDArray[np.bool_] = _gain(params, macs, self.dense) >= self.least_gain
        return (params < 1) & (macs < 1) & enough


def _gain(params_share: Any, macs_share: Any, dense: Cost) -> Any:
    """The larger of the shares of its parameters and of its MACs that a layer saves."""
    return 1 - (np.minimum(params_share, macs_share) if dense.macs else params_share)


def scale_of(kernels: Any) -> float:
    """The scale to divide kernels by before they are decomposed; 1 for layers with more than one weight."""
    return safe_scale(kernels) if isinstance(kernels, Tensor) else 1.0


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
    allowed = grid.pays & (costs < dense_cost) & _multiples(grid.ranks, limits, multiple_of, is_preset)
    places = np.flatnonzero(allowed)
    return places[Front.of(costs[places], grid.error[places] ** 2).places] if len(places) else places


def _multiples(
    ranks: NDArray[np.int32], limits: Sequence[int], multiple_of: int, fixed: Sequence[bool]
) -> NDArray[np.bool_]:
    """Where every rank is a multiple of ``multiple_of``, or full, or fixed."""
    allowed: NDArray[np.bool_] = (ranks % multiple_of == 0) | (ranks == np.array(limits)) | np.array(fixed)
    return np.asarray(allowed.all(1))


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
    fingerprint: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        module: nn.Module,
        method: Method,
        calls: list[Call] | None,
        *,
        measure: Measure | None = None,
        multiple: int = 1,
        shares: Sequence[float] = RANK_SHARES,
        moments: AnyMoments | None = None,
    ) -> "Candidate":
        """Analyse the weight of ``module``, and with moments of the data its output.

        ``calls`` are the calls of the layer in one pass of the example inputs. With ``measure`` the layer is
        timed as well, at these ``shares`` of its ranks, in multiples of ``multiple``.
        """
        require_finite(name, module)
        kernels = method.kernels(module)
        limits = method.limits(kernels)
        scale = scale_of(kernels)  # errors are relative: an extreme weight is analysed at a moderate scale
        scaled = kernels if scale == 1 else kernels / scale
        with naming(name):
            layer = cast(type[Factorized], method.layer_of(module))
            price = Price(module, layer, limits, calls)
            weight_analysis = analysis = method.analyse(scaled)
            outputs = None if moments is None else output_kernels(layer, scaled, moments)
            if outputs is not None:
                analysis = method.analyse(outputs)
            stopwatch = None
            if measure is not None:
                stopwatch = Stopwatch(price, limits, calls or [], measure, multiple, shares)
        energy = analysis.energy * scale * scale
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
            shape=tuple(weight_of(module).shape),
            method=method,
            limits=limits,
            weight_analysis=weight_analysis,
            analysis=analysis,
            price=price,
            absolute_macs=calls is not None,
            stopwatch=stopwatch,
            tucker_reference=tucker_reference,
            importance=None if importance is None else importance * energy,
            fingerprint=fingerprint(kernels),
        )

    @classmethod
    def _tucker_reference(
        cls,
        kernels: Unchanged,
        name: str,
        module: nn.Module,
        calls: list[Call] | None,
        moments: AnyMoments | None,
    ) -> "Candidate":
        kernels()
        candidate = cls.of(name, module, spectral_reference(module), calls, moments=moments)
        candidate.keep()
        return candidate

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
        return self.limited_grid(1, 0.0)

    def limited_grid(self, multiple_of: int, min_gain: float) -> Grid:
        """The grid at ranks that are multiples of ``multiple_of`` or full; its ``pays`` needs the least gain."""
        energy = self.analysis.energy
        ranks, costs = self.analysis.ranks, self._costs
        error = np.sqrt(self.analysis.squared_errors() / energy) if energy else np.zeros(len(ranks))
        if multiple_of > 1:
            rows = _multiples(ranks, self.limits, multiple_of, self._is_preset)
            ranks, error = ranks[rows], error[rows]
            costs = {kind: counts[rows] for kind, counts in costs.items()}
        return Grid(ranks, costs, self.price.dense, error, min_gain)

    def dense_cost(self, kind: str) -> float:
        """Cost of the dense layer of a counted kind, or its measured seconds."""
        return float(self.price.dense[kind]) if kind in COUNTED else self._stopwatch.dense

    def seconds(self, ranks: Ranks) -> float:
        """Predicted seconds at these ranks, interpolated between measured ones."""
        return float(self._stopwatch(np.array([ranks]))[0])

    @cached_property
    def _fronts(self) -> dict[tuple[str, int, float], tuple[list[Ranks], Values, Values]]:
        return {}

    def front(self, kind: str, multiple_of: int, min_gain: float = 0.0) -> tuple[list[Ranks], Values, Values]:
        """The Pareto-optimal ranks among those that pay, with their costs and squared relative errors.

        Ranks are multiples of ``multiple_of``, or full, and save at least ``min_gain``.
        """
        key = (kind, multiple_of, min_gain)
        if key not in self._fronts:
            grid = self.limited_grid(1, min_gain)
            counted = grid.costs.get(kind)
            costs = self._stopwatch(grid.ranks) if counted is None else counted.astype(np.float64)
            places = undominated(grid, costs, self.dense_cost(kind), self.limits, multiple_of, self._is_preset)
            ranks = [tuple(row) for row in grid.ranks[places].tolist()]
            self._fronts[key] = (ranks, costs[places], grid.error[places] ** 2)
        return self._fronts[key]

    @property
    def _preset(self) -> tuple[int | None, ...]:
        preset = self.method.preset or (None,) * len(self.limits)
        return tuple(p and min(p, limit) for p, limit in zip(preset, self.limits, strict=True))

    @property
    def _is_preset(self) -> tuple[bool, ...]:
        return tuple(preset is not None for preset in self._preset)

    @property
    def _stopwatch(self) -> Stopwatch:
        if self.stopwatch is None:
            raise ValueError(f"layer {self.name!r} was not timed: make the plan with seconds=")
        return self.stopwatch

    def keep(self, ranks: Ranks = ()) -> None:
        """Keep what the factors at these ranks are made of, and release the rest; see ``Bases``."""
        for analysis in (self.weight_analysis, self.analysis):
            if analysis.bases is not None:
                analysis.bases.keep(ranks if self.analysis is self.weight_analysis else ())

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

    def decide(self, request: "Rule | Fixed | None", *, multiple_of: int = 1, min_gain: float = 0.0) -> Choice:
        """Choose the ranks of a rule or of the user, or to stay dense, with the reason.

        Ranks of a rule are multiples of ``multiple_of``, or full, and save at least ``min_gain``; those of the
        user are taken as they are.

        Raises:
            ValueError: the ranks do not fit this layer; the message names it.
        """
        if request is None:
            return self._choice((), reason="no glob of ranks= matches it")
        if isinstance(request, Fixed):
            ranks, note = self._fitted(request)
            return self._unless_worse(ranks, note)
        if self.tucker_reference is not None and request.reads_spectra:
            return self._no_more_expensive_than(self.tucker_reference(), request, multiple_of, min_gain)
        given = request(self if request.reads_spectra else _Limited(self, multiple_of, min_gain))
        try:
            ranks = tuple(map(index, given))
        except TypeError:
            ranks = ()
        if len(ranks) != len(self.limits) or any(not 0 <= r <= m for r, m in zip(ranks, self.limits, strict=True)):
            raise ValueError(
                f"layer {self.name!r}: {request!r} gave ranks {given}, allowed are 0 to {self.limits}"
            )
        if 0 in ranks:
            limited = f", with multiples of {multiple_of}" if multiple_of > 1 and not request.reads_spectra else ""
            return self._choice((), reason=request.nothing + limited)
        return self._unless_worse(self._rounded(ranks, multiple_of), "", min_gain)

    def _rounded(self, ranks: Ranks, multiple_of: int, *, down: bool = False) -> Ranks:
        """The nearest multiples above, or below where there are any; full and fixed ranks are kept."""
        steps = [rank // multiple_of if down else -(-rank // multiple_of) for rank in ranks]
        rounded = [min(max(step, 1) * multiple_of, limit) for step, limit in zip(steps, self.limits, strict=True)]
        modes = zip(ranks, rounded, self.limits, self._is_preset, strict=True)
        return tuple(rank if fixed or rank == limit else new for rank, new, limit, fixed in modes)

    def _fitted(self, request: Fixed) -> tuple[Ranks, str]:
        try:
            ranks, clamped = request.fit(self.limits, self._preset, is_matrix=set(self.shape[2:]) <= {1})
        except ValueError as error:
            raise ValueError(f"layer {self.name!r}: {error}") from None
        return ranks, f"clamped to {_ranks(ranks)}" if clamped else ""

    def _no_more_expensive_than(
        self, reference: "Candidate", rule: Rule, multiple_of: int, min_gain: float
    ) -> Choice:
        """The ranks with the most parameters that cost no more than the Tucker-2 which a spectral rule chooses."""
        tucker = reference.decide(rule, multiple_of=multiple_of)
        if not tucker.ranks:
            return self._choice((), reason=tucker.reason)
        params, macs = self._costs["params"], self._costs["macs"]
        bound = reference.price(tucker.ranks)
        places = np.flatnonzero((params <= bound.params) & (macs <= bound.macs))
        if not len(places):
            return self._choice(
                (), reason=f"more expensive at every rank than the Tucker-2 {_ranks(tucker.ranks)} of {rule!r}"
            )
        ranks = tuple(self.analysis.ranks[places[params[places].argmax()]].tolist())
        return self._unless_worse(self._rounded(ranks, multiple_of, down=True), "", min_gain)

    def _unless_worse(self, ranks: Ranks, note: str, min_gain: float = 0.0) -> Choice:
        cost, dense = self.price(ranks), self.price.dense
        params, macs = self.params_share(ranks), self.macs_share(ranks)
        at = f"at {_ranks(ranks)}: params x{params:.2f}, MACs x{macs:.2f}"
        if cost.params >= dense.params or (cost.macs >= dense.macs and dense.macs):
            return self._choice((), reason=f"not cheaper {at}")
        if _gain(params, macs, dense) < min_gain:
            return self._choice((), reason=f"too little gain {at}, less than min_gain={min_gain:g}")
        return self._choice(ranks, note=note)

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


class _Limited:
    """A candidate for rules that choose from its grid: with the ranks only that may be chosen."""

    def __init__(self, candidate: Candidate, multiple_of: int, min_gain: float) -> None:
        self._candidate, self._limits = candidate, (multiple_of, min_gain)

    @property
    def grid(self) -> Grid:
        return self._candidate.limited_grid(*self._limits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._candidate, name)


def _ranks(ranks: Ranks) -> str:
    return str(ranks[0]) if len(ranks) == 1 else str(ranks)

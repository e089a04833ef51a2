"""A budget over the whole network: the method and the ranks of all layers together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import ceil, inf
from numbers import Integral, Real
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from decomp._util.naming import some
from decomp._util.schema import Value
from decomp.methods import AUTO
from decomp.planning.allocation import BudgetTooSmall, Front, allocate, allocate_minmax, allocate_quickly
from decomp.planning.candidate import Candidate
from decomp.planning.choice import Choice
from decomp.planning.cost import COSTS, COUNTED, Bounds
from decomp.ranks import Ranks

Values = NDArray[np.float64]


class OutOfReach(ValueError):
    """No choice of ranks keeps the budget; the message says what can be kept."""


@dataclass(frozen=True)
class Objective:
    """What is made least: a loss of the squared relative error of each layer, and how the losses add up."""

    loss: Callable[[Values], Values]
    allocate: Callable[[Sequence[Front], float], list[int]]


OBJECTIVES: dict[str, Objective] = {
    "sum": Objective(lambda squared: squared, allocate),
    "product": Objective(lambda squared: -np.log(np.maximum(1 - squared, 1e-300)), allocate),
    "max": Objective(lambda squared: squared, allocate_minmax),
    "network": Objective(lambda squared: squared, allocate),
}


@dataclass(frozen=True)
class Budget:
    """A bound on a kind of cost of the whole model: an amount, or a share of what the dense model costs."""

    kind: str
    value: float

    @classmethod
    def of(cls, bounds: Bounds) -> "Budget | None":
        """The one bound that is given; None if none is.

        Raises:
            ValueError: there are several, or the value is out of range.
        """
        given = {kind: value for kind, value in bounds.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"one budget at a time, not {' and '.join(f'{kind}=' for kind in given)}")
        for kind, value in given.items():
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            is_share = is_number and kind in COUNTED and not isinstance(value, Integral)
            if not is_number or not value > 0 or (is_share and value >= 1):  # type: ignore[operator]
                allowed = "a share in (0, 1), or an absolute int" if kind in COUNTED else f"{kind} above 0"
                raise ValueError(f"{kind}={value!r}: write {allowed}")
            number = cast(float, value)
            return cls(kind, int(number) if kind in COUNTED and not is_share else float(number))
        return None

    @classmethod
    def read(cls, value: Value) -> "Budget":
        """Read a budget from JSON.

        Raises:
            ValueError: a field is unknown, missing, of another type or out of range; the message names it.
        """
        entry = value.record("kind", "value")
        kind, amount = entry["kind"].one_of(COSTS), entry["value"].number()
        try:
            return cast("Budget", cls.of(cast(Bounds, {kind: amount})))
        except ValueError:
            needed = "a share in (0, 1), or an integer above 0" if kind in COUNTED else "a number above 0"
            raise entry["value"].error(needed) from None

    @property
    def is_share(self) -> bool:
        """Whether it is a share of what the dense model costs."""
        return self.kind in COUNTED and isinstance(self.value, float)

    def absolute(self, total: float) -> float:
        """The bound in units of cost, for a model that costs ``total``."""
        return self.value * total if self.is_share else self.value


@dataclass(frozen=True)
class Request:
    """What a plan under a budget was asked for; the plan keeps it, so that another budget is spent likewise.

    ``methods`` are names of rows of the table of methods, or of the user's own methods.
    """

    budget: Budget | None = None
    methods: tuple[str, ...] = AUTO
    objective: str = "auto"
    multiple_of: int = 1
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        known = ["auto", *sorted(OBJECTIVES)]
        if self.objective not in known:
            raise ValueError(f"objective={self.objective!r} is unknown: write one of {known}")
        if (
            isinstance(self.multiple_of, bool)
            or not isinstance(self.multiple_of, Integral)
            or self.multiple_of < 1
        ):
            raise ValueError(f"multiple_of={self.multiple_of!r}: write an int of at least 1")
        for name, weight in (self.weights or {}).items():
            if not isinstance(weight, Real) or not 0 <= weight < inf:
                raise ValueError(f"weights: {name!r} has {weight!r}; write a finite number of at least 0")

    def settled(self, layers: Mapping[str, Sequence[Candidate]]) -> "Request":
        """The request with the objective that "auto" stands for with these layers.

        Raises:
            ValueError: the objective needs the sensitivity of the network's output, which was not measured.
        """
        unknown = [name for name, candidates in layers.items() if candidates[0].importance is None]
        if self.objective == "auto" and len(unknown) == len(layers):
            return replace(self, objective="product")
        if self.objective not in ("auto", "network"):
            return self
        if len(unknown) == len(layers):
            raise ValueError(
                "objective='network': how much the network's output depends on each layer is not known; "
                "write data=decomp.calibrate(model, batches, loss='output')"
            )
        if unknown:
            raise ValueError(
                f"how much the network's output depends on layer {unknown[0]!r} is not known: calibrate left it "
                "out, or no gradient reached it (the loss does not depend on it, or it runs under no_grad); "
                "leave it out by exclude=, calibrate all layers, or, where there is objective=, write 'product'"
            )
        return replace(self, objective="network")

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON can hold it."""
        return asdict(self) | {"methods": list(self.methods)}

    @classmethod
    def read(cls, value: Value) -> "Request":
        """Read back what :meth:`to_dict` returned, by way of JSON.

        Raises:
            ValueError: a field is unknown, missing, of another type or out of range; the message names it.
        """
        entry = value.record(*(field.name for field in fields(cls)))
        budget, weights = entry["budget"], entry["weights"]
        return cls(
            budget=None if budget.is_null else Budget.read(budget),
            methods=tuple(name.text() for name in entry["methods"].items()),
            objective=entry["objective"].one_of(["auto", *sorted(OBJECTIVES)]),
            multiple_of=entry["multiple_of"].integer(least=1),
            weights=None if weights.is_null else {n: w.number(least=0) for n, w in weights.entries().items()},
        )


def _losses(candidate: Candidate, squared: Values, objective: str) -> Values:
    """What an objective, other than "auto", makes of squared relative errors."""
    scale = candidate.importance if objective == "network" else 1.0
    return cast(float, scale) * OBJECTIVES[objective].loss(squared)


def fixed_cost(
    kind: str, layers: Mapping[str, Sequence[Candidate]], total: float, settled: Mapping[str, Choice]
) -> float:
    """What the model costs beside ``layers``, with the savings of those that are settled."""
    fixed = total - sum(candidates[0].dense_cost(kind) for candidates in layers.values())
    if kind not in COUNTED:  # a model is timed as it is now, with what was factorized earlier
        return fixed
    return fixed - float(sum(choice.saved(kind) for choice in settled.values()))


def spend(
    layers: Mapping[str, Sequence[Candidate]],
    budget: Budget,
    total: float,
    settled: Mapping[str, Choice],
    request: Request,
) -> dict[str, tuple[Candidate, Ranks]]:
    """Return for each layer a candidate and its ranks, empty where it stays dense, within the budget.

    Args:
        layers: the candidates of each layer, one per method.
        budget: the bound.
        total: what the whole model costs as it is, of which a share is taken.
        settled: the choices of the other layers.
        request: how the budget is to be spent.

    Raises:
        OutOfReach: the budget is less than what can be reached; the message says what that is.
    """
    unknown = set(request.weights or ()) - set(layers) - set(settled)
    if unknown:
        raise ValueError(f"weights: no layer {sorted(unknown)[0]!r}; layers are {some(list(layers))}")
    fixed = fixed_cost(budget.kind, layers, total, settled)
    request = request.settled(layers)
    objective = OBJECTIVES[request.objective]
    fronts: list[Front] = []
    tables: list[list[tuple[Candidate, Ranks, float, float]]] = []
    for name, candidates in layers.items():
        weight = 1.0 if request.weights is None else request.weights.get(name, 1.0)
        table: list[tuple[Candidate, Ranks, float, float]]
        table = [(candidates[0], (), candidates[0].dense_cost(budget.kind), 0.0)]
        for candidate in candidates:
            ranks, costs, squared = candidate.front(budget.kind, request.multiple_of)
            losses = weight * _losses(candidate, squared, request.objective)
            rows = zip(ranks, costs.tolist(), losses.tolist(), strict=True)
            table += [(candidate, found, cost, loss) for found, cost, loss in rows]
        tables.append(table)
        fronts.append(Front.of(np.array([row[2] for row in table]), np.array([row[3] for row in table])))
    bound = budget.absolute(total)
    try:
        chosen = objective.allocate(fronts, bound - fixed)
    except BudgetTooSmall as error:
        least = fixed + error.least
        count = f"{ceil(least):,}" if budget.kind in COUNTED else f"{least:.3g}"
        reached = f"{count}, a share of {ceil(1000 * least / total) / 1000:.3f}"
        raise OutOfReach(
            f"{budget.kind}={budget.value!r} cannot be reached: the least is {reached} "
            f"({fixed:.3g} of it in what is not decomposed)"
        ) from None
    taken = [table[place] for table, place in zip(tables, chosen, strict=True)]
    return {name: (row[0], row[1]) for name, row in zip(layers, taken, strict=True)}


class Menu:
    """The options of layers with one candidate each, kept between calls, so that a budget takes milliseconds."""

    def __init__(self, objective: str) -> None:
        self.objective = objective
        self._fronts: dict[tuple[int, str], tuple[Candidate, Front, list[Ranks]]] = {}

    def choose(self, layers: Mapping[str, Candidate], kind: str, bound: float) -> tuple[dict[str, Ranks], float]:
        """Return the ranks of each layer within ``bound``, or the cheapest ones, and the least cost there is."""
        found = [self.front(candidate, kind) for candidate in layers.values()]
        fronts = [front for front, _ in found]
        least = float(sum(front.costs[0] for front in fronts))
        places = allocate_quickly(fronts, max(bound, least)) if fronts else []
        named = zip(layers, found, places, strict=True)
        return {n: ranks[place] if place < len(ranks) else () for n, (_, ranks), place in named}, least

    def front(self, candidate: Candidate, kind: str) -> tuple[Front, list[Ranks]]:
        """The options of one layer for the objective: its ranks, and after them to stay dense."""
        key = (id(candidate), kind)
        if key not in self._fronts:
            ranks, costs, squared = candidate.front(kind, 1)
            losses = _losses(candidate, squared, self.objective)
            costs = np.append(costs, candidate.dense_cost(kind))
            self._fronts[key] = (candidate, Front.of(costs, np.append(losses, 0.0)), ranks)
        return self._fronts[key][1:]

"""A budget over the whole network: the method and the ranks of all layers together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from numbers import Integral, Real
from typing import cast

import numpy as np
from numpy.typing import NDArray

from decomp.planning.allocation import BudgetTooSmall, Front, allocate, allocate_minmax, allocate_quickly
from decomp.planning.candidate import Candidate
from decomp.planning.choice import Change, Choice
from decomp.planning.cost import Cost
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
    """A bound on ``kind``: "params", "macs" or "seconds"."""

    kind: str
    value: float

    @classmethod
    def of(cls, **bounds: float | None) -> "Budget | None":
        """The one bound that is given; None if none is.

        Raises:
            ValueError: there are several, or the value is out of range.
        """
        given = {kind: value for kind, value in bounds.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"one budget at a time, not {' and '.join(f'{kind}=' for kind in given)}")
        for kind, value in given.items():
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            is_share = is_number and kind != "seconds" and not isinstance(value, Integral)
            if not is_number or not value > 0 or (is_share and value >= 1):
                allowed = "seconds above 0" if kind == "seconds" else "a share in (0, 1), or an absolute int"
                raise ValueError(f"{kind}={value!r}: write {allowed}")
            return cls(kind, float(value) if is_share or kind == "seconds" else int(value))
        return None

    def absolute(self, total: float) -> float:
        """The bound in units of cost, for a model that costs ``total``."""
        is_share = self.kind != "seconds" and isinstance(self.value, float)
        return self.value * total if is_share else self.value


@dataclass(frozen=True)
class Wish:
    """How a budget is to be spent: the objective, what ranks are multiples of, and the weights of the layers."""

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

    def of(self, layers: Mapping[str, Sequence[Candidate]]) -> "Wish":
        """The wish with its objective settled.

        Raises:
            ValueError: the objective needs what the data did not tell.
        """
        told = {name: importance(found[0]) for name, found in layers.items()}
        unknown = [name for name, scale in told.items() if scale is None]
        if self.objective == "auto" and len(unknown) == len(told):
            return replace(self, objective="product")
        if self.objective not in ("auto", "network"):
            return self
        if len(unknown) == len(told):
            raise ValueError(
                "objective='network': nothing tells how much a layer counts; "
                "write data=decomp.calibrate(model, batches, loss='output')"
            )
        if unknown:
            raise ValueError(
                f"nothing tells how much layer {unknown[0]!r} counts: calibrate did not look at it, or no "
                "gradient reached it (what the loss reads does not depend on it, or it runs under no_grad); leave "
                "it out by exclude=, calibrate all layers, or, where there is objective=, write 'product'"
            )
        return replace(self, objective="network")


def importance(candidate: Candidate) -> float | None:
    """What a squared relative error of 1 of the layer does to the network, where gradients told it."""
    scale = None if candidate.moments is None else candidate.moments.importance
    return None if scale is None else scale * candidate.analysis.energy


def _losses(candidate: Candidate, squared: Values, objective: str) -> Values:
    """What an objective, settled by :meth:`Wish.of`, makes of squared relative errors."""
    scale = importance(candidate) if objective == "network" else 1.0
    return cast(float, scale) * OBJECTIVES[objective].loss(squared)


def total_cost(kind: str, before: Cost, seconds: Change | None) -> float:
    """What the whole model costs as it is.

    Raises:
        ValueError: that is not known; the message says what to give.
    """
    if kind == "seconds" and seconds is None:
        raise ValueError("no layer was timed: make the plan with seconds=")
    if kind == "macs" and not before.macs:
        raise ValueError(
            "a budget of MACs needs the sizes of inputs (give example_inputs=) and layers that multiply; where "
            "there are none make it one of parameters"
        )
    return seconds.before if kind == "seconds" and seconds else float(getattr(before, kind))


def fixed_cost(
    kind: str, layers: Mapping[str, Sequence[Candidate]], total: float, settled: Mapping[str, Choice]
) -> float:
    """What the model costs beside ``layers``, with the savings of those that are settled."""
    fixed = total - sum(candidates[0].dense_cost(kind) for candidates in layers.values())
    if kind == "seconds":  # a model is timed as it is now, with what was factorized earlier
        return fixed
    changes = [getattr(choice, kind) for choice in settled.values()]
    return fixed - float(sum(change.before - change.after for change in changes))


def spend(
    layers: Mapping[str, Sequence[Candidate]],
    budget: Budget,
    total: float,
    settled: Mapping[str, Choice],
    wish: Wish,
) -> dict[str, tuple[Candidate, Ranks]]:
    """Return for each layer a candidate and its ranks, empty where it stays dense, within the budget.

    Args:
        layers: the candidates of each layer, one per method.
        budget: the bound.
        total: what the whole model costs as it is, of which a share is taken.
        settled: the choices of the other layers.
        wish: how the budget is to be spent.

    Raises:
        OutOfReach: the budget is less than what can be reached; the message says what that is.
    """
    unknown = set(wish.weights or ()) - set(layers) - set(settled)
    if unknown:
        raise ValueError(
            f"weights: no layer {sorted(unknown)[0]!r}; layers are {', '.join(map(repr, list(layers)[:8]))}"
        )
    fixed = fixed_cost(budget.kind, layers, total, settled)
    wish = wish.of(layers)
    objective = OBJECTIVES[wish.objective]
    fronts: list[Front] = []
    tables: list[list[tuple[Candidate, Ranks, float, float]]] = []
    for name, candidates in layers.items():
        weight = 1.0 if wish.weights is None else wish.weights.get(name, 1.0)
        table: list[tuple[Candidate, Ranks, float, float]]
        table = [(candidates[0], (), candidates[0].dense_cost(budget.kind), 0.0)]
        for candidate in candidates:
            ranks, costs, squared = candidate.front(budget.kind, wish.multiple_of)
            losses = weight * _losses(candidate, squared, wish.objective)
            rows = zip(ranks, costs.tolist(), losses.tolist(), strict=True)
            table += [(candidate, found, cost, loss) for found, cost, loss in rows]
        tables.append(table)
        fronts.append(Front.of(np.array([row[2] for row in table]), np.array([row[3] for row in table])))
    bound = budget.absolute(total)
    try:
        chosen = objective.allocate(fronts, bound - fixed)
    except BudgetTooSmall as error:
        least = fixed + error.least
        count = f"{least:.3g}" if budget.kind == "seconds" else f"{ceil(least):,}"
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

"""A budget over the whole network: the method and the ranks of all layers together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decomp.candidates import Candidate
from decomp.ranks import Ranks
from decomp.ranks.allocation import BudgetTooSmall, Front, allocate, allocate_minmax

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Objective:
    """What is made least: a loss of the squared relative error of each layer, and how the losses add up."""

    loss: Callable[[Values], Values]
    allocate: Callable[[Sequence[Front], float], list[int]]


OBJECTIVES: dict[str, Objective] = {
    "sum": Objective(lambda squared: squared, allocate),
    "product": Objective(lambda squared: -np.log(np.maximum(1 - squared, 1e-300)), allocate),
    "max": Objective(lambda squared: squared, allocate_minmax),
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
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not value > 0 or (kind != "seconds" and isinstance(value, float) and value >= 1):
                allowed = "seconds above 0" if kind == "seconds" else "a share in (0, 1), or an absolute int"
                raise ValueError(f"{kind}={value!r}: write {allowed}")
            return cls(kind, value)
        return None

    def absolute(self, total: float) -> float:
        """The bound in units of cost, for a model that costs ``total``."""
        is_share = self.kind != "seconds" and isinstance(self.value, float)
        return self.value * total if is_share else self.value


@dataclass(frozen=True)
class Wish:
    """How a budget is to be spent: the objective, what ranks are multiples of, and the weights of the layers."""

    objective: str = "product"
    multiple_of: int = 1
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} is unknown: write one of {sorted(OBJECTIVES)}")
        if not isinstance(self.multiple_of, int) or self.multiple_of < 1:
            raise ValueError(f"multiple_of={self.multiple_of!r}: write an int of at least 1")


def spend(
    layers: Mapping[str, Sequence[Candidate]], budget: Budget, total: float, fixed: float, wish: Wish
) -> dict[str, tuple[Candidate, Ranks]]:
    """Return for each layer a candidate and its ranks, empty where it stays dense, within the budget.

    Args:
        layers: the candidates of each layer, one per method.
        budget: the bound.
        total: what the whole model costs as it is, of which a share is taken.
        fixed: what the parts cost that are not among ``layers``.
        wish: how the budget is to be spent.

    Raises:
        ValueError: the budget is less than what can be reached; the message says what that is.
    """
    objective = OBJECTIVES[wish.objective]
    fronts: list[Front] = []
    tables: list[list[tuple[Candidate, Ranks, float, float]]] = []
    for name, candidates in layers.items():
        weight = 1.0 if wish.weights is None else wish.weights.get(name, 1.0)
        table: list[tuple[Candidate, Ranks, float, float]]
        table = [(candidates[0], (), candidates[0].dense_cost(budget.kind), 0.0)]
        for candidate in candidates:
            ranks, costs, squared = candidate.front(budget.kind, wish.multiple_of)
            losses = weight * objective.loss(squared)
            rows = zip(ranks, costs.tolist(), losses.tolist(), strict=True)
            table += [(candidate, found, cost, loss) for found, cost, loss in rows]
        tables.append(table)
        fronts.append(Front.of(np.array([row[2] for row in table]), np.array([row[3] for row in table])))
    bound = budget.absolute(total)
    try:
        chosen = objective.allocate(fronts, bound - fixed)
    except BudgetTooSmall as error:
        least = fixed + error.least
        share = "" if budget.kind == "seconds" else f", a share of {least / total:.3f}"
        raise ValueError(
            f"{budget.kind}={budget.value!r} cannot be reached: the least is {least:.6g}{share} "
            f"({fixed:.6g} of it in what is not decomposed)"
        ) from None
    taken = [table[place] for table, place in zip(tables, chosen, strict=True)]
    return {name: (row[0], row[1]) for name, row in zip(layers, taken, strict=True)}

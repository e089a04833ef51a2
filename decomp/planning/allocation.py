"""Allocation under a budget: one option per layer with the least sum of losses and a bounded sum of costs.

The multiple-choice knapsack problem. Sources: Zhang et al. 2016, section 3.2.3 (product of energies, greedy);
Idelbayev and Carreira-Perpinan 2020 (Lagrangian); Liebenwein et al. 2021, section 3 (min-max, ALDS).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Indices = NDArray[np.int64]

BINS = 10_000
TABLE_ROWS = 1200
FEWEST_NEIGHBOURS = 9


class BudgetTooSmall(ValueError):
    """No choice of options fits the budget; ``least`` is the smallest possible sum of costs."""

    def __init__(self, least: float) -> None:
        super().__init__(f"the smallest possible cost is {least}")
        self.least = least


@dataclass(frozen=True)
class Front:
    """The Pareto front of one layer's options, by rising cost and falling loss.

    ``places`` are indices into all options; ``hull`` are indices into the front of its lower convex hull.
    """

    costs: Values
    losses: Values
    places: Indices
    hull: Indices

    @classmethod
    def of(cls, costs: Values, losses: Values) -> "Front":
        """Select the options that no other dominates in cost and loss."""
        order = np.lexsort((losses, costs))
        falling = np.minimum.accumulate(losses[order])
        places = order[np.concatenate([[True], falling[1:] < falling[:-1]])]
        return cls(costs[places], losses[places], places, _lower_hull(costs[places], losses[places]))


def allocate(fronts: Sequence[Front], budget: float) -> list[int]:
    """Return one index per layer among all its options: least sum of losses, sum of costs at most ``budget``.

    The Lagrangian solution on the hulls; then dynamic programming over the options around it (over all of them if
    there are few), with costs rounded up to bins so that the budget holds; then the rest of the budget is spent
    greedily, on the largest reduction of the loss per cost.

    >>> costs = np.array([1.0, 2.0, 4.0])
    >>> allocate([Front.of(costs, np.array([9.0, 4.0, 1.0])), Front.of(costs, np.array([3.0, 2.0, 1.0]))], 5.0)
    [2, 0]

    Raises:
        BudgetTooSmall: even the cheapest options do not fit.
    """
    _require_room(fronts, budget)
    chosen = _lagrangian(fronts, budget)
    # Layers with a wide range of costs decide most of the budget: they get more options.
    ranges = np.array([front.costs[-1] - front.costs[0] for front in fronts])
    counts = FEWEST_NEIGHBOURS + (TABLE_ROWS * ranges / max(float(ranges.sum()), 1e-300)).astype(np.int64)
    nearby = [_neighbours(*each) for each in zip(fronts, chosen, counts.tolist(), strict=True)]
    better = _knapsack(fronts, nearby, budget)
    if _total(fronts, better, "losses") < _total(fronts, chosen, "losses"):
        chosen = better
    return _places(fronts, _fill(fronts, chosen, budget))


def allocate_quickly(fronts: Sequence[Front], budget: float) -> list[int]:
    """Like :func:`allocate` without the dynamic programming: nearly optimal, in a few milliseconds.

    Raises:
        BudgetTooSmall: even the cheapest options do not fit.
    """
    _require_room(fronts, budget)
    # If a large step of one layer (to dense, for instance) does not fit, smaller steps of it may.
    solutions = [_fill(fronts, _lagrangian(fronts, budget, onward=onward), budget) for onward in (True, False)]
    return _places(fronts, min(solutions, key=lambda chosen: _total(fronts, chosen, "losses")))


def allocate_minmax(fronts: Sequence[Front], budget: float) -> list[int]:
    """Return one index per layer: the least maximum of the losses within ``budget``; the rest is spent greedily.

    Raises:
        BudgetTooSmall: even the cheapest options do not fit.
    """
    _require_room(fronts, budget)

    def cheapest(bound: float) -> list[int]:
        """The cheapest option of each layer with a loss of at most ``bound``, or its best."""
        return [min(int((front.losses > bound).sum()), len(front.losses) - 1) for front in fronts]

    bounds = np.unique(np.concatenate([front.losses for front in fronts]))
    low, high = 0, len(bounds) - 1
    while low < high:
        middle = (low + high) // 2
        fits = _total(fronts, cheapest(float(bounds[middle])), "costs") <= budget
        low, high = (low, middle) if fits else (middle + 1, high)
    return _places(fronts, _fill(fronts, cheapest(float(bounds[low])), budget))


def _require_room(fronts: Sequence[Front], budget: float) -> None:
    least = float(sum(front.costs[0] for front in fronts))
    if least > budget:
        raise BudgetTooSmall(least)


def _lower_hull(costs: Values, losses: Values) -> Indices:
    """Lower convex hull of a front by Andrew's monotone chain."""
    x, y = costs.tolist(), losses.tolist()  # lists: one element of an array at a time is slow
    hull: list[int] = []
    for point in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            turn = (x[b] - x[a]) * (y[point] - y[a]) - (y[b] - y[a]) * (x[point] - x[a])
            if turn > 0:
                break
            hull.pop()
        hull.append(point)
    return np.array(hull, np.int64)


def _lagrangian(fronts: Sequence[Front], budget: float, *, onward: bool = True) -> list[int]:
    """Take segments of all hulls, the steepest first, while they fit into the budget.

    With ``onward`` a segment that does not fit ends only the walk of its own layer, else of all layers.
    """
    layers = np.concatenate([np.full(len(front.hull) - 1, layer) for layer, front in enumerate(fronts)])
    costs = np.concatenate([np.diff(front.costs[front.hull]) for front in fronts])
    gains = np.concatenate([-np.diff(front.losses[front.hull]) for front in fronts])
    order = np.argsort(-gains / np.maximum(costs, 1e-300), kind="stable")
    spare = budget - float(sum(front.costs[0] for front in fronts))
    fitting = int(np.searchsorted(costs[order].cumsum(), spare, side="right"))
    steps = np.bincount(layers[order[:fitting]].astype(np.int64), minlength=len(fronts))
    spare -= float(costs[order[:fitting]].sum())
    stopped: set[int] = set()
    rest = order[fitting:] if onward else order[:0]
    for segment, layer in zip(rest.tolist(), layers[rest].tolist(), strict=True):
        if layer in stopped or costs[segment] > spare:
            stopped.add(layer)
        else:
            spare -= float(costs[segment])
            steps[layer] += 1
    return [int(front.hull[step]) for front, step in zip(fronts, steps, strict=True)]


def _neighbours(front: Front, place: int, count: int) -> Indices:
    """About ``count`` options around ``place``: neighbours, adjacent hull points, both ends, some in between."""
    total = len(front.costs)
    if total <= count:
        return np.arange(total)
    start = min(max(place - FEWEST_NEIGHBOURS // 2, 0), total - FEWEST_NEIGHBOURS)
    beside = np.arange(start, start + FEWEST_NEIGHBOURS)
    step = int(np.searchsorted(front.hull, place))
    hull = front.hull[max(step - 1, 0) : step + 2]
    levels = np.linspace(front.losses[-1], front.losses[0], max(count - FEWEST_NEIGHBOURS, 2))
    spread = np.searchsorted(-front.losses, -levels).clip(0, total - 1)
    return np.unique(np.concatenate([spread, beside, hull, [0, total - 1]]))


def _knapsack(fronts: Sequence[Front], nearby: list[Indices], budget: float) -> list[int]:
    """Dynamic programming: the least loss for every cost, in bins above the sum of the cheapest nearby options."""
    least = float(sum(front.costs[places[0]] for front, places in zip(fronts, nearby, strict=True)))
    scale = BINS / (budget - least) if budget > least else 0.0
    value = np.zeros(BINS + 1)
    picks: list[Indices] = []
    steps = [
        np.minimum(np.ceil((front.costs[places] - front.costs[places[0]]) * scale - 1e-9), BINS + 1).astype(
            np.int64
        )
        for front, places in zip(fronts, nearby, strict=True)
    ]
    for front, places, step_of in zip(fronts, nearby, steps, strict=True):
        best, pick = np.full(BINS + 1, np.inf), np.zeros(BINS + 1, np.int64)
        for option, (place, step) in enumerate(zip(places, step_of, strict=True)):
            if step <= BINS and (scale or front.costs[place] == front.costs[places[0]]):
                reached = value[: BINS + 1 - step] + front.losses[place]
                better = reached < best[step:]
                np.copyto(best[step:], reached, where=better)
                pick[step:][better] = option
        value = best
        picks.append(pick)
    chosen: list[int] = []
    left = BINS
    for places, step_of, pick in zip(reversed(nearby), reversed(steps), reversed(picks), strict=True):
        option = int(pick[left])
        chosen.append(int(places[option]))
        left -= int(step_of[option])
    return chosen[::-1]


def _fill(fronts: Sequence[Front], chosen: list[int], budget: float) -> list[int]:
    """Repeatedly upgrade the layer with the largest loss reduction per cost, until no upgrade fits."""
    chosen = list(chosen)
    left = budget - _total(fronts, chosen, "costs")
    while True:
        best = (0.0, -1, 0)
        for layer, (front, now) in enumerate(zip(fronts, chosen, strict=True)):
            place = int(np.searchsorted(front.costs, front.costs[now] + left, side="right")) - 1
            if place > now:
                more, gain = front.costs[place] - front.costs[now], front.losses[now] - front.losses[place]
                best = max(best, (float(gain / more), layer, place))
        _, layer, place = best
        if layer < 0:
            return chosen
        left -= float(fronts[layer].costs[place] - fronts[layer].costs[chosen[layer]])
        chosen[layer] = place


def _total(fronts: Sequence[Front], chosen: list[int], what: str) -> float:
    return float(sum(getattr(front, what)[place] for front, place in zip(fronts, chosen, strict=True)))


def _places(fronts: Sequence[Front], chosen: list[int]) -> list[int]:
    return [int(front.places[place]) for front, place in zip(fronts, chosen, strict=True)]

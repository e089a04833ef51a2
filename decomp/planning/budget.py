"""A budget for the whole network: methods and ranks of all layers are chosen together.

Which kinds of cost there are, and how each is counted, is in ``cost.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import ceil, inf, nan
from numbers import Integral, Real
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from decomp._util.naming import some
from decomp._util.schema import Value
from decomp.methods import AUTO, RECURRENT
from decomp.methods.recurrent import SVD_RNN
from decomp.planning.allocation import BudgetTooSmall, Front, allocate, allocate_minmax, allocate_quickly
from decomp.planning.candidate import Candidate
from decomp.planning.choice import Choice, where_it_stays
from decomp.planning.cost import COSTS, COUNTED, Bounds
from decomp.ranks import Ranks

Values = NDArray[np.float64]


MIN_GAIN = 0.05
"""The default of ``min_gain=``.

On four networks (the digit classifier, MiniLM, CRAFT, ResNet-18 with random weights), layers that energy(0.9),
energy(0.95) or error(0.3) replaced for less than this gave 0 to 7 % of the parameters saved and 3 to 31 % of the
sum of squared errors. By energy(0.95) in MiniLM they gave 29 % and 57 %, of little that was saved in all. vbmf
chose no such ranks.
"""


NEVER_CHEAPER = "no decomposition of it is cheaper"


class seconds(float):
    """A duration, for ``seconds=`` with ``runtime=``, where a plain float is a share of the dense model's time.

    >>> seconds(0.010)
    seconds(0.01)
    """

    def __repr__(self) -> str:
        return f"seconds({float(self)!r})"


class OutOfReach(ValueError):
    """No choice of ranks meets the budget; the message gives the least possible cost, and what is in the way.

    ``least`` is that cost, as predicted or measured.
    """

    def __init__(self, message: str, least: float = nan) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class Objective:
    """An objective: the loss of a layer from its squared relative error, and the allocation that minimizes it."""

    loss: Callable[[Values], Values]
    allocate: Callable[[Sequence[Front], float], list[int]]


def _lost(squared: Values) -> Values:
    """-log(1 - e^2): e^2 for a small error, and without a bound where nothing is left of a layer."""
    losses: Values = -np.log(np.maximum(1 - squared, 1e-300))
    return losses


OBJECTIVES: dict[str, Objective] = {
    "sum": Objective(lambda squared: squared, allocate),
    "product": Objective(_lost, allocate),
    "max": Objective(lambda squared: squared, allocate_minmax),
    "network": Objective(_lost, allocate),
}


@dataclass(frozen=True)
class Budget:
    """An upper bound on a kind of cost of the whole model: an amount, or a share of the dense model's cost."""

    kind: str
    value: float

    @classmethod
    def of(cls, bounds: Bounds) -> "Budget | None":
        """The one bound that is given; None if none is.

        Raises:
            ValueError: more than one is given, or the value is out of range.
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
        """Whether the value is a share of the dense model's cost."""
        return self.kind in COUNTED and isinstance(self.value, float)

    def absolute(self, total: float) -> float:
        """The bound in units of cost, for a model that costs ``total``."""
        return self.value * total if self.is_share else self.value


@dataclass(frozen=True)
class Request:
    """The arguments of a plan under a budget. The plan stores them, as defaults for its next budget.

    ``methods`` are names of rows of ``decomp.methods.METHODS``, or of the user's own methods.
    """

    budget: Budget | None = None
    methods: tuple[str, ...] = AUTO
    objective: str = "auto"
    multiple_of: int = 1
    weights: Mapping[str, float] | None = None
    min_gain: float = MIN_GAIN

    def __post_init__(self) -> None:
        is_share = (
            isinstance(self.min_gain, Real) and not isinstance(self.min_gain, bool) and 0 <= self.min_gain < 1
        )
        if not is_share:
            raise ValueError(f"min_gain={self.min_gain!r}: write a share in [0, 1), e.g. 0.05")
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
        # Numbers of NumPy are taken as well, and JSON knows none of them.
        object.__setattr__(self, "multiple_of", int(self.multiple_of))
        if self.weights is not None:
            weights = {name: float(weight) for name, weight in self.weights.items()}
            object.__setattr__(self, "weights", weights)

    def resolved(self, layers: Mapping[str, Sequence[Candidate]]) -> "Request":
        """The request with "auto" replaced by the objective that it means for these layers.

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
        """The request as a dict for JSON."""
        return asdict(self) | {"methods": list(self.methods)}

    @classmethod
    def read(cls, value: Value) -> "Request":
        """Read a request from the JSON of :meth:`to_dict`.

        Raises:
            ValueError: a field is unknown, missing, of another type or out of range; the message names it.
        """
        entry = value.record(
            *(field.name for field in fields(cls) if field.name != "min_gain"), optional=["min_gain"]
        )
        budget, weights = entry["budget"], entry["weights"]
        return cls(
            budget=None if budget.is_null else Budget.read(budget),
            methods=tuple(name.text() for name in entry["methods"].items()),
            objective=entry["objective"].one_of(["auto", *sorted(OBJECTIVES)]),
            multiple_of=entry["multiple_of"].integer(least=1),
            min_gain=entry["min_gain"].number(least=0) if "min_gain" in entry else 0.0,
            weights=None if weights.is_null else {n: w.number(least=0) for n, w in weights.entries().items()},
        )


def _losses(candidate: Candidate, squared: Values, objective: str) -> Values:
    """The losses of a candidate under an objective, other than "auto", for squared relative errors."""
    scale = candidate.importance if objective == "network" else 1.0
    return cast(float, scale) * OBJECTIVES[objective].loss(squared)


def fixed_cost(
    kind: str, layers: Mapping[str, Sequence[Candidate]], total: float, fixed_choices: Mapping[str, Choice]
) -> float:
    """The cost of the model outside of ``layers``, with the layers of ``fixed_choices`` as chosen."""
    fixed = total - sum(candidates[0].dense_cost(kind) for candidates in layers.values())
    if kind not in COUNTED:  # the model was timed with its layers as factorized now
        return fixed
    return fixed - float(sum(choice.saved(kind) for choice in fixed_choices.values()))


def spend(
    layers: Mapping[str, Sequence[Candidate]],
    budget: Budget,
    total: float,
    fixed_choices: Mapping[str, Choice],
    request: Request,
) -> dict[str, tuple[Candidate, Ranks]]:
    """Return for each layer a candidate and its ranks, empty where it stays dense, within the budget.

    Args:
        layers: the candidates of each layer, one per method.
        budget: the bound.
        total: the cost of the whole dense model, to which a share refers.
        fixed_choices: the choices of the other layers, which do not change.
        request: objective, weights and the multiple of ranks.

    Raises:
        OutOfReach: the budget is below the smallest possible cost, which the message gives.
    """
    unknown = set(request.weights or ()) - set(layers) - set(fixed_choices)
    if unknown:
        raise ValueError(f"weights: no layer {sorted(unknown)[0]!r}; layers are {some(list(layers))}")
    fixed = fixed_cost(budget.kind, layers, total, fixed_choices)
    request = request.resolved(layers)
    objective = OBJECTIVES[request.objective]
    fronts: list[Front] = []
    options_of_layers: list[list[_Option]] = []
    for name, candidates in layers.items():
        weight = 1.0 if request.weights is None else request.weights.get(name, 1.0)
        options = [_Option(candidates[0], (), candidates[0].dense_cost(budget.kind), 0.0)]
        for candidate in candidates:
            ranks, costs, squared = candidate.front(budget.kind, request.multiple_of, request.min_gain)
            losses = weight * _losses(candidate, squared, request.objective)
            rows = zip(ranks, costs.tolist(), losses.tolist(), strict=True)
            options += [_Option(candidate, *row) for row in rows]
        options_of_layers.append(options)
        fronts.append(Front.of(np.array([o.cost for o in options]), np.array([o.loss for o in options])))
    bound = budget.absolute(total)
    try:
        chosen = objective.allocate(fronts, bound - fixed)
    except BudgetTooSmall as error:
        named = zip(layers, options_of_layers, strict=True)
        dense = {n: o[0].candidate.choose((), NEVER_CHEAPER if len(o) == 1 else "") for n, o in named}
        least = fixed + error.least
        text = _out_of_reach(budget, total, least, fixed, {**fixed_choices, **dense})
        allowed = {each.method.name for candidates in layers.values() for each in candidates}
        if RECURRENT.name in allowed and SVD_RNN.name not in allowed:
            text += f"; {SVD_RNN.name!r} in methods= decomposes the recurrence of LSTM, GRU and RNN layers as well"
        raise OutOfReach(text, least) from None
    found = [options[place] for options, place in zip(options_of_layers, chosen, strict=True)]
    return {name: (option.candidate, option.ranks) for name, option in zip(layers, found, strict=True)}


class _Option(NamedTuple):
    """A candidate at some ranks, none for a dense layer, with its cost and its loss."""

    candidate: Candidate
    ranks: Ranks
    cost: float
    loss: float


def _out_of_reach(budget: Budget, total: float, least: float, fixed: float, choices: Mapping[str, Choice]) -> str:
    """What to say of a budget below the least possible cost; of the layers, those with a reason are in the way."""
    kind, value = budget.kind, budget.value
    if kind not in COUNTED:
        return (
            f"{kind}={value!r} cannot be reached: the least is {least:.3g}, a share of {_share(least, total)} "
            f"of the {total:.3g} that the dense model takes ({fixed:.3g} of it in parts that are not decomposed)"
        )
    text = f"{kind}={value!r} cannot be reached: the least is {ceil(least):,}, a share of {_share(least, total)}"
    text += f" ({fixed:.3g} of it in parts that are not decomposed)"
    where = where_it_stays(choices, kind, total - sum(choice.saved(kind) for choice in choices.values()), total)
    text += f"; of the dense model {where}" if where else ""
    if not budget.is_share and 1 < value < 100:
        text += (
            f". {kind}={value} is a number of {COSTS[kind].label}: did you mean the share {kind}={value / 100:g}?"
        )
    return text


def _share(least: float, total: float) -> str:
    return f"{ceil(1000 * least / total) / 1000:.3f}"


class CachedFronts:
    """Pareto fronts of layers with one candidate each, cached, so that another budget takes only milliseconds."""

    def __init__(self, request: Request) -> None:
        self.objective = request.objective
        self._request = request
        self._fronts: dict[tuple[int, str], tuple[Candidate, Front, list[Ranks]]] = {}

    def choose(self, layers: Mapping[str, Candidate], kind: str, bound: float) -> tuple[dict[str, Ranks], float]:
        """Return the ranks of each layer within ``bound``, else the cheapest, and the smallest possible cost."""
        options = [self.front(candidate, kind) for candidate in layers.values()]
        fronts = [front for front, _ in options]
        least = float(sum(front.costs[0] for front in fronts))
        places = allocate_quickly(fronts, max(bound, least)) if fronts else []
        named = zip(layers, options, places, strict=True)
        return {n: ranks[place] if place < len(ranks) else () for n, (_, ranks), place in named}, least

    def front(self, candidate: Candidate, kind: str) -> tuple[Front, list[Ranks]]:
        """The front of one layer and its ranks; the index after the last rank stands for staying dense."""
        key = (id(candidate), kind)
        if key not in self._fronts:
            ranks, costs, squared = candidate.front(kind, self._request.multiple_of, self._request.min_gain)
            losses = _losses(candidate, squared, self.objective)
            costs = np.append(costs, candidate.dense_cost(kind))
            self._fronts[key] = (candidate, Front.of(costs, np.append(losses, 0.0)), ranks)
        return self._fronts[key][1:]

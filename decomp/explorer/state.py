"""Choosing ranks by hand: what the explorer knows and decides, without any widget."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from torch import nn

from decomp import api
from decomp.analysis.scores import Evaluate, Judge, Totals
from decomp.calibration.calibrate import Statistics
from decomp.calibration.sensitivity import sensitivity
from decomp.methods import METHODS
from decomp.network.selection import Selector
from decomp.planning.budget import Menu, Request, fixed_cost
from decomp.planning.candidate import Candidate
from decomp.planning.choice import DENSE, Change, Choice
from decomp.planning.plan import KEPT_DENSE, Plan
from decomp.planning.planner import NothingToDecompose
from decomp.ranks import Fixed, Ranks, energy

NO_LIMIT = 1e9  # seconds: a plan within them leaves all dense, with every layer timed
CURVE = tuple(step / 20 for step in range(1, 20))


@dataclass(frozen=True)
class Tried:
    """A plan that was applied and measured."""

    plan: Plan
    totals: Totals
    score: float


class Exploration:
    """The state of :func:`decomp.explore`: one plan, changed a layer or a budget at a time.

    ``plan`` is the decision now, ``held`` the layers that budgets and thresholds leave alone, ``tried`` what was
    measured, ``problem`` why there is nothing to choose, if there is nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        evaluate: Evaluate | None = None,
        data: Iterable[Any] | None = None,
        *,
        inputs: Callable[[Any], Any] | None = None,
        statistics: Statistics | None = None,
        layers: Selector = None,
        exclude: Selector = (),
        timed: bool = True,
        progress: bool | None = None,
    ) -> None:
        self.model, self._inputs, self._timed, self._statistics = model, example_inputs, timed, statistics
        self.judge = Judge(model, example_inputs, evaluate, data, inputs)
        self.held: set[str] = set()
        self.tried: list[Tried] = []
        self._wanted: dict[str, Ranks] = {}
        self._curves: dict[tuple[str, ...], list[tuple[float, float]]] = {}
        self.problem = ""
        self._baseline: float | None = None
        self._applied: tuple[Plan, nn.Module] | None = None
        self._found: dict[tuple[str, str], Candidate] = {}
        try:
            self.plan = self._analysed("auto", layers, exclude, progress)
        except NothingToDecompose as error:
            self.problem, self.plan = str(error), api.plan(model, layers=layers, exclude=exclude, progress=False)
        self.layers = {name: found[0] for name, found in self.plan.candidates.items() if not self.problem}
        self._found.update({(name, c.method.name): c for name, c in self.layers.items()})
        self._menu = Menu(Request().settled({name: [found] for name, found in self.layers.items()}).objective)
        self._weights = self._weighed(data, inputs, progress)
        for kind in self.kinds if self.layers else ():
            self.curve(kind)  # now, so that the first move of a slider is fast as well
        if not self.problem and not any(len(c.front("params", 1)[0]) for c in self.layers.values()):
            self.problem = "no layer has ranks that pay: every decomposition would have more parameters or MACs"

    def _weighed(self, data: Any, inputs: Any, progress: bool | None) -> Mapping[str, float] | None:
        """How much the squared error of each layer's weight counts for the output, where data tell it."""
        if data is None or self._statistics is not None or not self.layers:
            return None
        return sensitivity(
            self.model, data, inputs=inputs, batches=1, layers=lambda n, _: n in self.layers, progress=progress
        )

    def _analysed(
        self, methods: Any, layers: Selector, exclude: Selector = (), progress: bool | None = False
    ) -> Plan:
        budget = {"seconds": NO_LIMIT} if self._timed else {"params": 10**30}
        return api.plan(
            self.model,
            **budget,
            methods=methods,
            layers=layers,
            exclude=exclude,
            example_inputs=self._inputs,
            data=self._statistics,
            progress=progress,
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The costs that a budget can be about."""
        counted = ("macs", "params") if self.plan.macs else ("params",)
        return (*counted, "seconds") if self._timed else counted

    @property
    def predicts(self) -> str:
        """What the predicted error is an error of: the network's output, all layers' outputs, or their weights."""
        if self._weights is not None or self._menu.objective == "network":
            return "of the output"
        return "of the weights" if self._statistics is None else "of the layers' outputs"

    @property
    def totals(self) -> Totals:
        """What the plan costs and the error that it predicts, without running anything."""
        plan = self.plan
        return Totals(plan.params, plan.macs or Change(1, 1), plan.seconds, self._predicted(plan))

    def _predicted(self, plan: Plan) -> float:
        known = {name: choice for name, choice in plan.items() if name in self.layers}
        errors = {n: c.error if c.output_error is None else c.output_error for n, c in known.items()}
        squared = {name: error**2 for name, error in errors.items()}
        if self._menu.objective == "network":  # each layer under the method that it has now
            return sqrt(sum((self.layers[name].importance or 0.0) * error for name, error in squared.items()))
        if self._weights is not None:
            return sqrt(sum(self._weights.get(name, 0.0) * error for name, error in squared.items()))
        return sqrt(sum(squared.values()) / max(len(squared), 1))

    def choose_budget(self, kind: str, share: float) -> float:
        """Choose for each layer that is not held, within a share of the model's cost; return the least share.

        Below the least that can be reached the plan is the cheapest one.
        """
        if kind not in self.kinds:
            raise ValueError(f"kind={kind!r}: write one of {', '.join(map(repr, self.kinds))}")
        self.plan, least = self._within(kind, share, self.held)
        return least

    def _within(self, kind: str, share: float, held: set[str]) -> tuple[Plan, float]:
        free = {name: candidate for name, candidate in self.layers.items() if name not in held}
        total = float(getattr(self.plan, kind).before)
        settled: dict[str, Choice] = {name: c for name, c in self.plan.items() if name not in free}
        fixed = fixed_cost(kind, {name: [c] for name, c in free.items()}, total, settled)
        if kind == "seconds":
            kept = ((self.layers[name], settled[name].ranks) for name in held)
            fixed -= sum(c.dense_cost(kind) - c.seconds(ranks) for c, ranks in kept if ranks)
        ranks, least = self._menu.choose(free, kind, share * total - fixed)
        reason = "the budget leaves it dense"
        chosen = {name: (c, c.choose(ranks[name], reason)) for name, c in free.items()}
        return self.plan.choosing(chosen), (fixed + least) / total

    def choose_energy(self, share: float) -> None:
        """Give each layer that is not held the smallest ranks that keep a share of its squared singular values."""
        rule = energy(share)
        free = {name: candidate for name, candidate in self.layers.items() if name not in self.held}
        self.plan = self.plan.choosing({name: (c, c.decide(rule)) for name, c in free.items()})

    def choose_ranks(self, name: str, ranks: Ranks) -> None:
        """Set the ranks of one layer and hold it; where they do not pay it stays dense, and its reason says so."""
        candidate = self.layers[name]
        self.plan = self.plan.choosing({name: (candidate, candidate.decide(Fixed(tuple(ranks), exact=True)))})
        self.held.add(name)
        self._wanted[name] = tuple(ranks)

    def shown_ranks(self, name: str) -> Ranks:
        """The ranks of a layer; where it is dense those that were asked for last, or the largest."""
        wanted = self._wanted.get(name) if name in self.held else None
        return self.plan[name].ranks or wanted or self.layers[name].limits

    def choose_method(self, name: str, method: str) -> None:
        """Set the method of one layer, "dense" for none, at about the cost that it has now, and hold it."""
        now = self.plan[name]
        candidate = self.layers[name] if method == DENSE else self._candidate(name, method)
        self.held.add(name)
        self._wanted.pop(name, None)
        if method == DENSE:
            self.plan = self.plan.choosing({name: (candidate, candidate.choose((), KEPT_DENSE))})
            return
        grid, cost = candidate.grid, now.macs if now.macs.before else now.params
        target = cost.after / cost.before if now.ranks else 0.5
        shares = grid.macs_share if now.macs.before else grid.params_share
        places = np.flatnonzero(grid.pays & (shares <= target))
        if not len(places):
            places = np.flatnonzero(grid.pays)[:1]
        ranks: Ranks = tuple(grid.ranks[places[grid.error[places].argmin()]].tolist()) if len(places) else ()
        self.layers[name] = candidate
        choice = candidate.choose(ranks, f"{method} is not cheaper at any rank")
        self.plan = self.plan.choosing({name: (candidate, choice)})

    def _candidate(self, name: str, method: str) -> Candidate:
        if (name, method) not in self._found:
            if method not in self.methods_of(name):
                raise ValueError(f"method={method!r}: layer {name!r} takes {', '.join(self.methods_of(name))}")
            (found, *_) = self._analysed([method], lambda other, _: other == name).candidates[name]
            if found.stopwatch is not None:  # in units of the layers that were timed together
                known = self.layers[name].dense_cost("seconds")
                found.stopwatch.rescale(known / found.stopwatch.dense)
            self._found[name, method] = found
        return self._found[name, method]

    def methods_of(self, name: str) -> list[str]:
        """ "dense", and the methods that take a layer and know their error at all ranks at once."""
        module = self.model.get_submodule(name)
        return [DENSE, *(row.name for row in METHODS.values() if row.closed_form and not row.why_not(module))]

    def hold(self, name: str, held: bool = True) -> None:
        """Make budgets and thresholds leave a layer as it is now, or let them choose for it again."""
        (self.held.add if held else self.held.discard)(name)

    def curve(self, kind: str) -> list[tuple[float, float]]:
        """(share, predicted error) of the budgets that can be kept, if no layer were held."""
        key = (kind, *(candidate.method.name for candidate in self.layers.values()))
        if key not in self._curves:
            plans = [self._within(kind, share, set())[0] for share in CURVE] if self.layers else []
            points = {getattr(p, kind).after / getattr(p, kind).before: self._predicted(p) for p in plans}
            self._curves[key] = sorted(points.items())
        return self._curves[key]

    @property
    def baseline(self) -> float:
        """The score of the model as it is."""
        if self._baseline is None:
            self._baseline = self.judge(self.model)
        return self._baseline

    def apply(self) -> nn.Module:
        """Return the model that the plan makes; the same object as long as the plan stays the same.

        Raises:
            ValueError: every layer stays dense.
        """
        if self._applied is None or self._applied[0] is not self.plan:
            self._applied = (self.plan, self.plan.apply(self.model, progress=False))
        return self._applied[1]

    def evaluate(self) -> Tried:
        """Apply the plan anew (who has the model may have changed it), measure its score and keep it as tried."""
        self.baseline  # noqa: B018 - measured first, to compare with
        tried = Tried(self.plan, self.totals, self.judge(self.plan.apply(self.model, progress=False)))
        self.tried.append(tried)
        return tried

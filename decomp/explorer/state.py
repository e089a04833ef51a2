"""Choosing ranks by hand: what the explorer knows and decides, without any widget."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from torch import nn

from decomp import api
from decomp.analysis.scores import Evaluate, Scorer
from decomp.calibration.calibrate import Statistics
from decomp.calibration.sensitivity import sensitivity
from decomp.methods import METHODS
from decomp.network.restoring import all_or_nothing, on_failure
from decomp.network.selection import Selector
from decomp.network.unpacking import unpacked
from decomp.planning.budget import CachedFronts, fixed_cost, seconds
from decomp.planning.build import NothingToDecompose
from decomp.planning.candidate import Candidate
from decomp.planning.choice import DENSE, Change, Choice
from decomp.planning.cost import COSTS, COUNTED
from decomp.planning.latency import latency, seconds_of
from decomp.planning.plan import Plan
from decomp.ranks import Fixed, Ranks, energy
from decomp.runtimes import Runtime, find, ready

UNLIMITED = {
    "seconds": seconds(1e9),
    "params": 10**30,
}  # budgets that leave all dense; seconds has every layer timed
CURVE_SHARES = tuple(step / 20 for step in range(1, 20))


@dataclass(frozen=True)
class Totals:
    """Costs of the whole model before and after, and the predicted relative error.

    Args:
        costs: by kind, of those that are known.
        error: the predicted relative error; :attr:`Exploration.error_of` says of what.
    """

    costs: Mapping[str, Change]
    error: float

    @property
    def params(self) -> Change:
        """Parameters."""
        return self.costs["params"]

    @property
    def macs(self) -> Change:
        """Multiply-adds of one pass on the example inputs; (1, 1) where there are none."""
        return self.costs.get("macs", Change(1, 1))

    @property
    def seconds(self) -> Change | None:
        """Estimated latency; None where layers were not timed."""
        return self.costs.get("seconds")

    def share(self, kind: str) -> float:
        """Return what is left of a cost, as a share.

        Args:
            kind: a kind of cost that is known.

        >>> Totals({"params": Change(100, 25)}, 0.1).share("params")
        0.25
        """
        change = self.costs[kind]
        return float(change.after / change.before)


@dataclass(frozen=True)
class Trial:
    """A plan that was applied and scored."""

    plan: Plan
    totals: Totals
    score: float


class Exploration:
    """The state of :func:`decomp.explore`: one plan, changed a layer or a budget at a time.

    ``plan`` is the current decision, ``layers`` the candidate of every layer under its current method, ``held``
    the layers that budgets and thresholds leave alone, ``tried`` the plans that were scored, ``problem`` why there
    is nothing to choose (empty if there is), ``spread`` the relative difference between latencies that were
    measured of one and the same model. The arguments are those of :func:`decomp.explore`.

    >>> import torch
    >>> state = Exploration(nn.Sequential(nn.Linear(64, 64)), torch.zeros(1, 64), timed=False, progress=False)
    >>> state.choose_ranks("0", (8,))
    >>> state.plan["0"].ranks, state.totals.share("macs"), state.held
    ((8,), 0.25, {'0'})
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
        runtime: str | Runtime | None = None,
        progress: bool | None = None,
    ) -> None:
        if runtime is not None and not timed:
            raise ValueError("timed=False, but runtime= says where to time: leave one of them out")
        self.runtime = None if runtime is None else find(runtime)
        self.model, self._example_inputs = model, example_inputs
        self._unpacked = unpacked(model)
        self._timed, self._statistics = timed, statistics
        self.scorer = Scorer(model, example_inputs, evaluate, data, inputs)
        self.held: set[str] = set()
        self.tried: list[Trial] = []
        self.problem = ""
        self._requested: dict[str, Ranks] = {}
        self._curves: dict[tuple[str, ...], list[tuple[float, float]]] = {}
        self._baseline: float | None = None
        self._applied: tuple[Plan, nn.Module] | None = None
        try:
            self.plan = self._analyse("auto", layers, exclude, progress)
        except NothingToDecompose as error:
            self.problem, self.plan = str(error), api.plan(model, layers=layers, exclude=exclude, progress=False)
        analysed = {} if self.problem else self.plan.candidates
        self.layers = {name: first for name, (first, *_) in analysed.items()}
        self._candidates = {(name, first.method.name): first for name, first in self.layers.items()}
        self._fronts = CachedFronts(
            self.plan.request.resolved({name: [first] for name, first in self.layers.items()})
        )
        self._sensitivities = self._measure_sensitivities(data, inputs, progress)
        self.spread = self._measure_spread() if timed and self.layers else 0.0
        for kind in self.kinds if self.layers else ():
            self.curve(kind)  # now, so that the first move of a slider is fast as well
        if not self.problem and not any(len(c.front("params", 1)[0]) for c in self.layers.values()):
            self.problem = "no decomposition of any layer has fewer parameters and MACs than the layer"

    def _analyse(
        self, methods: Any, layers: Selector, exclude: Selector = (), progress: bool | None = False
    ) -> Plan:
        kind = "seconds" if self._timed else "params"
        unlimited: dict[str, Any] = {kind: UNLIMITED[kind]}
        return api.plan(
            self.model,
            **unlimited,
            methods=methods,
            layers=layers,
            exclude=exclude,
            example_inputs=self._example_inputs,
            data=self._statistics,
            runtime=self.runtime,
            progress=progress,
        )

    def _measure_spread(self) -> float:
        """By how much measured latencies of the dense model differ: (largest - smallest) / median of three."""
        example = self._example_inputs
        if self.runtime is None:
            times = latency([self.model] * 3, example)
        else:
            times = seconds_of([ready(self.runtime, self.model, example, [example])] * 3, example)
        return (max(times) - min(times)) / sorted(times)[1]

    def _measure_sensitivities(self, data: Any, inputs: Any, progress: bool | None) -> Mapping[str, float] | None:
        """How much the squared error of each layer's weight adds to that of the output; None without data."""
        if data is None or self._statistics is not None or not self.layers:
            return None
        return sensitivity(
            self.model, data, inputs=inputs, batches=1, layers=lambda n, _: n in self.layers, progress=progress
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The costs that a budget can bound."""
        return tuple(kind for kind in COSTS if self.plan.cost(kind) is not None)

    @property
    def error_of(self) -> str:
        """What the predicted error is about: the network's output, the layers' outputs, or their weights."""
        if self._sensitivities is not None or self._fronts.objective == "network":
            return "of the output"
        return "of the weights" if self._statistics is None else "of the layers' outputs"

    @property
    def totals(self) -> Totals:
        """What the plan costs and the error that it predicts; nothing is run."""
        costs = {kind: self.plan.cost(kind) for kind in COSTS}
        known = {kind: change for kind, change in costs.items() if change is not None}
        return Totals(known, self._predicted_error(self.plan))

    def _predicted_error(self, plan: Plan) -> float:
        """Of the output sqrt(sum_l s_l e_l^2), with s_l the sensitivity to layer l; else the root mean square."""
        choices = {name: choice for name, choice in plan.items() if name in self.layers}
        errors = {n: c.error if c.output_error is None else c.output_error for n, c in choices.items()}
        squared = {name: error**2 for name, error in errors.items()}
        if self._fronts.objective == "network":  # each layer under the method that it has now
            return sqrt(sum((self.layers[name].importance or 0.0) * error for name, error in squared.items()))
        if self._sensitivities is not None:
            return sqrt(sum(self._sensitivities.get(name, 0.0) * error for name, error in squared.items()))
        return sqrt(sum(squared.values()) / max(len(squared), 1))

    def choose_budget(self, kind: str, share: float) -> float:
        """Choose ranks for all layers that are not held, within a share of the dense model's cost.

        Args:
            kind: the cost, one of :attr:`kinds`.
            share: the share. Below the least that can be reached the plan is the cheapest one.

        Returns:
            The least share that can be reached.

        Raises:
            ValueError: ``kind`` is no cost that is known here.
        """
        if kind not in self.kinds:
            raise ValueError(f"kind={kind!r}: write one of {', '.join(map(repr, self.kinds))}")
        self.plan, least = self._plan_within(kind, share, self.held)
        return least

    def _plan_within(self, kind: str, share: float, held: set[str]) -> tuple[Plan, float]:
        free = {name: candidate for name, candidate in self.layers.items() if name not in held}
        cost = self.plan.cost(kind)
        total = float(cost.before) if cost is not None else 0.0
        settled: dict[str, Choice] = {name: c for name, c in self.plan.items() if name not in free}
        fixed = fixed_cost(kind, {name: [c] for name, c in free.items()}, total, settled)
        if kind not in COUNTED:
            held_layers = ((self.layers[name], settled[name].ranks) for name in held)
            fixed -= sum(c.dense_cost(kind) - c.seconds(ranks) for c, ranks in held_layers if ranks)
        ranks, least = self._fronts.choose(free, kind, share * total - fixed)
        reason = "the budget leaves it dense"
        chosen = {name: (c, c.choose(ranks[name], reason)) for name, c in free.items()}
        return self.plan.choosing(chosen), (fixed + least) / total

    def choose_energy(self, share: float) -> None:
        """Give each layer that is not held the smallest ranks that keep a share of its squared singular values.

        Args:
            share: in (0, 1].
        """
        rule = energy(share, pure=True)  # its effect is seen at once
        free = {name: candidate for name, candidate in self.layers.items() if name not in self.held}
        step, least = self.plan.request.multiple_of, self.plan.request.min_gain
        self.plan = self.plan.choosing(
            {name: (c, c.decide(rule, multiple_of=step, min_gain=least)) for name, c in free.items()}
        )

    def choose_ranks(self, name: str, ranks: Ranks) -> None:
        """Set the ranks of one layer and hold it; where they save nothing it stays dense and its reason says so.

        Args:
            name: the layer.
            ranks: one per mode of its method.

        Raises:
            ValueError: there are too many or too few ranks, or one is past its limit.
        """
        candidate = self.layers[name]
        with self._changing():
            self.plan = self.plan.choosing({name: (candidate, candidate.decide(Fixed(tuple(ranks), exact=True)))})
            self.held.add(name)
            self._requested[name] = tuple(ranks)

    def shown_ranks(self, name: str) -> Ranks:
        """Return the ranks of a layer; where it is dense those that were requested last, or the largest.

        Args:
            name: the layer.
        """
        requested = self._requested.get(name) if name in self.held else None
        return self.plan[name].ranks or requested or self.layers[name].limits

    def choose_method(self, name: str, method: str) -> None:
        """Set the method of one layer at about its current cost, and hold the layer.

        Args:
            name: the layer.
            method: one of :meth:`methods_of`; "dense" for none.

        Raises:
            ValueError: the layer has no such method.
        """
        with self._changing():
            self._choose_method(name, method)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Run a block that changes several attributes; if it fails, they are as before."""
        plan, held, layers, requested = self.plan, set(self.held), dict(self.layers), dict(self._requested)

        def restore() -> None:
            self.plan, self.layers, self._requested = plan, dict(layers), dict(requested)
            self.held.clear()
            self.held.update(held)

        with all_or_nothing():
            on_failure(restore)
            yield

    def _choose_method(self, name: str, method: str) -> None:
        current = self.plan[name]
        candidate = self.layers[name] if method == DENSE else self._candidate(name, method)
        self.held.add(name)
        self._requested.pop(name, None)
        if method == DENSE:
            self.plan = self.plan.choosing({name: (candidate, candidate.choose((), "").keep_dense(True))})
            return
        grid, cost = candidate.grid, current.macs if current.macs.before else current.params
        target = cost.after / cost.before if current.ranks else 0.5
        shares = grid.macs_share if current.macs.before else grid.params_share
        affordable = np.flatnonzero(grid.pays & (shares <= target))
        if not len(affordable):
            affordable = np.flatnonzero(grid.pays)[:1]
        ranks: Ranks = ()
        if len(affordable):
            ranks = tuple(grid.ranks[affordable[grid.error[affordable].argmin()]].tolist())
        self.layers[name] = candidate
        choice = candidate.choose(ranks, f"{method} is not cheaper at any rank")
        self.plan = self.plan.choosing({name: (candidate, choice)})

    def _candidate(self, name: str, method: str) -> Candidate:
        """A layer under a method, analysed when it is first asked for."""
        if (name, method) not in self._candidates:
            if method not in self.methods_of(name):
                raise ValueError(f"method={method!r}: layer {name!r} takes {', '.join(self.methods_of(name))}")
            (candidate, *_) = self._analyse([method], lambda other, _: other == name).candidates[name]
            if candidate.stopwatch is not None:  # in units of the layers that were timed together
                dense_seconds = self.layers[name].dense_cost("seconds")
                candidate.stopwatch.rescale(dense_seconds / candidate.stopwatch.dense)
            self._candidates[name, method] = candidate
        return self._candidates[name, method]

    def methods_of(self, name: str) -> list[str]:
        """Return "dense" and the methods that take a layer and have a formula for their error at every rank.

        Args:
            name: the layer.
        """
        module = self._unpacked.get_submodule(name)
        return [DENSE, *(row.name for row in METHODS.values() if row.closed_form and not row.why_not(module))]

    def hold(self, name: str, held: bool = True) -> None:
        """Make budgets and thresholds leave a layer as it is now, or let them choose for it again.

        Args:
            name: the layer.
            held: whether to hold it.
        """
        (self.held.add if held else self.held.discard)(name)

    def curve(self, kind: str) -> list[tuple[float, float]]:
        """Return (share, predicted error) of the plans of several budgets, were no layer held.

        Args:
            kind: the cost that the budgets bound, one of :attr:`kinds`.
        """
        key = (kind, *(candidate.method.name for candidate in self.layers.values()))
        if key not in self._curves:
            plans = [self._plan_within(kind, share, set())[0] for share in CURVE_SHARES] if self.layers else []
            costs = ((plan.cost(kind), plan) for plan in plans)
            points = {c.after / c.before: self._predicted_error(plan) for c, plan in costs if c is not None}
            self._curves[key] = sorted(points.items())
        return self._curves[key]

    @property
    @all_or_nothing()
    def baseline(self) -> float:
        """The score of the dense model."""
        if self._baseline is None:
            self._baseline = self.scorer(self.model)
        return self._baseline

    @all_or_nothing()
    def apply(self) -> nn.Module:
        """Return the model that the plan makes; the same object as long as the plan stays the same.

        Raises:
            ValueError: every layer stays dense.
        """
        if self._applied is None or self._applied[0] is not self.plan:
            self._applied = (self.plan, self.plan.apply(self.model, progress=False))
        return self._applied[1]

    @all_or_nothing()
    def evaluate(self) -> Trial:
        """Score the model of the plan, and add it to ``tried``.

        The plan is applied anew: the user may have changed the model that :meth:`apply` returned.

        Raises:
            ValueError: every layer stays dense.
        """
        self.baseline  # noqa: B018 - measured first, to compare with
        trial = Trial(self.plan, self.totals, self.scorer(self.plan.apply(self.model, progress=False)))
        self.tried.append(trial)
        return trial

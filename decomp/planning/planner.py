"""Making a plan: from rank rules, every layer by itself, or from a budget, all layers together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from decomp._util.progress import bar
from decomp.calibration.calibrate import Statistics, calibrate
from decomp.layers import Factorized
from decomp.methods import AUTO, METHODS, Method, kinds_of, method_named, row_named
from decomp.network.eligibility import WhyNot
from decomp.network.selection import Selector
from decomp.planning.budget import Budget, Wish
from decomp.planning.candidate import Candidate
from decomp.planning.choice import Change
from decomp.planning.latency import latency, layer_seconds
from decomp.planning.plan import Plan
from decomp.planning.survey import Survey, survey
from decomp.ranks import RULES, parse_request


class NothingToDecompose(ValueError):
    """No layer of the model can be decomposed; the message says why."""


@dataclass(frozen=True)
class Scope:
    """What a plan is about and what it may look at: the arguments that all calls share."""

    layers: Selector = None
    exclude: Selector = ()
    example_inputs: Any = None
    data: Any = None
    inputs: Callable[[Any], Any] | None = None
    progress: bool | None = None

    def statistics(self, model: nn.Module) -> Statistics | None:
        """The statistics that were given as data, or those of the data; None without any."""
        if isinstance(self.data, Statistics):
            _require_same_model(self.data, model)
        if self.data is None or isinstance(self.data, Statistics):
            return self.data
        return calibrate(
            model, self.data, inputs=self.inputs, layers=self.layers, exclude=self.exclude, progress=self.progress
        )

    def survey(
        self, model: nn.Module, methods: Sequence[Method], why_not: WhyNot, statistics: Statistics | None
    ) -> Survey:
        """The layers; sizes come from the example inputs, else from the data."""
        example = self.example_inputs
        if example is None and statistics is not None:
            example = statistics.example
        return survey(model, kinds_of(*methods), why_not, self.layers, self.exclude, example)


def make_plan(
    model: nn.Module, method: str | Method, options: Mapping[str, Any], ranks: Any, scope: Scope
) -> Plan:
    """Plan every layer of ``model``; see :func:`decomp.plan`."""
    earlier = ranks if isinstance(ranks, Plan) else None
    named = method_named(method, options)
    method_of = _methods(named, earlier)

    def why_not(name: str, module: nn.Module) -> str:
        return method_of(name, module).why_not(module)

    statistics = scope.statistics(model)
    surveyed = scope.survey(model, [named], why_not, statistics)
    if earlier is not None:
        earlier.require_fit({name: site.module for name, site in surveyed.sites.items()})
        kept = {name: choice.ranks for name, choice in earlier.items() if choice.ranks}
        ranks = {name: found for name, found in kept.items() if name in surveyed.open}
    request_of = parse_request(ranks, surveyed.open, RULES)
    choices = dict(surveyed.refused)
    candidates: dict[str, list[Candidate]] = {}
    for name, module in bar(scope.progress, "analyse", surveyed.open.items()):
        moments = statistics.get(name) if statistics is not None else None
        candidate = Candidate.of(name, module, method_of(name, module), surveyed.calls(name), moments=moments)
        candidates[name] = [candidate]
        choices[name] = candidate.decide(request_of(name))
        if earlier is not None and not choices[name].ranks and name in earlier:
            choices[name] = choices[name].as_dense(earlier[name].reason or choices[name].reason)
    return Plan({name: choices[name] for name in surveyed.sites}, surveyed.cost, candidates)


def make_budget_plan(
    model: nn.Module,
    budget: Budget,
    methods: str | Sequence[str | Method],
    wish: Wish,
    scope: Scope,
) -> Plan:
    """Plan all layers of ``model`` together under a budget; see :func:`decomp.compress`."""
    if scope.example_inputs is None and scope.data is None and budget.kind != "params":
        raise ValueError(f"a budget of {budget.kind} needs the sizes of inputs: give example_inputs=")
    names: Sequence[str | Method] = AUTO if methods == "auto" else methods
    allowed = [row_named(name) for name in ([names] if isinstance(names, str) else names)]

    def fitting(module: nn.Module) -> list[Method]:
        return [method for method in allowed if not method.why_not(module)]

    def why_not(name: str, module: nn.Module) -> str:
        return "" if fitting(module) else f"none of {[method.name for method in allowed]} is for this layer"

    statistics = scope.statistics(model)
    surveyed = scope.survey(model, allowed, why_not, statistics)
    timed = budget.kind == "seconds"
    candidates = {}
    for name, module in bar(scope.progress, "time and analyse" if timed else "analyse", surveyed.open.items()):
        calls, moments = surveyed.calls(name), statistics.get(name) if statistics is not None else None
        candidates[name] = [
            Candidate.of(name, module, each, calls, timed=timed, moments=moments) for each in fitting(module)
        ]
    if not candidates:
        reasons = sorted({choice.reason for choice in surveyed.refused.values()}) or ["it has no layer"]
        raise NothingToDecompose(f"no layer can be decomposed under a budget: {'; '.join(reasons[:4])}")
    dense = {name: found[0].choose((), "undecided") for name, found in candidates.items()}
    choices = surveyed.refused | dense
    seconds = _timed_together(model, surveyed.open, candidates, surveyed.example) if timed else None
    plan = Plan({name: choices[name] for name in surveyed.sites}, surveyed.cost, candidates, seconds=seconds)
    return plan.with_budget(**{budget.kind: budget.value}, wish=wish)


def _require_same_model(statistics: Statistics, model: nn.Module) -> None:
    known = dict(model.named_modules())
    for name, moments in statistics.items():
        shape = tuple(getattr(getattr(known.get(name), "weight", None), "shape", ()))
        if moments.shape != shape and not isinstance(known.get(name), Factorized):
            raise ValueError(
                f"data: the statistics are of another model, layer {name!r} had weight {moments.shape}, "
                f"here it has {shape}"
            )


def _timed_together(
    model: nn.Module, modules: Mapping[str, nn.Module], candidates: Mapping[str, list[Candidate]], batch: Any
) -> Change:
    """Time the whole model, and scale what each layer took by itself to what it takes inside of it."""
    inside = layer_seconds(model, batch, modules)
    (total,) = latency([model], batch)
    share = min(1.0, total / sum(inside.values()))
    for name, found in candidates.items():
        for stopwatch in filter(None, (candidate.stopwatch for candidate in found)):
            stopwatch.rescale(share * inside[name] / stopwatch.dense)
    return Change(total, total)


def _methods(named: Method, earlier: Plan | None) -> Callable[[str, nn.Module], Method]:
    """The method of each layer: the one named where it takes the layer, else SVD; a plan brings its own."""

    def method_of(name: str, module: nn.Module) -> Method:
        if earlier is not None and name in earlier and earlier[name].ranks:
            return earlier.method_of(name)
        matrix = METHODS["svd"]
        taken = not named.why_not(module) or (matrix.why_not(module) and named.layer_of(module))
        return named if taken else matrix

    return method_of

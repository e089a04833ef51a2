"""Trade-offs: what a model costs against how good it is, over methods, rules and budgets."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from decomp import api
from decomp._util import tables
from decomp._util.io import digest, write_atomically
from decomp._util.progress import bar
from decomp._util.schema import Value
from decomp.analysis import plots
from decomp.analysis.scores import Evaluate, Scorer
from decomp.calibration.calibrate import Statistics
from decomp.data.batches import Batches
from decomp.methods import METHODS, Method, kinds_of, row_named
from decomp.network import surgery
from decomp.network.restoring import all_or_nothing
from decomp.network.selection import Selector
from decomp.network.unpacking import unpacked
from decomp.planning.budget import OutOfReach, seconds
from decomp.planning.choice import DENSE
from decomp.planning.cost import COSTS, COUNTED
from decomp.planning.latency import latency, seconds_of
from decomp.planning.plan import Plan, read_plan
from decomp.planning.survey import Survey, survey
from decomp.ranks import RULES, Rule, parse_spec
from decomp.runtimes import InRuntime, Runtime, find, ready

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "decomp-tradeoff-2"
BUDGETS = (0.75, 0.5, 0.35, 0.25, 0.15)

Methods = Sequence[str | Method | Sequence[str | Method]]
Rules = str | Rule | Sequence[str | Rule]


@dataclass(frozen=True)
class Point:
    """One compressed model: what it costs and how good it is.

    Args:
        line: the method or rule, which is the line of the figure that the point is on.
        label: the budget, or the rule with its settings.
        costs: by kind: parameters, multiply-adds of one pass on the example inputs, bytes of the parameters, and
            the seconds of one pass, measured in turn with the dense model.
        score: what ``evaluate`` returned, or the output error.
        plan: the plan of the model; None if it could not be made.
        note: why the model could not be made; costs and score are then 0 and mean nothing.
    """

    line: str
    label: str
    costs: Mapping[str, float]
    score: float
    plan: Plan | None = None
    note: str = ""

    @property
    def params(self) -> int:
        """Parameters of the model."""
        return int(self.costs["params"])

    @property
    def macs(self) -> int:
        """Multiply-adds of one pass on the example inputs."""
        return int(self.costs["macs"])

    @property
    def seconds(self) -> float:
        """Latency of one pass."""
        return float(self.costs["seconds"])

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the point among those of a trade-off."""
        return (self.line, self.label)

    def to_dict(self) -> dict[str, Any]:
        """Return the point as JSON can hold it."""
        values = {key: value for key, value in vars(self).items() if key != "plan"}
        return values | {"plan": None if self.plan is None else json.loads(self.plan.to_json())}

    @classmethod
    def read(cls, value: Value) -> "Point":
        """Read back what :meth:`to_dict` returned.

        Args:
            value: the point as read from JSON.

        Raises:
            ValueError: a field is unknown, missing, of another type or out of range; the message names it.
        """
        entry = value.record("line", "label", "costs", "score", "plan", "note")
        costs = entry["costs"].record("params", "macs", "seconds", optional=COSTS)
        return cls(
            line=entry["line"].text(),
            label=entry["label"].text(),
            costs={kind: cost.number(least=0) for kind, cost in costs.items()},
            score=entry["score"].number(finite=False),
            plan=None if entry["plan"].is_null else read_plan(entry["plan"]),
            note=entry["note"].text(),
        )


@dataclass(frozen=True)
class Tradeoff(tables.Tabular):
    """What :func:`decomp.tradeoff` measured; printed, it is a table.

    Args:
        points: the compressed models, line by line.
        dense: the model as it was.
        score_name: the name of the function ``evaluate``, "score" if it has none, or "output error" without it.
        is_error: whether a lower score is better.
        cost: what the budgets were shares of: "macs", "params", "bytes" or "seconds".
    """

    points: Sequence[Point]
    dense: Point
    score_name: str
    is_error: bool
    cost: str = "macs"

    def share(self, point: Point, cost: str | None = None) -> float:
        """Return the cost of a point as a share of the dense model's.

        Args:
            point: one of ``points``.
            cost: "macs", "params", "bytes" or "seconds"; by default what the budgets were shares of.

        Raises:
            ValueError: the cost is unknown, or the dense model has none of it (embeddings alone have no MACs).
        """
        name = self._cost(cost)
        if not self.dense.costs[name]:
            raise ValueError(f"the dense model has no {COSTS[name].label}: write another cost=")
        return float(point.costs[name] / self.dense.costs[name])

    def drop(self, point: Point) -> float:
        """Return how much worse than the dense model a point is: the fall of the score, or the output error.

        Args:
            point: one of ``points``.
        """
        return point.score if self.is_error else self.dense.score - point.score

    def best(self, max_drop: float = 0.01, cost: str | None = None) -> Plan:
        """Return the plan of the cheapest point whose :meth:`drop` is at most ``max_drop``.

        Args:
            max_drop: in units of the score; without ``evaluate=`` the largest output error.
            cost: what cheapest refers to: "macs", "params", "bytes" or "seconds"; by default what the budgets were
                shares of.

        Raises:
            ValueError: no point is that good; the message says how good the best one is.
        """
        point = self._best_point(max_drop, cost)
        if point is None or point.plan is None:
            drops = [self.drop(p) for p in self.points if p.plan]
            least = f"the least is {min(drops):.4g}" if drops else "no point could be made"
            raise ValueError(f"max_drop={max_drop!r}: no point is that good, {least}; measure milder budgets")
        return point.plan

    def _best_point(self, max_drop: float, cost: str | None) -> Point | None:
        made = [(self.share(p, cost), self.drop(p), index) for index, p in enumerate(self.points) if p.plan]
        good = [(share, drop, index) for share, drop, index in made if drop <= max_drop]
        return self.points[min(good)[2]] if good else None

    def records(self) -> list[dict[str, Any]]:
        """Return the points as dictionaries of plain values, the dense model last; costs are in their units."""
        return [
            {"line": p.line, "point": p.label}
            | (dict(p.costs) if made else dict.fromkeys(p.costs))
            | {self.score_name.replace(" ", "_"): p.score if made else None, "note": p.note}
            for p, made in [*((p, p.plan is not None) for p in self.points), (self.dense, True)]
        ]

    def _table(self) -> tables.Table:
        columns = (
            tables.Column("method or rule", "name"),
            tables.Column("point", "detail"),
            *(tables.Column(title) for title in ("params", "MACs", "latency", self.score_name)),
            tables.Column("note", "remark"),
        )
        rows = [(p.line, p.label, *(self._cells(p) if p.plan else ("",) * 4), p.note) for p in self.points]
        return tables.Table(columns, rows, (DENSE, "", *self._cells(self.dense), ""))

    def plot(self, cost: str | None = None, max_drop: float = 0.01) -> "Figure":
        """Draw the score over the share of a cost that is left, a line per method and per kind of rule.

        Every point has its budget or rule beside it; the Pareto front, the tolerance and the point that
        :meth:`best` takes are marked.

        Args:
            cost: "macs", "params", "bytes" or "seconds"; by default what the budgets were shares of.
            max_drop: the tolerance, as in :meth:`best`.

        Raises:
            ValueError: the cost is unknown, or the dense model has none of it.
            ImportError: matplotlib is not installed.
        """
        name = self._cost(cost)
        lines: dict[str, list[tuple[float, float]]] = {}
        names: dict[str, list[str]] = {}
        for point in self.points:
            if point.plan:
                lines.setdefault(point.line, []).append((100 * self.share(point, name), point.score))
                names.setdefault(point.line, []).append(_short_label(point.label))
        level = max_drop if self.is_error else self.dense.score - max_drop
        best, tolerance = self._best_point(max_drop, name), f"tolerance: max_drop={max_drop:g}"
        chosen = None
        if best is not None:
            place = (100 * self.share(best, name), best.score)
            chosen = (place, f"best(max_drop={max_drop:g}): {best.line}, {_short_label(best.label)}")
        else:
            tolerance += ", no point is that good"
        marks = plots.Marks(names, self.is_error, (level, tolerance), chosen)
        label = f"{COSTS[name].label} (% of the dense model)"
        return plots.tradeoffs(lines, (label, self.score_name), (100.0, self.dense.score), marks=marks)

    def _cost(self, cost: str | None) -> str:
        return self.cost if cost is None else _known_cost(cost)

    def _cells(self, point: Point) -> tuple[tables.Cell, ...]:
        def cell(cost: str) -> tables.Cell:
            count, dense = point.costs[cost], self.dense.costs[cost]
            share = count / dense if dense else None
            return tables.Cell(tables.number(count) if share is None else f"{share:.0%}", value=count, share=share)

        seconds, whole = point.seconds, self.dense.seconds
        latency = tables.Cell(
            tables.milliseconds(seconds), value=seconds, share=seconds / whole if whole else None
        )
        return (cell("params"), cell("macs"), latency, tables.Cell(f"{point.score:.4f}", value=point.score))


@all_or_nothing()
def tradeoff(
    model: nn.Module,
    example_inputs: Any,
    *,
    evaluate: Evaluate | None = None,
    budgets: Sequence[float] = BUDGETS,
    cost: str = "macs",
    methods: str | Methods = ("auto",),
    rules: Rules = (),
    data: Iterable[Any] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    statistics: Statistics | None = None,
    finetune: Callable[[nn.Module], Any] | None = None,
    path: str | os.PathLike[str] | None = None,
    layers: Selector = None,
    exclude: Selector = (),
    progress: bool | None = None,
    runtime: str | Runtime | None = None,
) -> Tradeoff:
    """Measure a model at several budgets under several methods and rules: cost against accuracy.

    Every method is a line with a point per budget; every kind of rule is a line with a point per rule, under
    Tucker-2 and SVD. Parameters and MACs are counted, seconds measured in turn with the dense model. Of a model
    that is factorized already, parameters and MACs count as those of the dense model that it stands for.

    Args:
        model: any ``nn.Module``; it is never changed.
        example_inputs: a batch as the model is called with: costs are those of one pass on it.
        evaluate: a function of a model that returns its score; higher is better. Without it the score is the
            relative error of the output.
        budgets: shares of the cost of the whole model, each in (0, 1).
        cost: what they are shares of: "macs", "params", "bytes" or "seconds".
        methods: "auto", names of methods, or sequences of names to choose among together.
        rules: rank rules besides, ``["vbmf", decomp.ranks.energy(0.9)]`` for example.
        data: batches that the output error is measured on; by default ``example_inputs``.
        inputs: what the model is called with, from a batch of ``data``.
        statistics: what :func:`decomp.calibrate` measured on data: factors, and the ranks of budgets, follow it.
        finetune: called with each compressed model before it is scored; it changes the model in place.
        path: a JSON file that keeps the points that are done; a call that was cut off goes on from there. It does
            not know what ``evaluate``, ``data`` and ``finetune`` do: after changing them write another path.
        layers: which layers; see :func:`decomp.tucker`.
        exclude: which of these stay dense.
        progress: show a progress bar; by default where there is a terminal.
        runtime: a runtime, by name or as a record (``decomp.runtimes``), in which all models are timed and scored;
            with ``cost="seconds"`` layers are priced there too. An int8 runtime takes its ranges from ``data``, or
            from ``example_inputs``.

    Raises:
        ValueError: there is nothing to measure, a budget, cost, method or rule is unknown, or ``path`` holds
            points of another model or of another kind of score.
        TypeError: ``evaluate`` is not a function, or returned something else than a number.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> curve = tradeoff(model, torch.randn(8, 64), budgets=(0.75, 0.5), progress=False)
    >>> [(each.line, each.label, round(curve.share(each), 1)) for each in curve.points]
    [('auto', 'macs=0.75', 0.8), ('auto', 'macs=0.5', 0.5)]
    >>> curve.best(max_drop=1.0).macs.after < 0.51 * curve.dense.macs
    True
    """
    surgery.check_model(model)
    scorer = Scorer(model, example_inputs, evaluate, data, inputs)
    requests = [*_budget_requests(methods, budgets, cost), *_rule_requests(rules)]
    if not requests:
        raise ValueError("nothing to measure: give budgets= with methods=, or rules=")
    surveyed = survey(unpacked(model), kinds_of(), lambda name, module: "", layers, exclude, example_inputs)
    identity = {
        "model": _digest_of_model(model, surveyed),
        "score": scorer.name,
        "finetuned": finetune is not None,
        "example": digest(example_inputs) if evaluate is None and data is None else "",
        "statistics": digest([vars(each) for each in statistics.values()]) if statistics else "",
    }
    place = _Place(None, example_inputs, [])
    if runtime is not None:
        batches = [example_inputs] if data is None else list(Batches(data, inputs))
        place = _Place(find(runtime), example_inputs, batches)
        identity["runtime"] = find(runtime).name
    store = PointStore.open(path, identity)
    if store.dense is None:
        (taken,) = place.seconds([model])
        store.dense = Point(DENSE, DENSE, surveyed.cost | {"seconds": taken}, scorer(place.model(model)))
        store.save()
    planner = Planner(
        model,
        cost,
        layers=layers,
        exclude=exclude,
        example_inputs=example_inputs,
        data=statistics,
        progress=False,
        **({"runtime": runtime} if cost == "seconds" else {}),
    )
    for request in bar(progress, "trade-off", requests):
        if request.key not in store.points:
            store.add(_measure(request, model, place, planner, store.dense, scorer, finetune))
    points = [planner.with_analysis(request, store.points[request.key]) for request in requests]
    return Tradeoff(points, store.dense, scorer.label, scorer.is_error, cost)


class _Place(NamedTuple):
    """Where models are timed and scored: in a runtime, or, without one, as they are."""

    runtime: Runtime | None
    example_inputs: Any
    batches: Sequence[Any]

    def model(self, model: nn.Module) -> nn.Module:
        """The model as it runs there."""
        return InRuntime(model, self.runtime, self.example_inputs, self.batches) if self.runtime else model

    def seconds(self, models: list[nn.Module]) -> list[float]:
        """Median seconds of one pass of each, in turn."""
        if self.runtime is None:
            return latency(models, self.example_inputs)
        runs = [ready(self.runtime, model, self.example_inputs, self.batches) for model in models]
        return seconds_of(runs, self.example_inputs)


class PointRequest(NamedTuple):
    """A point to measure: methods under a budget, or, without a budget, a rule."""

    line: str
    label: str
    methods: str | Sequence[str | Method] = ""
    budget: float | None = None
    rule: Any = None

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the point among those of a trade-off."""
        return (self.line, self.label)


def _budget_requests(methods: str | Methods, budgets: Sequence[float], cost: str) -> Iterator[PointRequest]:
    _known_cost(cost)
    for share in budgets:
        if isinstance(share, bool) or not isinstance(share, float) or not 0 < share < 1:
            raise ValueError(
                f"budgets: {share!r} is no share of the dense model; write floats in (0, 1), 0.5 for example"
            )
    for given in [methods] if isinstance(methods, str) else methods:
        names = [given] if isinstance(given, str | Method) else list(given)
        rows = "auto" if names == ["auto"] else [row_named(name) for name in names]
        line = "auto" if rows == "auto" else " + ".join(_name_of(row) for row in rows if isinstance(row, Method))
        for share in budgets:
            yield PointRequest(line, f"{cost}={share:g}", methods=rows, budget=share)


def _rule_requests(rules: Rules) -> Iterator[PointRequest]:
    for given in rules if isinstance(rules, list | tuple) else [rules]:
        rule = parse_spec(given, RULES)
        line = given if isinstance(given, str) else type(rule).__name__
        yield PointRequest(line, repr(rule), rule=rule)


def _short_label(label: str) -> str:
    """The label of a point as a figure shows it.

    >>> from decomp.ranks import energy
    >>> [_short_label(repr(rule)) for rule in (RULES["vbmf"], energy(0.8))]
    ['vbmf', 'energy 0.8']
    >>> _short_label("macs=0.5")
    'macs 0.5'
    """
    if label in map(repr, RULES.values()):
        return label.partition("(")[0]
    text = re.sub(r", \w+=(False|None)\b", "", label)  # options that are off
    text = re.sub(r"\w+=", "", re.sub(r"^(\w+)=", r"\1 ", text))
    return " ".join(re.sub(r"[()]", " ", text).split()).rstrip(" ,")


def _known_cost(cost: str) -> str:
    if cost not in COSTS:
        raise ValueError(f"cost={cost!r}: write one of {', '.join(map(repr, COSTS))}")
    return cost


def _name_of(method: Method) -> str:
    """The name of a method, with its options where they are not those of the table of methods."""
    if METHODS.get(method.name) is method:
        return method.name
    preset = ", ".join(f"{n}={p}" for n, p in zip(method.rank_names, method.preset, strict=False) if p is not None)
    return f"{method.name} ({preset or 'own'})"


class Planner:
    """Makes the plans of the points; every line is analysed once, whatever the number of its points."""

    def __init__(self, model: nn.Module, cost: str, **options: Any) -> None:
        self._model, self._cost, self._options = model, cost, options
        self._analyses: dict[str | None, Plan] = {}

    def plan(self, request: PointRequest) -> Plan:
        """Return the plan of one point.

        Raises:
            OutOfReach: no ranks of the methods keep the budget.
        """
        plan = self._analysis(request)
        if request.budget is None:
            return plan.with_ranks("*", request.rule)
        known = plan.cost(self._cost)
        unit = 1.0 if self._cost in COUNTED or known is None else known.before
        budget: dict[str, Any] = {self._cost: request.budget * unit}
        return plan.with_budget(**budget)

    def with_analysis(self, request: PointRequest, point: Point) -> Point:
        """Return the point; to one read from a file add the statistics that its factors are computed from."""
        plan = point.plan
        if plan is None or plan.candidates or self._options["data"] is None:
            return point
        analysis = self._analysis(request)
        chosen = {}
        for name, candidates in analysis.candidates.items():
            same_method = (each for each in candidates if each.method.name == plan[name].method)
            chosen[name] = (next(same_method, candidates[0]), plan[name])
        return replace(point, plan=analysis.choosing(chosen))

    def _analysis(self, request: PointRequest) -> Plan:
        """The plan that those of a line, or of all rules, are derived from."""
        line = None if request.budget is None else request.line
        if line not in self._analyses:
            # No method is out of reach of so large a budget: all that counts here is the analysis.
            unlimited: dict[str, Any] = {self._cost: 10**30 if self._cost in COUNTED else seconds(1e9)}
            budget = {} if line is None else unlimited | {"methods": request.methods}
            self._analyses[line] = api.plan(self._model, **budget, **self._options)
        return self._analyses[line]


def _measure(
    request: PointRequest,
    model: nn.Module,
    place: _Place,
    planner: Planner,
    dense: Point,
    scorer: Scorer,
    finetune: Callable[[nn.Module], Any] | None,
) -> Point:
    """Make the model of one point and measure it; a point that cannot be made has a note instead of a plan."""
    try:
        plan = planner.plan(request)
    except OutOfReach as error:
        return Point(*request.key, dict.fromkeys(COSTS, 0), 0.0, note=str(error))
    if not any(choice.ranks for choice in plan.values()):
        return Point(*request.key, dict.fromkeys(COSTS, 0), 0.0, note="no layer is replaced")
    small = plan.apply(model, progress=False)
    if finetune is not None:
        finetune(small)
    score = scorer(place.model(small))
    known = {kind: plan.cost(kind) for kind in COUNTED}
    costs: dict[str, float] = {kind: change.after for kind, change in known.items() if change is not None}
    if "macs" not in costs:
        costs["macs"] = sum(choice.macs.after for choice in plan.values())
    # In turn with the dense model, whose seconds may have drifted since its own point was measured.
    small_seconds, dense_seconds = place.seconds([small, model])
    taken = dense.seconds * small_seconds / dense_seconds
    return Point(*request.key, costs | {"seconds": taken}, score, plan)


@dataclass
class PointStore:
    """The points that are done, in memory and, with a path, in a file that is whole at any moment.

    ``identity`` says what the points were measured on; a file with another one is refused.
    """

    path: Path | None
    identity: Mapping[str, Any]
    dense: Point | None = None
    points: dict[tuple[str, str], Point] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, identity: Mapping[str, Any]) -> "PointStore":
        """Read the points of an earlier call, where there is a file.

        Raises:
            ValueError: the file is none of :func:`decomp.tradeoff`, its points are of something else, or its
                folder does not exist.
        """
        store = cls(None if path is None else Path(path), identity)
        if store.path is not None and not store.path.parent.is_dir():
            raise ValueError(f"path={str(path)!r}: there is no folder {str(store.path.parent)!r}; make it first")
        if store.path is None or not store.path.exists():
            return store
        try:
            entry = Value.parse(store.path.read_bytes()).record("format", "head", "dense", "points")
            entry["format"].one_of([FORMAT])
            head = entry["head"].record(optional=identity)
            points = [Point.read(point) for point in entry["points"].items()]
            twice = [key for key, count in Counter(point.key for point in points).items() if count > 1]
            if twice:
                raise ValueError(f"points: {' '.join(twice[0])!r} is there twice")
            store.dense = Point.read(entry["dense"])
        except ValueError as error:
            raise ValueError(
                f"path={str(path)!r} holds no trade-off of decomp: {error}; remove the file, or write another path"
            ) from None
        earlier = {key: value.value for key, value in head.items()}
        different = [key for key in identity if repr(earlier.get(key, "")) != repr(identity[key])]
        if different:
            raise ValueError(
                f"path={str(path)!r} holds points with another {' and '.join(different)}: write another path"
            )
        store.points = {point.key: point for point in points}
        return store

    def add(self, point: Point) -> None:
        """Keep a point, and write the file anew."""
        self.points[point.key] = point
        self.save()

    def save(self) -> None:
        """Write all points; the file is replaced in one step, so a crash leaves the old one or the new one."""
        if self.path is None or self.dense is None:
            return
        points = [point.to_dict() for point in self.points.values()]
        data = {"format": FORMAT, "head": dict(self.identity), "dense": self.dense.to_dict(), "points": points}
        write_atomically(self.path, json.dumps(data).encode())


def _digest_of_model(model: nn.Module, surveyed: Survey) -> str:
    """What tells this model, these layers and inputs of this size from others."""
    layers = repr(
        (surveyed.forward_pass and surveyed.forward_pass.calls, sorted(surveyed.decomposable), surveyed.cost)
    )
    weights = [
        (f"{name} {tuple(tensor.shape)} {tensor.dtype}", tensor) for name, tensor in model.state_dict().items()
    ]
    return digest([layers, weights])

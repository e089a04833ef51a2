"""Trade-offs: what a model costs against how good it is, over methods, rules and budgets."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from decomp import api
from decomp._util import tables
from decomp._util.io import digest, write_atomically
from decomp._util.progress import bar
from decomp.analysis.scores import Evaluate, Judge
from decomp.calibration.calibrate import Statistics
from decomp.methods import METHODS, Method, kinds_of, row_named
from decomp.network import surgery
from decomp.network.selection import Selector
from decomp.planning.budget import OutOfReach
from decomp.planning.choice import DENSE
from decomp.planning.latency import latency
from decomp.planning.plan import Plan
from decomp.planning.survey import Survey, survey
from decomp.ranks import RULES, Rule, parse_spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "decomp-tradeoff-2"
COSTS = {"macs": "MACs", "params": "parameters", "seconds": "seconds"}


@dataclass(frozen=True)
class Point:
    """One model: what it costs and its score; ``note`` says why it could not be made, and then nothing else holds.

    ``seconds`` are measured, beside the dense model. ``score`` is what ``evaluate`` gave, or the output error.
    """

    line: str
    label: str
    params: int
    macs: int
    seconds: float
    score: float
    plan: Plan | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the point as JSON can hold it."""
        values = {key: value for key, value in vars(self).items() if key != "plan"}
        return values | {"plan": json.loads(self.plan.to_json()) if self.plan else None}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "Point":
        """Read a point back."""
        plan = entry["plan"]
        return cls(**{**entry, "plan": Plan.from_json(json.dumps(plan)) if plan else None})


@dataclass
class Store:
    """The points that are done, in memory and, with a path, in a file that is whole at any moment."""

    path: Path | None
    head: Mapping[str, Any]
    dense: Point | None = None
    points: dict[tuple[str, str], Point] = field(default_factory=dict)

    @classmethod
    def open(cls, path: "str | os.PathLike[str] | None", head: Mapping[str, Any]) -> "Store":
        """Read the points of an earlier call, where there is a file.

        Raises:
            ValueError: it is no such file, its points are about something else, or its folder is not there.
        """
        store = cls(None if path is None else Path(path), head)
        if store.path is not None and not store.path.parent.is_dir():
            raise ValueError(f"path={str(path)!r}: there is no folder {str(store.path.parent)!r}, make it before")
        if store.path is None or not store.path.exists():
            return store
        try:
            data = json.loads(store.path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, {FORMAT!r} is needed")
            found, theirs = [Point.from_dict(entry) for entry in data["points"]], data["head"]
            store.dense = Point.from_dict(data["dense"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path={str(path)!r} holds no trade-off of decomp: {error}") from error
        different = [key for key in head if theirs.get(key, "") != head[key]]
        if different:
            raise ValueError(
                f"path={str(path)!r} holds points with another {' and '.join(different)}: write another path"
            )
        store.points = {(point.line, point.label): point for point in found}
        return store

    def add(self, point: Point) -> None:
        """Keep a point; the file is replaced in one step, so that a crash leaves the old one or the new one."""
        self.points[point.line, point.label] = point
        self.save()

    def save(self) -> None:
        """Write all points that there are."""
        if self.path is None or self.dense is None:
            return
        entries = [point.to_dict() for point in self.points.values()]
        data = {"format": FORMAT, "head": dict(self.head), "dense": self.dense.to_dict(), "points": entries}
        write_atomically(self.path, json.dumps(data).encode())


@dataclass(frozen=True)
class Tradeoff:
    """What :func:`decomp.tradeoff` measured: ``points``, and ``dense``, the model as it was.

    ``score_name`` is "score" or "output error"; of an error less is better. Budgets were shares of ``cost``.
    """

    points: Sequence[Point]
    dense: Point
    score_name: str
    is_error: bool
    cost: str = "macs"

    def share(self, point: Point, cost: str | None = None) -> float:
        """What is left of "macs", "params" or "seconds" at a point, as a share of the dense model's.

        Raises:
            ValueError: the dense model has none of that cost (embeddings alone have no MACs).
        """
        name = self._cost(cost)
        if not getattr(self.dense, name):
            raise ValueError(f"the dense model has no {COSTS[name]}: write another cost=")
        return float(getattr(point, name) / getattr(self.dense, name))

    def best(self, max_drop: float = 0.01, cost: str | None = None) -> Plan:
        """Return the plan of the cheapest point whose score is at most ``max_drop`` worse than the dense model's.

        Without ``evaluate=`` the output error is at most ``max_drop``. ``cost`` says what cheap means; by default
        what the budgets were about.

        Raises:
            ValueError: no point is that good; the message names the best one.
        """
        found = [(self.share(p, cost), self.drop(p), place) for place, p in enumerate(self.points) if p.plan]
        good = [each for each in found if each[1] <= max_drop]
        plan = self.points[min(good)[2]].plan if good else None
        if plan is None:
            least = f"the least is {min(each[1] for each in found):.4g}" if found else "no point could be made"
            raise ValueError(f"max_drop={max_drop!r}: no point is that good, {least}; measure milder budgets")
        return plan

    def drop(self, point: Point) -> float:
        """How much worse than the dense model a point is: the fall of the score, or the output error."""
        return point.score if self.is_error else self.dense.score - point.score

    def table(self) -> str:
        """Write the points as a table."""
        columns = ("method or rule", "point", ">params", ">MACs", ">latency", f">{self.score_name}", "note")
        total = ("dense", "", *self._cells(self.dense), "")
        rows = [(p.line, p.label, *(self._cells(p) if p.plan else ("",) * 4), p.note) for p in self.points]
        return tables.render("", columns, rows, total)

    def plot(self, cost: str | None = None) -> "Figure":
        """Draw the score over the share of a cost that is left, a line per method and per kind of rule."""
        from decomp.analysis import plots

        name = self._cost(cost)
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in self.points:
            if point.plan:
                lines.setdefault(point.line, []).append((100 * self.share(point, name), point.score))
        label = f"{COSTS[name]} (% of the dense model)"
        return plots.tradeoffs(lines, (label, self.score_name), (100.0, self.dense.score))

    def _cost(self, cost: str | None) -> str:
        if cost is not None and cost not in COSTS:
            raise ValueError(f"cost={cost!r}: write one of {', '.join(map(repr, COSTS))}")
        return cost or self.cost

    def _cells(self, point: Point) -> tuple[str, ...]:
        pairs = ((getattr(point, name), getattr(self.dense, name)) for name in ("params", "macs"))
        shares = (f"{count / dense:.0%}" if dense else tables.number(count) for count, dense in pairs)
        return (*shares, tables.milliseconds(point.seconds), f"{point.score:.4f}")

    def __str__(self) -> str:
        return self.table()


RULE = "rules"
Methods = Sequence[str | Method | Sequence[str | Method]]


class Want(NamedTuple):
    """One point to measure: a method and a budget, or a rule."""

    line: str
    label: str
    methods: "str | Sequence[str | Method]"
    budget: float | None
    rule: Any

    @property
    def key(self) -> tuple[str, str]:
        return (self.line, self.label)


def budget_wants(methods: str | Methods, budgets: Sequence[float], cost: str) -> Iterator[Want]:
    if cost not in COSTS:
        raise ValueError(f"cost={cost!r}: write one of {', '.join(map(repr, COSTS))}")
    for share in budgets:
        if isinstance(share, bool) or not isinstance(share, float) or not 0 < share < 1:
            raise ValueError(f"budgets: {share!r} is no share of the dense model; write floats in (0, 1), 0.5 say")
    for given in [methods] if isinstance(methods, str) else methods:
        names = [given] if isinstance(given, str | Method) else list(given)
        rows = "auto" if names == ["auto"] else [row_named(name) for name in names]
        line = "auto" if rows == "auto" else " + ".join(_called(row) for row in rows if isinstance(row, Method))
        for share in budgets:
            yield Want(line, f"{cost}={share:g}", rows, share, None)


def _called(row: Method) -> str:
    """The name of a row, with its options where they are not those of the table."""
    if METHODS.get(row.name) is row:
        return row.name
    preset = ", ".join(f"{n}={p}" for n, p in zip(row.rank_names, row.preset, strict=False) if p is not None)
    return f"{row.name} ({preset or 'own'})"


def rule_wants(rules: "str | Rule | Sequence[str | Rule]") -> Iterator[Want]:
    for given in rules if isinstance(rules, list | tuple) else [rules]:
        rule = parse_spec(given, RULES)
        line = given if isinstance(given, str) else type(rule).__name__
        yield Want(line, repr(rule), "", None, rule)


class Planner:
    """Makes the plans: each method is analysed once, whatever the number of budgets."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        statistics: Statistics | None,
        layers: Selector,
        exclude: Selector,
        cost: str,
    ) -> None:
        self._model, self.example_inputs, self._cost = model, example_inputs, cost
        self._options: dict[str, Any] = {
            "layers": layers,
            "exclude": exclude,
            "example_inputs": example_inputs,
            "data": statistics,
            "progress": False,
        }
        self._plans: dict[str, Plan] = {}

    def plan(self, want: Want) -> Plan:
        """The plan of one point.

        Raises:
            OutOfReach: the budget is less than the method can reach.
        """
        plan = self._analysed(want)
        if want.budget is None:
            return plan.with_ranks("*", want.rule)
        unit = plan.seconds.before if self._cost == "seconds" and plan.seconds else 1.0
        budget: dict[str, Any] = {self._cost: want.budget * unit}
        return plan.with_budget(**budget)

    def _analysed(self, want: Want) -> Plan:
        """The plan that all points of a line start from."""
        line = RULE if want.budget is None else want.line
        if line not in self._plans:
            # A budget that leaves all dense: only the analysis is wanted, no budget is out of its reach.
            unbounded: dict[str, Any] = {self._cost: 1e9 if self._cost == "seconds" else 10**30}
            chosen = {} if want.budget is None else unbounded | {"methods": want.methods}
            self._plans[line] = api.plan(self._model, **chosen, **self._options)
        return self._plans[line]

    def informed(self, want: Want, point: Point) -> Point:
        """The point; one that was read from a file with the statistics that its factors come from."""
        read = point.plan
        if read is None or read.candidates or self._options["data"] is None:
            return point
        plan = self._analysed(want)
        chosen = {}
        for name, found in plan.candidates.items():
            candidate = next((each for each in found if each.method.name == read[name].method), found[0])
            chosen[name] = (candidate, read[name])
        return replace(point, plan=plan.choosing(chosen))

    def _survey(self) -> Survey:
        chosen = {key: self._options[key] for key in ("layers", "exclude", "example_inputs")}
        return survey(self._model, kinds_of(), lambda name, module: "", **chosen)

    def dense_cost(self) -> tuple[int, int]:
        """Parameters and MACs of the model as it is."""
        cost = self._survey().cost
        return cost.params, cost.macs

    def digest(self) -> str:
        """What tells this model, these layers and inputs of this size from others."""
        surveyed = self._survey()
        layers = repr((surveyed.seen and surveyed.seen.calls, sorted(surveyed.open), surveyed.cost))
        weights = [
            (f"{name} {tuple(tensor.shape)} {tensor.dtype}", tensor)
            for name, tensor in self._model.state_dict().items()
        ]
        return digest([layers, weights])


BUDGETS = (0.75, 0.5, 0.35, 0.25, 0.15)


def tradeoff(
    model: nn.Module,
    example_inputs: Any,
    *,
    evaluate: Evaluate | None = None,
    budgets: Sequence[float] = BUDGETS,
    cost: str = "macs",
    methods: str | Methods = ("auto",),
    rules: "str | Rule | Sequence[str | Rule]" = (),
    data: Iterable[Any] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    statistics: Statistics | None = None,
    finetune: Callable[[nn.Module], Any] | None = None,
    path: Any = None,
    layers: Selector = None,
    exclude: Selector = (),
    progress: bool | None = None,
) -> Tradeoff:
    """Measure a model at several budgets under several methods and rules: cost against accuracy.

    Every method is a line with a point per budget; every kind of rule is a line with a point per rule, under
    Tucker-2 and SVD. Parameters and MACs are counted, seconds measured beside the dense model. Of a model that is
    factorized already, parameters and MACs count as those of the dense model that it stands for.

    Args:
        model: any ``nn.Module``; it is never changed.
        example_inputs: a batch as the model is called with: costs are those of one pass on it.
        evaluate: a function of a model that gives its score, more is better. Without it the relative error of the
            output is measured.
        budgets: shares of the cost of the whole model, each in (0, 1).
        cost: what they are shares of: "macs", "params" or "seconds".
        methods: "auto", rows of the table of methods, or sequences of rows to choose among together.
        rules: rank rules besides, ``["vbmf", decomp.ranks.energy(0.9)]`` say.
        data: batches that the output error is measured on; by default ``example_inputs``.
        inputs: what the model is called with, from a batch of ``data``.
        statistics: what :func:`decomp.calibrate` made of data: factors, and the ranks of budgets, come from it.
        finetune: what happens to each compressed model before it is scored; it changes the model in place.
        path: a JSON file that keeps the points that are done; a call that was cut off goes on from there. It does
            not know what ``evaluate``, ``data`` and ``finetune`` do: after changing them write another path.
        layers: which layers; see :func:`decomp.tucker`.
        exclude: which of these stay dense.
        progress: show a progress bar; by default where there is a terminal.

    Raises:
        ValueError: ``path`` holds points of another model or of another kind of score.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> curve = tradeoff(model, torch.randn(8, 64), budgets=(0.75, 0.5), progress=False)
    >>> [(point.line, point.label, round(curve.share(point), 1)) for point in curve.points]
    [('auto', 'macs=0.75', 0.8), ('auto', 'macs=0.5', 0.5)]
    >>> curve.best(max_drop=1.0).macs.after < 0.51 * curve.dense.macs
    True
    """
    surgery.check_model(model)
    judge = Judge(model, example_inputs, evaluate, data, inputs)
    work = [*budget_wants(methods, budgets, cost), *rule_wants(rules)]
    if not work:
        raise ValueError("nothing to measure: give budgets= with methods=, or rules=")
    planner = Planner(model, example_inputs, statistics, layers, exclude, cost)
    head = {"model": planner.digest(), "score": judge.name, "finetuned": finetune is not None}
    head["example"] = digest(example_inputs) if evaluate is None and data is None else ""
    head["statistics"] = digest([vars(each) for each in statistics.values()]) if statistics else ""
    store = Store.open(path, head)
    if store.dense is None:
        seconds = latency([model], example_inputs)[0]
        store.dense = Point(DENSE, DENSE, *planner.dense_cost(), seconds, judge(model))
        store.save()
    for want in bar(progress, "trade-off", work):
        if want.key not in store.points:
            store.add(_measured(model, planner, want, store.dense, judge, finetune))
    points = [planner.informed(want, store.points[want.key]) for want in work]
    return Tradeoff(points, store.dense, judge.name, judge.is_error, cost)


def _measured(
    model: nn.Module,
    planner: Planner,
    want: Want,
    dense: Point,
    judge: Judge,
    finetune: Callable[[nn.Module], Any] | None,
) -> Point:
    """Make the model of one point and measure it; a point that cannot be made has a note instead of a plan."""
    try:
        plan = planner.plan(want)
    except OutOfReach as error:
        return Point(*want.key, 0, 0, 0.0, 0.0, note=str(error))
    if not any(choice.ranks for choice in plan.values()):
        return Point(*want.key, 0, 0, 0.0, 0.0, note="no layer is replaced")
    small = plan.apply(model, progress=False)  # the one place where a plan becomes a model
    if finetune is not None:
        finetune(small)
    score = judge(small)
    macs = sum(choice.macs.after for choice in plan.values()) if plan.macs is None else plan.macs.after
    # In turn with the dense model, whose seconds may have drifted since its own point was measured.
    seconds, beside = latency([small, model], planner.example_inputs)
    return Point(*want.key, int(plan.params.after), int(macs), dense.seconds * seconds / beside, score, plan)

"""Trade-offs: what a model costs against how good it is, over methods, rules and budgets."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from decomp import api, surgery
from decomp.budgets import OutOfReach
from decomp.calibration import Statistics
from decomp.choices import DENSE
from decomp.methods import METHODS, Method, row_named
from decomp.plans import Plan
from decomp.points import COSTS, Point, Store, Tradeoff
from decomp.progress import bar
from decomp.ranks import RULES, Rule, parse_spec
from decomp.scores import Evaluate, Judge
from decomp.selection import Selector
from decomp.surveys import Survey, survey
from decomp.timing import latency

RULE = "rules"
BUDGETS = (0.75, 0.5, 0.35, 0.25, 0.15)
Methods = Sequence[str | Method | Sequence[str | Method]]


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
        statistics: what :func:`decomp.calibrate` made of data: factors and ranks then come from it.
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
    work = [*_budget_wants(methods, budgets, cost), *_rule_wants(rules)]
    if not work:
        raise ValueError("nothing to measure: give budgets= with methods=, or rules=")
    planner = _Planner(model, example_inputs, statistics, layers, exclude, cost)
    head = {"model": planner.digest(), "score": judge.name, "finetuned": finetune is not None}
    head["example"] = _digest_of(example_inputs) if evaluate is None and data is None else ""
    head["statistics"] = _digest_of([vars(each) for each in statistics.values()]) if statistics else ""
    store = Store.open(path, head)
    if store.dense is None:
        seconds = latency([model], example_inputs)[0]
        store.dense = Point(DENSE, DENSE, *planner.dense_cost(), seconds, judge(model))
        store.save()
    for want in bar(progress, "trade-off", work):
        if want.key not in store.points:
            store.add(_measured(model, planner, want, store.dense, judge, finetune))
    points = [planner.informed(store.points[want.key]) for want in work]
    return Tradeoff(points, store.dense, judge.name, judge.is_error, cost)


class _Want(NamedTuple):
    """One point to measure: a method and a budget, or a rule."""

    line: str
    label: str
    methods: "str | Sequence[str | Method]"
    budget: float | None
    rule: Any

    @property
    def key(self) -> tuple[str, str]:
        return (self.line, self.label)


def _budget_wants(methods: str | Methods, budgets: Sequence[float], cost: str) -> Iterator[_Want]:
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
            yield _Want(line, f"{cost}={share:g}", rows, share, None)


def _called(row: Method) -> str:
    """The name of a row, with its options where they are not those of the table."""
    if METHODS.get(row.name) is row:
        return row.name
    preset = ", ".join(f"{n}={p}" for n, p in zip(row.rank_names, row.preset, strict=False) if p is not None)
    return f"{row.name} ({preset or 'own'})"


def _rule_wants(rules: "str | Rule | Sequence[str | Rule]") -> Iterator[_Want]:
    for given in rules if isinstance(rules, list | tuple) else [rules]:
        rule = parse_spec(given, RULES)
        line = given if isinstance(given, str) else type(rule).__name__
        yield _Want(line, repr(rule), "", None, rule)


class _Planner:
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

    def plan(self, want: _Want) -> Plan:
        """The plan of one point.

        Raises:
            OutOfReach: the budget is less than the method can reach.
        """
        if want.budget is None:
            if RULE not in self._plans:
                self._plans[RULE] = api.plan(self._model, **self._options)
            return self._plans[RULE].with_ranks("*", want.rule)
        if want.line not in self._plans:
            # A budget that leaves all dense: only the analysis is wanted, no budget is out of its reach.
            unbounded: dict[str, Any] = {self._cost: 1e9 if self._cost == "seconds" else 10**30}
            self._plans[want.line] = api.plan(self._model, methods=want.methods, **unbounded, **self._options)
        plan = self._plans[want.line]
        unit = plan.seconds.before if self._cost == "seconds" and plan.seconds else 1.0
        budget: dict[str, Any] = {self._cost: want.budget * unit}
        return plan.with_budget(**budget)

    def informed(self, point: Point) -> Point:
        """The point; one that was read from a file with the statistics that its factors come from."""
        if point.plan is None or point.plan.candidates or self._options["data"] is None:
            return point
        return replace(point, plan=api.plan(self._model, ranks=point.plan, **self._options))

    def _survey(self) -> Survey:
        chosen = {key: self._options[key] for key in ("layers", "exclude", "example_inputs")}
        return survey(self._model, lambda name, module: "", **chosen)

    def dense_cost(self) -> tuple[int, int]:
        """Parameters and MACs of the model as it is."""
        cost = self._survey().cost
        return cost.params, cost.macs

    def digest(self) -> str:
        """What tells this model, these layers and inputs of this size from others."""
        surveyed = self._survey()
        found = sha256(
            repr((surveyed.seen and surveyed.seen.calls, sorted(surveyed.open), surveyed.cost)).encode()
        )
        for name, tensor in self._model.state_dict().items():
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_digest_of(tensor)}".encode())
        return found.hexdigest()


def _digest_of(values: Any) -> str:
    """What tells these tensors from others of the same shape."""
    found = sha256()
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _measured(
    model: nn.Module,
    planner: _Planner,
    want: _Want,
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
    macs = plan.macs.after if plan.macs else 0
    # In turn with the dense model, whose seconds may have drifted since its own point was measured.
    seconds, beside = latency([small, model], planner.example_inputs)
    return Point(*want.key, int(plan.params.after), int(macs), dense.seconds * seconds / beside, score, plan)

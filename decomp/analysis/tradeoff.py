"""Trade-offs: what a model costs against how good it is, over methods, rules and budgets."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from decomp._util.progress import bar
from decomp.analysis.points import Point, Store, Tradeoff
from decomp.analysis.scores import Evaluate, Judge
from decomp.analysis.wanted import Methods, Planner, Want, budget_wants, digest_of, rule_wants
from decomp.calibration.calibrate import Statistics
from decomp.network import surgery
from decomp.network.selection import Selector
from decomp.planning.budget import OutOfReach
from decomp.planning.choices import DENSE
from decomp.planning.latency import latency
from decomp.ranks import Rule

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
    head["example"] = digest_of(example_inputs) if evaluate is None and data is None else ""
    head["statistics"] = digest_of([vars(each) for each in statistics.values()]) if statistics else ""
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

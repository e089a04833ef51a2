"""The points that a trade-off is to have: what each is asked for, and the plan that it gets."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from decomp import api
from decomp.analysis.points import COSTS, Point
from decomp.calibration.calibrate import Statistics
from decomp.methods import METHODS, Method, kinds_of, row_named
from decomp.network.selection import Selector
from decomp.planning.plan import Plan
from decomp.planning.survey import Survey, survey
from decomp.ranks import RULES, Rule, parse_spec

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
        found = sha256(
            repr((surveyed.seen and surveyed.seen.calls, sorted(surveyed.open), surveyed.cost)).encode()
        )
        for name, tensor in self._model.state_dict().items():
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {digest_of(tensor)}".encode())
        return found.hexdigest()


def digest_of(values: Any) -> str:
    """What tells these tensors from others of the same shape."""
    found = sha256()
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

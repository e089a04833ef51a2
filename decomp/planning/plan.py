"""The plan: which method and ranks every layer gets, as data that can be read, edited, saved and applied."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Unpack, cast

from torch import nn

from decomp._util import tables
from decomp._util.arguments import takes
from decomp._util.naming import matches, some
from decomp._util.schema import Value
from decomp.calibration.moments import Moments
from decomp.methods import METHODS, Method
from decomp.network import surgery
from decomp.network.eligibility import ALREADY_FACTORIZED
from decomp.planning.budget import Budget, Request, spend
from decomp.planning.build import (
    correct_means,
    decomposed,
    layers_to_replace,
    measured,
    require_fit,
    structures,
)
from decomp.planning.candidate import Candidate
from decomp.planning.choice import COLUMNS, Change, Choice
from decomp.planning.cost import COSTS, COUNTED, Bounds, Cost
from decomp.ranks import RULES, RankSpec, parse_spec

FORMAT = "decomp-plan-2"
EARLIER_FORMAT = "decomp-plan-1"  # params and macs of a layer as fields of their own, and no request
KEPT_DENSE = "kept dense on request"
NO_REQUEST = Request()
PLAN = "decomp_plan"  # the attribute of a model that carries the plan it was made by


class CompressedModule(nn.Module):
    """What the calls return, for type checkers: the user's own model, with the plan that it was made by."""

    decomp_plan: "Plan"
    decomp_finetuning: Any


class Plan(Mapping[str, Choice]):
    """The decision for every layer, by its qualified name. Nothing is changed by making one.

    ``print(plan)`` shows it as a table. A plan is never changed: ``with_ranks``, ``with_budget`` and
    ``keep_dense`` return a new one, at once, from the spectra that were computed when the plan was made.
    ``request`` is what a budget
    was asked for: the methods to choose among, the objective, what ranks are multiples of, and weights of layers.
    """

    def __init__(
        self,
        choices: Mapping[str, Choice],
        before: Cost,
        candidates: Mapping[str, Sequence[Candidate]] | None = None,
        *,
        statistics: Mapping[str, Moments] | None = None,
        methods: Mapping[str, Method] | None = None,
        seconds: Change | None = None,
        request: Request | None = None,
    ) -> None:
        self._choices = dict(choices)
        self._candidates = dict(candidates or {})
        self._statistics = dict(statistics or {})
        self._methods = {name: found[0].method for name, found in self._candidates.items()} | dict(methods or {})
        self._before = before
        self._seconds = seconds
        self.request = request or NO_REQUEST

    def _with(
        self,
        choices: Mapping[str, Choice],
        candidates: Mapping[str, Sequence[Candidate]] | None = None,
        request: Request | None = None,
    ) -> "Plan":
        """The plan with some choices, some candidates or the request replaced."""
        return Plan(
            self._choices | dict(choices),
            self._before,
            self._candidates | dict(candidates or {}),
            statistics=self._statistics,
            methods=self._methods if not self._candidates else None,
            seconds=self._seconds,
            request=request or self.request,
        )

    def __deepcopy__(self, memo: object) -> "Plan":
        return self

    def __getstate__(self) -> dict[str, object]:
        """The decision is pickled, without the spectra that make it editable and the statistics of the data."""
        own = {name: found for name, found in self._methods.items() if found.name not in METHODS}
        return vars(self) | {"_candidates": {}, "_statistics": {}, "_methods": own}

    def __getitem__(self, name: str) -> Choice:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    @property
    def candidates(self) -> Mapping[str, Sequence[Candidate]]:
        """What each layer was analysed under, the method in use first; empty for a plan that came from JSON."""
        return self._candidates

    @property
    def statistics(self) -> Mapping[str, Moments]:
        """What was measured on data of each layer; empty for a plan made without data, or read from JSON."""
        return self._statistics

    def cost(self, kind: str) -> Change | None:
        """A kind of cost of the whole model, before and after; None where it is not known.

        MACs are known of a plan made with example inputs, seconds of one made with ``seconds=``.
        """
        if kind not in COUNTED:
            return self._predicted_seconds()
        if not self._before.get(kind):
            return None
        return Change(self._before[kind], self._before[kind] - sum(choice.saved(kind) for choice in self.values()))

    @property
    def params(self) -> Change:
        """Parameters of the whole model, before and after."""
        return self.cost("params") or Change(0, 0)

    @property
    def macs(self) -> Change | None:
        """MACs of the whole model on the example inputs, before and after; None for a plan made without them."""
        return self.cost("macs")

    @property
    def bytes(self) -> Change | None:
        """Bytes of the parameters of the whole model, before and after; None for a plan of an earlier version."""
        return self.cost("bytes")

    @property
    def seconds(self) -> Change | None:
        """Seconds of one pass: measured before, predicted after; None for a plan made without ``seconds=``."""
        return self.cost("seconds")

    def _predicted_seconds(self) -> Change | None:
        if self._seconds is None or not self._candidates:
            return self._seconds
        found = ((self[name], candidates[0]) for name, candidates in self._candidates.items())
        saved = sum(c.dense_cost("seconds") - c.seconds(choice.ranks) for choice, c in found if choice.ranks)
        return Change(self._seconds.before, self._seconds.before - saved)

    def with_ranks(self, layers: str, ranks: RankSpec) -> "Plan":
        """Return the plan with other ranks for the layers that match a glob.

        Args:
            layers: a glob on the names of layers; ``*`` crosses dots.
            ranks: a rule's name, a rule, an int or a tuple.

        Raises:
            ValueError: nothing matches, the layer cannot be decomposed, the ranks do not fit it, or the plan
                came from JSON and knows no spectra.
        """
        names = self._matching(layers)
        if not self._candidates:
            raise ValueError(
                "this plan came from a file or a model and holds no spectra: make an editable one with "
                "decomp.plan(model, ranks=plan)"
            )
        found = [name for name in names if name in self._candidates]
        if not found:
            raise ValueError(f"layer {names[0]!r} cannot be decomposed: {self[names[0]].reason}")
        asked = parse_spec(ranks, RULES, exact=layers in self)
        return self._with({name: self._candidates[name][0].decide(asked) for name in found})

    @takes(Bounds)
    def with_budget(
        self,
        *,
        objective: str | None = None,
        multiple_of: int | None = None,
        weights: Mapping[str, float] | None = None,
        **bounds: Unpack[Bounds],
    ) -> "Plan":
        """Return the plan with the ranks of all layers chosen anew for a budget, at once.

        Layers that :meth:`keep_dense` pinned stay so.

        Args:
            objective: see :func:`decomp.compress`; by default that of ``request``, as for the next two.
            multiple_of: ranks are multiples of it, or full.
            weights: how much the error of a layer counts, by name; {} for none.

        Raises:
            ValueError: there is not exactly one budget, or it cannot be reached (the message says what can).
        """
        given = {"objective": objective, "multiple_of": multiple_of, "weights": weights}
        changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        request = replace(self.request, budget=Budget.of(bounds), **changed)
        free = {name: found for name, found in self._candidates.items() if self[name].reason != KEPT_DENSE}
        budget = request.budget
        if budget is None or not free:
            kinds = ", ".join(f"{kind}=" for kind in COSTS)
            raise ValueError(f"write one of {kinds}, on a plan that decomp.plan made with layers to choose")
        total = self._total(budget.kind)
        settled = {name: choice for name, choice in self.items() if name not in free}
        spent = spend(free, budget, total, settled, request)
        reason = f"the budget {budget.kind}={budget.value} spends nothing on it"
        if budget.absolute(total) >= total:
            reason = f"the model is within {budget.kind}={budget.value} as it is"
        return self.choosing({name: (c, c.choose(ranks, reason)) for name, (c, ranks) in spent.items()}, request)

    def _total(self, kind: str) -> float:
        """What the whole model costs as it is.

        Raises:
            ValueError: that is not known; the message says what to give.
        """
        cost = self.cost(kind)
        if cost is None and kind not in COUNTED:
            raise ValueError(f"no layer was timed: make the plan with {kind}=")
        if cost is None:
            raise ValueError(
                f"a budget of {COSTS[kind].label} needs the sizes of inputs (give example_inputs=) and layers "
                "that multiply; where there are none make it one of parameters"
            )
        return float(cost.before)

    def choosing(self, chosen: Mapping[str, tuple[Candidate, Choice]], request: Request | None = None) -> "Plan":
        """Return the plan with these choices, each with the candidate that it was made from."""
        first = {
            name: [candidate, *(other for other in self._candidates.get(name, ()) if other is not candidate)]
            for name, (candidate, _) in chosen.items()
        }
        return self._with({name: choice for name, (_, choice) in chosen.items()}, first, request)

    def keep_dense(self, layers: str) -> "Plan":
        """Return the plan with the layers that match a glob left dense.

        Raises:
            ValueError: nothing matches, or a layer is factorized already.
        """
        names = self._matching(layers)
        factorized = [name for name in names if self[name].ranks and self[name].reason == ALREADY_FACTORIZED]
        if factorized:
            raise ValueError(f"layer {factorized[0]!r} is {ALREADY_FACTORIZED}: it cannot be kept dense")
        kept = {name: self[name].as_dense(KEPT_DENSE) for name in names}
        return self._with(kept)

    def _matching(self, layers: str) -> list[str]:
        names = [name for name in self if matches(name, layers)]
        if not names:
            raise ValueError(f"{layers!r} matches no layer of the plan; it has {some(list(self))}")
        return names

    def apply(self, model: nn.Module, *, inplace: bool = False, progress: bool | None = None) -> CompressedModule:
        """Decompose the weights of ``model`` and return the model with the factorized layers swapped in.

        Args:
            model: the model that the plan was made for; left as it is, unless ``inplace``.
            inplace: change ``model`` itself. Every factor is computed before the first swap.
            progress: show a progress bar; by default where there is a terminal.

        Raises:
            ValueError: the plan replaces no layer, or was made for another model.
        """
        replaced = layers_to_replace(model, self, self.method_of, needs_values=True)
        new = decomposed(replaced, self, self.method_of, self._candidates, self._statistics, progress)
        small = self.swap(model, new, measured(self, replaced, new, self._statistics), inplace=inplace)
        correct_means(small, replaced, new, self._statistics)
        return small

    def build(self, model: nn.Module, *, inplace: bool = False) -> CompressedModule:
        """Return ``model`` with untrained factorized layers: the structure for ``load_state_dict``, or to train.

        Raises:
            ValueError: the plan replaces no layer, or was made for another model.
        """
        dense = layers_to_replace(model, self, self.method_of, needs_values=False)
        return self.swap(model, structures(dense, self, self.method_of), {}, inplace=inplace)

    def to_json(self) -> str:
        """Write the plan as JSON; :meth:`from_json` reads it back."""
        head = {
            "format": FORMAT,
            "before": self._before,
            "seconds": self.seconds,
            "request": self.request.to_dict(),
        }
        layers = {name: asdict(choice) for name, choice in self.items()}
        return json.dumps({**head, "layers": layers}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan back. It can be applied and built; to edit it, make one of it with ``decomp.plan``.

        Raises:
            ValueError: the text is not a plan; the message names the field.
        """
        try:
            return read_plan(Value.parse(text))
        except ValueError as error:
            raise ValueError(f"not a plan of decomp in JSON: {error}") from None

    def method_of(self, name: str) -> Method:
        """The method of a layer that this plan replaces.

        Raises:
            ValueError: it is none of ours, and the plan came from JSON, which holds only its name.
        """
        method = self._methods.get(name) or METHODS.get(self[name].method)
        if method is None:
            raise ValueError(f"layer {name!r}: unknown method {self[name].method!r}; known are {sorted(METHODS)}")
        return method

    def require_fit(self, modules: Mapping[str, nn.Module]) -> None:
        """Refuse layers that are not those that the plan replaces; see ``build.require_fit``."""
        require_fit(self, self.method_of, modules)

    def swap(
        self, model: nn.Module, new: Mapping[str, nn.Module], settled: Mapping[str, Choice], *, inplace: bool
    ) -> CompressedModule:
        """Swap layers in, and leave the plan on the model, with the choices that came out otherwise."""
        model, choices = surgery.swap(model, new, inplace=inplace), self._choices | dict(settled)
        own = {n: m for n, m in self._methods.items() if self[n].ranks and m.name not in METHODS}
        plan = Plan(choices, self._before, methods=own, seconds=self.seconds, request=self.request)
        setattr(model, PLAN, plan)
        return cast(CompressedModule, model)

    def __repr__(self) -> str:
        return f"<Plan: {sum(bool(choice.ranks) for choice in self.values())} of {len(self)} layers replaced>"

    def __str__(self) -> str:
        replaced = f"{sum(bool(choice.ranks) for choice in self.values())} of {len(self)} replaced"
        params = " => ".join(map(tables.number, self.params))
        macs = " => ".join(map(tables.number, self.macs)) if self.macs else ""
        names = {} if self.macs else {">MACs": ">MACs (share, large input)"}
        if any(choice.output_error is not None for choice in self.values()):
            names[">error"] = ">error of weight / output"
        columns = [names.get(column, column) for column in COLUMNS]
        rows = [choice.row(name) for name, choice in self.items()]
        table = tables.render("", columns, rows, ("whole model", replaced, "", "", params, macs, "", ""))
        return table + "".join(f"\n\n{line}" for line in self._other_costs())

    def _other_costs(self) -> Iterator[str]:
        """Lines about the kinds of cost that have no column: seconds, and what the budget was about."""
        if self.seconds is not None:
            yield "latency {} measured => {} predicted".format(*map(tables.milliseconds, self.seconds))
        kind = self.request.budget.kind if self.request.budget else ""
        change = self.cost(kind) if kind in COUNTED and kind not in ("params", "macs") else None
        if change is not None:
            yield f"{COSTS[kind].label} {' => '.join(map(COSTS[kind].write, change))}"


def read_plan(value: Value) -> Plan:
    """Read a plan from the JSON that :meth:`Plan.to_json` wrote.

    Raises:
        ValueError: a field is unknown, missing, of another type or out of range; the message names it.
    """
    version = value.entries().get("format", Value(None, "format")).one_of([FORMAT, EARLIER_FORMAT])
    entry = (_of_earlier_format(value) if version == EARLIER_FORMAT else value).record(
        "format", "before", "seconds", "request", "layers"
    )
    before = entry["before"].record("params", optional=COUNTED)
    seconds = None
    if not entry["seconds"].is_null:
        measured_before, predicted = entry["seconds"].items(2)
        seconds = Change(measured_before.number(least=0), predicted.number())
    return Plan(
        {name: Choice.read(layer) for name, layer in entry["layers"].entries().items()},
        Cost({kind: count.integer(least=0) for kind, count in before.items()}),
        seconds=seconds,
        request=Request.read(entry["request"]),
    )


def _of_earlier_format(value: Value) -> Value:
    """A plan of the first format as one of today's."""
    entry, layers = value.record("format", "before", "seconds", "layers"), {}
    for name, layer in entry["layers"].entries().items():
        found = {key: inner.value for key, inner in layer.entries().items()}
        costs = {kind: found.pop(kind, None) for kind in ("params", "macs")}
        layers[name] = {**found, "costs": costs}
    return Value({**value.value, "layers": layers, "request": Request().to_dict()}, value.field)

"""The plan: method and ranks of every layer, as data that can be read, edited, saved and applied."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Unpack, cast

from torch import nn

from decomp._util import tables
from decomp._util.arguments import with_arguments
from decomp._util.naming import matches, some
from decomp._util.schema import Value
from decomp.calibration.moments import Moments
from decomp.methods import METHODS, Method
from decomp.network import surgery
from decomp.network.eligibility import ALREADY_FACTORIZED
from decomp.network.flops import uncounted_note
from decomp.network.restoring import all_or_nothing
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
from decomp.planning.choice import COLUMNS, KEPT_DENSE, Change, Choice
from decomp.planning.cost import COSTS, COUNTED, Bounds, Cost
from decomp.ranks import RULES, RankSpec, parse_spec

FORMAT = "decomp-plan-2"
EARLIER_FORMAT = "decomp-plan-1"  # with params and macs as separate fields of a layer, and without a request
PLAN = "decomp_plan"  # the attribute of a compressed model that holds its plan


class CompressedModule(nn.Module):
    """The return type of the calls, for type checkers: the user's own class, with its plan as an attribute."""

    decomp_plan: "Plan"
    decomp_finetuning: Any


class Plan(Mapping[str, Choice]):
    """The decision for every layer, by its qualified name. Making a plan does not change the model.

    ``print(plan)`` shows it as a table. Plans are immutable: ``with_ranks``, ``with_budget`` and ``keep_dense``
    return a new one, without delay, from the spectra computed when the plan was made. ``request`` holds the
    arguments of a budget: the methods to choose from, the objective, the multiple of ranks, and layer weights.
    ``uncounted`` are operators of the model whose MACs are not known, with the number of their calls: MACs and
    budgets of MACs leave them out.
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
        uncounted: Mapping[str, int] | None = None,
    ) -> None:
        self._choices = dict(choices)
        self._candidates = dict(candidates or {})
        self._statistics = dict(statistics or {})
        self._methods = {name: first.method for name, (first, *_) in self._candidates.items()} | dict(
            methods or {}
        )
        self._before = before
        self._seconds = seconds
        self.request = request or Request()
        self.uncounted = dict(uncounted or {})

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
            uncounted=self.uncounted,
        )

    def __deepcopy__(self, memo: object) -> "Plan":
        return self

    def __getstate__(self) -> dict[str, object]:
        """Pickle the decision without the spectra, which make it editable, and the statistics of the data."""
        own = {name: method for name, method in self._methods.items() if method.name not in METHODS}
        emptied: dict[str, object] = {"_candidates": {}, "_statistics": {}, "_methods": own}
        return vars(self) | emptied | {"_seconds": self.seconds}

    def __getitem__(self, name: str) -> Choice:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    @property
    def candidates(self) -> Mapping[str, Sequence[Candidate]]:
        """The candidates of each layer, the chosen method's first; empty for a plan from a file or a model."""
        return self._candidates

    @property
    def methods(self) -> Mapping[str, Method]:
        """The method of each layer that was analysed; for a plan from a file or a model, of the user's methods."""
        return self._methods

    @property
    def statistics(self) -> Mapping[str, Moments]:
        """The moments of each layer; empty for a plan made without data, or from a file or a model."""
        return self._statistics

    def cost(self, kind: str) -> Change | None:
        """A kind of cost of the whole model, before and after; None if it is not known.

        MACs are known if the plan was made with example inputs, seconds if it was made with ``seconds=``.
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
        pairs = ((self[name], candidates[0]) for name, candidates in self._candidates.items())
        saved = sum(c.dense_cost("seconds") - c.seconds(choice.ranks) for choice, c in pairs if choice.ranks)
        return Change(self._seconds.before, self._seconds.before - saved)

    def with_ranks(self, layers: str, ranks: RankSpec) -> "Plan":
        """Return the plan with other ranks for the layers that match a glob.

        Args:
            layers: a glob on the names of layers; ``*`` crosses dots.
            ranks: a rule's name, a rule, an int or a tuple.

        Raises:
            ValueError: nothing matches, the layer cannot be decomposed, the ranks do not fit it, or the plan
                is from a file or a model and holds no spectra.
        """
        names = self._matching(layers)
        if not self._candidates:
            raise ValueError(
                "this plan came from a file or a model and holds no spectra: make an editable one with "
                "decomp.plan(model, ranks=plan)"
            )
        editable = [name for name in names if name in self._candidates]
        if not editable:
            raise ValueError(f"layer {names[0]!r} cannot be decomposed: {self[names[0]].reason}")
        spec = parse_spec(ranks, RULES, exact=layers in self)
        return self._with({name: self._candidates[name][0].decide(spec) for name in editable})

    @with_arguments(Bounds)
    def with_budget(
        self,
        *,
        objective: str | None = None,
        multiple_of: int | None = None,
        weights: Mapping[str, float] | None = None,
        **bounds: Unpack[Bounds],
    ) -> "Plan":
        """Return the plan with methods and ranks of all layers chosen again for a budget.

        Layers that :meth:`keep_dense` was called for stay dense.

        Args:
            objective: see :func:`decomp.compress`; this and the next two are by default those of ``request``.
            multiple_of: ranks are multiples of it, or full.
            weights: weights of the layers' losses, by name; {} for none.

        Raises:
            ValueError: there is not exactly one budget, or it cannot be reached (the message gives the
                smallest cost).
        """
        given = {"objective": objective, "multiple_of": multiple_of, "weights": weights}
        changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        request = replace(self.request, budget=Budget.of(bounds), **changed)
        free = {name: each for name, each in self._candidates.items() if not self[name].kept_dense}
        budget = request.budget
        if budget is None or not free:
            kinds = ", ".join(f"{kind}=" for kind in COSTS)
            raise ValueError(f"write one of {kinds}, on a plan that decomp.plan made with layers to choose")
        total = self._total(budget.kind)
        fixed_choices = {name: choice for name, choice in self.items() if name not in free}
        spent = spend(free, budget, total, fixed_choices, request)
        reason = f"dense under the budget {budget.kind}={budget.value}"
        if budget.absolute(total) >= total:
            reason = f"the dense model is within {budget.kind}={budget.value}"
        return self.choosing({name: (c, c.choose(ranks, reason)) for name, (c, ranks) in spent.items()}, request)

    def _total(self, kind: str) -> float:
        """The cost of the whole dense model.

        Raises:
            ValueError: it is not known; the message names the argument to give.
        """
        cost = self.cost(kind)
        if cost is None and kind not in COUNTED:
            raise ValueError(f"no layer was timed: make the plan with {kind}=")
        if cost is None:
            raise ValueError(
                f"a budget of {COSTS[kind].label} needs the sizes of inputs (give example_inputs=) and layers "
                "with MACs; for a model without them write a budget of params="
            )
        return float(cost.before)

    def choosing(self, chosen: Mapping[str, tuple[Candidate, Choice]], request: Request | None = None) -> "Plan":
        """Return the plan with these choices, each given with the candidate that it comes from."""
        first = {
            name: [candidate, *(other for other in self._candidates.get(name, ()) if other is not candidate)]
            for name, (candidate, _) in chosen.items()
        }
        return self._with({name: choice for name, (_, choice) in chosen.items()}, first, request)

    def keep_dense(self, layers: str) -> "Plan":
        """Return the plan with the layers that match a glob left dense, also by :meth:`with_budget`.

        Raises:
            ValueError: nothing matches, or a layer is factorized already.
        """
        names = self._matching(layers)
        factorized = [name for name in names if self[name].was_factorized]
        if factorized:
            raise ValueError(f"layer {factorized[0]!r} is {ALREADY_FACTORIZED}: it cannot be kept dense")
        return self._with({name: self[name].keep_dense(name in self._candidates) for name in names})

    def _matching(self, layers: str) -> list[str]:
        names = [name for name in self if matches(name, layers)]
        if not names:
            raise ValueError(f"{layers!r} matches no layer of the plan; it has {some(list(self))}")
        return names

    @all_or_nothing()
    @surgery.outside_inference_mode()
    def apply(self, model: nn.Module, *, inplace: bool = False, progress: bool | None = None) -> CompressedModule:
        """Decompose the layers of ``model`` and return a model with the factorized layers in their place.

        Args:
            model: the model that the plan was made for; not changed, unless ``inplace``.
            inplace: change ``model`` itself; all factors are computed before the first layer is replaced.
            progress: show a progress bar; by default where there is a terminal.

        Raises:
            ValueError: the plan replaces no layer, or was made for another model.
        """
        replaced = layers_to_replace(model, self, self.method_of, needs_values=True)
        new = decomposed(replaced, self, self.method_of, self._candidates, self._statistics, progress)
        settled = measured(self, replaced, new, self._candidates, self._statistics)
        small = self.swap(model, new, settled, inplace=inplace)
        correct_means(small, replaced, new, self._statistics)
        return small

    @all_or_nothing()
    @surgery.outside_inference_mode()
    def build(self, model: nn.Module, *, inplace: bool = False) -> CompressedModule:
        """Return ``model`` with untrained factorized layers, for ``load_state_dict`` or training from scratch.

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
        return json.dumps({**head, "uncounted": self.uncounted, "layers": layers}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan, which can be applied and built; ``decomp.plan(model, ranks=plan)`` makes it editable.

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
            ValueError: it is the user's own method, and the plan is from a file, which holds only its name.
        """
        method = self._methods.get(name) or METHODS.get(self[name].method)
        if method is None:
            raise ValueError(f"layer {name!r}: unknown method {self[name].method!r}; known are {sorted(METHODS)}")
        return method

    def require_fit(self, modules: Mapping[str, nn.Module]) -> None:
        """Check that these are the layers that the plan replaces; see ``build.require_fit``."""
        require_fit(self, self.method_of, modules)

    def swap(
        self, model: nn.Module, new: Mapping[str, nn.Module], updated: Mapping[str, Choice], *, inplace: bool
    ) -> CompressedModule:
        """Replace layers, and attach the plan with these updated choices to the model."""
        model, choices = surgery.swap(model, new, inplace=inplace), self._choices | dict(updated)
        own = {n: m for n, m in self._methods.items() if self[n].ranks and m.name not in METHODS}
        plan = Plan(
            choices,
            self._before,
            methods=own,
            seconds=self.seconds,
            request=self.request,
            uncounted=self.uncounted,
        )
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
            # Plans with statistics predict; that of a compressed model has what was measured.
            names[">error"] = f">error of weight / {'predicted ' if self._statistics else ''}output"
        columns = [names.get(column, column) for column in COLUMNS]
        rows = [choice.row(name) for name, choice in self.items()]
        table = tables.render("", columns, rows, ("whole model", replaced, "", "", params, macs, "", ""))
        return table + "".join(f"\n\n{line}" for line in self._other_costs())

    def _other_costs(self) -> Iterator[str]:
        """Lines about kinds of cost without a column: seconds, and the kind of the budget."""
        if self.uncounted:
            yield uncounted_note(self.uncounted)
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
        "format", "before", "seconds", "request", "uncounted", "layers"
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
        uncounted={name: calls.integer(least=1) for name, calls in entry["uncounted"].entries().items()},
    )


def _of_earlier_format(value: Value) -> Value:
    """Convert a plan of the first format to the present one."""
    entry, layers = value.record("format", "before", "seconds", "layers"), {}
    for name, layer in entry["layers"].entries().items():
        found = {key: inner.value for key, inner in layer.entries().items()}
        costs = {kind: found.pop(kind, None) for kind in ("params", "macs")}
        layers[name] = {**found, "costs": costs, "kept_dense": found.get("reason") == KEPT_DENSE}
    return Value({**value.value, "layers": layers, "request": Request().to_dict(), "uncounted": {}}, value.field)

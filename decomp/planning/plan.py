"""The plan: method and ranks of every layer, as data that can be read, edited, saved and applied."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Unpack, cast

from torch import nn

from decomp._util import tables
from decomp._util.arguments import with_arguments
from decomp._util.naming import matches, some
from decomp._util.schema import Value
from decomp.calibration.recurrent import AnyMoments
from decomp.methods import METHODS, Method
from decomp.network import surgery
from decomp.network.eligibility import ALREADY_FACTORIZED
from decomp.network.flops import uncounted_note
from decomp.network.restoring import all_or_nothing
from decomp.network.unpacking import unpacked
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
from decomp.planning.choice import COLUMNS, KEPT_DENSE, Change, Choice, Measured, where_it_stays
from decomp.planning.cost import COSTS, COUNTED, Bounds, Cost
from decomp.planning.safeguard import safeguard
from decomp.ranks import RULES, RankSpec, parse_spec

FORMAT = "decomp-plan-2"
EARLIER_FORMAT = "decomp-plan-1"  # with params and macs as separate fields of a layer, and without a request
LITTLE_GAIN = 1.25  # a plan whose model has fewer times less of a cost says what stands in the way
PLAN = "decomp_plan"  # the attribute of a compressed model that holds its plan


_TOLD_OF_SWAPS: list[Callable[[nn.Module], None]] = []


def after_swaps(told: Callable[[nn.Module], None]) -> None:
    """Have a function called with each model in which a call swapped layers, once it has its plan or has none."""
    _TOLD_OF_SWAPS.append(told)


def tell_swapped(model: nn.Module) -> None:
    """Call the functions of :func:`after_swaps`."""
    for told in _TOLD_OF_SWAPS:
        told(model)


class CompressedModule(nn.Module):
    """The return type of the calls, for type checkers: the user's own class, with its plan as an attribute."""

    decomp_plan: "Plan"
    decomp_finetuning: Any


class Plan(tables.Tabular, Mapping[str, Choice]):
    """The decision for every layer, by its qualified name. Making a plan does not change the model.

    ``print(plan)`` shows it as a table, ``records`` and ``to_pandas`` give it as data. Plans are immutable:
    ``with_ranks``, ``with_budget`` and ``keep_dense`` return a new one, without delay, from the spectra computed
    when the plan was made. ``request`` holds the arguments of a budget: the methods to choose from, the objective,
    the multiple of ranks, and layer weights. ``measured`` holds the seconds that were measured in a runtime, for a
    plan made with ``seconds=`` and ``runtime=``. ``uncounted`` are operators of the model whose MACs are not
    known, with the number of their calls: MACs and budgets of MACs leave them out.
    """

    def __init__(
        self,
        choices: Mapping[str, Choice],
        before: Cost,
        candidates: Mapping[str, Sequence[Candidate]] | None = None,
        *,
        statistics: Mapping[str, AnyMoments] | None = None,
        methods: Mapping[str, Method] | None = None,
        seconds: Change | None = None,
        measured: Measured | None = None,
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
        self.measured = measured
        self.request = request or Request()
        self.uncounted = dict(uncounted or {})

    def _with(
        self,
        choices: Mapping[str, Choice],
        candidates: Mapping[str, Sequence[Candidate]] | None = None,
        request: Request | None = None,
        before: Cost | None = None,
        uncounted: Mapping[str, int] | None = None,
        measured: Measured | None = None,
    ) -> "Plan":
        """The plan with some choices, some candidates, the request or the costs of the whole replaced."""
        return Plan(
            self._choices | dict(choices),
            before or self._before,
            self._candidates | dict(candidates or {}),
            statistics=self._statistics,
            methods=self._methods if not self._candidates else None,
            seconds=self._seconds,
            measured=measured,
            request=request or self.request,
            uncounted=self.uncounted if uncounted is None else uncounted,
        )

    def with_macs(self, macs: Mapping[str, Change], total: int, uncounted: Mapping[str, int]) -> "Plan":
        """Return the plan with other MACs, those of other inputs: of each layer, and of the whole dense model.

        The ranks stay as they are. The candidates keep their prices: they are those of the inputs of the plan.
        """
        choices = {
            name: replace(self[name], costs={**self[name].costs, "macs": each}) for name, each in macs.items()
        }
        return self._with(choices, before=Cost({**self._before, "macs": total}), uncounted=uncounted)

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
    def statistics(self) -> Mapping[str, AnyMoments]:
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
        """Seconds of one pass, measured before, predicted after; None for a plan made without ``seconds=``."""
        return self.cost("seconds")

    def _predicted_seconds(self) -> Change | None:
        if self._seconds is None or not self._candidates:
            return self._seconds
        pairs = ((self[name], candidates[0]) for name, candidates in self._candidates.items())
        saved = sum(c.dense_cost("seconds") - c.seconds(choice.ranks) for choice, c in pairs if choice.ranks)
        return Change(self._seconds.before, self._seconds.before - saved)

    def with_measured(self, runtime: str, seconds: Change) -> "Plan":
        """Return the plan with the seconds that the dense and the compressed model take in a runtime."""
        return self._with({}, measured=Measured(runtime, seconds))

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
        self._require_spectra()
        editable = [name for name in names if name in self._candidates]
        if not editable:
            raise ValueError(f"layer {names[0]!r} cannot be decomposed: {self[names[0]].reason}")
        spec = parse_spec(ranks, RULES, exact=layers in self)
        limits: Any = {"multiple_of": self.request.multiple_of, "min_gain": self.request.min_gain}
        firsts = {name: self._candidates[name][0] for name in editable}
        decided = {name: first.decide(spec, **limits) for name, first in firsts.items()}
        rules = {name: spec if name in decided else None for name in self._candidates}
        return self._with(decided | safeguard(self._choices | decided, rules, firsts, **limits))

    @with_arguments(Bounds)
    def with_budget(
        self,
        *,
        objective: str | None = None,
        multiple_of: int | None = None,
        weights: Mapping[str, float] | None = None,
        min_gain: float | None = None,
        **bounds: Unpack[Bounds],
    ) -> "Plan":
        """Return the plan with methods and ranks of all layers chosen again for a budget.

        Layers that :meth:`keep_dense` was called for stay dense.

        Args:
            objective: see :func:`decomp.compress`; this and the next three are by default those of ``request``.
            multiple_of: ranks are multiples of it, or full.
            weights: weights of the layers' losses, by name; {} for none.
            min_gain: a layer is replaced only where that saves at least this share of its parameters or MACs.

        Raises:
            ValueError: there is not exactly one budget, or it cannot be reached (the message gives the
                smallest cost).
        """
        given = {"objective": objective, "multiple_of": multiple_of, "weights": weights, "min_gain": min_gain}
        changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        request = replace(self.request, budget=Budget.of(bounds), **changed)
        free = {name: each for name, each in self._candidates.items() if not self[name].kept_dense}
        budget = request.budget
        if budget is None:
            raise ValueError(f"with_budget needs one of {', '.join(f'{kind}=' for kind in COSTS)}, e.g. macs=0.5")
        self._require_spectra()
        if not free:
            raise ValueError(
                "no layer is left to choose for: all that can be decomposed were kept dense on request"
            )
        total = self._total(budget.kind)
        fixed_choices = {name: choice for name, choice in self.items() if name not in free}
        spent = spend(free, budget, total, fixed_choices, request)
        reason = f"dense under the budget {budget.kind}={budget.value}"
        if budget.absolute(total) >= total:
            reason = f"the dense model is within {budget.kind}={budget.value}"
            if budget.kind not in COUNTED:
                reason += f": it takes {COSTS[budget.kind].write(total)}"
        return self.choosing({name: (c, c.choose(ranks, reason)) for name, (c, ranks) in spent.items()}, request)

    def _require_spectra(self) -> None:
        """Refuse to choose ranks without spectra.

        Raises:
            ValueError: the plan holds none; the message says why.
        """
        if self._candidates:
            return
        if all(choice.reason and not choice.ranks for choice in self.values()):
            raise ValueError(
                f"no layer of this plan can be decomposed: {next(iter(self.values())).reason}"
                if self
                else "the plan has no layer"
            )
        raise ValueError(
            "this plan came from a file or a model and holds no spectra: make an editable one with "
            "decomp.plan(model, ranks=plan)"
        )

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

    def renamed(self, names: Mapping[str, str], before: Cost | None = None) -> "Plan":
        """Return the plan of another model: layers have new names, and those that are not named are left out.

        Args:
            names: the new name of each layer by its present one, in the order of the new plan.
            before: costs of the other model where it is dense; by default it costs what this one does.
        """
        weights = self.request.weights and {
            names[name]: weight for name, weight in self.request.weights.items() if name in names
        }
        return Plan(
            {new: self[name] for name, new in names.items()},
            before or self._before,
            methods={names[name]: method for name, method in self._methods.items() if name in names},
            seconds=self.seconds if before is None else None,
            request=replace(self.request, weights=weights),
            uncounted=self.uncounted if before is None else {},
        )

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
        whole = unpacked(model, self.replaced)
        replaced = layers_to_replace(whole, self, self.method_of, needs_values=True)
        new = decomposed(replaced, self, self.method_of, self._candidates, self._statistics, progress)
        settled = measured(self, replaced, new, self._statistics)
        layers = {name: each.layer for name, each in new.items()}
        small = self.swap(model, layers, settled, inplace=inplace)
        correct_means(small, layers, new, self._statistics)
        return small

    @all_or_nothing()
    @surgery.outside_inference_mode()
    def build(self, model: nn.Module, *, inplace: bool = False) -> CompressedModule:
        """Return ``model`` with untrained factorized layers, for ``load_state_dict`` or training from scratch.

        Raises:
            ValueError: the plan replaces no layer, or was made for another model.
        """
        whole = unpacked(model, self.replaced)
        dense = layers_to_replace(whole, self, self.method_of, needs_values=False)
        return self.swap(model, structures(dense, self, self.method_of), {}, inplace=inplace)

    def to_json(self) -> str:
        """Write the plan as JSON; :meth:`from_json` reads it back."""
        head: dict[str, Any] = {
            "format": FORMAT,
            "before": self._before,
            "seconds": self.seconds,
            "request": self.request.to_dict(),
        }
        if self.measured is not None:
            head["measured"] = self.measured
        layers = {name: asdict(choice) for name, choice in self.items()}
        return json.dumps({**head, "uncounted": self.uncounted, "layers": layers}, indent=1)

    @classmethod
    def from_json(cls, text: str, methods: Iterable[Method] = ()) -> "Plan":
        """Read a plan, which can be applied and built; ``decomp.plan(model, ranks=plan)`` makes it editable.

        Args:
            text: what :meth:`to_json` wrote.
            methods: methods of your own that the plan names.

        Raises:
            ValueError: the text is not a plan; the message names the field.
        """
        try:
            return read_plan(Value.parse(text), methods)
        except ValueError as error:
            raise ValueError(f"not a plan of decomp in JSON: {error}") from None

    def method_of(self, name: str) -> Method:
        """The method of a layer that this plan replaces.

        Raises:
            ValueError: it is the user's own method, and the plan is from a file, which holds only its name.
        """
        method = self._methods.get(name) or METHODS.get(self[name].method)
        if method is None:
            raise ValueError(
                f"layer {name!r}: unknown method {self[name].method!r}; known are {sorted(METHODS)}. Give a "
                "method of your own as methods=[...] to Plan.from_json or decomp.load"
            )
        return method

    @property
    def replaced(self) -> set[str]:
        """The names of the layers that this plan replaces."""
        return {name for name, choice in self.items() if choice.ranks}

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
            measured=self.measured,
            request=self.request,
            uncounted=self.uncounted,
        )
        setattr(model, PLAN, plan)
        tell_swapped(model)
        return cast(CompressedModule, model)

    def __repr__(self) -> str:
        return f"<Plan: {sum(bool(choice.ranks) for choice in self.values())} of {len(self)} layers replaced>"

    def records(self) -> list[dict[str, Any]]:
        """Return the decision for every layer as a dictionary of plain values.

        MACs are shares of the dense layer's for a plan made without example inputs.

        >>> import decomp
        >>> (row,) = decomp.plan(nn.Sequential(nn.Linear(64, 64)), ranks=8).records()
        >>> row["layer"], row["ranks"], row["params_before"], row["params_after"]
        ('0', (8,), 4160, 1088)
        """
        return [choice.record(name) for name, choice in self.items()]

    def _table(self) -> tables.Table:
        replaced = f"{sum(bool(choice.ranks) for choice in self.values())} of {len(self)} replaced"
        params, macs = tables.change(*self.params), tables.change(*self.macs) if self.macs else ""
        names = {} if self.macs else {"MACs": "MACs (share, large input)"}
        if any(choice.output_error is not None for choice in self.values()):
            # Plans with statistics predict; that of a compressed model has what was measured.
            names["error"] = f"error of weight / {'predicted ' if self._statistics else ''}output"
        columns = [replace(column, title=names.get(column.title, column.title)) for column in COLUMNS]
        rows = [choice.row(name) for name, choice in self.items()]
        total = ("whole model", replaced, "", "", params, macs, "", "")
        return tables.Table(columns, rows, total, tuple(self._other_costs()))

    def _other_costs(self) -> Iterator[str]:
        """Lines about kinds of cost without a column: seconds, and the kind of the budget."""
        if self.uncounted:
            yield uncounted_note(self.uncounted)
        yield from self._little_gain()
        if self.measured is not None and self.seconds is not None:
            before, after = map(tables.milliseconds, self.measured.seconds)
            predicted = tables.milliseconds(self.seconds.after)
            yield f"latency {before} => {after} measured in {self.measured.runtime} ({predicted} predicted)"
        elif self.seconds is not None:
            yield "latency {} measured => {} predicted".format(*map(tables.milliseconds, self.seconds))
        kind = self.request.budget.kind if self.request.budget else ""
        change = self.cost(kind) if kind in COUNTED and kind not in ("params", "macs") else None
        if change is not None:
            yield f"{COSTS[kind].label} {' => '.join(map(COSTS[kind].write, change))}"

    def _little_gain(self) -> Iterator[str]:
        """A line that says what stands in the way where rank rules save little of the whole model."""
        kind = "macs" if self.macs else "params"
        before, after = self.cost(kind) or Change(0, 0)
        if self.request.budget is not None or not before or before > LITTLE_GAIN * after:
            return
        where = where_it_stays(self, kind, after, before)
        label = COSTS[kind].label
        yield f"little is saved: {after / before:.0%} of the {label} stay" + (f", {where}" if where else "")


def read_plan(value: Value, methods: Iterable[Method] = ()) -> Plan:
    """Read a plan from the JSON that :meth:`Plan.to_json` wrote, with methods of the user's own.

    Raises:
        ValueError: a field is unknown, missing, of another type or out of range; the message names it.
    """
    version = value.entries().get("format", Value(None, "format")).one_of([FORMAT, EARLIER_FORMAT])
    entry = (_of_earlier_format(value) if version == EARLIER_FORMAT else value).record(
        "format", "before", "seconds", "request", "uncounted", "layers", optional=["measured"]
    )
    before = entry["before"].record("params", optional=COUNTED)
    seconds = None
    if not entry["seconds"].is_null:
        measured_before, predicted = entry["seconds"].items(2)
        seconds = Change(measured_before.number(least=0), predicted.number())
    choices = {name: Choice.read(layer) for name, layer in entry["layers"].entries().items()}
    own = {method.name: method for method in methods}
    return Plan(
        choices,
        Cost({kind: count.integer(least=0) for kind, count in before.items()}),
        methods={name: own[choice.method] for name, choice in choices.items() if choice.method in own},
        seconds=seconds,
        measured=Measured.read(entry["measured"]) if "measured" in entry else None,
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
    request = Request(min_gain=0.0).to_dict()
    return Value({**value.value, "layers": layers, "request": request, "uncounted": {}}, value.field)

"""The plan: which method and ranks every layer gets, as data that can be read, edited, saved and applied."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase

from torch import nn

from decomp._util import tables
from decomp.methods import METHODS, Method
from decomp.network import surgery
from decomp.network.eligibility import ALREADY_FACTORIZED
from decomp.planning.budget import Budget, Wish, spend, total_cost
from decomp.planning.build import correct_means, decomposed, layers_to_replace, measured, require_fit, structures
from decomp.planning.candidate import Candidate
from decomp.planning.choice import COLUMNS, Change, Choice
from decomp.planning.cost import Cost
from decomp.ranks import RULES, RankSpec, parse_spec

FORMAT = "decomp-plan-1"
KEPT_DENSE = "kept dense on request"
PLAN = "decomp_plan"  # the attribute of a model that carries the plan it was made by


class Plan(Mapping[str, Choice]):
    """The decision for every layer, by its qualified name. Nothing is changed by making one.

    ``print(plan)`` shows it as a table. A plan is never changed: ``with_ranks`` and ``keep_dense`` return a new
    one, at once, from the spectra that were computed when the plan was made.
    """

    def __init__(
        self,
        choices: Mapping[str, Choice],
        before: Cost,
        candidates: Mapping[str, Sequence[Candidate]] | None = None,
        methods: Mapping[str, Method] | None = None,
        seconds: Change | None = None,
    ) -> None:
        self._choices = dict(choices)
        self._candidates = dict(candidates or {})
        self._methods = {name: found[0].method for name, found in self._candidates.items()} | dict(methods or {})
        self._before = before
        self._seconds = seconds

    def __deepcopy__(self, memo: object) -> "Plan":
        return self

    def __getstate__(self) -> dict[str, object]:
        """The decision is pickled, without the spectra that make it editable."""
        own = {name: found for name, found in self._methods.items() if found.name not in METHODS}
        return vars(self) | {"_candidates": {}, "_methods": own}

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
    def params(self) -> Change:
        """Parameters of the whole model, before and after."""
        saved = sum(choice.params.before - choice.params.after for choice in self.values())
        return Change(self._before.params, self._before.params - saved)

    @property
    def macs(self) -> Change | None:
        """MACs of the whole model on the example inputs, before and after; None for a plan made without them."""
        if not self._before.macs:
            return None
        saved = sum(choice.macs.before - choice.macs.after for choice in self.values())
        return Change(self._before.macs, self._before.macs - saved)

    @property
    def seconds(self) -> Change | None:
        """Seconds of one pass: measured before, predicted after; None for a plan made without ``seconds=``."""
        if self._seconds is None or not self._candidates:
            return self._seconds
        found = ((self[name], candidates[0]) for name, candidates in self._candidates.items())
        saved = sum(c.dense_cost("seconds") - c.seconds(choice.ranks) for choice, c in found if choice.ranks)
        return Change(self._seconds.before, self._seconds.before - saved)

    def with_ranks(self, layers: str, ranks: RankSpec) -> "Plan":
        """Return the plan with other ranks for the layers that match a glob.

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
        request = parse_spec(ranks, RULES, exact=layers in self)
        decided = {name: self._candidates[name][0].decide(request) for name in found}
        return Plan(self._choices | decided, self._before, self._candidates, seconds=self._seconds)

    def with_budget(
        self,
        *,
        macs: float | None = None,
        params: float | None = None,
        seconds: float | None = None,
        wish: Wish | None = None,
    ) -> "Plan":
        """Return the plan with the ranks of all layers chosen anew for a budget, at once.

        Layers that :meth:`keep_dense` pinned stay so.

        Raises:
            ValueError: there is not exactly one budget, or it cannot be reached (the message says what can).
        """
        budget = Budget.of(macs=macs, params=params, seconds=seconds)
        free = {name: found for name, found in self._candidates.items() if self[name].reason != KEPT_DENSE}
        if budget is None or not free:
            raise ValueError(
                "write macs=, params= or seconds=, on a plan that decomp.plan made with layers to choose"
            )
        total = total_cost(budget.kind, self._before, self._seconds)
        settled = {name: choice for name, choice in self.items() if name not in free}
        spent = spend(free, budget, total, settled, wish or Wish())
        reason = f"the budget {budget.kind}={budget.value} spends nothing on it"
        if budget.absolute(total) >= total:
            reason = f"the model is within {budget.kind}={budget.value} as it is"
        return self.choosing({name: (c, c.choose(ranks, reason)) for name, (c, ranks) in spent.items()})

    def choosing(self, chosen: Mapping[str, tuple[Candidate, Choice]]) -> "Plan":
        """Return the plan with these choices, each with the candidate that it was made from."""
        first = {
            name: [candidate, *(other for other in self._candidates.get(name, ()) if other is not candidate)]
            for name, (candidate, _) in chosen.items()
        }
        choices = {name: choice for name, (_, choice) in chosen.items()}
        return Plan(self._choices | choices, self._before, self._candidates | first, seconds=self._seconds)

    def keep_dense(self, layers: str) -> "Plan":
        """Return the plan with the layers that match a glob left dense."""
        names = self._matching(layers)
        factorized = [name for name in names if self[name].ranks and self[name].reason == ALREADY_FACTORIZED]
        if factorized:
            raise ValueError(f"layer {factorized[0]!r} is {ALREADY_FACTORIZED}: it cannot be kept dense")
        kept = {name: self[name].as_dense(KEPT_DENSE) for name in names}
        return Plan(self._choices | kept, self._before, self._candidates, seconds=self._seconds)

    def _matching(self, layers: str) -> list[str]:
        names = [name for name in self if name == layers or fnmatchcase(name, layers)]
        if not names:
            known = ", ".join(map(repr, list(self)[:8]))
            raise ValueError(f"{layers!r} matches no layer of the plan; it has {known}")
        return names

    def apply(self, model: nn.Module, *, inplace: bool = False, progress: bool | None = None) -> nn.Module:
        """Decompose the weights of ``model`` and return the model with the factorized layers swapped in.

        The model given is left as it is unless ``inplace``; then every factor is computed before the first swap.

        Raises:
            ValueError: the plan replaces no layer, or was made for another model.
        """
        replaced = layers_to_replace(model, self, self.method_of, needs_values=True)
        new = decomposed(replaced, self, self.method_of, self._candidates, progress)
        small = self.swap(model, new, measured(self, replaced, new, self._candidates), inplace=inplace)
        correct_means(small, replaced, new, self._candidates)
        return small

    def build(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Return ``model`` with untrained factorized layers: the structure for ``load_state_dict``, or to train.

        Raises:
            ValueError: the plan replaces no layer, or was made for another model.
        """
        dense = layers_to_replace(model, self, self.method_of, needs_values=False)
        return self.swap(model, structures(dense, self, self.method_of), {}, inplace=inplace)

    def to_json(self) -> str:
        """Write the plan as JSON; :meth:`from_json` reads it back."""
        layers = {name: asdict(choice) for name, choice in self.items()}
        head = {"format": FORMAT, "before": self._before._asdict(), "seconds": self.seconds}
        return json.dumps({**head, "layers": layers}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan back. It can be applied and built; to edit it, make one of it with ``decomp.plan``.

        Raises:
            ValueError: the text is not a plan.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, {FORMAT!r} is needed")
            choices = {name: Choice.from_dict(entry) for name, entry in data["layers"].items()}
            seconds = None if data["seconds"] is None else Change(*data["seconds"])
            return cls(choices, Cost(**data["before"]), seconds=seconds)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a plan of decomp in JSON: {error}") from error

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
        """Refuse layers that are not those that the plan replaces; see ``fitting.require_fit``."""
        require_fit(self, self.method_of, modules)

    def swap(
        self, model: nn.Module, new: Mapping[str, nn.Module], settled: Mapping[str, Choice], *, inplace: bool
    ) -> nn.Module:
        """Swap layers in, and leave the plan on the model, with the choices that came out otherwise."""
        model, choices = surgery.swap(model, new, inplace=inplace), self._choices | dict(settled)
        own = {n: m for n, m in self._methods.items() if self[n].ranks and m.name not in METHODS}
        setattr(model, PLAN, Plan(choices, self._before, methods=own, seconds=self.seconds))
        return model

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
        if self.seconds is None:
            return table
        return "{}\n\nlatency {} measured => {} predicted".format(table, *map(tables.milliseconds, self.seconds))

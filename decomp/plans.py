"""The plan: which method and ranks every layer gets, as data that can be read, edited, saved and applied."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase

from torch import nn

from decomp import surgery, tables
from decomp.candidates import Candidate, require_finite
from decomp.choices import COLUMNS, Change, Choice, describe
from decomp.costs import Cost
from decomp.layers import Factorized, group_kernels
from decomp.methods import METHODS, Method
from decomp.naming import naming
from decomp.progress import bar
from decomp.ranks import RULES, RankSpec, parse_spec

FORMAT = "decomp-plan-1"
ALREADY_FACTORIZED = "already factorized"
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
        candidates: Mapping[str, Candidate] | None = None,
        methods: Mapping[str, Method] | None = None,
    ) -> None:
        self._choices = dict(choices)
        self._candidates = dict(candidates or {})
        self._methods = {name: candidate.method for name, candidate in self._candidates.items()} | dict(
            methods or {}
        )
        self._before = before

    def __getitem__(self, name: str) -> Choice:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

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
        decided = {name: self._candidates[name].decide(request) for name in found}
        return Plan(self._choices | decided, self._before, self._candidates)

    def keep_dense(self, layers: str) -> "Plan":
        """Return the plan with the layers that match a glob left dense."""
        names = self._matching(layers)
        factorized = [name for name in names if self[name].ranks and self[name].reason == ALREADY_FACTORIZED]
        if factorized:
            raise ValueError(f"layer {factorized[0]!r} is {ALREADY_FACTORIZED}: it cannot be kept dense")
        kept = {name: self[name].as_dense("kept dense on request") for name in names}
        return Plan(self._choices | kept, self._before, self._candidates)

    def _matching(self, layers: str) -> list[str]:
        names = [name for name in self if name == layers or fnmatchcase(name, layers)]
        if not names:
            raise ValueError(
                f"{layers!r} matches no layer of the plan; it has {', '.join(map(repr, list(self)[:8]))}"
            )
        return names

    def apply(self, model: nn.Module, *, inplace: bool = False, progress: bool | None = None) -> nn.Module:
        """Decompose the weights of ``model`` and return the model with the factorized layers swapped in.

        The model given is left as it is unless ``inplace``; then every factor is computed before the first swap.

        Raises:
            ValueError: the plan replaces no layer, or was made for another model.
        """
        replaced = self._replaced(model, needs_values=True)
        new = {}
        for name, module in bar(progress, "decompose", replaced.items()):
            require_finite(name, module)
            method = self.method_of(name)
            with naming(name):
                factors = method.factors(group_kernels(module), self[name].ranks)
                new[name] = method.layers[type(module)].from_factors(module, factors)
        return self._swapped(model, new, inplace)

    def build(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Return ``model`` with untrained factorized layers: the structure for ``load_state_dict``, or to train.

        Raises:
            ValueError: the plan replaces no layer, or was made for another model.
        """
        replaced = self._replaced(model, needs_values=False)
        layers = {name: self.method_of(name).layers[type(module)] for name, module in replaced.items()}
        new = {name: layer.like(replaced[name], self[name].ranks) for name, layer in layers.items()}
        return self._swapped(model, new, inplace)

    def to_json(self) -> str:
        """Write the plan as JSON; :meth:`from_json` reads it back."""
        layers = {name: asdict(choice) for name, choice in self.items()}
        return json.dumps({"format": FORMAT, "before": self._before._asdict(), "layers": layers}, indent=1)

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
            return cls(choices, Cost(**data["before"]))
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
        """Refuse layers that are not those that the plan replaces, and ranks that they cannot have.

        Raises:
            ValueError: names the layer, what it is, and what the plan says.
        """
        for name, choice in self.items():
            if not choice.ranks or isinstance(modules.get(name), Factorized):
                continue
            if name not in modules:
                raise ValueError(f"the plan was made for another model: this one has no layer {name!r}")
            module, method = modules[name], self.method_of(name)
            shape = tuple(getattr(getattr(module, "weight", None), "shape", ()))
            if (shape, describe(module)) != (choice.shape, choice.layer) or type(module) not in method.layers:
                raise ValueError(
                    f"the plan was made for another model: layer {name!r} is {describe(module)} with weight "
                    f"{shape}, the plan says {choice.layer} with {choice.shape}"
                )
            limits = method.limits(group_kernels(module))
            fits = len(choice.ranks) == len(limits)
            if not fits or any(not 1 <= r <= most for r, most in zip(choice.ranks, limits, strict=True)):
                raise ValueError(f"layer {name!r}: ranks {choice.ranks} do not fit it, allowed are 1 to {limits}")

    def _replaced(self, model: nn.Module, *, needs_values: bool) -> dict[str, nn.Module]:
        """The dense layers of ``model`` that this plan replaces, checked against it."""
        surgery.check_model(model)
        known = {name: module for module, names in surgery.names_of(model) for name in names}
        self.require_fit(known)
        shared = surgery.shared_parameters(model)
        replaced = {}
        reasons = Counter(choice.reason for choice in self.values() if not choice.ranks)
        for name, choice in self.items():
            if not choice.ranks:
                continue
            module = known[name]
            if isinstance(module, Factorized):
                if (module.method, module.ranks) != (choice.method, choice.ranks):
                    raise ValueError(f"layer {name!r} is {ALREADY_FACTORIZED}, with other ranks: {module.ranks}")
                reasons[ALREADY_FACTORIZED] += 1
                continue
            reason = surgery.refusal(module, shared, needs_values=needs_values)
            if reason:
                raise ValueError(f"layer {name!r} cannot be replaced: {reason}")
            replaced[name] = module
        if not replaced:
            counts = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(4))
            raise ValueError(
                f"no layer would be replaced: {counts or 'the model has no linear layer or convolution'}"
            )
        return replaced

    def _swapped(self, model: nn.Module, new: Mapping[str, nn.Module], inplace: bool) -> nn.Module:
        model = surgery.swap(model, new, inplace=inplace)
        methods = {name: method for name, method in self._methods.items() if self[name].ranks}
        setattr(model, PLAN, Plan(self._choices, self._before, methods=methods))
        return model

    def __repr__(self) -> str:
        return f"<Plan: {sum(bool(choice.ranks) for choice in self.values())} of {len(self)} layers replaced>"

    def __str__(self) -> str:
        replaced = f"{sum(bool(choice.ranks) for choice in self.values())} of {len(self)} replaced"
        params = " => ".join(map(tables.number, self.params))
        macs = " => ".join(map(tables.number, self.macs)) if self.macs else ""
        columns = [
            column if column != ">MACs" or self.macs else ">MACs (share, large input)" for column in COLUMNS
        ]
        rows = [choice.row(name) for name, choice in self.items()]
        return tables.render("", columns, rows, ("whole model", replaced, "", "", params, macs, "", ""))

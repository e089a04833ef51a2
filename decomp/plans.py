"""The plan: which method and ranks every layer gets, as data that can be read, edited, saved and applied."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from tqdm import tqdm

from decomp import surgery, tables
from decomp.candidates import Candidate, Change, Choice
from decomp.costs import Cost
from decomp.layers import Factorized, group_kernels
from decomp.methods import METHODS, Method
from decomp.ranks import RULES, RankSpec, parse_spec

FORMAT = "decomp-plan-1"
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
    ) -> None:
        self._choices = dict(choices)
        self._candidates = dict(candidates or {})
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
        kept = {name: self[name].as_dense("kept dense on request") for name in self._matching(layers)}
        return Plan(self._choices | kept, self._before, self._candidates)

    def _matching(self, layers: str) -> list[str]:
        names = [name for name in self if fnmatchcase(name, layers)]
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
        replaced = self._replaced(model)
        new = {}
        for name, module in tqdm(
            replaced.items(), "decompose", disable=None if progress is None else not progress
        ):
            method = self._method(name)
            factors = method.factors(group_kernels(module), self[name].ranks)
            new[name] = method.layers[type(module)].from_factors(module, factors)
        return self._swapped(model, new, inplace)

    def build(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Return ``model`` with untrained factorized layers: the structure for ``load_state_dict``, or to train.

        Raises:
            ValueError: the plan replaces no layer, or was made for another model.
        """
        replaced = self._replaced(model)
        layers = {name: self._method(name).layers[type(module)] for name, module in replaced.items()}
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
            choices = {name: _read_choice(entry) for name, entry in data["layers"].items()}
            return cls(choices, Cost(**data["before"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a plan of decomp in JSON: {error}") from error

    def _replaced(self, model: nn.Module) -> dict[str, nn.Module]:
        """The dense layers of ``model`` that this plan replaces, checked against it."""
        surgery.check_model(model)
        shared = surgery.shared_parameters(model)
        replaced = {}
        for name, choice in self.items():
            if not choice.ranks:
                continue
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"the plan was made for another model: this one has no layer {name!r}") from None
            if isinstance(module, Factorized) and module.ranks == choice.ranks and module.method == choice.method:
                continue
            shape = tuple(getattr(getattr(module, "weight", None), "shape", ()))
            if shape != choice.shape or type(module) not in self._method(name).layers:
                raise ValueError(
                    f"the plan was made for another model: layer {name!r} is {type(module).__name__} with weight "
                    f"{shape}, the plan says {choice.layer} with {choice.shape}"
                )
            reason = surgery.refusal(module, shared)
            if reason and not module.weight.is_meta:
                raise ValueError(f"layer {name!r} cannot be replaced: {reason}")
            replaced[name] = module
        if not replaced:
            raise ValueError(f"no layer would be replaced: {self._reasons()}")
        return replaced

    def _method(self, name: str) -> Method:
        if name in self._candidates:
            return self._candidates[name].method
        if self[name].method not in METHODS:
            raise ValueError(f"layer {name!r}: unknown method {self[name].method!r}; known are {sorted(METHODS)}")
        return METHODS[self[name].method]

    def _swapped(self, model: nn.Module, new: Mapping[str, nn.Module], inplace: bool) -> nn.Module:
        model = surgery.swap(model, new, inplace=inplace)
        setattr(model, PLAN, Plan(self._choices, self._before))
        return model

    def _reasons(self) -> str:
        counts = Counter(choice.reason for choice in self.values())
        if not counts:
            return "the model has no linear layer or convolution"
        return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(4))

    def __repr__(self) -> str:
        return f"<Plan: {sum(bool(choice.ranks) for choice in self.values())} of {len(self)} layers replaced>"

    def __str__(self) -> str:
        rows = [
            (
                name or "(the model)",
                choice.layer,
                choice.method,
                " x ".join(map(str, choice.ranks)),
                _change(choice.params, choice),
                _change(choice.macs, choice),
                f"{choice.error:.3f}" if choice.ranks else "",
                choice.reason or choice.note,
            )
            for name, choice in self.items()
        ]
        macs = "MACs" if self.macs else "MACs (share, large input)"
        columns = ("layer", "type", "method", "ranks", ">params", f">{macs}", ">error", "why / note")
        return tables.render("", columns, rows, self._totals())

    def _totals(self) -> tuple[str, ...]:
        replaced = f"{sum(bool(choice.ranks) for choice in self.values())} of {len(self)} replaced"
        params = f"{tables.number(self.params.before)} => {tables.number(self.params.after)}"
        macs = " => ".join(map(tables.number, self.macs)) if self.macs else ""
        return ("whole model", replaced, "", "", params, macs, "", "")


def _change(change: Change, choice: Choice) -> str:
    before, after = (f"{v:.2f}" if isinstance(change.before, float) else tables.number(v) for v in change)
    return f"{before} => {after}" if choice.ranks else before


def _read_choice(entry: Mapping[str, Any]) -> Choice:
    unknown = set(entry) ^ {field.name for field in fields(Choice)}
    if unknown:
        raise ValueError(f"unknown or missing fields {sorted(unknown)}")
    ranks, shape = tuple(map(int, entry["ranks"])), tuple(map(int, entry["shape"]))
    macs, params = Change(*entry["macs"]), Change(*entry["params"])
    return Choice(**{**entry, "ranks": ranks, "shape": shape, "macs": macs, "params": params})

"""The layers of a model, the choices of those that cannot be decomposed, and the cost of the dense model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from decomp.layers import Factorized
from decomp.network.eligibility import Eligibility, WhyNot, eligibility
from decomp.network.flops import Call, ForwardPass, observe
from decomp.network.selection import Selector
from decomp.planning.choice import Change, Choice, unchanged_choice
from decomp.planning.cost import Cost
from decomp.planning.plan import PLAN, Plan


@dataclass(frozen=True)
class Survey:
    """The layers of a model by their first name, the choices of those that cannot be decomposed, and its cost.

    ``cost`` is that of the model before any layer was factorized; its MACs are 0 without example inputs.
    ``forward_pass`` is that of the example inputs.
    """

    layers: dict[str, Eligibility]
    refused: dict[str, Choice]
    cost: Cost
    forward_pass: ForwardPass | None
    example: Any = None

    @property
    def decomposable(self) -> dict[str, nn.Module]:
        """The layers that can be decomposed."""
        return {name: layer.module for name, layer in self.layers.items() if name not in self.refused}

    @property
    def uncounted(self) -> Mapping[str, int]:
        """Operators whose MACs are not known, with the number of their calls on the example inputs."""
        return self.forward_pass.uncounted if self.forward_pass else {}

    def calls(self, name: str) -> list[Call] | None:
        """The calls of a layer in one pass of the example inputs; None without these."""
        return self.forward_pass.calls[name] if self.forward_pass else None


def survey(
    model: nn.Module,
    kinds: Iterable[Any],
    why_not: WhyNot,
    layers: Selector,
    exclude: Selector,
    example_inputs: Any,
) -> Survey:
    """Survey the layers of these kinds; ``why_not`` returns why no method supports one, or an empty string."""
    entries = eligibility(model, kinds, why_not, layers, exclude)
    forward_pass = None
    if example_inputs is not None:
        forward_pass = observe(model, example_inputs, {name: entry.module for name, entry in entries.items()})
    refused = {}
    for name, entry in entries.items():
        reason = entry.reason or (_unusable_call(name, forward_pass) if forward_pass else "")
        if reason:
            refused[name] = _refused_choice(model, name, entry.module, reason, forward_pass)
    factorized = [refused[name] for name, entry in entries.items() if isinstance(entry.module, Factorized)]
    now = Cost.of(model) | {"macs": forward_pass.total_macs if forward_pass else 0}
    saved = {kind: sum(int(choice.saved(kind)) for choice in factorized) for kind in now}
    if forward_pass is None:
        saved["macs"] = 0
    cost = Cost({kind: count + saved[kind] for kind, count in now.items()})
    return Survey(entries, refused, cost, forward_pass, example_inputs)


def _unusable_call(name: str, forward_pass: ForwardPass) -> str:
    if name in forward_pass.read:
        how = "and does not only call it" if name in forward_pass.macs else "and never calls it"
        return f"the model reads its weight {how}: factors would be multiplied each time"
    if name not in forward_pass.macs:
        return "not called on example_inputs"
    empty = any(0 in each.shape for each in forward_pass.calls[name])
    return "example_inputs reach it with an empty batch" if empty else ""


def _refused_choice(
    model: nn.Module, name: str, module: nn.Module, reason: str, forward_pass: ForwardPass | None
) -> Choice:
    """The choice of a layer that cannot be decomposed; a factorized one has the choice of its earlier plan."""
    choice = unchanged_choice(module, reason, forward_pass.macs.get(name, 0) if forward_pass else 1.0)
    if not isinstance(module, Factorized):
        return choice
    earlier = getattr(model, PLAN, None)
    if isinstance(earlier, Plan) and name in earlier and earlier[name].ranks == module.ranks:
        share = earlier[name].macs.after / (earlier[name].macs.before or 1)
        after = forward_pass.macs.get(name, 0) if forward_pass else share
        before = (round(after / share) if share else 0) if forward_pass else 1.0
        return replace(earlier[name], costs={**earlier[name].costs, "macs": Change(before, after)}, reason=reason)
    return replace(choice, method=module.method, ranks=module.ranks)

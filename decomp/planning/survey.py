"""The layers of a model, the choices of those that stay dense, and what the model costs as it is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from decomp.layers import Factorized
from decomp.network.eligibility import Site, WhyNot, sites
from decomp.network.flops import Call, Observation, observe
from decomp.network.selection import Selector
from decomp.planning.choice import Change, Choice, undecided
from decomp.planning.cost import Cost
from decomp.planning.plan import PLAN, Plan


@dataclass(frozen=True)
class Survey:
    """The layers of a model by their first name, the choices of those that stay dense, and the model's cost.

    ``cost`` is that of the model before any layer was factorized; its MACs are 0 without example inputs.
    """

    sites: dict[str, Site]
    refused: dict[str, Choice]
    cost: Cost
    seen: Observation | None
    example: Any = None

    @property
    def open(self) -> dict[str, nn.Module]:
        """The layers that can be decomposed."""
        return {name: site.module for name, site in self.sites.items() if name not in self.refused}

    @property
    def uncounted(self) -> Mapping[str, int]:
        """Operators whose MACs are not known, with the number of their calls on the example inputs."""
        return self.seen.uncounted if self.seen else {}

    def calls(self, name: str) -> list[Call] | None:
        """How the example inputs call a layer, where there are any."""
        return self.seen.calls[name] if self.seen else None


def survey(
    model: nn.Module,
    kinds: Iterable[Any],
    why_not: WhyNot,
    layers: Selector,
    exclude: Selector,
    example_inputs: Any,
) -> Survey:
    """Look at every layer of these kinds; ``why_not`` says why no method takes one, or gives an empty string."""
    found = sites(model, kinds, why_not, layers, exclude)
    seen = None
    if example_inputs is not None:
        seen = observe(model, example_inputs, {name: site.module for name, site in found.items()})
    refused = {}
    for name, site in found.items():
        reason = site.reason or (_out_of_reach(name, seen) if seen else "")
        if reason:
            refused[name] = _undecided(model, name, site.module, reason, seen)
    factorized = [refused[name] for name, site in found.items() if isinstance(site.module, Factorized)]
    now = Cost.of(model) | {"macs": seen.total_macs if seen else 0}
    saved = {kind: sum(int(choice.saved(kind)) for choice in factorized) for kind in now}
    if seen is None:
        saved["macs"] = 0
    cost = Cost({kind: count + saved[kind] for kind, count in now.items()})
    return Survey(found, refused, cost, seen, example_inputs)


def _out_of_reach(name: str, seen: Observation) -> str:
    if name in seen.read:
        how = "and does not only call it" if name in seen.macs else "and never calls it"
        return f"the model reads its weight {how}: factors would be multiplied each time"
    if name not in seen.macs:
        return "example_inputs never reach it"
    empty = any(0 in shape for shape, _ in seen.calls[name])
    return "example_inputs reach it with an empty batch" if empty else ""


def _undecided(model: nn.Module, name: str, module: nn.Module, reason: str, seen: Observation | None) -> Choice:
    """A layer that is out of the question; one factorized earlier keeps the choice that made it."""
    choice = undecided(module, reason, seen.macs.get(name, 0) if seen else 1.0)
    if not isinstance(module, Factorized):
        return choice
    earlier = getattr(model, PLAN, None)
    if isinstance(earlier, Plan) and name in earlier and earlier[name].ranks == module.ranks:
        share = earlier[name].macs.after / (earlier[name].macs.before or 1)
        after = seen.macs.get(name, 0) if seen else share
        before = (round(after / share) if share else 0) if seen else 1.0
        return replace(earlier[name], costs={**earlier[name].costs, "macs": Change(before, after)}, reason=reason)
    return replace(choice, method=module.method, ranks=module.ranks)

"""Which layers a model has, which of them can be decomposed, and what they cost as they are."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from decomp import surgery
from decomp.choices import Change, Choice, undecided
from decomp.costs import Cost, count_params
from decomp.fitting import ALREADY_FACTORIZED
from decomp.layers import Factorized
from decomp.layers.kernels import qualified_name
from decomp.methods import METHODS
from decomp.observing import Call, Observation, observe
from decomp.plans import PLAN, Plan
from decomp.selection import Selector, select

Takes = Callable[[str, nn.Module], str]

NEVER: dict[type[nn.Module], str] = {
    nn.RNNBase: "never decomposed: its fused kernels read packed weights",
    nn.RNNCellBase: "never decomposed: its fused kernels read packed weights",
    nn.MultiheadAttention: "never decomposed: its packed projections are read without being called",
    nn.Bilinear: "never decomposed: no method takes three-way products",
}
_KINDS = {kind for method in METHODS.values() for kind in method.layers}
DECOMPOSABLE = tuple(kind for kind in _KINDS if isinstance(kind, type))
DECOMPOSABLE_NAMES = {kind for kind in _KINDS if isinstance(kind, str)}
ASK_FOR_EMBEDDINGS = "an embedding is decomposed only when asked for: layers=torch.nn.Embedding, or its name"


@dataclass(frozen=True)
class Site:
    """One layer of the model, and why it is out of the question, if it is."""

    module: nn.Module
    reason: str = ""


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

    def calls(self, name: str) -> list[Call] | None:
        """How the example inputs call a layer, where there are any."""
        return self.seen.calls[name] if self.seen else None


def survey(model: nn.Module, takes: Takes, layers: Selector, exclude: Selector, example_inputs: Any) -> Survey:
    """Look at every layer; ``takes`` gives the reason why no method takes one, or an empty string."""
    surgery.check_model(model)
    sites = _selected(_sites(model, takes), layers, exclude)
    seen = None
    if example_inputs is not None:
        seen = observe(model, example_inputs, {name: site.module for name, site in sites.items()})
    refused = {}
    for name, site in sites.items():
        reason = site.reason or (_out_of_reach(name, seen) if seen else "")
        if reason:
            refused[name] = _undecided(model, name, site.module, reason, seen)
    factorized = [refused[name] for name, site in sites.items() if isinstance(site.module, Factorized)]
    params = count_params(model) + sum(int(c.params.before - c.params.after) for c in factorized)
    macs = seen.total_macs + sum(int(c.macs.before - c.macs.after) for c in factorized) if seen else 0
    return Survey(sites, refused, Cost(params, macs), seen, example_inputs)


def _out_of_reach(name: str, seen: Observation) -> str:
    if name not in seen.macs:
        return "example_inputs never reach it"
    if name in seen.read:
        return "the model reads its weight and does not only call it: factors would be multiplied each time"
    empty = any(0 in shape for shape, _ in seen.calls[name])
    return "example_inputs reach it with an empty batch" if empty else ""


def _sites(model: nn.Module, takes: Takes) -> dict[str, Site]:
    """Every layer that could be thought of, by its first name, in the order of ``named_modules``."""
    shared = surgery.shared_parameters(model)
    sites: dict[str, Site] = {}
    for name, module in surgery.walk(model, (Factorized, *NEVER)):
        never = next((reason for kind, reason in NEVER.items() if isinstance(module, kind)), "")
        if never:
            sites[name] = Site(module, never)
        elif isinstance(module, Factorized):
            sites[name] = Site(module, ALREADY_FACTORIZED)
        elif isinstance(module, DECOMPOSABLE) or qualified_name(type(module)) in DECOMPOSABLE_NAMES:
            reason = surgery.refusal(module, shared) or _subclass(module)
            sites[name] = Site(module, reason or _depthwise(module) or takes(name, module))
        elif any(sum(size > 1 for size in p.shape) > 1 for p in module.parameters(False) if not is_lazy(p)):
            sites[name] = Site(module, f"no method takes {type(module).__name__}")
    return sites


def _subclass(module: nn.Module) -> str:
    if type(module) in DECOMPOSABLE or not isinstance(module, DECOMPOSABLE):
        return ""
    kind = next(kind for kind in DECOMPOSABLE if isinstance(module, kind))
    return f"{type(module).__name__}, a subclass of {kind.__name__}: it may compute otherwise"


def _depthwise(module: nn.Module) -> str:
    groups = getattr(module, "groups", 1)
    if groups > 1 and groups == getattr(module, "in_channels", 0) == getattr(module, "out_channels", 0):
        return "depthwise: one channel per group leaves nothing to decompose"
    return ""


def _selected(sites: dict[str, Site], layers: Selector, exclude: Selector) -> dict[str, Site]:
    """Mark what ``layers=`` leaves out and ``exclude=`` takes out, in that order."""
    modules = {name: site.module for name, site in sites.items()}
    if layers is None:
        embeddings = {n for n, s in sites.items() if isinstance(s.module, nn.Embedding) and not s.reason}
        sites = {n: replace(s, reason=ASK_FOR_EMBEDDINGS) if n in embeddings else s for n, s in sites.items()}
    else:
        chosen = select(layers, modules, "layers")
        sites = {
            n: s if n in chosen or s.reason else replace(s, reason="not among layers=") for n, s in sites.items()
        }
    if exclude is not None and exclude != ():
        banned = select(exclude, modules, "exclude")
        sites = {n: replace(s, reason="excluded") if n in banned else s for n, s in sites.items()}
    return sites


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
        return replace(earlier[name], macs=Change(before, after), reason=reason)
    return replace(choice, method=module.method, ranks=module.ranks)

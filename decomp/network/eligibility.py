"""Which layers of a model can be decomposed at all, and why the others can not."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from decomp.layers import Factorized
from decomp.layers.kernels import qualified_name
from decomp.network import surgery
from decomp.network.selection import Selector, select

WhyNot = Callable[[str, nn.Module], str]

NEVER: dict[type[nn.Module], str] = {
    nn.RNNBase: "never decomposed: its fused kernels read packed weights",
    nn.RNNCellBase: "never decomposed: its fused kernels read packed weights",
    nn.MultiheadAttention: "never decomposed: its packed projections are read without being called",
    nn.Bilinear: "never decomposed: no method takes three-way products",
}
ALREADY_FACTORIZED = "already factorized"
ASK_FOR_EMBEDDINGS = "an embedding is decomposed only when asked for: layers=torch.nn.Embedding, or its name"


@dataclass(frozen=True)
class Site:
    """One layer of the model, and why it is out of the question, if it is."""

    module: nn.Module
    reason: str = ""


def sites(
    model: nn.Module, kinds: Iterable[Any], why_not: WhyNot, layers: Selector, exclude: Selector
) -> dict[str, Site]:
    """Every layer that could be thought of, by its first name, in the order of ``named_modules``.

    Args:
        model: the model.
        kinds: what can be decomposed: types of layers, and qualified names of types whose library need not be
            installed.
        why_not: the reason why no method takes a layer of these kinds, or an empty string.
        layers: which layers; see :func:`decomp.tucker`.
        exclude: which of these to leave out.
    """
    surgery.check_model(model)
    return _selected(_sites(model, kinds, why_not), layers, exclude)


def eligible(
    model: nn.Module, kinds: Iterable[Any], layers: Selector = None, exclude: Selector = ()
) -> dict[str, nn.Module]:
    """The layers of these kinds that a method could take, by name."""
    found = sites(model, kinds, lambda name, module: "", layers, exclude)
    return {name: site.module for name, site in found.items() if not site.reason}


def _sites(model: nn.Module, kinds: Iterable[Any], why_not: WhyNot) -> dict[str, Site]:
    kinds = set(kinds)
    types = tuple(kind for kind in kinds if isinstance(kind, type))
    shared = surgery.shared_parameters(model)
    found: dict[str, Site] = {}
    for name, module in surgery.walk(model, (Factorized, *NEVER)):
        never = next((reason for kind, reason in NEVER.items() if isinstance(module, kind)), "")
        if never:
            found[name] = Site(module, never)
        elif isinstance(module, Factorized):
            found[name] = Site(module, ALREADY_FACTORIZED)
        elif isinstance(module, types) or qualified_name(type(module)) in kinds:
            reason = surgery.refusal(module, shared) or _subclass(module, types)
            found[name] = Site(module, reason or _depthwise(module) or why_not(name, module))
        elif any(sum(size > 1 for size in p.shape) > 1 for p in module.parameters(False) if not is_lazy(p)):
            found[name] = Site(module, f"no method takes {type(module).__name__}")
    return found


def _subclass(module: nn.Module, types: tuple[type[nn.Module], ...]) -> str:
    if type(module) in types or not isinstance(module, types):
        return ""
    kind = next(kind for kind in types if isinstance(module, kind))
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

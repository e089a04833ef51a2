"""Which layers of a model can be decomposed, and why the others cannot."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from decomp.layers import Factorized, Unpacked
from decomp.layers.kernels import kind_of, qualified_name
from decomp.network import surgery
from decomp.network.selection import Selector, select
from decomp.network.unpacking import NOT_COPIED, why_packed

WhyNot = Callable[[str, nn.Module], str]

NEVER: dict[type[nn.Module], str] = {
    nn.RNNCellBase: "never decomposed: its step is one fused kernel that reads both weights",
    nn.Bilinear: "never decomposed: no method supports three-way products",
}
ALREADY_FACTORIZED = "already factorized"
ASK_FOR_EMBEDDINGS = "an embedding is decomposed only when asked for: layers=torch.nn.Embedding, or its name"


@dataclass(frozen=True)
class Eligibility:
    """A layer, and the reason why it cannot be decomposed; an empty string if it can.

    ``names`` are all its names: a layer that is shared has several, of which the first is its key.
    """

    module: nn.Module
    reason: str = ""
    names: tuple[str, ...] = ()


def eligibility(
    model: nn.Module,
    kinds: Iterable[Any],
    why_not: WhyNot,
    layers: Selector,
    exclude: Selector,
    *,
    needs_values: bool = True,
) -> dict[str, Eligibility]:
    """Every layer with a weight matrix or kernel, by its first name, in the order of ``named_modules``.

    Args:
        model: the model, with its packed layers unpacked (:func:`decomp.network.unpacking.unpacked`).
        kinds: what can be decomposed: types of layers, and qualified names of types of libraries that may not be
            installed.
        why_not: returns the reason why no method supports a layer of these kinds, or an empty string.
        layers: which layers; see :func:`decomp.tucker`.
        exclude: which of these to leave out.
        needs_values: whether weights without values, on the meta device, are a reason.
    """
    surgery.check_model(model)
    names = {aliases[0]: tuple(aliases) for _, aliases in surgery.names_of(model)}
    entries = _layers_of(model, kinds, why_not, needs_values)
    named = {name: replace(entry, names=names[name]) for name, entry in entries.items()}
    packings = {name: each for name, each in model.named_modules() if isinstance(each, Unpacked)}
    return _selected(named, packings, layers, exclude)


def eligible(
    model: nn.Module, kinds: Iterable[Any], layers: Selector = None, exclude: Selector = ()
) -> dict[str, nn.Module]:
    """The layers of these kinds that can be decomposed, by name."""
    every = eligibility(model, kinds, lambda name, module: "", layers, exclude)
    return {name: entry.module for name, entry in every.items() if not entry.reason}


def _layers_of(
    model: nn.Module, kinds: Iterable[Any], why_not: WhyNot, needs_values: bool
) -> dict[str, Eligibility]:
    kinds = set(kinds)
    types = tuple(kind for kind in kinds if isinstance(kind, type))
    shared = surgery.shared_parameters(model)
    adapted = surgery.modules_of_adapters(model)
    entries: dict[str, Eligibility] = {}
    # The tensors of a parametrization belong to the layer that is parametrized, which has a row of its own.
    for name, module in surgery.walk(
        model, (Factorized, nn.MultiheadAttention, *NEVER, parametrize.ParametrizationList)
    ):
        if isinstance(module, parametrize.ParametrizationList):
            continue
        never = next((reason for kind, reason in NEVER.items() if isinstance(module, kind)), "")
        if never:
            entries[name] = Eligibility(module, never)
        elif surgery.unpacker_of(module):
            entries[name] = Eligibility(module, why_packed(model, module, shared) or NOT_COPIED)
        elif isinstance(module, Factorized):
            entries[name] = Eligibility(module, ALREADY_FACTORIZED)
        elif isinstance(module, types) or qualified_name(type(module)) in kinds:
            reason = adapted.get(id(module)) or surgery.refusal(module, shared, needs_values=needs_values)
            reason = reason or _subclass(module, types)
            entries[name] = Eligibility(module, reason or _depthwise(module) or why_not(name, module))
        elif any(sum(size > 1 for size in p.shape) > 1 for p in module.parameters(False) if not is_lazy(p)):
            reason = adapted.get(id(module)) or f"no method supports {type(module).__name__}"
            entries[name] = Eligibility(module, reason)
    return entries


def _subclass(module: nn.Module, types: tuple[type[nn.Module], ...]) -> str:
    if kind_of(module) in types or not isinstance(module, types):
        return ""
    kind = next(kind for kind in types if isinstance(module, kind))
    return f"{type(module).__name__}, a subclass of {kind.__name__}: its forward may differ"


def _depthwise(module: nn.Module) -> str:
    groups = getattr(module, "groups", 1)
    if groups > 1 and groups == getattr(module, "in_channels", 0) == getattr(module, "out_channels", 0):
        return "depthwise: one channel per group leaves nothing to decompose"
    return ""


def _selected(
    entries: dict[str, Eligibility], packings: dict[str, Unpacked], layers: Selector, exclude: Selector
) -> dict[str, Eligibility]:
    """Give the layers that ``layers=`` does not select or ``exclude=`` selects a reason."""
    modules = {name: entry.module for entry in entries.values() for name in entry.names}
    first = {name: key for key, entry in entries.items() for name in entry.names}
    if layers is None:
        embeddings = {n for n, e in entries.items() if isinstance(e.module, nn.Embedding) and not e.reason}
        entries = {n: replace(e, reason=ASK_FOR_EMBEDDINGS) if n in embeddings else e for n, e in entries.items()}
    else:
        chosen = {first[name] for name in select(layers, modules, "layers", unpacked=packings)}
        entries = {
            n: e if n in chosen or e.reason else replace(e, reason="not among layers=") for n, e in entries.items()
        }
    if exclude is not None and exclude != ():
        banned = {first[name] for name in select(exclude, modules, "exclude", unpacked=packings)}
        entries = {n: replace(e, reason="excluded") if n in banned else e for n, e in entries.items()}
    return entries

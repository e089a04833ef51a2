"""Selection of layers by globs on names, types, or a predicate."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from typing_extensions import TypeAliasType

from decomp._util.naming import matches, some
from decomp.layers.attention import PROJECTIONS

Selector = TypeAliasType(
    "Selector",
    str | type[nn.Module] | Callable[[str, nn.Module], bool] | tuple[Any, ...] | list[Any] | None,
)
"""Layers by a glob on their names, an exact type, a predicate (name, module), or several of these."""


def select(
    selector: Selector,
    modules: Mapping[str, nn.Module],
    argument: str,
    what: str = "layer",
    *,
    attention: Mapping[str, nn.Module] | None = None,
) -> set[str]:
    """Names of the modules that match: a glob (``*`` crosses dots), an exact type, a predicate, or several.

    ``attention`` are unpacked attentions: a glob that matches one, or the type ``nn.MultiheadAttention``, selects
    the projections in it.

    >>> sorted(select("layer?.*", {"layer1.conv": nn.Conv2d(1, 1, 1), "fc": nn.Linear(1, 1)}, "layers"))
    ['layer1.conv']

    Raises:
        ValueError: a glob or a type matches nothing.
        TypeError: the selector is none of these.
    """
    if isinstance(selector, tuple | list | set | frozenset):
        return set().union(*(select(part, modules, argument, what, attention=attention) for part in selector))
    if isinstance(selector, str):
        names = {name for name in modules if matches(name, selector)}
        names |= _projections([name for name in attention or () if matches(name, selector)], modules)
    elif isinstance(selector, type):
        names = {name for name, module in modules.items() if type(module) is selector}
        names |= _projections((attention or ()) if selector is nn.MultiheadAttention else (), modules)
    elif callable(selector):
        return {name for name, module in modules.items() if selector(name, module)}
    else:
        raise TypeError(
            f"{argument}={selector!r}: write a glob, a module type, a predicate (name, module), or several"
        )
    if not names:
        raise ValueError(f"{argument}={selector!r} matches no {what}; {what}s are {some(list(modules))}")
    return names


def _projections(attention: Iterable[str], modules: Mapping[str, nn.Module]) -> set[str]:
    inside = {f"{name}.{role}".lstrip(".") for name in attention for role in PROJECTIONS}
    return inside & modules.keys()

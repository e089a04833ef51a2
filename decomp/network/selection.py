"""Selection of layers by globs on names, types, or a predicate."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from typing_extensions import TypeAliasType

from decomp._util.naming import matches, some
from decomp.layers import Unpacked

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
    unpacked: Mapping[str, Unpacked] | None = None,
) -> set[str]:
    """Names of the modules that match: a glob (``*`` crosses dots), an exact type, a predicate, or several.

    ``unpacked`` are modules whose layers were packed: a glob that matches one, or its type before it was unpacked
    (``nn.MultiheadAttention``), selects the layers in it.

    >>> sorted(select("layer?.*", {"layer1.conv": nn.Conv2d(1, 1, 1), "fc": nn.Linear(1, 1)}, "layers"))
    ['layer1.conv']

    Raises:
        ValueError: a glob or a type matches nothing.
        TypeError: the selector is none of these.
    """
    wholes = unpacked or {}
    if isinstance(selector, tuple | list | set | frozenset):
        return set().union(*(select(part, modules, argument, what, unpacked=unpacked) for part in selector))
    if isinstance(selector, str):
        names = {name for name in modules if matches(name, selector)}
        names |= _layers_in({name: each for name, each in wholes.items() if matches(name, selector)}, modules)
    elif isinstance(selector, type):
        names = {name for name, module in modules.items() if type(module) is selector}
        names |= _layers_in({n: each for n, each in wholes.items() if each.dense_type is selector}, modules)
    elif callable(selector):
        return {name for name, module in modules.items() if selector(name, module)}
    else:
        raise TypeError(
            f"{argument}={selector!r}: write a glob, a module type, a predicate (name, module), or several"
        )
    if not names:
        raise ValueError(f"{argument}={selector!r} matches no {what}; {what}s are {some(list(modules))}")
    return names


def _layers_in(unpacked: Mapping[str, Unpacked], modules: Mapping[str, nn.Module]) -> set[str]:
    inside = {f"{name}.{role}".lstrip(".") for name, each in unpacked.items() for role in each.roles}
    return inside & modules.keys()

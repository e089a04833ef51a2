"""Which layers a call is about: globs on names, types, or a predicate."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

Selector: TypeAlias = (
    "str | type[nn.Module] | Callable[[str, nn.Module], bool] | tuple[Any, ...] | list[Any] | None"
)


def select(selector: Selector, modules: Mapping[str, nn.Module], argument: str) -> set[str]:
    """Names of the modules that match: a glob (``*`` crosses dots), an exact type, a predicate, or several.

    >>> sorted(select("layer?.*", {"layer1.conv": nn.Conv2d(1, 1, 1), "fc": nn.Linear(1, 1)}, "layers"))
    ['layer1.conv']

    Raises:
        ValueError: a glob or a type matches nothing.
        TypeError: the selector is none of these.
    """
    if isinstance(selector, tuple | list | set | frozenset):
        return set().union(*(select(part, modules, argument) for part in selector))
    if isinstance(selector, str):
        found = {name for name in modules if name == selector or fnmatchcase(name, selector)}
    elif isinstance(selector, type):
        found = {name for name, module in modules.items() if type(module) is selector}
    elif callable(selector):
        return {name for name, module in modules.items() if selector(name, module)}
    else:
        raise TypeError(
            f"{argument}={selector!r}: write a glob, a module type, a predicate (name, module), or several"
        )
    if not found:
        known = ", ".join(map(repr, list(modules)[:8])) or "none"
        raise ValueError(
            f"{argument}={selector!r} matches no layer; layers are {known}{', ...' if len(modules) > 8 else ''}"
        )
    return found

"""Constructors by name: what makes the dense model that a file's plan is applied to."""

import json
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from decomp.data.batches import random_state, set_random_state

Constructor = Callable[..., nn.Module]


def name_of(constructor: Constructor | str) -> str:
    """The name that a file gives to a constructor: "package.module.Class", or of a function or static method."""
    if isinstance(constructor, str):
        return constructor
    module, name = (getattr(constructor, each, None) for each in ("__module__", "__qualname__"))
    if not module or not name:
        raise TypeError(f"constructor={constructor!r}: a class or a function of a module is needed, or its name")
    return f"{module}.{name}"


def describe(
    constructor: Constructor | str | None, arguments: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """The name and arguments of a constructor as a file holds them.

    Raises:
        ValueError: the name leads to nothing, or to something else than what was given; or there are arguments and
            no constructor.
        TypeError: the arguments are not what JSON can hold.
    """
    if constructor is None:
        if arguments:
            raise ValueError("arguments= are those of constructor=: give both, or neither")
        return "", {}
    name = name_of(constructor)
    found = resolve(name)
    if not isinstance(constructor, str) and found is not constructor:
        raise ValueError(f"constructor={name!r} is another object than the one given: only what can be imported")
    given = dict(arguments or {})
    try:
        stored = json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"arguments={given!r}: only numbers, strings, lists and dicts ({error})") from None
    if stored != _as_lists(given):
        raise TypeError(f"arguments={given!r}: keys must be strings, JSON has no others")
    return name, stored


def _as_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_lists(each) for key, each in value.items()}
    return [_as_lists(each) for each in value] if isinstance(value, list | tuple) else value


def resolve(name: str) -> Any:
    """Import what a name stands for.

    Raises:
        ValueError: there is nothing of that name.
    """
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"constructor {name!r} cannot be imported ({error}): it must be at the top of a module"
        ) from error


def construct(name: str, arguments: Mapping[str, Any], allow: Iterable[Constructor | str]) -> nn.Module:
    """Call the constructor of a file, if the caller allows it; random generators are left as they were.

    Raises:
        ValueError: the file names none, or one that is not allowed: nothing was imported then.
        TypeError: the constructor returns no module.
    """
    if isinstance(allow, str):
        allow = [allow]
    allowed = {name_of(each): each for each in allow}
    if not name:
        raise ValueError("it names no constructor: give the dense model, decomp.load(path, model)")
    if name not in allowed:
        raise ValueError(
            f"it names the constructor {name!r}, which is not allowed here: write allow=[{name!r}] if you trust "
            "what it does, or give the dense model, decomp.load(path, model)"
        )
    given = allowed[name]
    constructor = resolve(given) if isinstance(given, str) else given
    before = random_state()
    try:
        model = constructor(**arguments)
    finally:
        set_random_state(before)
    if not isinstance(model, nn.Module):
        raise TypeError(f"constructor {name!r} returned a {type(model).__name__}, a torch.nn.Module is needed")
    return model

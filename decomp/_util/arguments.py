"""Arguments that several calls share: typed and documented once, complete in every signature and docstring."""

import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_type_hints

from decomp._util.warn import warn

Function = TypeVar("Function", bound=Callable[..., Any])


class Argument(NamedTuple):
    """The default and the description of a keyword argument: the metadata of a key of a ``TypedDict``."""

    default: Any
    meaning: str


def arguments_of(group: type[Any]) -> dict[str, Argument]:
    """The arguments of a ``TypedDict`` whose keys are ``Annotated[type, Argument(default, meaning)]``."""
    hints = get_type_hints(group, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def with_arguments(group: type[Any], *, renamed: dict[str, str] | None = None) -> Callable[[Function], Function]:
    """Declare that the ``**keywords`` of a function are the arguments of a group.

    Missing arguments get their default; unknown ones raise a ``TypeError`` that lists the allowed ones.
    ``inspect.signature`` and ``help`` show all of them, and their descriptions are added to the Args of the
    docstring. ``renamed`` maps old names to new ones; old names work, with a ``DeprecationWarning``.
    """

    def declare(function: Function) -> Function:
        own = inspect.signature(function)
        hints = get_type_hints(group)
        shared = arguments_of(group)
        own_parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=argument.default, annotation=hints[name]
            )
            for name, argument in shared.items()
        ]
        signature = own.replace(parameters=[*own_parameters, *added])

        @functools.wraps(function)
        def call(*positional: Any, **keywords: Any) -> Any:
            for old, new in (renamed or {}).items():
                if old in keywords:
                    _rename(function.__name__, keywords, old, new)
            try:
                signature.bind(*positional, **keywords)
            except TypeError as error:
                known = ", ".join(f"{name}=" for name in [p.name for p in own_parameters[1:]] + list(shared))
                raise TypeError(f"{function.__name__}: {error}; arguments are {known}") from None
            return function(*positional, **{name: each.default for name, each in shared.items()} | keywords)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = _documented(function.__doc__, shared)
        return call  # type: ignore[return-value]

    return declare


def _rename(function: str, keywords: dict[str, Any], old: str, new: str) -> None:
    if new in keywords:
        raise TypeError(f"{function}: {old}= is the old name of {new}=: write {new}= alone")
    warn(f"{function}: {old}= is now {new}=", DeprecationWarning)
    keywords[new] = keywords.pop(old)


def _documented(doc: str | None, shared: dict[str, Argument]) -> str | None:
    r"""The docstring with the shared arguments at the end of its Args.

    >>> doc = "Do.\n\nArgs:\n    x: a number.\n\nRaises:\n    E: no."
    >>> print(_documented(doc, {"y": Argument(1, "more.")}))
    Do.
    <BLANKLINE>
    Args:
        x: a number.
        y: more.
    <BLANKLINE>
    Raises:
        E: no.
    """
    if doc is None:  # python -OO
        return None
    doc = inspect.cleandoc(doc)
    entries = [
        textwrap.fill(f"{name}: {each.meaning}", 110, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for name, each in shared.items()
    ]
    args = re.search(r"^Args:\n(?:[ ]+.*\n)+", doc + "\n", re.MULTILINE)
    if args is None:
        raise ValueError(f"a docstring without Args: {doc[:60]!r}")
    return "\n".join([doc[: args.end()].rstrip("\n"), *entries]) + "\n" + doc[args.end() :]

"""Names of layers: globs that match them, and errors that name them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn


def matches(name: str, glob: str) -> bool:
    """Whether a glob matches a name; ``*`` also matches dots, and every name matches itself, even with brackets.

    >>> matches("layer1.conv", "layer?.*"), matches("a[0]", "a[0]")
    (True, True)
    """
    return name == glob or fnmatchcase(name, glob)


def some(names: Sequence[str], most: int = 8) -> str:
    """The first few names, for an error that lists the valid ones.

    >>> some(["a", "b", "c"], most=2)
    "'a', 'b', ... (3 in all)"
    """
    shown = ", ".join(map(repr, names[:most])) or "none"
    return shown + (f", ... ({len(names)} in all)" if len(names) > most else "")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Add the name of the layer as a note to any exception raised in the block."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in layer {name!r}")
        raise


def require_finite(name: str, module: nn.Module) -> None:
    """Refuse a weight with NaN or infinite entries.

    Raises:
        ValueError: the message names the layer and the number of such entries.
    """
    weights = [each.detach() for key, each in module.named_parameters(recurse=False) if key.startswith("weight")]
    if all(bool(torch.isfinite(weight.sum())) for weight in weights):
        return  # several times faster than looking at every entry; a sum can overflow where no entry does
    bad = sum(int((~torch.isfinite(weight)).sum()) for weight in weights)
    if bad:
        count = sum(weight.numel() for weight in weights)
        raise ValueError(
            f"layer {name!r}: {bad} of {count} weights are NaN or infinite; repair the "
            f"weights, or exclude the layer with exclude={name!r}"
        )

"""Errors that name the layer they come from."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Add the name of the layer to whatever goes wrong in the block."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in layer {name!r}")
        raise

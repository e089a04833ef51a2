"""Packages that are only needed for some calls."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needing(package: str, message: str) -> Iterator[None]:
    """Import from an optional package in the block.

    Raises:
        ImportError: with this message, if the package is not installed. A package that it misses itself is named
            by the original error.

    >>> with needing("no_such_package", "plots need no_such_package"):
    ...     import no_such_package
    Traceback (most recent call last):
    ...
    ImportError: plots need no_such_package
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(message) from error

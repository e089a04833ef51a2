"""Progress bars: shown where there is a terminal, unless the user says otherwise."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(
    progress: bool | None, label: str, work: Iterable[Any] | None = None, total: int | None = None
) -> "tqdm[Any]":
    """A progress bar over ``work``, or one of ``total`` steps that is moved by hand."""
    return tqdm(work, label, total, disable=None if progress is None else not progress)

"""Progress bars, by default shown only on a terminal."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(
    progress: bool | None, label: str, work: Iterable[Any] | None = None, total: int | None = None
) -> "tqdm[Any]":
    """A progress bar over ``work``, or one of ``total`` steps that the caller updates."""
    return tqdm(work, label, total, disable=None if progress is None else not progress)

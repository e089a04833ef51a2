"""Training examples without end, in windows that fit into memory, from a place that can be found again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Window(Generic[Item]):
    """Examples that are in memory at once: of the batches from ``start`` on, or the ``whole`` of the data."""

    start: int
    items: list[Item]
    whole: bool = False


Windows = Callable[[int], Iterator[Window[Item]]]


@dataclass(frozen=True)
class Split:
    """Which batches a process trains on and which it measures on: every n-th is its own, some of these held out.

    Of the batches of a process every k-th is held out, k = 1 / share, beginning with number k // 2.

    >>> split = Split(0.2)
    >>> [index for index in range(10) if split.held(index)]
    [2, 7]
    """

    share: float
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 0.5:
            raise ValueError(f"held_out={self.share}: write a share of the batches from 0 to 0.5")

    def own(self, index: int) -> bool:
        """Whether the batch is this process's."""
        return index % self.size == self.rank

    def held(self, index: int) -> bool:
        """Whether this process measures on it, and never trains on it."""
        if not self.share:
            return False
        every = max(2, round(1 / self.share))
        return self.own(index) and index // self.size % every == every // 2

    def train(self, index: int) -> bool:
        """Whether this process trains on it."""
        return self.own(index) and not self.held(index)


class Endless(Generic[Item]):
    """The examples of windows, over and over; a window that holds the whole data stays in memory.

    >>> windows = lambda start: (Window(i, [10 * i, 10 * i + 1]) for i in range(start, 3))
    >>> stream = Endless(windows)
    >>> [next(stream) for _ in range(7)], stream.place
    ([0, 1, 10, 11, 20, 21, 0], (0, 1))
    >>> stream.seek((2, 1)); next(stream), next(stream)
    (21, 0)
    """

    def __init__(self, windows: Windows[Item]) -> None:
        self._windows = windows
        self._later: Iterator[Window[Item]] = iter(())
        self._window: Window[Item] = Window(0, [])
        self._taken = 0

    @property
    def place(self) -> tuple[int, int]:
        """The batch that the window begins with, and how many of its examples were taken."""
        return self._window.start, self._taken

    def seek(self, place: tuple[int, int]) -> None:
        """Go where ``place`` was read."""
        start, taken = place
        if not self._window.items or self._window.start != start:
            self._later = self._windows(start)
            self._window = next(self._later, Window(start, []))
        self._taken = taken

    def begin(self) -> bool:
        """Bring the first window into memory; whether there is one."""
        self.seek((0, 0))
        return bool(self._window.items)

    def __next__(self) -> Item:
        if self._taken >= len(self._window.items):
            self._advance()
        self._taken += 1
        return self._window.items[self._taken - 1]

    def _advance(self) -> None:
        self._taken = 0
        if self._window.whole:
            return
        self._window = Window(0, [])  # the old window has to be gone before the next one is made
        following = next(self._later, None)
        if following is None:
            self._later = self._windows(0)
            following = next(self._later, None)
        if following is None:
            raise ValueError("data came out empty on a later pass: give what can be gone through again")
        self._window = following


class Examples(Generic[Item]):
    """The examples of one pass, window by window; kept where one window holds them all."""

    def __init__(self, windows: Windows[Item]) -> None:
        self._windows = windows
        self._kept: list[Item] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._kept is not None:
            yield from self._kept
            return
        for window in self._windows(0):
            if window.whole:
                self._kept = window.items
            yield from window.items
            del window  # gone before the next one is made

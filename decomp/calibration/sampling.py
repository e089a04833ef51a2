"""Which positions the statistics of a layer are summed over: all of them, or a seeded stratified sample."""

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import TypeAliasType

POSITIONS_PER_CHANNEL = 10
ROWS_PER_CHANNEL_TO_SEE = 40  # of which they are chosen: more of one batch say less than as many of another
CHEAP_PRODUCTS = 2**33  # multiply-adds that take a few tenths of a second
FIT_PRODUCTS = 2**37  # that take a few seconds

ROWS_PER_UNKNOWN = 4  # with n rows and p unknowns the noise adds about p / (n - p) to the squared error: a third

Positions = TypeAliasType("Positions", int | Literal["auto", "all"])
"""How many positions per layer are summed over: "auto", "all", or a number."""


def little_data(rows: int, unknowns: int) -> str:
    """A note where rows are too few for the unknowns of each output; else an empty string.

    >>> little_data(24, 9), little_data(36, 9)
    ('little data: 24 rows for 9 unknowns per output, 36 would be enough', '')
    """
    enough = ROWS_PER_UNKNOWN * unknowns
    if not 0 < rows < enough:
        return ""
    return f"little data: {rows} rows for {unknowns} unknowns per output, {enough} would be enough"


@dataclass(frozen=True)
class Sampling:
    """How many positions of a layer its statistics are summed over.

    ``positions`` is a number, "all", or "auto": ten for each of the n channels of the rows x that are summed,
    and more of them, up to 2^33 / n^2, where the sum of x x^T costs little. The positions of images and of texts
    are correlated, so that more of them say little that is new (Zhang et al. 2016 take ten per image).
    ``batches`` is the number of batches in a pass, None if it is not known; ``numbers`` are those of the batches,
    ascending, where only some of the data are used.

    Raises:
        ValueError: ``positions`` is none of these.
    """

    positions: int | str = "auto"
    batches: int | None = None
    numbers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.positions, int) and not isinstance(self.positions, bool) and self.positions > 0
        if not number and self.positions not in ("auto", "all"):
            raise ValueError(f'positions={self.positions!r}: write "auto", "all", or a number above 0')

    def enough(self, channels: int) -> float:
        """How many rows of so many channels are taken of all data; infinity for all."""
        if isinstance(self.positions, int):
            return self.positions
        if self.positions == "all":
            return math.inf
        return max(POSITIONS_PER_CHANNEL * channels, CHEAP_PRODUCTS // channels**2)

    def to_fit(self, channels: int) -> float:
        """How many rows a fit of so many coefficients takes; infinity for all.

        Up to four times as many as moments take: what these lack is noise in the metric, what a fit lacks is noise
        in its coefficients.
        """
        if self.positions != "auto":
            return self.enough(channels)
        affordable = min(ROWS_PER_CHANNEL_TO_SEE * channels, FIT_PRODUCTS // channels**2)
        return max(self.enough(channels), affordable)

    def least(self, channels: int) -> float:
        """How many rows of so many channels a fit should choose from; infinity for all."""
        to_fit = self.to_fit(channels)
        return max(ROWS_PER_CHANNEL_TO_SEE * channels, to_fit) if self.positions == "auto" else to_fit

    def of(self, numbers: Iterable[int]) -> "Sampling":
        """The same for the batches with these numbers alone: as many rows, from fewer batches."""
        chosen = tuple(sorted(numbers))
        return replace(self, batches=len(chosen), numbers=chosen)

    def place(self, batch: int) -> int:
        """How many of the batches that are used come before this one."""
        return batch if self.numbers is None else bisect_left(self.numbers, batch)

    def wanted(self, enough: float, batch: int, taken: int) -> float:
        """How many rows of a batch are taken, where ``taken`` of the ``enough`` rows of all data are there.

        By batch b of B a share (b + 1) / B of the rows should have been taken: a layer that only some batches
        reach makes up for the others. Where B is not known, a share 1 + ln(b + 1) should have been taken: one
        batch is enough, and many cost little.
        """
        number = self.place(batch) + 1
        least = enough / (self.batches or number)
        due = least * number if self.batches else enough * (1 + math.log(number))
        return max(due - taken, least)

    def share(self, channels: int) -> float:
        """How many rows are taken of one batch if every batch gives the same number."""
        return self.enough(channels) / max(1, self.batches or 1)


class Sampler:
    """Draws the rows that are summed from each call of a layer, in the order of the batches.

    How many are :meth:`Sampling.wanted`. A call that gives n of its N rows counts with weight N / n, which makes
    the sums unbiased whatever was taken of the other calls.

    >>> sampler = Sampler(Sampling(8, batches=2), channels=3)
    >>> rows, weight = sampler.draw(100, batch=0)
    >>> len(rows), weight
    (4, 25.0)
    >>> sampler.draw(3, batch=1)
    (None, 1.0)
    """

    def __init__(self, sampling: Sampling, channels: int) -> None:
        self._sampling, self._enough = sampling, sampling.enough(channels)
        self.taken = 0
        self.seen = 0

    def draw(self, total: int, batch: int) -> tuple[Tensor | None, float]:
        """Draw from ``total`` rows; return the indices, None for all, and the weight of each."""
        wanted = self._sampling.wanted(self._enough, batch, self.taken)
        self.seen += total
        if wanted >= total:
            self.taken += total
            return None, 1.0
        count = max(1, math.ceil(wanted))
        self.taken += count
        return stratified(total, count, seed=batch), total / count


def stratified(total: int, count: int, seed: int) -> Tensor:
    """Indices below ``total``, one drawn at random from each of ``count`` strata of equal size, ascending.

    Each index is drawn with the same expected frequency, ``count / total``. The random state of the program is
    not used.

    >>> stratified(1000, 4, seed=0) // 250
    tensor([0, 1, 2, 3])
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    offsets = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    places = (torch.arange(count, dtype=torch.float64, device="cpu") + offsets) * (total / count)
    return places.long().clamp(max=total - 1)

"""Rules that bound the cost or the error of a layer, and choose the best ranks within the bound."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from decomp.ranks.rule import CandidateLike, GridLike, Ranks, Values, require_share

MAX_FITS = 40


@dataclass(frozen=True)
class params:
    """The ranks of least weight error whose factors have at most this share of the layer's parameters.

    Only ranks that lower both parameters and MACs are considered.
    """

    share: float
    reads_spectra: ClassVar[bool] = False
    nothing: ClassVar[str] = "even rank 1 has more parameters than this share"

    def __post_init__(self) -> None:
        require_share("params", self.share)

    def __call__(self, candidate: CandidateLike) -> Ranks:
        grid = candidate.grid
        return _least(grid, grid.error, (grid.params_share <= self.share) & grid.pays, grid.params_share)


@dataclass(frozen=True)
class macs:
    """The ranks of least weight error whose factors need at most this share of the layer's MACs.

    Only ranks that lower both parameters and MACs are considered.
    """

    share: float
    reads_spectra: ClassVar[bool] = False
    nothing: ClassVar[str] = "even rank 1 needs more MACs than this share"

    def __post_init__(self) -> None:
        require_share("macs", self.share)

    def __call__(self, candidate: CandidateLike) -> Ranks:
        grid = candidate.grid
        return _least(grid, grid.error, (grid.macs_share <= self.share) & grid.pays, grid.macs_share)


@dataclass(frozen=True)
class error:
    """The ranks of fewest parameters whose relative error ||W - W'|| / ||W|| is at most ``bound``.

    Ranks that lower both parameters and MACs are preferred; if there are none, the layer stays dense.
    """

    bound: float
    reads_spectra: ClassVar[bool] = False
    nothing: ClassVar[str] = "no rank keeps the error within this bound"

    def __post_init__(self) -> None:
        require_share("error", self.bound)

    def __call__(self, candidate: CandidateLike) -> Ranks:
        for _ in range(MAX_FITS):
            grid = candidate.grid
            within = grid.error <= self.bound
            cheaper = within & grid.pays
            ranks = _least(grid, grid.params_share, cheaper if cheaper.any() else within, grid.macs_share)
            # For fitted methods the grid holds estimates, which each fit improves.
            if 0 in ranks or candidate.error(ranks) <= self.bound:
                return ranks
        return (0,) * len(candidate.limits)


def _least(grid: GridLike, objective: Values, allowed: NDArray[np.bool_], then: Values) -> Ranks:
    """The allowed ranks with the least ``objective``, ties broken by ``then``; zeros if none are allowed."""
    if not allowed.any():
        return tuple(0 for _ in range(grid.ranks.shape[1]))
    best = allowed & (objective <= objective[allowed].min())
    place = int(np.where(best, then, np.inf).argmin())
    ranks: list[int] = grid.ranks[place].tolist()
    return tuple(ranks)

"""Rank rules: from what is known of one layer to its ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from decomp.ranks.vbmf import evbmf_rank

Values = NDArray[np.float64]
Ranks = tuple[int, ...]


class SpectrumLike(Protocol):
    """Singular values of one unfolding: ``values`` is (groups, n) of a rows x columns matrix per group."""

    @property
    def values(self) -> Values: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...


class CandidateLike(Protocol):
    """One layer under one method: what a rule may ask about it."""

    @property
    def spectra(self) -> tuple[Any, ...]: ...
    @property
    def limits(self) -> Ranks: ...
    def error(self, ranks: Ranks) -> float: ...
    def params_share(self, ranks: Ranks) -> float: ...
    def macs_share(self, ranks: Ranks) -> float: ...


class Rule(Protocol):
    """A rank rule: one rank per spectrum, 0 where nothing of the weight is worth keeping."""

    def __call__(self, candidate: CandidateLike, /) -> Ranks: ...


@dataclass(frozen=True)
class vbmf:
    """The number of components above the noise, by global analytic EVBMF of every unfolding.

    The rank of a grouped convolution is the largest over its groups. 0 means noise: the layer stays dense.

    Source: Nakajima et al. 2013; used for Tucker-2 by Kim et al. 2016.
    """

    nothing: ClassVar[str] = "noise to vbmf: no component stands above it"

    def __call__(self, candidate: CandidateLike) -> Ranks:
        return _per_mode(candidate, evbmf_rank)


@dataclass(frozen=True)
class energy:
    """The smallest rank that keeps this share of the squared singular values, in every unfolding.

    min {r: sum_{i <= r} sigma_i^2 >= share sum_i sigma_i^2}; for a matrix the relative error of the weight
    is then at most sqrt(1 - share). ``share`` is in (0, 1].

    >>> energy(0.9)
    energy(share=0.9)
    """

    share: float
    nothing: ClassVar[str] = "its weight is zero"

    def __post_init__(self) -> None:
        _require_share("energy", self.share, upper_included=True)

    def __call__(self, candidate: CandidateLike) -> Ranks:
        return _per_mode(candidate, self._rank)

    def _rank(self, values: Values, rows: int, columns: int) -> int:
        kept = (values**2).cumsum()
        return int(np.searchsorted(kept, self.share * kept[-1] * (1 - 1e-12)) + 1) if kept[-1] > 0 else 0


@dataclass(frozen=True)
class params:
    """The ranks of least weight error whose factors have at most this share of the layer's parameters."""

    nothing: ClassVar[str] = "even rank 1 has more parameters than this share"

    share: float

    def __post_init__(self) -> None:
        _require_share("params", self.share)

    def __call__(self, candidate: CandidateLike) -> Ranks:
        return _best_within(candidate, params=self.share)


@dataclass(frozen=True)
class macs:
    """The ranks of least weight error whose factors need at most this share of the layer's MACs."""

    nothing: ClassVar[str] = "even rank 1 needs more MACs than this share"

    share: float

    def __post_init__(self) -> None:
        _require_share("macs", self.share)

    def __call__(self, candidate: CandidateLike) -> Ranks:
        return _best_within(candidate, macs=self.share)


def _per_mode(candidate: CandidateLike, rank: Callable[[Values, int, int], int]) -> Ranks:
    """The rank of every unfolding, the largest over the groups; a mode whose factor does not pay stays full.

    A factor pays where it lowers both parameters and MACs, or where the layer is cheaper only with it.
    """
    found = tuple(
        max(rank(values, spectrum.rows, spectrum.columns) for values in spectrum.values)
        for spectrum in candidate.spectra
    )
    if 0 in found:
        return found
    kept = found
    for mode, limit in enumerate(candidate.limits):
        full = (*kept[:mode], limit, *kept[mode + 1 :])
        if not _cheaper(candidate, kept, full):
            kept = full
    return found if _cheaper(candidate, found) and not _cheaper(candidate, kept) else kept


def _cheaper(candidate: CandidateLike, ranks: Ranks, than: Ranks | None = None) -> bool:
    """Whether both costs are below those at other ranks, or below the dense layer's."""
    params = candidate.params_share(than) if than else 1.0
    macs = candidate.macs_share(than) if than else 1.0
    return candidate.params_share(ranks) < params and candidate.macs_share(ranks) < macs


def _best_within(candidate: CandidateLike, params: float = 1.0, macs: float = 1.0) -> Ranks:
    """Least error within both shares: for each choice of all ranks but the last, the largest last one."""

    def allowed(ranks: Ranks) -> bool:
        return candidate.params_share(ranks) <= params and candidate.macs_share(ranks) <= macs

    *leading, last = candidate.limits
    best: tuple[float, Ranks] | None = None
    for head in product(*(range(1, limit + 1) for limit in leading)):
        ranks = _largest_allowed(head, last, allowed)
        if ranks:
            found = (candidate.error(ranks), ranks)
            best = found if best is None or found < best else best
    return best[1] if best else (0,) * len(candidate.limits)


def _largest_allowed(head: Ranks, last: int, allowed: Callable[[Ranks], bool]) -> Ranks | None:
    """The full last mode needs no factor, so that it can be allowed where a rank just below it is not."""
    if allowed((*head, last)):
        return (*head, last)
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allowed((*head, middle)) else (low, middle)
    return (*head, low) if low else None


def _require_share(name: str, share: float, *, upper_included: bool = False) -> None:
    if (
        isinstance(share, bool)
        or not isinstance(share, int | float)
        or not (0 < share < 1 or (upper_included and share == 1))
    ):
        raise ValueError(
            f"{name}({share!r}): a share in (0, 1{']' if upper_included else ')'} is needed, e.g. {name}(0.5)"
        )

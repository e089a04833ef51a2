"""Rules that read the spectrum of every unfolding and say how many of its components are kept."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil, cos, pi, sin, sqrt
from typing import Any, ClassVar

import numpy as np
from scipy.integrate import quad
from scipy.optimize import brentq

from decomp.ranks.rule import CandidateLike, Ranks, Values, require_share
from decomp.ranks.vbmf import evbmf_rank


@dataclass(frozen=True)
class vbmf:
    """The number of components above the noise, by global analytic EVBMF of every unfolding.

    The rank of a grouped convolution is the largest over its groups. 0 means noise: the layer stays dense.
    ``weaken`` in (0, 1] goes only that share of the way down from the full rank: r = L - weaken (L - r_vbmf).

    Source: Nakajima et al. 2013; used for Tucker-2 by Kim et al. 2016; weakened by Gusak et al. 2019 (MUSCO).
    """

    weaken: float = 1.0
    reads_spectra: ClassVar[bool] = True
    nothing: ClassVar[str] = "noise to vbmf: no component stands above it"

    def __post_init__(self) -> None:
        require_share("vbmf", self.weaken, upper_included=True)

    def __call__(self, candidate: CandidateLike) -> Ranks:
        return _per_mode(candidate, self._rank)

    def _rank(self, values: Values, rows: int, columns: int) -> int:
        rank = evbmf_rank(values, rows, columns)
        return ceil(len(values) - self.weaken * (len(values) - rank) - 1e-9) if rank else 0


@dataclass(frozen=True)
class energy:
    """The smallest rank that keeps this share of the squared singular values, in every unfolding.

    min {r: sum_{i <= r} sigma_i^2 >= share sum_i sigma_i^2}; for a matrix the relative error of the weight
    is then at most sqrt(1 - share). ``share`` is in (0, 1]. With ``nuclear`` the singular values themselves
    are added up, the other convention: the same share then keeps far more. With data the singular values are
    those of the outputs.

    >>> energy(0.9)
    energy(share=0.9, nuclear=False)
    """

    share: float
    nuclear: bool = False
    reads_spectra: ClassVar[bool] = True
    nothing: ClassVar[str] = "its weight is zero"

    def __post_init__(self) -> None:
        require_share("energy", self.share, upper_included=True)

    def __call__(self, candidate: CandidateLike) -> Ranks:
        return _per_mode(candidate, self._rank, candidate.output_spectra)

    def _rank(self, values: Values, rows: int, columns: int) -> int:
        kept = (_above_rounding(values, max(rows, columns)) if self.nuclear else values**2).cumsum()
        return int(np.searchsorted(kept, self.share * kept[-1] * (1 - 1e-12)) + 1) if kept[-1] > 0 else 0


@dataclass(frozen=True)
class gavish_donoho:
    """The singular values above the optimal hard threshold for unknown noise, omega(beta) x their median.

    Source: Gavish and Donoho 2014, equations 11 and 4. It presumes that at least half of the spectrum is noise.
    """

    reads_spectra: ClassVar[bool] = True
    nothing: ClassVar[str] = "noise to gavish_donoho: no singular value is above the threshold"

    def __call__(self, candidate: CandidateLike) -> Ranks:
        return _per_mode(candidate, self._rank)

    def _rank(self, values: Values, rows: int, columns: int) -> int:
        small, large = sorted((rows, columns))
        threshold = gavish_donoho_factor(small / large) * np.median(values)
        return int((_above_rounding(values, large) > threshold).sum())


@dataclass(frozen=True)
class mdl:
    """The rank of minimum description length of the squared singular values, taken as a sample covariance.

    MDL(k) = -N (p - k) log(GM / AM) + k (2p - k) log(N) / 2 with p = L, N = M, and the geometric and
    arithmetic mean of the p - k smallest eigenvalues. Source: Wax and Kailath 1985, equation 17.
    """

    reads_spectra: ClassVar[bool] = True
    nothing: ClassVar[str] = "noise to mdl: rank 0 describes it best"

    def __call__(self, candidate: CandidateLike) -> Ranks:
        return _per_mode(candidate, self._rank)

    def _rank(self, values: Values, rows: int, columns: int) -> int:
        count, samples = sorted((rows, columns))
        if not values[0] > 0:
            return 0
        eigenvalues = np.maximum(values**2, samples * np.finfo(np.float64).eps * values[0] ** 2)
        kept = np.arange(count)
        beyond = count - kept
        log_geometric = np.log(eigenvalues)[::-1].cumsum()[::-1] / beyond
        log_arithmetic = np.log(eigenvalues[::-1].cumsum()[::-1] / beyond)
        misfit = samples * beyond * (log_arithmetic - log_geometric)
        return int((misfit + kept * (2 * count - kept) * np.log(samples) / 2).argmin())


@dataclass(frozen=True)
class stable_rank:
    """The stable rank ||W||_F^2 / sigma_1^2 of every unfolding, rounded up: a low, smooth measure of the spectrum.

    Source: Rudelson and Vershynin 2007; for ranks of networks Wang et al. 2023 (Cuttlefish).
    """

    reads_spectra: ClassVar[bool] = True
    nothing: ClassVar[str] = "its weight is zero"

    def __call__(self, candidate: CandidateLike) -> Ranks:
        return _per_mode(candidate, self._rank)

    def _rank(self, values: Values, rows: int, columns: int) -> int:
        return ceil((values**2).sum() / values[0] ** 2 - 1e-9) if values[0] > 0 else 0


@cache
def gavish_donoho_factor(beta: float) -> float:
    """omega(beta) = lambda*(beta) / sqrt(median of the Marchenko-Pastur law), for 0 < beta = L / M <= 1.

    >>> [round(gavish_donoho_factor(beta), 3) for beta in (1.0, 0.5, 0.25)]
    [2.858, 2.171, 1.837]
    """
    threshold = sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + sqrt(beta**2 + 14 * beta + 1)))
    low, high = (1 - sqrt(beta)) ** 2, (1 + sqrt(beta)) ** 2

    # x = center - radius cos(angle) takes the square roots out of the density at both ends.
    center, radius = (low + high) / 2, (high - low) / 2

    def share_below(angle: float) -> float:
        def density(a: float) -> float:
            x = center - radius * cos(a)
            # At beta = 1 the law reaches down to 0, where numerator and denominator vanish together.
            return (radius * sin(a)) ** 2 / (2 * pi * beta * x) if x > 0 else radius / (pi * beta)

        share: float = quad(density, 0, angle)[0]
        return share

    angle: float = brentq(lambda a: share_below(a) - 0.5, 1e-9, pi, xtol=1e-12)
    return threshold / sqrt(center - radius * cos(angle))


def _above_rounding(values: Values, large: int) -> Values:
    """Set what the Gram matrix cannot tell from zero to zero: sigma^2 below max(L, M) eps sigma_1^2."""
    return np.where(values > np.sqrt(large * np.finfo(np.float64).eps) * values[0], values, 0.0)


def _per_mode(
    candidate: CandidateLike, rank: Callable[[Values, int, int], int], spectra: tuple[Any, ...] | None = None
) -> Ranks:
    """The rank of every unfolding of the weight, or of other spectra, the largest over the groups; a mode whose
    factor does not pay stays full.

    A factor pays where it lowers both parameters and MACs, or where the layer is cheaper only with it.
    """
    found = tuple(
        max(rank(values, spectrum.rows, spectrum.columns) for values in spectrum.values)
        for spectrum in (candidate.spectra if spectra is None else spectra)
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

"""Rules that choose the rank of every unfolding from its singular values.

``evbmf_rank`` is the formula of ``vbmf``: the global analytic solution of empirical variational Bayesian
matrix factorization. Source: Nakajima, Sugiyama, Babacan and Tomioka 2013 (Global analytic solution of
fully-observed variational Bayesian matrix factorization, JMLR 14), theorems 2 and 3, with the exact threshold of
their 2015 analysis.

A rule sees one layer at a time. In the calls, layers stay dense whose ranks by these rules would cost the network
more than they save (``decomp/planning/safeguard.py``); with ``pure=True`` all ranks are those of the formula.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from math import ceil, cos, log, log1p, pi, sin, sqrt
from typing import Any, ClassVar

import numpy as np

from decomp.ranks.rule import CandidateLike, Ranks, Values, require_share

ZERO_OF_PHI = 2.512862417252339
PROBES_PER_INTERVAL = 10
EDGES_AT_ONCE = 64
ROUNDING = 4 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True, repr=False)
class SpectralRule:
    """A rule that chooses ranks from singular values alone.

    With ``pure`` the ranks of every layer are those of the formula, as in the papers. Without it layers whose
    factors would cost the network more than they save get higher ranks, or stay dense.
    """

    pure: bool = field(default=False, kw_only=True)
    reads_spectra: ClassVar[bool] = True
    nothing: ClassVar[str]

    def __repr__(self) -> str:
        shown = [f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.name != "pure"]
        return f"{type(self).__name__}({', '.join(shown + ['pure=True'] * self.pure)})"

    def __call__(self, candidate: CandidateLike) -> Ranks:
        return _per_mode(candidate, self._rank)

    def _rank(self, values: Values, rows: int, columns: int) -> int:
        """The rank of one unfolding, rows x columns, with these singular values; 0 for a dense layer."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class vbmf(SpectralRule):
    """The number of components above the noise, by global analytic EVBMF of every unfolding.

    The rank of a grouped convolution is the largest over its groups. 0 means noise: the layer stays dense.
    ``weaken`` in (0, 1] reduces the full rank L only by that share: r = L - weaken (L - r_vbmf).

    Source: Nakajima et al. 2013; used for Tucker-2 by Kim et al. 2016; weakened by Gusak et al. 2019 (MUSCO).
    """

    weaken: float = 1.0
    nothing: ClassVar[str] = "noise to vbmf: no component stands above it"

    def __post_init__(self) -> None:
        require_share("vbmf", self.weaken, upper_included=True)

    def _rank(self, values: Values, rows: int, columns: int) -> int:
        rank = evbmf_rank(values, rows, columns)
        return ceil(len(values) - self.weaken * (len(values) - rank) - 1e-9) if rank else 0


@dataclass(frozen=True, repr=False)
class energy(SpectralRule):
    """The smallest rank that retains this share of the squared singular values, in every unfolding.

    min {r: sum_{i <= r} sigma_i^2 >= share sum_i sigma_i^2}; for a matrix the relative error of the weight
    is then at most sqrt(1 - share). ``share`` is in (0, 1]. With ``nuclear`` the share is one of the sum of the
    singular values instead, another common convention, which gives far larger ranks for the same share. With data
    the singular values are those of the outputs.

    >>> energy(0.9), energy(0.9, pure=True)
    (energy(share=0.9, nuclear=False), energy(share=0.9, nuclear=False, pure=True))
    """

    share: float
    nuclear: bool = False
    nothing: ClassVar[str] = "its weight is zero"

    def __post_init__(self) -> None:
        require_share("energy", self.share, upper_included=True)

    def __call__(self, candidate: CandidateLike) -> Ranks:
        return _per_mode(candidate, self._rank, candidate.output_spectra)

    def _rank(self, values: Values, rows: int, columns: int) -> int:
        sums = (_above_rounding(values, max(rows, columns)) if self.nuclear else values**2).cumsum()
        return int(np.searchsorted(sums, self.share * sums[-1] * (1 - 1e-12)) + 1) if sums[-1] > 0 else 0


@dataclass(frozen=True, repr=False)
class gavish_donoho(SpectralRule):
    """The singular values above the optimal hard threshold for unknown noise, omega(beta) x their median.

    Source: Gavish and Donoho 2014, equations 11 and 4. It assumes that at least half of the spectrum is noise.
    """

    nothing: ClassVar[str] = "noise to gavish_donoho: no singular value is above the threshold"

    def _rank(self, values: Values, rows: int, columns: int) -> int:
        small, large = sorted((rows, columns))
        threshold = gavish_donoho_factor(small / large) * np.median(values)
        return int((_above_rounding(values, large) > threshold).sum())


@dataclass(frozen=True, repr=False)
class mdl(SpectralRule):
    """The rank of minimum description length of the squared singular values, taken as a sample covariance.

    MDL(k) = -N (p - k) log(GM / AM) + k (2p - k) log(N) / 2 with p = L, N = M, and the geometric and
    arithmetic mean of the p - k smallest eigenvalues. Source: Wax and Kailath 1985, equation 17.
    """

    nothing: ClassVar[str] = "noise to mdl: rank 0 describes it best"

    def _rank(self, values: Values, rows: int, columns: int) -> int:
        count, samples = sorted((rows, columns))
        if not values[0] > 0:
            return 0
        eigenvalues = np.maximum(values**2, samples * np.finfo(np.float64).eps * values[0] ** 2)
        ranks = np.arange(count)
        beyond = count - ranks
        log_geometric = np.log(eigenvalues)[::-1].cumsum()[::-1] / beyond
        log_arithmetic = np.log(eigenvalues[::-1].cumsum()[::-1] / beyond)
        misfit = samples * beyond * (log_arithmetic - log_geometric)
        return int((misfit + ranks * (2 * count - ranks) * np.log(samples) / 2).argmin())


@dataclass(frozen=True, repr=False)
class stable_rank(SpectralRule):
    """The stable rank ||W||_F^2 / sigma_1^2 of every unfolding, rounded up; at most the rank.

    Source: Rudelson and Vershynin 2007; for ranks of networks Wang et al. 2023 (Cuttlefish).
    """

    nothing: ClassVar[str] = "its weight is zero"

    def _rank(self, values: Values, rows: int, columns: int) -> int:
        return ceil((values**2).sum() / values[0] ** 2 - 1e-9) if values[0] > 0 else 0


@cache
def gavish_donoho_factor(beta: float) -> float:
    """omega(beta) = lambda*(beta) / sqrt(median of the Marchenko-Pastur law), for 0 < beta = L / M <= 1.

    >>> [round(gavish_donoho_factor(beta), 3) for beta in (1.0, 0.5, 0.25)]
    [2.858, 2.171, 1.837]
    """
    from scipy.integrate import quad  # imported late: it would double the time of import decomp

    threshold = sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + sqrt(beta**2 + 14 * beta + 1)))
    low, high = (1 - sqrt(beta)) ** 2, (1 + sqrt(beta)) ** 2

    # The substitution x = center - radius cos(angle) removes the square roots of the density at both ends.
    center, radius = (low + high) / 2, (high - low) / 2

    def share_below(angle: float) -> float:
        def density(a: float) -> float:
            x = center - radius * cos(a)
            # At beta = 1 the law reaches down to 0, where numerator and denominator vanish together.
            return (radius * sin(a)) ** 2 / (2 * pi * beta * x) if x > 0 else radius / (pi * beta)

        share: float = quad(density, 0, angle)[0]
        return share

    angle: float = _root(lambda a: share_below(a) - 0.5, 1e-9, pi, xtol=1e-12)
    return threshold / sqrt(center - radius * cos(angle))


def _above_rounding(values: Values, large: int) -> Values:
    """Set singular values that are rounding errors to zero: sigma^2 below max(L, M) eps sigma_1^2."""
    return np.where(values > np.sqrt(large * np.finfo(np.float64).eps) * values[0], values, 0.0)


def _per_mode(
    candidate: CandidateLike, rank: Callable[[Values, int, int], int], spectra: tuple[Any, ...] | None = None
) -> Ranks:
    """The rank of every unfolding of the weight, or of other spectra, the largest over the groups.

    A mode whose factor does not pay stays full. A factor pays if it lowers both parameters and MACs, or if the
    layer is cheaper only with it.
    """
    ranks = tuple(
        max(rank(values, spectrum.rows, spectrum.columns) for values in spectrum.values)
        for spectrum in (candidate.spectra if spectra is None else spectra)
    )
    if 0 in ranks:
        return ranks
    paying = ranks
    for mode, limit in enumerate(candidate.limits):
        full = (*paying[:mode], limit, *paying[mode + 1 :])
        if not _cheaper(candidate, paying, full):
            paying = full
    return ranks if _cheaper(candidate, ranks) and not _cheaper(candidate, paying) else paying


def _cheaper(candidate: CandidateLike, ranks: Ranks, than: Ranks | None = None) -> bool:
    """Whether both costs are below those at other ranks, or below those of the dense layer."""
    params = candidate.params_share(than) if than else 1.0
    macs = candidate.macs_share(than) if than else 1.0
    return candidate.params_share(ranks) < params and candidate.macs_share(ranks) < macs


def evbmf_rank(singular_values: Values, rows: int, columns: int) -> int:
    """Return how many singular values of a rows x columns matrix stand above the estimated noise.

    Keeps component h iff gamma_h > sqrt(M sigma^2 x_), where sigma^2 minimizes the free energy (27) and x_ is
    the exact threshold. Invariant to transposition and scaling. The rank is at most ceil(L / (1 + L/M)) - 1
    with L <= M the sides of the matrix, and 0 where nothing stands out of the noise.

    >>> rng = np.random.default_rng(0)
    >>> signal = 3 * rng.normal(size=(60, 4)) @ rng.normal(size=(4, 90))
    >>> evbmf_rank(np.linalg.svd(signal + rng.normal(size=(60, 90)), compute_uv=False), 60, 90)
    4
    """
    small, large = sorted((rows, columns))
    energies = np.sort(np.asarray(singular_values, np.float64))[::-1] ** 2
    if not energies[0] > 0:
        return 0
    # Zero singular values are part of the noise: dropping them would change L, a higher floor would change
    # the noise. The mean energy of an entry is set to 1, so that the noise variance is searched in (0, 1].
    energies = np.maximum(energies, large * np.finfo(np.float64).eps * energies[0])
    energies = energies / (energies.sum() / (small * large))
    alpha = small / large
    threshold = evbmf_threshold(alpha)
    variance = _noise_variance(energies / large, alpha, threshold)
    return int((energies / large > variance * threshold).sum())


def evbmf_threshold(alpha: float) -> float:
    """x_ = (1 + tau)(1 + alpha / tau), Phi(tau) + Phi(tau / alpha) = 0 with Phi(z) = log(1 + z)/z - 1/2.

    >>> round(evbmf_threshold(1.0), 4)
    4.9108
    """

    def phi(z: float) -> float:
        return log1p(z) / z - 0.5

    tau: float = _root(lambda t: phi(t) + phi(t / alpha), 1e-9 * alpha, ZERO_OF_PHI, xtol=1e-15, rtol=1e-14)
    return (1 + tau) * (1 + alpha / tau)


def _noise_variance(energies: Values, alpha: float, threshold: float) -> float:
    """Minimize the free energy over sigma^2, with ``energies`` gamma_h^2 / M.

    Between two kinks gamma_h^2 / (M x_) the set of components above the noise is fixed and the energy is smooth.
    At a kink it is the lower of two branches: no minimum lies there. Each interval is searched separately.
    """
    upper = energies.sum() / len(energies)
    most = ceil(len(energies) / (1 + alpha)) - 1
    lower = min(upper, max(energies[most] / threshold, energies[most:].mean()))
    kinks = energies / threshold
    edges = np.unique(np.concatenate([[lower, upper], kinks[(kinks > lower) & (kinks < upper)]]))
    ranks = (kinks > (edges[:-1, None] + edges[1:, None]) / 2).sum(1)
    candidates = [upper, lower]
    for place in np.flatnonzero(_may_turn(energies, alpha, ranks, edges)):
        left, right = log(edges[place]), log(edges[place + 1])
        candidates += _stationary_points(energies, alpha, int(ranks[place]), left, right)
    variance: float = min(candidates, key=lambda variance: _free_energy(energies, alpha, threshold, variance))
    return variance


def _may_turn(energies: Values, alpha: float, ranks: Any, edges: Values) -> Any:
    """Whether the derivative of :func:`_stationary_points` may change its sign between two neighbouring edges.

    The noise makes it rise with the variance and the signal makes it fall, so that each at its own edge bounds it.
    """
    signal = np.empty((2, len(ranks)))  # of each interval, at its left and its right edge
    for begin in range(0, len(ranks), EDGES_AT_ONCE):
        end = min(begin + EDGES_AT_ONCE, len(ranks))
        sums = np.zeros((end + 1 - begin, ranks[begin] + 1))
        tau = _tau(energies[: ranks[begin]] / edges[begin : end + 1, None], alpha)
        with np.errstate(divide="ignore"):  # of components that are noise at an edge, which no sum there includes
            np.cumsum(1 + 1 / tau, axis=1, out=sums[:, 1:])
        places = np.arange(end - begin)
        signal[:, begin:end] = sums[places, ranks[begin:end]], sums[places + 1, ranks[begin:end]]
    noise = np.concatenate([energies[::-1].cumsum()[::-1], [0.0]])[ranks]
    count = len(energies) - ranks
    most = count - noise / edges[1:] - alpha * signal[0]
    least = count - noise / edges[:-1] - alpha * signal[1]
    rounding = ROUNDING * len(energies) ** 2
    return (most >= -rounding) & (least <= rounding)


def _stationary_points(energies: Values, alpha: float, rank: int, left: float, right: float) -> list[float]:
    """Minima inside one interval: where the derivative by log sigma^2 changes from negative to positive."""
    noise_energy, noise_count = energies[rank:].sum(), len(energies) - rank

    def slope(log_variance: float | Values) -> Values:
        variance = np.exp(np.atleast_1d(log_variance))
        tau = _tau(energies[:rank] / variance[:, None], alpha)
        return np.asarray(noise_count - noise_energy / variance - alpha * (1 + 1 / tau).sum(1))

    probes = np.linspace(left, right, PROBES_PER_INTERVAL)
    slopes = slope(probes)
    turns = np.flatnonzero((slopes[:-1] < 0) & (slopes[1:] >= 0))
    return [float(np.exp(_root(lambda u: slope(u).item(), probes[i], probes[i + 1], xtol=1e-14))) for i in turns]


def _free_energy(energies: Values, alpha: float, threshold: float, variance: float) -> float:
    """Omega(sigma^2) without its constant terms; L <= M, all L singular values given."""
    x = energies / variance
    signal = x[x > threshold]
    tau = _tau(signal, alpha)
    shrinkage = np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau
    return float((x - np.log(x)).sum() + shrinkage.sum())


def _root(
    function: Callable[[float], float], low: float, high: float, xtol: float, rtol: float = ROUNDING
) -> float:
    """The root of a function in a bracket with opposite signs, by Brent's method."""
    from scipy.optimize import brentq  # imported late: it takes longer than the rest of import decomp

    return float(brentq(function, low, high, xtol=xtol, rtol=rtol))


def _tau(x: Values, alpha: float) -> Values:
    """The larger root of x = (1 + tau)(1 + alpha / tau); x_ is above (1 + sqrt(alpha))^2, so it is real."""
    excess = x - (1 + alpha)
    return np.asarray((excess + np.sqrt(np.maximum(excess**2 - 4 * alpha, 0))) / 2)

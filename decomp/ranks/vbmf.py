"""Global analytic solution of empirical variational Bayesian matrix factorization (EVBMF).

Source: Nakajima, Sugiyama, Babacan and Tomioka 2013 (Global analytic solution of fully-observed variational
Bayesian matrix factorization, JMLR 14), theorems 2 and 3, with the exact threshold of their 2015 analysis.
"""

from itertools import pairwise
from math import ceil, log, log1p

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Values = NDArray[np.float64]

ZERO_OF_PHI = 2.512862417252339
PROBES_PER_INTERVAL = 10


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

    tau: float = brentq(lambda t: phi(t) + phi(t / alpha), 1e-9 * alpha, ZERO_OF_PHI, xtol=1e-15, rtol=1e-14)
    return (1 + tau) * (1 + alpha / tau)


def _noise_variance(energies: Values, alpha: float, threshold: float) -> float:
    """Minimize the free energy over sigma^2, with ``energies`` gamma_h^2 / M.

    Between two kinks gamma_h^2 / (M x_) the set of kept components is fixed and the energy is smooth; at a kink
    it is the lower of two branches, so that no minimum lies there. Every interval is searched by itself.
    """
    upper = energies.sum() / len(energies)
    most = ceil(len(energies) / (1 + alpha)) - 1
    lower = min(upper, max(energies[most] / threshold, energies[most:].mean()))
    kinks = energies / threshold
    edges = np.unique(np.concatenate([[lower, upper], kinks[(kinks > lower) & (kinks < upper)]]))
    candidates = [upper, lower]
    for left, right in pairwise(edges):
        kept = int((kinks > (left + right) / 2).sum())
        candidates += _stationary_points(energies, alpha, kept, log(left), log(right))
    variance: float = min(candidates, key=lambda variance: _free_energy(energies, alpha, threshold, variance))
    return variance


def _stationary_points(energies: Values, alpha: float, kept: int, left: float, right: float) -> list[float]:
    """Minima inside one interval: where the slope in log sigma^2 turns from negative to positive."""
    noise_energy, noise_count = energies[kept:].sum(), len(energies) - kept

    def slope(log_variance: float | Values) -> Values:
        variance = np.exp(np.atleast_1d(log_variance))
        tau = _tau(energies[:kept] / variance[:, None], alpha)
        return np.asarray(noise_count - noise_energy / variance - alpha * (1 + 1 / tau).sum(1))

    probes = np.linspace(left, right, PROBES_PER_INTERVAL)
    slopes = slope(probes)
    turns = np.flatnonzero((slopes[:-1] < 0) & (slopes[1:] >= 0))
    return [float(np.exp(brentq(lambda u: slope(u).item(), probes[i], probes[i + 1], xtol=1e-14))) for i in turns]


def _free_energy(energies: Values, alpha: float, threshold: float, variance: float) -> float:
    """Omega(sigma^2) without its constant terms; L <= M, all L singular values given."""
    x = energies / variance
    signal = x[x > threshold]
    tau = _tau(signal, alpha)
    shrinkage = np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau
    return float((x - np.log(x)).sum() + shrinkage.sum())


def _tau(x: Values, alpha: float) -> Values:
    """The larger root of x = (1 + tau)(1 + alpha / tau); x_ is above (1 + sqrt(alpha))^2, so it is real."""
    excess = x - (1 + alpha)
    return np.asarray((excess + np.sqrt(np.maximum(excess**2 - 4 * alpha, 0))) / 2)

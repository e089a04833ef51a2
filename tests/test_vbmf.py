"""EVBMF against brute force, planted ranks, and the ways in which public ports fail."""

from math import ceil, log, sqrt

import numpy as np
import pytest
from scipy.optimize import brentq

from decomp.ranks.spectral import _may_turn, _noise_variance, evbmf_rank, evbmf_threshold


def rank_of(matrix):
    return evbmf_rank(np.linalg.svd(matrix, compute_uv=False), *matrix.shape)


def planted(rng, rows, columns, rank, strength):
    """A matrix of ``rank`` equal singular values, ``strength`` x the largest of the unit noise that is added."""
    left = np.linalg.qr(rng.normal(size=(rows, rank)))[0]
    right = np.linalg.qr(rng.normal(size=(columns, rank)))[0]
    signal = strength * (sqrt(rows) + sqrt(columns)) * left @ right.T
    return signal + rng.normal(size=(rows, columns))


@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (100, 100), (27, 64), (10, 2000)])
def test_recovers_a_planted_rank_whatever_the_scale_and_the_orientation(shape):
    rng = np.random.default_rng(0)
    small, large = sorted(shape)
    for rank in {1, 3, ceil(small / (1 + small / large)) // 2}:
        matrix = planted(rng, *shape, rank, 2.0)
        assert rank_of(matrix) == rank
        for scale in (1e-30, 1e-6, 1e-3, 1e4, 1e30):
            assert rank_of(matrix * scale) == rank
        assert rank_of(matrix.T) == rank


@pytest.mark.parametrize(("shape", "rank"), [((64, 576), 10), ((64, 576), 50), ((40, 40), 12), ((512, 512), 200)])
def test_exactly_low_rank_input_keeps_its_rank(shape, rank):
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    assert rank < ceil(min(shape) / (1 + min(shape) / max(shape)))
    assert rank_of(matrix) == rank
    assert rank_of(matrix.astype(np.float32)) == rank


def test_ranks_past_the_bound_are_never_given():
    rng = np.random.default_rng(2)
    matrix = rng.normal(size=(256, 140)) @ rng.normal(size=(140, 256))
    assert rank_of(matrix) < ceil(256 / 2)


@pytest.mark.parametrize("shape", [(64, 576), (256, 256), (1, 10), (10, 1), (2, 2), (3, 900), (1, 1)])
def test_noise_and_tiny_matrices_have_rank_zero(shape):
    rng = np.random.default_rng(3)
    for _ in range(5):
        assert rank_of(rng.normal(size=shape)) == 0


def test_zero_matrix_has_rank_zero():
    assert evbmf_rank(np.zeros(5), 5, 8) == 0


def test_one_dead_row_changes_nothing_much():
    rng = np.random.default_rng(4)
    matrix = planted(rng, 64, 576, 9, 2.0)
    matrix[5] = 0
    assert rank_of(matrix) == 9


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.25, 0.111, 0.05, 0.01, 0.001])
def test_threshold_is_at_the_exact_root(alpha):
    """The table of exact roots, to its four digits; 2.5129 sqrt(alpha) misses all but the first."""
    tau = {1.0: 2.5129, 0.5: 1.7826, 0.25: 1.2726, 0.111: 0.8638, 0.05: 0.5941, 0.01: 0.2829, 0.001: 0.0991}
    threshold = evbmf_threshold(alpha)
    found = brentq(lambda t: (1 + t) * (1 + alpha / t) - threshold, sqrt(alpha) * 1.0001, 10)
    assert found == pytest.approx(tau[alpha], abs=6e-5)


def spectra(seed):
    """Noise, power laws and planted signals of all strengths: the free energy has up to several minima."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 40))
    columns = rows + int(rng.integers(0, 80))
    matrix = rng.normal(size=(rows, columns)) * 10.0 ** rng.uniform(-5, 3)
    if seed % 3 == 0:
        matrix *= (np.arange(1, rows + 1) ** -rng.uniform(0.2, 2))[:, None]
    if seed % 3 == 1:
        rank = int(rng.integers(0, rows + 1))
        signal = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
        matrix += rng.uniform(0, 3) * matrix.std() * signal
    energies = np.linalg.svd(matrix, compute_uv=False) ** 2
    energies = np.maximum(energies, columns * 2.2e-16 * energies[0])
    return energies / energies.sum() * rows, rows / columns


def free_energy(energies, alpha, variance):
    """Equations 27 to 30 of Nakajima et al. 2013, written out."""
    total = 0.0
    for energy in energies.tolist():
        x = energy / variance
        total += x - log(x)
        if x > evbmf_threshold(alpha):
            tau = np.roots([1, 1 + alpha - x, alpha]).real.max()  # of x = (1 + tau) (1 + alpha / tau)
            total += log(tau + 1) + alpha * log(tau / alpha + 1) - tau
    return total


@pytest.mark.parametrize("seed", range(60))
def test_noise_variance_is_the_global_minimum(seed):
    """Against a dense grid over the whole interval that Nakajima et al. give for sigma^2."""
    energies, alpha = spectra(seed)
    threshold = evbmf_threshold(alpha)
    most = ceil(len(energies) / (1 + alpha)) - 1
    upper = energies.sum() / len(energies)
    lower = max(energies[most] / threshold, energies[most:].mean())
    grid = np.exp(np.linspace(np.log(min(lower, upper)), np.log(upper), 401))
    best = min(free_energy(energies, alpha, variance) for variance in grid)
    found = _noise_variance(energies, alpha, threshold)
    assert min(lower, upper) * (1 - 1e-12) <= found <= upper * (1 + 1e-12)
    assert free_energy(energies, alpha, found) <= best + 1e-9 * abs(best)


def test_a_long_unfolding_is_judged_from_its_few_singular_values():
    """No M x M matrix is made: with M = 100,000 it would take 80 GB."""
    values = np.arange(1, 513) ** -0.5
    assert 0 < evbmf_rank(values, 512, 100_000) < 512


def test_components_at_the_edge_of_the_noise_give_no_warning():
    energies = np.array([4, 2, 0.4, 0.4, 0.3, 0.3, 0.3, 0.3])
    with np.errstate(all="raise"):
        assert _noise_variance(energies, 1.0, evbmf_threshold(1.0)) > 0


def spectrum(kind, rng, rows, columns):
    match kind:
        case "planted":
            matrix = planted(rng, rows, columns, 1 + rows // 3, rng.uniform(0.2, 2))
            return np.linalg.svd(matrix, compute_uv=False)
        case "power law":
            return np.arange(1, rows + 1.0) ** -rng.uniform(0.1, 3)
        case "repeated":
            return np.sort(np.repeat(rng.exponential(size=rows), 3)[:rows])[::-1]
        case "exponential":
            return np.sort(rng.exponential(size=rows))[::-1]


@pytest.mark.parametrize("kind", ["planted", "power law", "repeated", "exponential"])
def test_bounds_of_the_slope_leave_out_no_minimum(kind, monkeypatch):
    rng = np.random.default_rng(7)
    left_out = 0
    for _ in range(40):
        rows, columns = sorted(int(n) for n in rng.integers(2, 120, 2))
        alpha = rows / columns
        values = spectrum(kind, rng, rows, columns)
        energies = values**2 / (values**2).sum() * rows
        threshold = evbmf_threshold(alpha)
        found = _noise_variance(energies, alpha, threshold)
        with monkeypatch.context() as patch:

            def everywhere(energies, alpha, ranks, edges):
                nonlocal left_out
                left_out += int((~_may_turn(energies, alpha, ranks, edges)).sum())
                return np.ones(len(ranks), bool)

            patch.setattr("decomp.ranks.spectral._may_turn", everywhere)
            assert _noise_variance(energies, alpha, threshold) == found
    assert left_out > 100

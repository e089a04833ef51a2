"""Rank rules against brute force and published constants, on spectra of a layer."""

from math import ceil

import numpy as np
import pytest
import torch
from networks import plant_spectra
from scipy.integrate import quad
from sklearn.decomposition import PCA
from torch import nn

import decomp
from decomp.ranks.spectral import gavish_donoho_factor


def ranks_of(dense, rule):
    """Ranks that a rule gives, whether or not they pay."""
    plan = decomp.plan(dense, ranks=1)
    return rule(plan._candidates[""][0])


def test_every_rule_by_name_and_as_an_object_with_a_readable_repr():
    dense = plant_spectra(nn.Linear(60, 90), decay=1.5)
    for name, rule in decomp.ranks.RULES.items():
        assert repr(rule).startswith(f"{name}(")
        assert decomp.plan(dense, ranks=name)[""].ranks == decomp.plan(dense, ranks=rule)[""].ranks != ()


def test_weakened_vbmf_goes_part_of_the_way():
    dense = plant_spectra(nn.Linear(60, 90), decay=1.5)
    (found,) = ranks_of(dense, decomp.ranks.vbmf())
    assert ranks_of(dense, decomp.ranks.vbmf(weaken=0.5)) == (int(np.ceil(60 - 0.5 * (60 - found))),)
    noise = nn.Linear(60, 90)
    assert ranks_of(noise, decomp.ranks.vbmf(weaken=0.5)) == (0,), "noise stays noise"


def test_nuclear_energy_adds_up_the_singular_values():
    dense = nn.Linear(30, 20)
    values = torch.linalg.svdvals(dense.weight.detach().double())
    for share in (0.1, 0.3, 0.5):
        expected = int((values.cumsum(0) < share * values.sum()).sum()) + 1
        assert ranks_of(dense, decomp.ranks.energy(share, nuclear=True)) == (expected,)


@pytest.mark.parametrize("bound", [0.05, 0.2, 0.5])
def test_error_gives_the_fewest_parameters_within_the_bound(bound):
    dense = plant_spectra(nn.Conv2d(10, 12, 3), decay=2.0)
    plan = decomp.plan(dense, ranks=decomp.ranks.error(bound), min_gain=0)
    found = ranks_of(dense, decomp.ranks.error(bound))
    candidate = plan._candidates[""][0]
    allowed = [
        (out, inside) for out in range(1, 13) for inside in range(1, 11) if candidate.error((out, inside)) <= bound
    ]
    assert found in allowed
    assert candidate.price(found).params == min(candidate.price(ranks).params for ranks in allowed)


@pytest.mark.parametrize(("beta", "factor"), [(1.0, 2.8582), (0.5, 2.1711), (0.25, 1.8371), (1 / 9, 1.6273)])
def test_gavish_donoho_factor_is_the_published_one(beta, factor):
    assert gavish_donoho_factor(beta) == pytest.approx(factor, rel=3e-4)
    cubic = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    assert gavish_donoho_factor(beta) == pytest.approx(cubic, rel=0.01)


def test_marchenko_pastur_median_halves_the_law():
    beta = 0.3
    low, high = (1 - np.sqrt(beta)) ** 2, (1 + np.sqrt(beta)) ** 2
    root = np.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + np.sqrt(beta**2 + 14 * beta + 1)))
    median = (root / gavish_donoho_factor(beta)) ** 2
    share = quad(lambda x: np.sqrt((high - x) * (x - low)) / (2 * np.pi * beta * x), low, median)[0]
    assert share == pytest.approx(0.5, abs=1e-6)


def test_rules_for_noise_recover_a_planted_rank():
    signal = torch.randn(80, 6) @ torch.randn(6, 160)
    dense = nn.Linear(160, 80)
    dense.weight.data = signal + 0.3 * torch.randn(80, 160)
    for rule in (decomp.ranks.vbmf(), decomp.ranks.gavish_donoho(), decomp.ranks.mdl()):
        assert ranks_of(dense, rule) == (6,)


def mdl_brute_force(values, samples):
    eigenvalues, count = values**2, len(values)
    scores = []
    for k in range(count):
        tail = eigenvalues[k:]
        likelihood = samples * (count - k) * (np.log(tail).mean() - np.log(tail.mean()))
        scores.append(-likelihood + 0.5 * k * (2 * count - k) * np.log(samples))
    return int(np.argmin(scores))


def test_mdl_is_the_minimum_of_its_formula():
    dense = plant_spectra(nn.Linear(70, 40), decay=0.8)
    values = torch.linalg.svdvals(dense.weight.detach().double()).numpy()
    assert ranks_of(dense, decomp.ranks.mdl()) == (mdl_brute_force(values, 70),)


def test_mdl_agrees_with_the_bayesian_choice_of_scikit_learn_on_clear_data():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(400, 5)) @ rng.normal(size=(5, 30)) + 0.1 * rng.normal(size=(400, 30))
    dense = nn.Linear(400, 30)
    dense.weight.data = torch.tensor(data.T, dtype=torch.float32)
    assert ranks_of(dense, decomp.ranks.mdl()) == (PCA("mle", svd_solver="full").fit(data).n_components_,)


def test_stable_rank():
    dense = nn.Linear(30, 20)
    values = torch.linalg.svdvals(dense.weight.detach().double())
    assert ranks_of(dense, decomp.ranks.stable_rank()) == (ceil(float(values.square().sum() / values[0] ** 2)),)


@pytest.mark.parametrize("rule", [decomp.ranks.vbmf, decomp.ranks.energy, decomp.ranks.error])
def test_thresholds_out_of_range_are_refused(rule):
    for bad in (0, -1, 2, "x", None):
        with pytest.raises(ValueError, match="a share in"):
            rule(bad)


@pytest.mark.parametrize("name", sorted(decomp.ranks.RULES))
def test_no_rule_crashes_on_odd_weights(name):
    low = torch.randn(40, 3) @ torch.randn(3, 60)
    dead = torch.cat([low, torch.zeros(10, 60)])
    odd = [(torch.zeros(6, 9), 0), (torch.ones(40, 60), 1), (torch.eye(6, 9), 6), (torch.randn(1, 9), 1)]
    odd += [(torch.randn(6, 1), 1), (low, 3), (dead, 3), (1e-18 * low, 3), (1e15 * low, 3)]
    for weight, most in odd:
        dense = nn.Linear(weight.shape[1], weight.shape[0]).double()
        dense.weight.data = weight.double()
        (rank,) = ranks_of(dense, decomp.ranks.RULES[name])
        assert 0 <= rank <= most, weight.shape


def test_nuclear_energy_does_not_count_rounding():
    dense = nn.Linear(60, 40)
    dense = dense.double()
    dense.weight.data = torch.randn(40, 3, dtype=torch.float64) @ torch.randn(3, 60, dtype=torch.float64)
    assert ranks_of(dense, decomp.ranks.energy(1.0, nuclear=True)) == (3,)


def test_error_prefers_ranks_that_pay_over_fewer_parameters():
    dense = plant_spectra(nn.ConvTranspose2d(32, 64, 3, stride=3), decay=1.0)
    for bound in (0.05, 0.1, 0.2, 0.3):
        plan = decomp.plan(dense, ranks=decomp.ranks.error(bound), min_gain=0)
        candidate = plan._candidates[""][0]
        grid = candidate.grid
        possible = (grid.error <= bound) & (grid.params_share < 1) & (grid.macs_share < 1)
        assert bool(plan[""].ranks) == bool(possible.any())

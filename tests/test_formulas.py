"""Formulas one by one, against NumPy, SciPy and scikit-learn."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from rows import rows_of, target_of
from sklearn.covariance import empirical_covariance, oas
from torch import nn

from decomp.calibration.moments import SHRINKAGES, chosen_shrinkage, oracle_shrinkage
from decomp.calibration.reduced_rank import refitted
from decomp.calibration.unfold import patches_like
from decomp.calibration.whitening import _marginals
from decomp.layers import TuckerConv, group_kernels
from decomp.linalg import as_float64, gram, gram_eigenvalues, symmetric_power, tail_sums
from decomp.methods import METHODS
from decomp.recovery.batch_norm_shift import BatchNormShift
from decomp.recovery.least_squares import RIDGES, NormalEquations


def positive(rng, size, rank=None):
    """A random positive semidefinite matrix."""
    factor = rng.normal(size=(size, rank or size))
    return factor @ factor.T


@pytest.mark.parametrize("shape", [(6, 4, 9), (6, 9, 4), (1, 5, 5), (3, 1, 7)])
def test_eigenvalues_of_the_gram_matrix_are_the_squared_singular_values(shape):
    matrices = np.random.default_rng(0).normal(size=shape)
    matrices[0, 0] = 0  # one of lower rank
    found = gram_eigenvalues(torch.from_numpy(matrices)).numpy()
    expected = np.linalg.svd(matrices, compute_uv=False) ** 2
    assert found.shape == expected.shape
    bound = max(shape[1:]) * np.finfo(float).eps * expected[:, :1]
    assert (np.abs(found - expected) <= 8 * bound).all()
    assert (found >= 0).all()


def test_tail_sums_do_not_cancel():
    energies = np.array([[1.0, 1e-3, 1e-20, 1e-22], [3.0, 2.0, 1.0, 0.0]])
    expected = [[math.fsum(row[start:]) for start in range(5)] for row in energies.tolist()]
    np.testing.assert_allclose(tail_sums(energies), expected, rtol=1e-15, atol=0)


def test_a_weight_is_taken_to_float64_as_it_is_and_without_its_graph():
    weight = nn.Parameter(torch.randn(3, 4, dtype=torch.bfloat16))
    taken = as_float64(weight)
    assert (taken.dtype, taken.requires_grad) == (torch.float64, False)
    assert taken.tolist() == weight.tolist()


@pytest.mark.parametrize("power", [0.5, -0.5, -1.0, 1.0])
def test_powers_of_symmetric_matrices_are_those_of_scipy(power):
    rng = np.random.default_rng(1)
    matrices = np.stack([positive(rng, 6) + np.eye(6), np.diag(np.arange(1.0, 7))])
    expected = [scipy.linalg.fractional_matrix_power(matrix, power) for matrix in matrices]
    found = symmetric_power(torch.from_numpy(matrices), power).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_the_inverse_root_of_a_singular_matrix_is_finite_and_right_where_the_matrix_is():
    matrix = positive(np.random.default_rng(2), 8, rank=3)
    root, inverse = (symmetric_power(torch.from_numpy(matrix)[None], power)[0].numpy() for power in (0.5, -0.5))
    basis = scipy.linalg.orth(matrix, rcond=1e-10)
    assert basis.shape == (8, 3)
    np.testing.assert_allclose(root, scipy.linalg.sqrtm(matrix).real, rtol=0, atol=1e-6)
    np.testing.assert_allclose(inverse @ root @ basis, basis, rtol=0, atol=1e-6)
    # n eps of the largest eigenvalue stands in for those that are zero.
    assert np.linalg.norm(inverse, 2) == pytest.approx(
        (np.linalg.norm(matrix, 2) * 8 * 2.0**-52) ** -0.5, rel=1e-6
    )


@pytest.mark.parametrize("size", [7, 256, 257, 600])
@pytest.mark.parametrize("columns", [5, 600])
def test_a_gram_matrix_is_that_of_numpy(size, columns):
    matrices = torch.randn(2, size, columns, dtype=torch.float64)
    found = gram(matrices)
    expected = np.einsum("gnm,gkm->gnk", matrices.numpy(), matrices.numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12 * columns)
    rounded = gram(matrices.float())
    assert rounded.dtype == torch.float64
    assert float((rounded - found).abs().max()) < 1e-6 * columns


def test_the_moments_of_one_mode_are_sums_over_the_others():
    rng, sizes = np.random.default_rng(3), (3, 4, 2)
    rows = rng.normal(size=(50, *sizes))
    flat = rows.reshape(50, -1)
    found = _marginals(torch.from_numpy(flat.T @ flat)[None], sizes)
    for marginal, formula in zip(found, ("nabc,nxbc->ax", "nabc,naxc->bx", "nabc,nabx->cx"), strict=True):
        np.testing.assert_allclose(marginal[0].numpy(), np.einsum(formula, rows, rows), rtol=1e-12)
    parts = [positive(rng, size) for size in sizes]
    product = np.kron(np.kron(parts[0], parts[1]), parts[2])
    found = _marginals(torch.from_numpy(product)[None], sizes)
    whole = np.trace(product)
    for marginal, part in zip(found, parts, strict=True):
        np.testing.assert_allclose(marginal[0].numpy(), part * whole / np.trace(part), rtol=1e-12)


@pytest.mark.parametrize(("samples", "size"), [(12, 4), (10, 20), (50, 20), (4000, 7), (2000, 2)])
def test_oracle_shrinkage_is_that_of_scikit_learn_with_the_term_that_it_leaves_out(samples, size):
    """Chen et al. 2010, equation 23; scikit-learn drops 2/p as small for large p."""
    x = np.random.default_rng(samples).normal(size=(samples, size)) * np.arange(1, size + 1)
    second = empirical_covariance(x)
    _, theirs = oas(x)
    assert 0 < theirs < 1, "clipped, the two cannot be compared"
    squares, trace = np.sum(second**2), np.trace(second) ** 2
    left_out = 2 / size * squares / (squares - trace / size)
    expected = (theirs * (samples + 1) - left_out) / (samples + 1 - 2 / size)
    assert oracle_shrinkage(torch.from_numpy(second)[None], samples) == pytest.approx(expected, rel=1e-12)


def test_oracle_shrinkage_at_its_ends_and_over_groups():
    x = np.random.default_rng(0).normal(size=20)
    one = torch.from_numpy(np.outer(x, x))[None]
    # Of rank one: tr(S^2) = tr(S)^2, so that ((1 - 2/p) + 1) / ((2 - 2/p) (1 - 1/p)) is 1 / (1 - 1/p): clipped.
    assert oracle_shrinkage(one, 1) == 1.0
    assert oracle_shrinkage(one, 100) == pytest.approx((2 - 2 / 20) / (101 - 2 / 20) / (1 - 1 / 20), rel=1e-12)
    assert oracle_shrinkage(3 * torch.eye(20, dtype=torch.float64)[None], 1000) == 1.0, "the target itself"
    assert oracle_shrinkage(torch.ones(1, 1, 1), 5) == 0.0
    spread = torch.diag(torch.logspace(0, -3, 20, dtype=torch.float64))[None]
    assert oracle_shrinkage(spread.expand(3, 20, 20), 50) == pytest.approx(oracle_shrinkage(spread, 50), rel=1e-12)
    both = oracle_shrinkage(torch.cat([one, spread]), 50)
    assert min(oracle_shrinkage(one, 50), oracle_shrinkage(spread, 50)) < both
    assert both < max(oracle_shrinkage(one, 50), oracle_shrinkage(spread, 50))


@pytest.mark.parametrize("seed", range(6))
def test_the_shrinkage_that_is_chosen_errs_least_on_moments_held_out(seed):
    """Oracle: the weight cut by the SVD of W C^1/2 in SciPy, measured on other samples of the same inputs."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(8, 8)) * np.arange(1, 9) ** -1.0
    few, others = (rng.normal(size=(count, 8)) @ mixing.T for count in ((10, 40, 400)[seed % 3], 400))
    weight, train, held_out = rng.normal(size=(5, 8)), few.T @ few / len(few), others.T @ others / len(others)
    errors = {}
    for rho in (0.037, *SHRINKAGES):
        metric = (1 - rho) * train + rho * np.trace(train) / 8 * np.eye(8)
        root = scipy.linalg.sqrtm(metric).real
        left, values, right = np.linalg.svd(weight @ root)
        cut = (left[:, :2] * values[:2]) @ right[:2] @ np.linalg.inv(root)
        errors[rho] = np.trace((weight - cut) @ held_out @ (weight - cut).T)
    best, second = sorted(errors, key=errors.get)[:2]
    assert errors[second] > errors[best] * (1 + 1e-6), "else rounding decides"
    given = (torch.from_numpy(each)[None] for each in (weight, train, held_out))
    assert chosen_shrinkage(*given, 0.037) == best


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("ridge", RIDGES)
def test_normal_equations_give_what_lstsq_gives_with_the_ridge_as_rows(ridge, centred):
    """Rows sqrt(n rho) (I, A_0) below (Z, Y), rho a share of the mean diagonal; a shift is free of it."""
    rng = np.random.default_rng(5)
    z = rng.normal(size=(2, 60, 5)) @ rng.normal(size=(2, 5, 5)) + rng.normal(size=5)
    y = z @ rng.normal(size=(2, 5, 3)) + rng.normal(size=(2, 60, 3)) + 2
    old = rng.normal(size=(2, 3, 5))
    equations = NormalEquations()
    for part in (slice(0, 25), slice(25, 60)):
        equations.add(torch.from_numpy(z[:, part]), torch.from_numpy(y[:, part]))
    weight, bias = next(equations.solutions(torch.from_numpy(old), (ridge,), centred=centred))
    assert (bias is None) != centred
    lost = energy = 0.0
    for group in range(2):
        mean_z, mean_y = (each[group].mean(0) * centred for each in (z, y))
        inside, outside = z[group] - mean_z, y[group] - mean_y
        rho = ridge * np.mean(np.sum(inside**2, 0) / 60)
        design = np.concatenate([inside, np.sqrt(60 * rho) * np.eye(5)])
        target = np.concatenate([outside, np.sqrt(60 * rho) * old[group].T])
        expected = np.linalg.lstsq(design, target)[0].T
        np.testing.assert_allclose(weight[group].numpy(), expected, rtol=0, atol=1e-10)
        shift = mean_y - expected @ mean_z
        if bias is not None:
            np.testing.assert_allclose(bias[group].numpy(), shift, rtol=0, atol=1e-10)
        lost += np.sum((y[group] - z[group] @ expected.T - shift) ** 2)
        energy += np.sum(y[group] ** 2)
    assert equations.error(weight, bias) == pytest.approx((lost / energy) ** 0.5, rel=1e-10)


def test_a_tucker_core_is_the_reduced_rank_regression_on_its_features():
    """Oracle: least squares of the outputs on the features of the first factor, cut by an SVD in NumPy."""
    dense = nn.Conv2d(6, 8, 3, dtype=torch.float64)
    x = torch.randn(40, 6, 5, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    rows = rows_of(patches_like(dense)(x), 2, 1)[0].detach()
    kernels = group_kernels(dense).detach()
    layer = METHODS["tucker"].layer_of(dense)
    first = layer.factor_kernels(dense, METHODS["tucker"].factors(kernels, (3, 2)))
    found = refitted(layer, dense, first, kernels, (rows.T @ rows / len(rows))[None])
    small = layer.from_kernels(dense, found)
    assert layer is TuckerConv
    assert torch.equal(found["reduce"], first["reduce"])
    features = np.kron(first["reduce"][0].flatten(1).numpy(), np.eye(9)) @ rows.numpy().T
    outputs = kernels[0].flatten(1).numpy() @ rows.numpy().T
    fitted = outputs @ np.linalg.pinv(features) @ features
    best = np.sum((outputs - fitted) ** 2) + np.sum(np.linalg.svd(fitted, compute_uv=False)[3:] ** 2)
    lost = float(((dense(x) - small(x)).detach() ** 2).sum())
    assert lost == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm1d, (7, 5)), (nn.BatchNorm1d, (7, 5, 3)), (nn.BatchNorm2d, (7, 5, 3, 2))]
)
def test_a_moved_batch_norm_turns_its_target_into_what_the_dense_one_gave(kind, shape, affine):
    ours, theirs = (kind(5, affine=affine, dtype=torch.float64).eval() for _ in range(2))
    for norm in (ours, theirs):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        if affine:
            nn.init.uniform_(norm.weight, -2, 2)
            nn.init.normal_(norm.bias)
    if affine:
        with torch.no_grad():
            ours.weight[2] = 0  # a constant whatever it gets: the output of the dense layer is as good as any
    y, live = torch.randn(shape, dtype=torch.float64), [0, 1, 3, 4]
    norm_shift = BatchNormShift(ours, theirs)
    target = target_of(norm_shift, y)
    torch.testing.assert_close(ours(target)[:, live], theirs(y)[:, live], rtol=0, atol=1e-12)
    if affine:
        assert torch.equal(target[:, 2], y[:, 2])
    bias = torch.randn(5, dtype=torch.float64)
    shifted = ours(y + bias.reshape(-1, *(1,) * (y.dim() - 2)))
    with torch.no_grad():
        norm_shift.absorb(3 * bias)  # counted from where the norm was, not from where it went
        norm_shift.absorb(bias)
    torch.testing.assert_close(ours(y), shifted, rtol=0, atol=1e-12)

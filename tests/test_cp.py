"""CP solver: against closed forms, planted models, brute force and tensorly's parafac."""

import itertools
import math
import warnings

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac
from torch import Tensor

from decomp.methods.solvers import CP, fit_cp
from decomp.methods.solvers.epc import SLACK, correct
from decomp.methods.solvers.terms import weights

SHAPES = [(7, 5), (8, 6, 9), (6, 5, 3, 3), (5, 4, 2, 3, 2)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def expand(factors: list[Tensor]) -> Tensor:
    """The tensors of a batch of factors, one einsum over explicit outer products."""
    modes = "abcde"[: len(factors)]
    return torch.einsum(",".join(f"z{mode}r" for mode in modes) + "->z" + modes, *factors)


def planted(shape: tuple[int, ...], rank: int, seed: int = 0) -> Tensor:
    return expand([noise(1, size, rank, seed=seed + mode) for mode, size in enumerate(shape)])


def border_rank() -> Tensor:
    """a a b + a b a + b a a has rank three, and rank-two models as near as one likes: their terms diverge."""
    first, second = noise(12), noise(12, seed=1)
    tensor = sum(
        torch.einsum("i,j,k->ijk", *triple)
        for triple in ((first, first, second), (first, second, first), (second, first, first))
    )
    tensor = tensor / tensor.norm() + 0.02 * noise(12, 12, 12, seed=2) / 12**1.5
    return tensor[None]


def relative(model: CP, tensor: Tensor) -> Tensor:
    return (model.squared_errors / tensor.double().flatten(1).square().sum(1)).sqrt()


def residual(model: CP, tensor: Tensor) -> Tensor:
    return (tensor.double() - expand(model.factors)).flatten(1).square().sum(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("extra", [0, 3])
def test_closed_form_is_exact(shape: tuple[int, ...], extra: int) -> None:
    smallest = sorted(shape)
    rank = math.prod(smallest[:-2]) * smallest[-2] + extra
    tensor = noise(2, *shape)
    model = fit_cp(tensor, rank)
    assert [tuple(factor.shape) for factor in model.factors] == [(2, size, rank) for size in shape]
    assert relative(model, tensor).max() < 1e-12
    torch.testing.assert_close(expand(model.factors), tensor, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.degeneracy, torch.ones(2, dtype=torch.float64))
    if extra:
        assert all(bool((factor[:, :, -extra:] == 0).all()) for factor in model.factors)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_two_modes_are_the_truncated_svd(rank: int) -> None:
    tensor = noise(3, 7, 5)
    values = torch.linalg.svdvals(tensor)
    model = fit_cp(tensor, rank)
    torch.testing.assert_close(model.squared_errors, values[:, rank:].square().sum(1), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_error_and_degeneracy_are_those_of_the_factors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = noise(2, *shape).to(dtype)
    model = fit_cp(tensor, 4, max_sweeps=30)
    assert all(factor.dtype == torch.float64 for factor in model.factors)
    torch.testing.assert_close(model.squared_errors, residual(model, tensor), rtol=1e-9, atol=0)
    sizes = weights(model.factors).square().sum(1) / tensor.double().flatten(1).square().sum(1)
    torch.testing.assert_close(model.degeneracy, sizes)
    norms = torch.stack([factor.norm(dim=1) for factor in model.factors])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


@pytest.mark.parametrize(
    ("shape", "rank"), [((10, 8, 6), 4), ((9, 7, 3, 3), 5), ((6, 5, 4, 3, 2), 3), ((7, 7, 7), 9)]
)
def test_finds_a_planted_model(shape: tuple[int, ...], rank: int) -> None:
    tensor = planted(shape, rank)
    model = fit_cp(tensor, rank, starts=8, tolerance=1e-9, max_sweeps=1000)
    assert float(relative(model, tensor)) < 1e-6
    torch.testing.assert_close(model.squared_errors, residual(model, tensor), rtol=1e-3, atol=1e-24)


def test_finds_a_planted_model_where_it_starts_in_float32() -> None:
    tensor = planted((64, 64, 17), 10)
    assert float(relative(fit_cp(tensor, 10, tolerance=1e-9, starts=2), tensor)) < 1e-6


@pytest.mark.parametrize("shape", [(24, 20, 9), (20, 24, 3, 3), (40, 6, 5)])
@pytest.mark.parametrize("rank", [3, 12])
def test_not_worse_than_parafac(shape: tuple[int, ...], rank: int) -> None:
    tensor = planted(shape, rank, seed=3)
    tensor = tensor / tensor.norm() + 0.3 * noise(1, *shape) / math.prod(shape) ** 0.5
    with tensorly.backend_context("pytorch", local_threadsafe=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [
            tensorly.cp_to_tensor(parafac(tensor[0], rank, init="svd", tol=1e-6, random_state=seed))
            for seed in range(3)
        ]
    best = min(float((tensor[0] - model).norm() / tensor.norm()) for model in theirs)
    assert float(relative(fit_cp(tensor, rank, starts=3), tensor)) < best + 1e-3


def test_correction_shrinks_the_terms_at_the_same_error() -> None:
    tensor = border_rank()
    loose = fit_cp(tensor, 2, correct=False, max_sweeps=1000, tolerance=1e-9)
    tight = fit_cp(tensor, 2, max_sweeps=1000, tolerance=1e-9)
    assert float(loose.degeneracy) > 30
    assert float(tight.degeneracy) < 0.7 * float(loose.degeneracy)
    assert float(tight.squared_errors) <= 1.01**2 * float(loose.squared_errors)
    torch.testing.assert_close(tight.squared_errors, residual(tight, tensor), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("shape", "rank"), [((24, 20, 9), 12), ((24, 20, 3, 3), 12)])
def test_terms_of_noise_stay_bounded(shape: tuple[int, ...], rank: int) -> None:
    tensor = noise(1, *shape)
    loose = fit_cp(tensor, rank, correct=False, max_sweeps=500)
    tight = fit_cp(tensor, rank, max_sweeps=500)
    assert float(tight.degeneracy) < 4
    assert float(relative(tight, tensor)) < 1.01 * float(relative(loose, tensor))


def test_modes_keep_their_order() -> None:
    tensor = planted((3, 9, 4, 7), 3)
    model = fit_cp(tensor, 3, starts=4, tolerance=1e-9, max_sweeps=1000)
    assert [factor.shape[1] for factor in model.factors] == [3, 9, 4, 7]
    torch.testing.assert_close(expand(model.factors), tensor, rtol=0, atol=1e-5)


def test_more_starts_are_never_worse() -> None:
    tensor = noise(5, 10, 9, 8)
    errors = [fit_cp(tensor, 6, starts=starts, correct=False).squared_errors for starts in (1, 2, 4)]
    assert all(bool((after <= before * (1 + 1e-9)).all()) for before, after in itertools.pairwise(errors))


def test_correction_of_diverging_terms() -> None:
    """A pair of large terms that cancel each other, added by hand, is taken away again."""
    tensor = planted((8, 7, 6), 2)
    tensor = tensor / tensor.norm() + 0.1 * noise(1, 8, 7, 6) / 336**0.5
    factors = [
        torch.cat([factor, 3 * noise(1, factor.shape[1], 1), 3 * noise(1, factor.shape[1], 1)], 2)
        for factor in fit_cp(tensor, 2).factors
    ]
    for mode, factor in enumerate(factors):
        factor[:, :, 3] = factor[:, :, 2] * (-1 if mode == 0 else 1) + 1e-4 * noise(1, factor.shape[1], seed=9)
    before = (tensor - expand(factors)).norm()
    mended = correct(tensor / tensor.norm(), [factor / tensor.norm() ** (1 / 3) for factor in factors])
    after = (tensor / tensor.norm() - expand(mended)).norm() * tensor.norm()
    assert float(weights(factors).square().sum()) > 1000
    assert float(weights(mended).square().sum()) < 2
    assert float(after) <= SLACK * float(before) * (1 + 1e-9)


def test_a_batch_is_like_its_tensors_one_at_a_time() -> None:
    tensor = noise(40, 12, 3, 3)
    together = relative(fit_cp(tensor, 3, starts=3), tensor)
    alone = torch.cat([relative(fit_cp(part, 3, starts=3), part) for part in tensor.split(1)])
    assert float((together.mean() - alone.mean()).abs()) < 5e-3
    assert float((together - alone).abs().median()) < 1e-4


def test_more_rank_is_not_more_error() -> None:
    tensor = noise(1, 12, 10, 9)
    errors = [float(relative(fit_cp(tensor, rank, starts=2), tensor)) for rank in (1, 2, 4, 8, 16, 32, 64, 90)]
    assert all(after < before + 2e-3 for before, after in itertools.pairwise(errors))
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_scale_changes_nothing(scale: float) -> None:
    tensor = noise(2, 8, 7, 3, 3)
    model, scaled = fit_cp(tensor, 6), fit_cp(tensor * scale, 6)
    torch.testing.assert_close(relative(scaled, tensor * scale), relative(model, tensor), rtol=1e-4, atol=0)
    torch.testing.assert_close(scaled.degeneracy, model.degeneracy, rtol=1e-2, atol=0)


@pytest.mark.parametrize("rank", [1, 6, 60])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_zero_tensor_beside_another(shape: tuple[int, ...], rank: int) -> None:
    tensor = torch.cat([torch.zeros(1, *shape, dtype=torch.float64), noise(1, *shape)])
    model = fit_cp(tensor, rank, max_sweeps=20)
    assert all(bool((factor[0] == 0).all()) for factor in model.factors)
    assert float(model.squared_errors[0]) == float(model.degeneracy[0]) == 0
    assert bool(torch.isfinite(model.squared_errors).all())
    assert float(relative(model, tensor)[1]) < 1


@pytest.mark.parametrize("single", [False, True])
def test_more_terms_than_the_tensor_has(single: bool) -> None:
    shape = (64, 64, 17) if single else (9, 8, 5)
    tensor = planted(shape, 2)
    model = fit_cp(tensor, 12, max_sweeps=50)
    assert all(bool(torch.isfinite(factor).all()) for factor in model.factors)
    assert float(relative(model, tensor)) < 1e-3
    assert float(model.degeneracy) < 3


def test_seeds_are_explicit() -> None:
    tensor = noise(2, 9, 8, 7)
    state = torch.random.get_rng_state()
    one, same, other = (fit_cp(tensor, 12, seed=seed, max_sweeps=10) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.factors, same.factors, strict=True))
    assert not torch.equal(one.factors[0], other.factors[0])

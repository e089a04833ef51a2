"""CANDECOMP/PARAFAC of small batches of tensors (Kolda & Bader 2009; Phan et al. 2020)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from decomp.linalg import leading_eigenvectors
from decomp.methods.solvers.als import FLOORS, Problem, Rules, minimise
from decomp.methods.solvers.epc import correct as correct_terms
from decomp.methods.solvers.terms import residual, spread, unit, weights

TOLERANCE = 1e-6
MAX_SWEEPS = 100
DAMPING = 1.0
SHARE = 1e-3
SINGLE_PRECISION_SIZE = 1 << 16


@dataclass(frozen=True)
class CP:
    """A CP model of each tensor of a batch: K ~= sum over r of the outer product of the columns r.

    ``factors`` holds one (batch, n_i, R) tensor per mode, columns of equal norm in all modes;
    ``squared_errors`` is ||K - K~||^2 and ``degeneracy`` the sum of ||term||^2 / ||K||^2, per tensor.
    """

    factors: list[Tensor]
    squared_errors: Tensor
    degeneracy: Tensor


def fit_cp(
    tensor: Tensor,
    rank: int,
    *,
    starts: int = 1,
    seed: int = 0,
    tolerance: float = TOLERANCE,
    max_sweeps: int = MAX_SWEEPS,
    correct: bool = True,
) -> CP:
    """CP of every (n_1, ..., n_d) tensor of a batch at one rank, d from 2 to 5; factors are float64.

    By SVDs of the slices if these are exact, or if d = 2; else the best of ``starts`` runs of alternating least
    squares, each of which ends after three consecutive sweeps that lower the relative error by less than
    ``tolerance``. With ``correct`` a slightly larger squared error is accepted for terms that do not cancel each
    other, because degenerate models diverge in fine-tuning (Phan et al. 2020).

    >>> model = fit_cp(torch.randn(1, 8, 6, 9), 4)
    >>> [tuple(factor.shape) for factor in model.factors]
    [(1, 8, 4), (1, 6, 4), (1, 9, 4)]
    """
    exact = tensor.detach().to(torch.float64)
    norm = exact.flatten(1).norm(dim=1)
    scale = torch.where(norm > 0, norm, 1)
    order = sorted(range(1, exact.dim()), key=lambda mode: -exact.shape[mode])
    scaled = (exact / scale.reshape(-1, *(1,) * (exact.dim() - 1))).permute(0, *order)
    closed = rank >= math.prod(scaled.shape[3:]) * scaled.shape[2] or exact.dim() == 3
    if closed:
        factors = _slices(scaled, rank)
    else:
        core, basis = _compressed(scaled)
        factors = _best(core, rank, starts, seed, Rules(tolerance, SHARE if correct else 0.0), max_sweeps)
        factors = correct_terms(core, factors) if correct else factors
        factors = factors if basis is None else [basis @ factors[0], *factors[1:]]
    squared_errors = residual(scaled, factors) * scale.square()
    degeneracy = weights(factors).square().sum(1)
    root = scale.pow(1 / len(order))[:, None, None]
    ordered = [factors[order.index(mode)] * root for mode in range(1, exact.dim())]
    return CP(spread(ordered), squared_errors, degeneracy)


def _slices(tensor: Tensor, rank: int) -> list[Tensor]:
    """SVD of every slice over n_3 ... n_d, times unit vectors: exact at rank min(n_1, n_2) n_3 ... n_d."""
    slices = tensor.reshape(*tensor.shape[:3], -1).movedim(3, 1)
    left, values, right = torch.linalg.svd(slices, full_matrices=False)
    columns = [(left * values[:, :, None]).movedim(1, 2).flatten(2), right.mT.movedim(1, 2).flatten(2)]
    places = torch.arange(slices.shape[1], device="cpu").repeat_interleave(values.shape[2]).to(tensor.device)
    for index, size in zip(_unravel(places, tensor.shape[3:]), tensor.shape[3:], strict=True):
        unit_vectors = torch.eye(size, dtype=tensor.dtype, device=tensor.device)[:, index]
        columns.append(unit_vectors.expand(tensor.shape[0], -1, -1))
    missing = max(0, rank - len(places))
    return spread([torch.nn.functional.pad(column[:, :, :rank], (0, missing)) for column in columns])


def _unravel(places: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.unravel_index(places, sizes) if sizes else ()


def _compressed(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Without loss (CANDELINC): a first mode longer than all others together, in a basis of what it spans."""
    length = math.prod(tensor.shape[2:])
    if tensor.shape[1] <= length:
        return tensor, None
    basis, core = torch.linalg.qr(tensor.flatten(2))
    return core.unflatten(2, tensor.shape[2:]), basis


def _best(tensor: Tensor, rank: int, starts: int, seed: int, rules: Rules, max_sweeps: int) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    best: list[Tensor] = []
    least = torch.full(tensor.shape[:1], math.inf, dtype=tensor.dtype, device=tensor.device)
    for index in range(starts):
        factors = _run(tensor, _start(tensor, rank, generator, leading=index == 0), rules, max_sweeps)
        errors = residual(tensor, factors)
        mask = (errors < least)[:, None, None]
        best = [torch.where(mask, new, old) for new, old in zip(factors, best or factors, strict=True)]
        least = torch.minimum(errors, least)
    return best


def _run(tensor: Tensor, start: list[Tensor], rules: Rules, max_sweeps: int) -> list[Tensor]:
    """Factors of one start: in float32 where products are the cost, then in float64, on for errors below 3 %."""
    exact = Problem.of(tensor, torch.float64)
    if tensor.numel() < SINGLE_PRECISION_SIZE:
        return minimise(exact, start, rules, max_sweeps, DAMPING)[0]
    coarse = Problem.of(tensor, torch.float32)
    single, errors, _ = minimise(coarse, [factor.float() for factor in start], rules, max_sweeps, DAMPING)
    del coarse
    small = bool((errors < FLOORS[torch.float32] ** 2).any())
    factors = [factor.double() for factor in single]
    return minimise(exact, factors, rules, max_sweeps if small else 1, rules.share * errors)[0]


def _start(tensor: Tensor, rank: int, generator: torch.Generator, leading: bool) -> list[Tensor]:
    """Random unit columns; in the second mode its leading eigenvectors first. The first mode is not read."""
    sizes = [(tensor.shape[0], size, rank) for size in tensor.shape[1:]]
    random = [torch.randn(each, generator=generator, device="cpu") for each in sizes]
    factors = [unit(factor.to(tensor)) for factor in random]
    if leading:
        unfolded = tensor.transpose(1, 2).flatten(2)
        basis = leading_eigenvectors(unfolded @ unfolded.mT, rank)
        factors[1] = torch.cat([basis, factors[1][:, :, basis.shape[2] :]], dim=2)
    return factors

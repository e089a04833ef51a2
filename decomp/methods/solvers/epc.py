"""Error-preserving correction: the same error with smaller rank-1 terms (Phan et al. 2020)."""

import torch
from torch import Tensor

from decomp.methods.solvers.terms import khatri_rao, residual, spread, unit, weights

DEGENERACY = 10.0
SLACK = 1.0003
MAX_SWEEPS = 20
GAIN = 1e-3
HALVINGS = 60
ROUNDING = 1e-6


def correct(tensor: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """Lower the sum of squared term norms of tensors of norm one while the error stays within 0.03 %.

    With all factors but F fixed, min sum_r w_r ||f_r||^2, w_r the squared norm of the other columns, subject to
    ||K - K~|| <= delta has the closed form F = G (Gamma + nu W)^-1, with G the product of the unfolding and the
    Khatri-Rao of the others, Gamma their Gram product and nu the root of a secular equation.
    """
    degenerate = weights(factors).square().sum(1) > DEGENERACY
    if not bool(degenerate.any()):
        return factors
    chosen = tensor[degenerate]
    mended = spread([factor[degenerate] for factor in factors])
    energy = chosen.flatten(1).square().sum(1)
    bound = residual(chosen, mended) * SLACK**2
    norms = weights(mended).square().sum(1)
    for _ in range(MAX_SWEEPS):
        for mode in range(len(mended)):
            mended[mode] = _update(chosen, mended, mode, energy, bound)
            mended = spread(mended)
        before, norms = norms, weights(mended).square().sum(1)
        if bool((before - norms <= GAIN * before).all()):
            break
    accepted = residual(chosen, mended) <= bound * (1 + ROUNDING)
    places = degenerate.nonzero()[accepted, 0]
    result = [factor.clone() for factor in factors]
    for factor, part in zip(result, mended, strict=True):
        factor[places] = part[accepted]
    return result


def _update(tensor: Tensor, factors: list[Tensor], mode: int, energy: Tensor, bound: Tensor) -> Tensor:
    others = factors[:mode] + factors[mode + 1 :]
    product = tensor.movedim(mode + 1, 1).flatten(2) @ khatri_rao(others)
    norms = weights(others)[:, None]
    scale = torch.where(norms > 0, 1 / norms, 0)
    values, vectors = torch.linalg.eigh(_correlations(others))
    values = values.clamp(min=1e-13)
    rotated = (product * scale) @ vectors
    energies = rotated.square().sum(1)
    shift = _secular(values, energies, energy, bound)
    updated: Tensor = (rotated / (values + shift)[:, None]) @ vectors.mT * scale
    return updated


def _correlations(factors: list[Tensor]) -> Tensor:
    """Cosines between the outer products of the columns of some modes: (batch, R, R)."""
    unitary = [unit(factor) for factor in factors]
    product: Tensor = unitary[0].mT @ unitary[0]
    for factor in unitary[1:]:
        product = product * (factor.mT @ factor)
    return product


def _secular(values: Tensor, energies: Tensor, energy: Tensor, bound: Tensor) -> Tensor:
    """nu >= 0 with energy - sum e (v + 2 nu) / (v + nu)^2 = bound, by bisection on log nu; (batch, 1)."""

    def error(shift: Tensor) -> Tensor:
        return energy - (energies * (values + 2 * shift) / (values + shift).square()).sum(1)

    low = torch.full_like(values[:, :1], -40.0)
    high = torch.full_like(low, 10.0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = (error(middle.exp()) <= bound)[:, None]
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where((error(low.exp()) <= bound)[:, None], low.exp(), 0)

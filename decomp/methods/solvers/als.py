"""Alternating least squares for CP, damped at first, with Nesterov extrapolation and restarts.

Kolda & Bader 2009 (ALS); Phan, Tichavsky & Cichocki 2013 (products with the tensor shared by the modes); Navasca,
De Lathauwer & Kindermann 2008 (damping); Mitchell, Ye & De Sterck 2020 (Nesterov steps with restarts).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from decomp.methods.solvers.terms import khatri_rao, solve, unit

PATIENCE = 3
LARGEST_STEP = 0.95
DECAY, FAST_DECAY = 0.85, 0.5
LEAST_DAMPING = 1e-4
SLOW = 1e-4
FLOORS = {torch.float64: 0.0, torch.float32: 0.03}


@dataclass(frozen=True)
class Problem:
    """Tensors (batch, n_1, ..., n_d) of norm one or zero, n_1 and n_2 the largest modes, in two layouts.

    ``rows`` is (batch, n_3 ... n_d, n_1, n_2), ``columns`` the same transposed; ``sizes`` are n_3, ..., n_d.
    """

    rows: Tensor
    columns: Tensor
    energy: Tensor
    sizes: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor, dtype: torch.dtype) -> "Problem":
        slices = tensor.flatten(3).movedim(3, 1).to(dtype)
        energy = tensor.flatten(1).double().square().sum(1)
        return Problem(slices.contiguous(), slices.mT.contiguous(), energy, tuple(tensor.shape[3:]))

    def select(self, chosen: Tensor) -> "Problem":
        return Problem(self.rows[chosen], self.columns[chosen], self.energy[chosen], self.sizes)


@dataclass(frozen=True)
class Rules:
    """When a problem has converged: three sweeps in a row lowered its root objective by less than ``tolerance``.

    The least damping is ``share`` times the squared error.
    """

    tolerance: float
    share: float


@dataclass(frozen=True)
class Descent:
    """The state of every problem: its factors, those of the previous sweep, and its convergence.

    ``factors`` come in the order of the modes: unit columns, except in the last, which holds the weights.
    ``squared_error`` and ``size``, the sum of squared term norms, are its objective with the ridge ``damping``;
    ``age`` counts sweeps since a restart, ``calm`` the small decreases in a row.
    """

    factors: list[Tensor]
    before: list[Tensor]
    squared_error: Tensor
    size: Tensor
    damping: Tensor
    age: Tensor
    calm: Tensor

    @staticmethod
    def start(problem: Problem, factors: list[Tensor], damping: Tensor | float) -> "Descent":
        zero = torch.zeros_like(problem.energy)
        return Descent(factors, factors, problem.energy, zero, zero + damping, zero, zero)

    def select(self, chosen: Tensor) -> "Descent":
        vectors = (self.squared_error, self.size, self.damping, self.age, self.calm)
        factors, before = ([factor[chosen] for factor in side] for side in (self.factors, self.before))
        return Descent(factors, before, *(vector[chosen] for vector in vectors))


def minimise(
    problem: Problem, factors: list[Tensor], rules: Rules, max_sweeps: int, damping: Tensor | float
) -> tuple[list[Tensor], Tensor, int]:
    """Factors, squared errors and the number of sweeps, from initial factors of all modes but the first.

    The objective is ||K - K~||^2 + damping sum_r ||term r||^2. The damping decays from sweep to sweep, in at
    most half of ``max_sweeps``, down to ``rules.share`` of the squared error. Early on it keeps terms from
    cancelling each other, which leads to lower minima in fewer sweeps; at the end it keeps them from
    diverging.
    """
    decay = min(DECAY, LEAST_DAMPING ** (2 / max_sweeps))
    descent = Descent.start(problem, factors, damping)
    result = [factor.clone() for factor in factors]
    errors = descent.squared_error.clone()
    places = torch.arange(len(errors), device=errors.device)
    for sweeps in range(1, max_sweeps + 1):
        descent = _advance(problem, descent, rules, decay)
        going = descent.calm < PATIENCE
        if sweeps == max_sweeps or 2 * int(going.sum()) <= len(going):
            for target, factor in zip(result, descent.factors, strict=True):
                target[places] = factor
            errors[places] = descent.squared_error
            if sweeps == max_sweeps or not bool(going.any()):
                break
            places, problem, descent = places[going], problem.select(going), descent.select(going)
    return result, errors, sweeps


def _advance(problem: Problem, descent: Descent, rules: Rules, decay: float) -> Descent:
    """One sweep from the extrapolated factors; a problem whose objective rises is reset and restarted."""
    age, damping = descent.age, descent.damping
    step = (age / (age + 1)).clamp(max=LARGEST_STEP).to(descent.factors[0].dtype)[:, None, None]
    ahead = [torch.lerp(old, new, 1 + step) for new, old in zip(descent.factors, descent.before, strict=True)]
    factors, squared_error = sweep(problem, ahead, damping)
    squared_error = squared_error.clamp(min=0)
    size = factors[-1].square().sum((1, 2), dtype=torch.float64)
    objective = (squared_error + damping * size).sqrt()
    gain = (descent.squared_error + damping * descent.size).sqrt() - objective
    least = rules.share * squared_error
    decaying = damping > (rules.share * descent.squared_error).clamp(min=LEAST_DAMPING)
    accepted = (gain >= 0) | (age == 0) | decaying
    converged = (gain < rules.tolerance) & ~decaying | (objective < FLOORS[factors[0].dtype])
    calm = torch.where(accepted, torch.where(converged, descent.calm + 1, 0), descent.calm)
    lower = damping * torch.where(gain < SLOW, FAST_DECAY, decay)
    damping = torch.where(lower > least.clamp(min=LEAST_DAMPING), lower, least.minimum(damping))
    if bool(accepted.all()):
        return Descent(factors, descent.factors, squared_error, size, damping, age + 1, calm)
    mask = accepted[:, None, None]
    selected = [torch.where(mask, new, old) for new, old in zip(factors, descent.factors, strict=True)]
    before = [torch.where(mask, old, new) for old, new in zip(descent.factors, selected, strict=True)]
    squared_error = torch.where(accepted, squared_error, descent.squared_error)
    size = torch.where(accepted, size, descent.size)
    return Descent(selected, before, squared_error, size, damping, torch.where(accepted, age + 1, 0), calm)


def sweep(problem: Problem, factors: list[Tensor], ridge: Tensor) -> tuple[list[Tensor], Tensor]:
    """Update all factors once, with two products of the tensor; the last update also gives the squared error.

    K x2 B gives A, then K x1 A gives B and all the small factors.
    """
    second, small = factors[1], list(factors[2:])
    small_gram = _gram(small)
    partial = _contract(problem.rows, second)
    first = unit(solve(_gram([second]) * small_gram, _combine(partial, small), ridge))
    first_gram = _gram([first])
    partial = _contract(problem.columns, first)
    second = unit(solve(first_gram * small_gram, _combine(partial, small), ridge))
    large_gram = first_gram * _gram([second])
    inner = (partial * second[:, None]).sum(2).unflatten(1, problem.sizes)
    for mode in range(len(small)):
        product = _without(inner, small, mode)
        rest = small[:mode] + small[mode + 1 :]
        matrix = large_gram * _gram(rest) if rest else large_gram
        last = solve(matrix, product, ridge)
        small[mode] = unit(last) if rest and mode < len(small) - 1 else last
    fit = (product * last).sum((1, 2), dtype=torch.float64)
    size = (matrix * _gram([last])).sum((1, 2))
    return [first, second, *small], problem.energy - 2 * fit + size


def _gram(factors: list[Tensor]) -> Tensor:
    """Hadamard product of the F^T F, in float64."""
    product = factors[0].mT @ factors[0]
    for factor in factors[1:]:
        product = product * (factor.mT @ factor)
    return product.double()


def _contract(slices: Tensor, factor: Tensor) -> Tensor:
    batch, small, rows, inner = slices.shape
    return (slices.reshape(batch, small * rows, inner) @ factor).reshape(batch, small, rows, -1)


def _combine(partial: Tensor, small: list[Tensor]) -> Tensor:
    """Sum over the small modes of ``partial`` (batch, n_3 ... n_d, n, R) times their columns: (batch, n, R)."""
    return (partial * khatri_rao(small)[:, :, None]).sum(1)


def _without(inner: Tensor, small: list[Tensor], mode: int) -> Tensor:
    """Contract ``inner`` (batch, n_3, ..., n_d, R) with all small factors but one: (batch, n_mode, R)."""
    for other in reversed(range(len(small))):
        if other != mode:
            shape = [1] * inner.dim()
            shape[0], shape[1 + other], shape[-1] = small[other].shape
            inner = (inner * small[other].reshape(shape)).sum(1 + other, keepdim=True)
    return inner.reshape(small[mode].shape)

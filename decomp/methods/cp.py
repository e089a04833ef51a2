"""CP of a convolution kernel, over T x S x k^2 (Phan et al. 2020) or over every mode (Lebedev et al. 2015)."""

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from decomp.layers import CP4Conv, CPConv
from decomp.layers.kernels import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, step_lengths
from decomp.linalg import as_float64
from decomp.methods.fitted import Fit, fitted_analysis
from decomp.methods.record import Analysis, Method, Ranks, needs_two_axes, spatial
from decomp.methods.solvers import fit_cp
from decomp.methods.tensorly import Solver, by_tensorly

CPFactors = tuple[Tensor | None, list[Tensor]]


def limits(kernels: Tensor, *, split: bool) -> Ranks:
    """The rank at which a CP of single fibers is exact: the product of all modes but the largest."""
    return (most_terms(as_tensor(kernels, split).shape[1:]),)


def most_terms(sizes: Sequence[int]) -> int:
    """An upper bound on the rank of tensors of these sizes: the number of fibers along the longest mode."""
    *small, _ = sorted(sizes)
    return prod(small)


def fit(kernels: Tensor, ranks: Ranks, *, split: bool) -> Fit:
    """CP by alternating least squares, then corrected to bound the norms of its terms.

    The note states sum_r ||term r||^2 / ||K||^2: far above 1, terms cancel each other.
    """
    model = fit_cp(as_tensor(kernels, split), ranks[0])
    energies = kernels.to(torch.float64).flatten(1).square().sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    share = float((model.degeneracy * energies).sum() / energies.sum())
    return Fit((None, model.factors), float(model.squared_errors.sum()), f"energy of its terms x{share:.2f}")


def as_tensor(kernels: Tensor, split: bool) -> Tensor:
    """The tensor that is decomposed: (groups, T, S, k^2), or one mode for every spatial axis longer than 1."""
    if not split:
        return as_float64(kernels).flatten(3)
    tensor: Tensor = as_float64(kernels).flatten(3).unflatten(3, step_lengths(kernels.shape[3:]))
    return tensor


def solved(kernels: Tensor, ranks: Ranks, *, split: bool, solver: Solver) -> Fit:
    """CP by the user's solver, group by group."""
    tensor = as_tensor(kernels, split)
    models = [by_tensorly(solver, each, rank=ranks[0]) for each in tensor]
    factors = []
    for weights, parts in models:
        first = parts[0] if weights is None else parts[0] * weights
        factors.append([first, *parts[1:]])
    stacked = [torch.stack(parts) for parts in zip(*factors, strict=True)]
    rebuilt = stacked[0]
    for part in stacked[1:-1]:
        rebuilt = rebuilt[..., None, :] * part[(slice(None), *(None,) * (rebuilt.dim() - 2))]
    rebuilt = torch.einsum("g...r,gkr->g...k", rebuilt, stacked[-1])
    return Fit((None, stacked), float((tensor - rebuilt).square().sum()))


def _method(name: str, layer: type[CPConv], split: bool, solver: Solver | None = None) -> Method:
    fitted = partial(fit, split=split) if solver is None else partial(solved, split=split, solver=solver)

    def analyse(kernels: Tensor) -> Analysis:
        return fitted_analysis(kernels, paying_path(kernels, limits(kernels, split=split)[0]), fitted)

    def factors(kernels: Tensor, ranks: Ranks) -> CPFactors:
        return fitted(kernels, ranks).factors  # type: ignore[no-any-return]

    layers = dict.fromkeys(CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS, layer)
    refuses = needs_two_axes(name, more=True) if split else spatial(name)
    return Method(name, ("R",), layers, refuses, partial(limits, split=split), analyse, factors, closed_form=False)


def paying_path(kernels: Tensor, limit: int) -> list[Ranks]:
    """Ranks up to the parameters of the dense kernel, at T + S or more parameters per rank."""
    _, outputs, inputs = kernels.shape[:3]
    most = kernels[0].numel() // (outputs + inputs)
    return [(rank,) for rank in range(1, max(1, min(limit, most)) + 1)]


def cp(*, modes: int = 3, solver: Solver | None = None) -> Method:
    """CP3 (``modes=3``: 1x1, depthwise k x k, 1x1) or CP4 (``modes=4``: a depthwise convolution per axis).

    ``solver`` is called as ``solver(tensor, rank=R)`` on a float64 torch tensor with TensorLy's torch backend,
    like ``tensorly.decomposition.parafac``, and returns ``(weights, factors)``.

    Raises:
        ValueError: ``modes`` is neither 3 nor 4.
    """
    if modes not in (3, 4):
        raise ValueError(f"modes={modes!r}: write 3 (1x1, depthwise k x k, 1x1) or 4 (one convolution per axis)")
    method = CP if modes == 3 else CP4
    return (
        method if solver is None else _method(method.name, CPConv if modes == 3 else CP4Conv, modes == 4, solver)
    )


CP = _method("cp", CPConv, split=False)
CP4 = _method("cp4", CP4Conv, split=True)

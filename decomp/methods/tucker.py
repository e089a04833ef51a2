"""Tucker-2 of a convolution kernel: HOSVD, then HOOI (Kim et al. 2016; De Lathauwer et al. 2000)."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from decomp.layers import TuckerConv
from decomp.layers.kernels import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from decomp.linalg import Spectrum, Values, as_float64, eigenbasis, leading_eigenvectors, tail_sums
from decomp.methods.record import Analysis, Method, Ranks, spatial
from decomp.methods.tensorly import Solver, by_tensorly

MAX_SWEEPS = 50
RELATIVE_GAIN = 1e-4


def limits(kernels: Tensor) -> Ranks:
    """The largest ranks are the modes themselves: (T, S) per group."""
    return (kernels.shape[1], kernels.shape[2])


def analyse(kernels: Tensor) -> Analysis:
    """Spectra of K_(1) and K_(2), and the exact error of the truncated HOSVD at every pair of ranks."""
    return Analysis.of_table(*error_table(kernels))


def error_table(kernels: Tensor) -> tuple[tuple[Spectrum, Spectrum], Values]:
    """The spectra of both modes, and the squared error at the ranks (R4, R3) from (0, 0) on.

    With U and V the full bases of both modes and C = K x1 U^T x2 V^T, the truncation to (R4, R3) leaves
    error^2 = sum of |C[a, b]|^2 over a > R4 or b > R3: one cumulative sum over a T x S table.
    """
    tensor = as_float64(kernels)
    out_energies, out_basis = eigenbasis(_gram(tensor, 1))
    in_energies, in_basis = eigenbasis(_gram(tensor, 2))
    spectra = (_spectrum(out_energies, tensor, 1), _spectrum(in_energies, tensor, 2))
    energies = _core(tensor, out_basis, in_basis).square().flatten(3).sum(-1).sum(0).cpu().numpy()
    return spectra, _squared_errors(energies)


def spectrum_of(kernels: Tensor, mode: int) -> Spectrum:
    """Singular values of the unfolding of one mode, 1 or 2."""
    tensor = as_float64(kernels)
    return _spectrum(eigenbasis(_gram(tensor, mode))[0], tensor, mode)


def leading_basis(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """The leading left singular vectors of the unfolding of one mode, as (groups, n, rank)."""
    return leading_eigenvectors(_gram(tensor, mode), rank)


def factors(kernels: Tensor, ranks: Ranks) -> tuple[Tensor, list[Tensor]]:
    """Tucker-2 factors (core, [U, V]) by HOOI from the HOSVD; every tensor has the groups as its first axis.

    K ~= C x1 U x2 V with U (T x R4) and V (S x R3) orthonormal. Each sweep takes U from the leading
    eigenvectors of the Gram matrix of K x2 V^T, then V likewise: ||C|| never falls, and the error^2 is
    ||K||^2 - ||C||^2. Sweeps stop when one lowers the squared error by less than a share of 1e-4.

    >>> core, (u, v) = factors(torch.randn(1, 8, 6, 3, 3), (4, 3))
    >>> core.shape, u.shape, v.shape
    (torch.Size([1, 4, 3, 3, 3]), torch.Size([1, 8, 4]), torch.Size([1, 6, 3]))
    """
    tensor = as_float64(kernels)
    full_out, full_in = ranks[0] == tensor.shape[1], ranks[1] == tensor.shape[2]
    left, right = _identity(tensor, 1), _identity(tensor, 2)
    if not full_in:
        right = leading_eigenvectors(_gram(tensor, 2), ranks[1])
    if full_out or full_in:
        left = left if full_out else leading_eigenvectors(_gram(tensor, 1), ranks[0])
        return _core(tensor, left, right), [left, right]
    energy, captured = float(tensor.square().sum()), 0.0
    for _ in range(MAX_SWEEPS):
        left = leading_eigenvectors(_gram(_project_in(tensor, right), 1), ranks[0])
        projected = _project_out(tensor, left)
        right = leading_eigenvectors(_gram(projected, 2), ranks[1])
        core = _project_in(projected, right)
        before, captured = captured, float(core.square().sum())
        if captured - before <= RELATIVE_GAIN * (energy - captured):
            break
    return core, [left, right]


def _squared_errors(energies: Values) -> Values:
    """D[a, b] = sum of the energies outside the leading a x b block, for every (a, b), by additions alone."""
    rows_beyond = tail_sums(energies.sum(1))
    columns_beyond = tail_sums(energies).cumsum(0)
    squared_errors = rows_beyond[:, None].repeat(energies.shape[1] + 1, 1)
    squared_errors[1:] += columns_beyond
    return squared_errors


def _spectrum(energies: Tensor, tensor: Tensor, mode: int) -> Spectrum:
    rows = tensor.shape[mode]
    columns = tensor[0].numel() // rows
    values = energies[:, : min(rows, columns)].clamp(min=0).sqrt().cpu().numpy()
    return Spectrum(values, rows, columns)


def _gram(tensor: Tensor, mode: int) -> Tensor:
    unfolded = tensor.transpose(1, mode).flatten(2)
    return unfolded @ unfolded.mT


def _identity(tensor: Tensor, mode: int) -> Tensor:
    eye = torch.eye(tensor.shape[mode], dtype=tensor.dtype, device=tensor.device)
    return eye.expand(tensor.shape[0], -1, -1)


def _project_out(tensor: Tensor, left: Tensor) -> Tensor:
    return torch.einsum("gts...,gta->gas...", tensor, left)


def _project_in(tensor: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("gts...,gsb->gtb...", tensor, right)


def _core(tensor: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return _project_in(_project_out(tensor, left), right)


def tucker(*, solver: Solver | None = None) -> Method:
    """The method; ``solver`` replaces HOOI: a function like ``tensorly.decomposition.partial_tucker``.

    It is called as ``solver(kernel, rank=[R4, R3], modes=[0, 1])`` on a float64 torch tensor (T, S, *kernel), with
    TensorLy's torch backend, and returns ``(core, [U, V])``, or that and the errors.
    """
    return TUCKER if solver is None else replace(TUCKER, factors=partial(_solved, solver))


def _solved(solver: Solver, kernels: Tensor, ranks: Ranks) -> tuple[Tensor, list[Tensor]]:
    results = [by_tensorly(solver, kernel, rank=list(ranks), modes=[0, 1]) for kernel in as_float64(kernels)]
    cores, pairs = zip(*(each[0] if isinstance(each[0], tuple | list) else each for each in results), strict=True)
    return torch.stack(cores), [torch.stack(factors) for factors in zip(*pairs, strict=True)]


TUCKER = Method(
    "tucker",
    ("out", "in"),
    dict.fromkeys(CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS, TuckerConv),
    spatial("tucker"),
    limits,
    analyse,
    factors,
    out_rank=0,
)

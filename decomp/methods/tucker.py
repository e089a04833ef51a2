"""Tucker-2 of a convolution kernel: HOSVD, then HOOI (Kim et al. 2016; De Lathauwer et al. 2000)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from decomp.layers import TuckerConv
from decomp.layers.kernels import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from decomp.linalg import (
    Spectrum,
    Values,
    as_float64,
    full_precision,
    gram_eigenvalues,
    leading_eigenvectors,
    leading_rows,
    row_spectrum,
    squared_norms,
    tail_sums,
    working,
)
from decomp.methods.record import Analysis, Bases, Method, Ranks, spatial
from decomp.methods.tensorly import Solver, by_tensorly

MAX_SWEEPS = 50
RELATIVE_GAIN = 1e-4
STEPS = 3  # of subspace iteration in each half of a sweep


def limits(kernels: Tensor) -> Ranks:
    """The largest ranks are the modes themselves: (T, S) per group."""
    return (kernels.shape[1], kernels.shape[2])


def analyse(kernels: Tensor) -> Analysis:
    """Spectra of K_(1) and K_(2), and the exact error of the truncated HOSVD at every pair of ranks."""
    spectra, table, bases = error_table(kernels)
    return Analysis.of_table(
        spectra, table, Bases(lambda ranks: [basis[..., :rank] for basis, rank in zip(bases, ranks, strict=True)])
    )


def error_table(kernels: Tensor) -> tuple[tuple[Spectrum, Spectrum], Values, list[Tensor]]:
    """The spectra of both modes, the squared error at the ranks (R4, R3) from (0, 0) on, and the bases U and V.

    With U and V the full bases of both modes and C = K x1 U^T x2 V^T, the truncation to (R4, R3) leaves
    error^2 = sum of |C[a, b]|^2 over a > R4 or b > R3: one cumulative sum over a T x S table. No energies are
    subtracted, so that rounding errors of C are of second order.
    """
    tensor = _working(kernels)
    spectra, bases = [], []
    for mode in (1, 2):
        energies, _, basis = row_spectrum(_unfolded(tensor, mode), vectors=True)
        spectra.append(_spectrum(energies, tensor, mode))
        bases.append(cast(Tensor, basis).to(tensor.dtype))
    with full_precision(tensor):
        core = _core(tensor, *bases)
    table = core.square().flatten(3).sum(-1).double().sum(0).cpu().numpy()
    return (spectra[0], spectra[1]), _squared_errors(table), bases


def spectrum_of(kernels: Tensor, mode: int) -> Spectrum:
    """Singular values of the unfolding of one mode, 1 or 2."""
    tensor = _working(kernels)
    return _spectrum(gram_eigenvalues(_unfolded(tensor, mode)), tensor, mode)


def leading_basis(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """The leading left singular vectors of the unfolding of one mode, as (groups, n, rank)."""
    return leading_rows(_unfolded(tensor, mode), rank)


def factors(kernels: Tensor, ranks: Ranks, bases: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
    """Tucker-2 factors (core, [U, V]) by HOOI from the HOSVD; every tensor has the groups as its first axis.

    K ~= C x1 U x2 V with U (T x R4) and V (S x R3) orthonormal. Each sweep takes U from the leading
    eigenvectors of the Gram matrix of K x2 V^T, then V likewise: ||C|| never falls, and the error^2 is
    ||K||^2 - ||C||^2. Sweeps stop when one lowers the squared error by less than a share of 1e-4. In large float32
    kernels U is the orthonormal basis of one step of subspace iteration from the U before, which costs no
    eigendecomposition; ||C|| never falls either. ``bases`` are those of the HOSVD, if they are known.

    >>> core, (u, v) = factors(torch.randn(1, 8, 6, 3, 3), (4, 3))
    >>> core.shape, u.shape, v.shape
    (torch.Size([1, 4, 3, 3, 3]), torch.Size([1, 8, 4]), torch.Size([1, 6, 3]))
    """
    tensor = _working(kernels)
    full = [rank == size for rank, size in zip(ranks, tensor.shape[1:3], strict=True)]

    def start(mode: int) -> Tensor:
        if full[mode - 1]:
            return _identity(tensor, mode)
        basis = bases[mode - 1] if bases else leading_basis(tensor, mode, ranks[mode - 1])
        return basis.to(tensor.dtype)

    with full_precision(tensor):
        right = start(2)
        # Where eigenvectors are computed in each sweep, the first takes U from those of K x2 V^T.
        by_steps = tensor.dtype != torch.float64
        left = start(1) if any(full) or by_steps else None
        if any(full):
            core = _core(tensor, cast(Tensor, left), right)
        else:
            core, left, right = _swept(tensor, ranks, left, right)
    return core.double(), [cast(Tensor, left).double(), right.double()]


def _swept(tensor: Tensor, ranks: Ranks, left: Tensor | None, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    energy, captured, core = float(squared_norms(tensor.flatten(2)).sum()), 0.0, tensor
    # In the order in which the products with V read it: each sweep would copy the kernel otherwise.
    inputs_first = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    for _ in range(MAX_SWEEPS):
        left = _improved(_project_in(inputs_first, right), 1, ranks[0], left)
        projected = _project_out(tensor, left)
        right = _improved(projected, 2, ranks[1], right)
        core = _project_in(projected, right)
        before, captured = captured, float(core.double().square().sum())
        if captured - before <= RELATIVE_GAIN * (energy - captured):
            break
    return core, cast(Tensor, left), right


def _improved(projected: Tensor, mode: int, rank: int, basis: Tensor | None) -> Tensor:
    """A basis of one mode of K projected in the other: leading eigenvectors, or a step towards them."""
    unfolded = _unfolded(projected, mode)
    if basis is None or unfolded.dtype == torch.float64:
        return leading_eigenvectors(unfolded @ unfolded.mT, rank)
    for _ in range(STEPS):
        basis = torch.linalg.qr(unfolded @ (unfolded.mT @ basis))[0]
    return basis


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


def _unfolded(tensor: Tensor, mode: int) -> Tensor:
    return tensor.transpose(1, mode).flatten(2)


def _working(kernels: Tensor) -> Tensor:
    """The kernels in the precision of their products; the largest are those with the T x T and S x S bases."""
    return working(kernels, max(kernels.shape[1:3]) * kernels[0].numel())


def _identity(tensor: Tensor, mode: int) -> Tensor:
    eye = torch.eye(tensor.shape[mode], dtype=tensor.dtype, device=tensor.device)
    return eye.expand(tensor.shape[0], -1, -1)


def _project_out(tensor: Tensor, left: Tensor) -> Tensor:
    """K x1 U^T for K (groups, T, S, *kernel) and U (groups, T, R4)."""
    projected: Tensor = (left.mT @ tensor.flatten(2)).unflatten(2, tensor.shape[2:])
    return projected


def _project_in(tensor: Tensor, right: Tensor) -> Tensor:
    """K x2 V^T for K (groups, T, S, *kernel) and V (groups, S, R3)."""
    return _project_out(tensor.transpose(1, 2), right).transpose(1, 2)


def _core(tensor: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return _project_in(_project_out(tensor, left), right)


def tucker(*, solver: Solver | None = None) -> Method:
    """The method; ``solver`` replaces HOOI: a function like ``tensorly.decomposition.partial_tucker``.

    It is called as ``solver(kernel, rank=[R4, R3], modes=[0, 1])`` on a float64 torch tensor (T, S, *kernel), with
    TensorLy's torch backend, and returns ``(core, [U, V])``, or that and the errors.
    """
    return TUCKER if solver is None else replace(TUCKER, factors=partial(_solved, solver))


def _solved(
    solver: Solver, kernels: Tensor, ranks: Ranks, bases: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
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

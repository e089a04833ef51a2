"""Linear algebra on batches of matrices: spectra, eigenvectors, powers, shrinkage towards the identity."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = NDArray[np.float64]

# Products of this many multiply-adds are made in float32 for weights of at most that; eigenvalues in float64.
SINGLE_PRECISION_SIZE = 1 << 24
CHUNK = 512  # columns whose products are summed in float32, and that are converted to float64 at a time
ROWS = 256  # of a product W W^T at a time, of which the lower half is made
SINGLE_PRECISION_FLOOR = 1e-4  # of the mean eigenvalue: rounding errors of float32 products are about 1e-7 of it
SHARE_BELOW_FLOOR = 0.01
NEARLY_SQUARE = 2
SINGLE_PRECISION_ERROR = 1e-4  # a squared relative error below which products are made in float64
KRYLOV_SIZE, KRYLOV_RANK = 512, 8  # a Krylov space pays from this size on, for ranks of at most an eighth of it
KRYLOV_SHARE = 1e-3  # of the squared error: what a larger Krylov space may still gain
MIN_BLOCK = 16
ZERO_MEAN_SQUARE = 1e-18  # smaller ones are rounding errors in central moments of constant inputs


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one unfolding, descending: ``values`` is (groups, min(rows, columns)).

    ``rows`` x ``columns`` is the shape of the unfolded matrix of one group.
    """

    values: Values
    rows: int
    columns: int


def as_float64(weight: Tensor) -> Tensor:
    """Detach ``weight`` and convert it to float64, on the CPU if its device does not support that."""
    device = "cpu" if weight.device.type == "mps" else weight.device
    return weight.detach().to(device, torch.float64)


def safe_scale(weight: Tensor) -> float:
    """The power of two to divide a weight by, so that squares neither overflow nor underflow in float64.

    It is 1 for all but extreme weights, and dividing by it is exact.

    >>> safe_scale(torch.tensor([0.3, -5.0]))
    1.0
    >>> safe_scale(torch.tensor([0.0, -5.0 * 2.0**400], dtype=torch.float64)) == 2.0**402
    True
    """
    largest = _largest(weight)
    return 1.0 if largest == 0 or 2.0**-300 < largest < 2.0**300 else 2.0 ** (math.frexp(largest)[1] - 1)


def working(weight: Tensor, size: int) -> Tensor:
    """Detach ``weight``, in the precision that products of ``size`` multiply-adds are made in.

    Float64 weights stay float64. The others become float64 where products are too small to take time, where
    squares could leave the range of float32, and where the user lets torch make float32 products in a lower
    precision.
    """
    single = weight.dtype in (torch.float32, torch.bfloat16, torch.float16) and weight.device.type != "mps"
    if not single or size < SINGLE_PRECISION_SIZE or torch.get_float32_matmul_precision() != "highest":
        return as_float64(weight)
    return weight.detach().float() if 1e-9 < _largest(weight) < 1e9 else as_float64(weight)


def _largest(weight: Tensor) -> float:
    low, high = torch.aminmax(weight.detach())
    return max(-float(low), float(high))


def gram(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """W W^T in float64 for matrices W (..., n, m): products in ``dtype``, by default that of W, sums in float64.

    With products in float32 the error of an entry is about eps32 times the mean of the eigenvalues, so that it
    matters for eigenvalues far below the mean only, see :func:`row_spectrum`.
    """
    size = matrices.shape[-2]
    total = matrices.new_zeros((*matrices.shape[:-1], size), dtype=torch.float64)
    ends = [min(start + ROWS, size) for start in range(0, size, ROWS)]
    with full_precision(matrices):
        for chunk in matrices.split(CHUNK, dim=-1):
            chunk = chunk.to(dtype or matrices.dtype)
            for start, end in pairwise([0, *ends]):
                total[..., start:end, :end] += chunk[..., start:end, :] @ chunk[..., :end, :].mT
    for start, end in pairwise(ends):
        total[..., :start, start:end] = total[..., start:end, :start].mT
    return total


def full_precision(tensor: Tensor) -> Any:
    """A context without autocast, which would make products of float32 in bfloat16."""
    return torch.autocast(tensor.device.type, enabled=False)


def row_spectrum(matrices: Tensor, *, vectors: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Eigenvalues of W W^T, descending, that matrix, and its eigenvectors as columns; all in float64.

    The eigenvectors of matrices with many rows take several times as long as the values: they are None unless
    asked for. Values below max(n, m) eps lambda_1 are rounding errors; negative ones are set to 0. For W in
    float32 that matrix is made of float32 products, unless more than one in a hundred eigenvalues is so small that
    its relative error would exceed about 1e-3: weights of low rank, also if they were rounded to bfloat16. Square
    and nearly square matrices often have so many small ones, and take longer for the eigenvalues than for the
    products: these are made in float64 at once.
    """
    vectors = vectors or matrices.shape[-2] < KRYLOV_SIZE
    is_square = matrices.shape[-1] < NEARLY_SQUARE * matrices.shape[-2]
    precisions = (torch.float64,) if is_square else (matrices.dtype, torch.float64)
    for dtype in precisions:
        product = gram(matrices, dtype)
        if vectors:
            values, basis = eigenbasis(product)
        else:
            values, basis = torch.linalg.eigvalsh(product).flip(-1), None
        least = SINGLE_PRECISION_FLOOR * values.mean(-1, keepdim=True)
        if dtype == torch.float64 or bool(((values < least).double().mean(-1) <= SHARE_BELOW_FLOOR).all()):
            break
    return values.clamp(min=0), product, basis


def gram_eigenvalues(matrices: Tensor) -> Tensor:
    """Squared singular values of each (..., L, M) matrix, descending, see :func:`row_spectrum`."""
    return row_spectrum(short_side(matrices))[0]


def short_side(matrices: Tensor) -> Tensor:
    """The matrices (..., n, m), transposed if they have more rows than columns."""
    return matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT


def leading_rows(matrices: Tensor, rank: int, product: Tensor | None = None) -> Tensor:
    """Leading left singular vectors U (..., n, rank) of W, in float64: ||U^T W|| is the largest.

    ``product`` is W W^T where that is known. Float64 matrices, small ones and large ranks take a full
    eigendecomposition of it; else U is that of a block Krylov space, with an error ||W - U U^T W|| within about
    1e-3 of the least, in general far less.
    """
    size = matrices.shape[-2]
    exact = matrices.dtype == torch.float64 or size < KRYLOV_SIZE or rank * KRYLOV_RANK > size
    if not exact:
        with full_precision(matrices):
            basis = _krylov(matrices, rank, product)
        if basis is not None:
            return basis
    if product is None:
        product = gram(matrices)
    if matrices.dtype != torch.float64:
        # Errors of a basis change ||U^T W|| by their squares, so that float32 serves unless the error is small.
        single = leading_eigenvectors(product.float(), rank).double()
        orthonormal: Tensor = torch.linalg.qr(single)[0]
        energy = product.diagonal(dim1=-2, dim2=-1).sum(-1)
        captured = ((product @ orthonormal) * orthonormal).sum((-2, -1))
        if bool((energy - captured >= SINGLE_PRECISION_ERROR * energy).all()):
            return orthonormal
        product = gram(matrices, torch.float64)
    return leading_eigenvectors(product, rank)


def _krylov(matrices: Tensor, rank: int, product: Tensor | None) -> Tensor | None:
    """Leading left singular vectors by block Lanczos with full reorthogonalization, in float32 as ``matrices``.

    With A = W W^T and a random block X the space is that of A X, A^2 X, ...; U are the Ritz vectors of its largest
    Ritz values, whose sum is ||U^T W||^2. Blocks are added until what further ones would still remove of the
    squared error, extrapolated from the last two, is below a share of 1e-3 of it. None where the error is not well
    above the rounding errors of float32, or where the space would be as large as half of the matrix.

    Source: Musco and Musco 2015, algorithm 2; Halko, Martinsson and Tropp 2011 for the random start.
    """
    *batch, rows, _ = matrices.shape
    energy = squared_norms(matrices)
    multiplied = None if product is None else product.to(matrices.dtype)

    def times(block: Tensor) -> Tensor:
        """A times a block."""
        if multiplied is not None:
            return multiplied @ block
        return matrices @ (matrices.mT @ block)

    width = max(rank // 2, MIN_BLOCK)
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(*batch, rows, width, generator=generator, device="cpu").to(matrices)
    block = torch.linalg.qr(times(start))[0]
    basis, images = block, times(block)
    ritz = basis.mT @ images
    captured: list[Tensor] = []
    while basis.shape[-1] + width <= rows // 2:
        block = images[..., -width:]
        for _ in range(2):
            block = block - basis @ (basis.mT @ block)
            block = torch.linalg.qr(block)[0]
        image = times(block)
        beside = basis.mT @ image
        ritz = torch.cat([torch.cat([ritz, beside], -1), torch.cat([beside.mT, block.mT @ image], -1)], -2)
        basis, images = torch.cat([basis, block], -1), torch.cat([images, image], -1)
        if basis.shape[-1] <= rank:
            continue
        captured.append(torch.linalg.eigvalsh(ritz.double())[..., -rank:].sum(-1))
        error = energy - captured[-1]
        if bool((error < SINGLE_PRECISION_ERROR * energy).any()):
            return None
        if bool((_still_to_gain(captured) <= KRYLOV_SHARE * error).all()):
            vectors = leading_eigenvectors(ritz.double(), rank)
            leading: Tensor = torch.linalg.qr(basis.double() @ vectors)[0]
            return leading
    return None


def _still_to_gain(captured: list[Tensor]) -> Tensor:
    """What a sequence has still to gain, if its last two differences are those of a geometric one."""
    if len(captured) < 3:
        return torch.full_like(captured[-1], math.inf)
    before, gain = captured[-2] - captured[-3], captured[-1] - captured[-2]
    rate = (gain / before.clamp(min=torch.finfo(gain.dtype).tiny)).clamp(0, 0.99)
    return gain * rate / (1 - rate)


def project(matrices: Tensor, basis: Tensor) -> Tensor:
    """U^T W (..., r, m) in float64, of products in the precision of W (..., n, m).

    They are in float64 where U is in float64 and holds nearly all of W: the rounding errors of float32 would be
    what is left.
    """
    with full_precision(matrices):
        product = (basis.mT.to(matrices.dtype) @ matrices).double()
        if basis.dtype != torch.float64 or matrices.dtype == torch.float64:
            return product
        energy, captured = squared_norms(matrices), product.square().sum((-2, -1))
        if bool((energy - captured >= SINGLE_PRECISION_ERROR * energy).all()):
            return product
        return basis.mT @ matrices.double()


def squared_norms(matrices: Tensor) -> Tensor:
    """||W||^2 of matrices (..., n, m), in float64."""
    return torch.stack([part.double().square().sum((-2, -1)) for part in matrices.split(CHUNK, -1)]).sum(0)


def eigenbasis(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of symmetric matrices (..., n, n), descending, and their eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(-1), vectors.flip(-1)


def leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """The eigenvectors (..., n, rank) of the largest eigenvalues of symmetric matrices (..., n, n).

    >>> leading_eigenvectors(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2).abs()
    tensor([[0., 0.],
            [1., 0.],
            [0., 1.]])
    """
    return eigenbasis(symmetric)[1][..., :rank]


def symmetric_powers(symmetric: Tensor, *powers: float) -> list[Tensor]:
    """Powers of symmetric positive semidefinite matrices (..., n, n), of one eigendecomposition.

    Eigenvalues below n eps lambda_1 are raised to that, so that negative powers are finite.

    >>> symmetric_powers(torch.diag(torch.tensor([4.0, 9.0])), -0.5)[0]
    tensor([[0.5000, 0.0000],
            [0.0000, 0.3333]])
    """
    values, vectors = torch.linalg.eigh(symmetric)
    limits = torch.finfo(values.dtype)
    floor = values[..., -1:].clamp(min=limits.tiny) * values.shape[-1] * limits.eps
    values = torch.maximum(values, floor)
    return [(vectors * values.pow(power)[..., None, :]) @ vectors.mT for power in powers]


def symmetric_power(symmetric: Tensor, power: float) -> Tensor:
    """One power, see :func:`symmetric_powers`."""
    return symmetric_powers(symmetric, power)[0]


def shrunk(moments: Tensor, rho: float) -> Tensor:
    """(1 - rho) C + rho tr(C) / n I for moments C (groups, n, n); the identity where C is zero.

    >>> shrunk(torch.diag(torch.tensor([3.0, 1.0]))[None], 0.5)
    tensor([[[2.5000, 0.0000],
             [0.0000, 1.5000]]])
    """
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(moments.shape[1], dtype=moments.dtype, device=moments.device)
    is_zero = mean <= ZERO_MEAN_SQUARE
    moments, mean = torch.where(is_zero, identity, moments), torch.where(is_zero, 1.0, mean)
    return (1 - rho) * moments + rho * mean * identity


def tail_sums(energies: Values) -> Values:
    """Sum of ``energies[r:]`` for every r from 0 to n along the last axis, without cancellation."""
    zero = np.zeros((*energies.shape[:-1], 1))
    return np.concatenate([energies[..., ::-1].cumsum(-1)[..., ::-1], zero], axis=-1)

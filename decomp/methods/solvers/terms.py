"""Batched pieces of a CP model: factors are (batch, n, R), one column per rank-1 term."""

import torch
from torch import Tensor

TINY = 1e-30
RIDGES = {torch.float64: 1e-12, torch.float32: 1e-6}


def khatri_rao(factors: list[Tensor]) -> Tensor:
    """Column-wise Kronecker product, the last factor running fastest: (batch, n_1 ... n_m, R)."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, :, None] * factor[:, None]).flatten(1, 2)
    return product


def unit(factor: Tensor) -> Tensor:
    """Columns of norm one; zero columns stay zero."""
    norms: Tensor = factor.norm(dim=1, keepdim=True)
    return factor / norms.clamp(min=TINY)


def weights(factors: list[Tensor]) -> Tensor:
    """Norm of every rank-1 term: (batch, R)."""
    product: Tensor = factors[0].norm(dim=1)
    for factor in factors[1:]:
        product = product * factor.norm(dim=1)
    return product


def spread(factors: list[Tensor]) -> list[Tensor]:
    """The same terms with columns of equal norm in every mode; a zero term is zero in all of them."""
    root = weights(factors).pow(1 / len(factors))[:, None]
    return [unit(factor) * root for factor in factors]


def residual(tensor: Tensor, factors: list[Tensor]) -> Tensor:
    """Squared error of a model, from the difference itself: exact where the error is tiny."""
    model = factors[0] @ khatri_rao(factors[1:]).mT
    return (tensor.flatten(2) - model).square().sum((1, 2))


def solve(matrix: Tensor, right: Tensor, ridge: Tensor) -> Tensor:
    """Damped least squares factor X of X ``matrix`` = ``right``: Cholesky of the matrix scaled to a unit diagonal.

    ``ridge`` (batch,) is added to that diagonal; at least 1e-12 in float64 and 1e-6 in float32 (of ``right``), and
    more for a matrix that rounding made indefinite.
    """
    inverse = matrix.diagonal(dim1=1, dim2=2).sqrt().clamp(min=TINY).reciprocal()
    scaled = matrix * (inverse[:, :, None] * inverse[:, None])
    diagonal, shift = scaled.diagonal(dim1=1, dim2=2), ridge.clamp(min=RIDGES[right.dtype])[:, None]
    diagonal += shift
    lower, info = torch.linalg.cholesky_ex(scaled)
    while bool(info.any()):
        shift = torch.where(info[:, None] > 0, 100 * shift, 0)
        diagonal += shift
        lower, info = torch.linalg.cholesky_ex(scaled)
    inverse = inverse.to(right.dtype)[:, None]
    return torch.cholesky_solve((right * inverse).mT, lower.to(right.dtype)).mT * inverse

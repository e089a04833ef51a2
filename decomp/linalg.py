"""Linear algebra on batches of matrices: spectra, eigenvectors, powers, shrinkage towards the identity."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = NDArray[np.float64]

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


def gram_eigenvalues(matrices: Tensor) -> Tensor:
    """Squared singular values of each (..., L, M) matrix, descending, from the smaller of its Gram matrices.

    Values below max(L, M) eps lambda_1 are rounding errors; negative ones are set to 0.
    """
    gram = matrices @ matrices.mT if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT @ matrices
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.flip(-1).clamp(min=0)


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


def symmetric_power(symmetric: Tensor, power: float) -> Tensor:
    """A power of symmetric positive semidefinite matrices (..., n, n).

    Eigenvalues below n eps lambda_1 are raised to that, so that negative powers are finite.

    >>> symmetric_power(torch.diag(torch.tensor([4.0, 9.0])), -0.5)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.3333]])
    """
    values, vectors = torch.linalg.eigh(symmetric)
    limits = torch.finfo(values.dtype)
    floor = values[..., -1:].clamp(min=limits.tiny) * values.shape[-1] * limits.eps
    powers: Tensor = torch.maximum(values, floor).pow(power)
    result: Tensor = (vectors * powers[..., None, :]) @ vectors.mT
    return result


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

"""Singular values of the unfoldings of a weight: what every rank rule reads."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one unfolding, descending: ``values`` is (groups, min(rows, columns)).

    ``rows`` x ``columns`` is the shape of the unfolded matrix of one group.
    """

    values: Values
    rows: int
    columns: int


def as_float64(weight: Tensor) -> Tensor:
    """Detach ``weight`` for a factorization: float64, on the CPU where the device has no float64."""
    device = "cpu" if weight.device.type == "mps" else weight.device
    return weight.detach().to(device, torch.float64)


def gram_eigenvalues(matrices: Tensor) -> Tensor:
    """Squared singular values of each (..., L, M) matrix, descending, from its smaller Gram matrix.

    Values below max(L, M) eps lambda_1 are rounding noise; none is negative.
    """
    gram = matrices @ matrices.mT if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT @ matrices
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.flip(-1).clamp(min=0)


def tail_sums(energies: Values) -> Values:
    """Sum of ``energies[r:]`` for every r from 0 to n along the last axis, without cancellation."""
    zero = np.zeros((*energies.shape[:-1], 1))
    return np.concatenate([energies[..., ::-1].cumsum(-1)[..., ::-1], zero], axis=-1)

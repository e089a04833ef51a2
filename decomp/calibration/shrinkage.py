"""How far moments are shrunk towards the metric of the weight, so that few data do not mislead."""

import torch
from torch import Tensor

from decomp.linalg import leading_eigenvectors

SHRINKAGES = (0.01, 0.1, 0.5, 1.0)


def oracle_shrinkage(second: Tensor, samples: int) -> float:
    """Oracle approximating shrinkage towards a multiple of the identity (Chen et al. 2010, equation 23).

    ``second`` are moments (groups, n, n).
    """
    size, squares = second.shape[1], float(second.square().sum())
    if size == 1:
        return 0.0
    trace = float(second.diagonal(dim1=1, dim2=2).sum(1).square().sum())
    above = (1 - 2 / size) * squares + trace
    below = (samples + 1 - 2 / size) * (squares - trace / size)
    return min(1.0, max(0.0, above / below)) if below > 0 else 1.0


def chosen_shrinkage(kernels: Tensor, moments: Tensor, held_out: Tensor, formula: float) -> float:
    """The shrinkage, by formula or from a few, whose truncated weight errs least on moments held out."""
    errors = {rho: _held_out_error(kernels, moments, held_out, rho) for rho in (formula, *SHRINKAGES)}
    return min(errors, key=lambda rho: errors[rho])


def _held_out_error(kernels: Tensor, moments: Tensor, held_out: Tensor, shrinkage: float) -> float:
    """Squared error on held-out inputs of the weight, (T k^2) x S, cut to a quarter of its rank by other
    inputs."""
    weight = kernels.transpose(1, 2).flatten(2).mT.to(torch.float64)
    size = moments.shape[1]
    identity = torch.eye(size, dtype=moments.dtype, device=moments.device)
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    values, vectors = torch.linalg.eigh((1 - shrinkage) * moments + (shrinkage + 1e-12) * mean * identity)
    roots = values.clamp(min=1e-300).sqrt()[:, None]
    white = weight @ (vectors * roots)
    leading = leading_eigenvectors(white.mT @ white, max(1, size // 4))
    cut = ((white @ leading) @ leading.mT / roots) @ vectors.mT
    lost = weight - cut
    return float(torch.einsum("gts,gsr,gtr->", lost, held_out, lost))

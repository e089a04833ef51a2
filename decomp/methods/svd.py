"""Truncated SVD of a matrix: linear layers and 1x1 convolutions (Denton et al. 2014, Girshick 2015)."""

from typing import cast

import torch
from torch import Tensor, nn

from decomp.layers import SVDConv, SVDLinear
from decomp.layers.kernels import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from decomp.methods.record import Analysis, Method, Ranks
from decomp.spectra import Spectrum, as_float64, gram_eigenvalues, tail_sums


def takes(module: nn.Module) -> bool:
    """A matrix: a linear layer or a 1x1 convolution."""
    return isinstance(module, nn.Linear) or set(cast(nn.Conv2d, module).kernel_size) == {1}


def limits(kernels: Tensor) -> Ranks:
    """The largest rank of W (T x S): min(T, S)."""
    return (min(kernels.shape[1:3]),)


def analyse(kernels: Tensor) -> Analysis:
    """Error^2 at rank r is sum_{i > r} sigma_i^2 (Eckart and Young 1936), for every r from one spectrum."""
    matrices = as_float64(kernels).flatten(2)
    energies = gram_eigenvalues(matrices).cpu().numpy()
    spectrum = Spectrum(energies**0.5, matrices.shape[1], matrices.shape[2])
    tails = tail_sums(energies).sum(0)
    return Analysis((spectrum,), tails, float(tails[0]))


def factors(kernels: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """W = U S V^T ~= (U_r S_r^1/2) (S_r^1/2 V_r^T): the balanced pair (groups, T, r), (groups, r, S).

    >>> left, right = factors(torch.eye(4)[None], (2,))
    >>> left.shape, right.shape
    (torch.Size([1, 4, 2]), torch.Size([1, 2, 4]))
    """
    (rank,) = ranks
    left, values, right = torch.linalg.svd(as_float64(kernels).flatten(2), full_matrices=False)
    root = values[:, :rank].sqrt()
    return left[:, :, :rank] * root[:, None, :], root[:, :, None] * right[:, :rank]


LAYERS: dict[type[nn.Module], type[SVDLinear] | type[SVDConv]] = {
    nn.Linear: SVDLinear,
    **dict.fromkeys(CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS, SVDConv),
}
SVD = Method("svd", ("r",), LAYERS, takes, limits, analyse, factors)

"""Truncated SVD of a matrix: linear layers, experts, 1x1 convolutions, embeddings (Denton 2014, Girshick 2015)."""

import torch
from torch import Tensor, nn

from decomp.layers import ExpertLinear, SVDConv, SVDEmbedding, SVDExpertLinear, SVDLinear
from decomp.layers.kernels import CONVOLUTIONS, HUGGING_FACE_CONV1D, TRANSPOSED_CONVOLUTIONS
from decomp.linalg import Spectrum, as_float64, gram_eigenvalues, tail_sums
from decomp.methods.record import Analysis, Layers, Method, Ranks


def refuses(module: nn.Module) -> str:
    """Only matrices are supported: linear layers, experts, 1x1 convolutions, embeddings without ``max_norm``."""
    if set(getattr(module, "kernel_size", (1,))) != {1}:
        return "svd is for matrices, this kernel is spatial: svd(fold=...) folds it to one"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm= changes its rows in forward"
    return ""


def limits(kernels: Tensor) -> Ranks:
    """The largest rank of W (T x S): min(T, S)."""
    return (min(kernels.shape[1:3]),)


def analyse(kernels: Tensor) -> Analysis:
    """Error^2 at rank r is sum_{i > r} sigma_i^2 (Eckart and Young 1936), for every r from one spectrum."""
    matrices = as_float64(kernels).flatten(2)
    energies = gram_eigenvalues(matrices).cpu().numpy()
    spectrum = Spectrum(energies**0.5, matrices.shape[1], matrices.shape[2])
    return Analysis.of_table((spectrum,), tail_sums(energies).sum(0))


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


LAYERS: Layers = {
    nn.Linear: SVDLinear,
    HUGGING_FACE_CONV1D: SVDLinear,
    nn.Embedding: SVDEmbedding,
    ExpertLinear: SVDExpertLinear,
    **dict.fromkeys(CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS, SVDConv),
}
SVD = Method("svd", ("r",), LAYERS, refuses, limits, analyse, factors, out_rank=0)

"""Truncated SVD of a matrix: linear layers, experts, 1x1 convolutions, embeddings (Denton 2014, Girshick 2015)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from decomp.layers import ExpertLinear, SVDConv, SVDEmbedding, SVDExpertLinear, SVDLinear
from decomp.layers.kernels import CONVOLUTIONS, HUGGING_FACE_CONV1D, TRANSPOSED_CONVOLUTIONS
from decomp.linalg import Spectrum, leading_rows, project, row_spectrum, short_side, tail_sums, working
from decomp.methods.record import Analysis, Bases, Layers, Method, Ranks


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
    matrices = _working(kernels)
    values, product, vectors = row_spectrum(short_side(matrices))
    energies = values.cpu().numpy()
    spectrum = Spectrum(energies**0.5, matrices.shape[1], matrices.shape[2])

    def leading(ranks: Ranks) -> list[Tensor]:
        if vectors is not None:
            return [vectors[..., : ranks[0]]]
        working_again = short_side(_working(kernels))  # not held, for it may be a converted copy
        return [leading_rows(working_again, ranks[0], product).to(working_again.dtype)]

    return Analysis.of_table((spectrum,), tail_sums(energies).sum(0), Bases(leading))


def factors(kernels: Tensor, ranks: Ranks, bases: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """W = U S V^T ~= (U_r S_r^1/2) (S_r^1/2 V_r^T): the balanced pair (groups, T, r), (groups, r, S).

    U_r spans the leading singular vectors of the shorter side, ``bases`` if they are known, and the other factor
    is U_r^T W: that needs no second decomposition.

    >>> left, right = factors(torch.eye(4)[None], (2,))
    >>> left.shape, right.shape
    (torch.Size([1, 4, 2]), torch.Size([1, 2, 4]))
    """
    matrices = _working(kernels)
    short = short_side(matrices)
    left = bases[0].double() if bases else leading_rows(short, ranks[0])
    right = project(short, left)
    root = right.norm(dim=-1).sqrt()
    right = right / root.clamp(min=torch.finfo(root.dtype).tiny)[..., None]
    left = left * root[..., None, :]
    return (left, right) if short is matrices else (right.mT, left.mT)


def _working(kernels: Tensor) -> Tensor:
    rows, columns = sorted(kernels.flatten(2).shape[1:])
    return working(kernels, rows**2 * columns).flatten(2)


LAYERS: Layers = {
    nn.Linear: SVDLinear,
    HUGGING_FACE_CONV1D: SVDLinear,
    nn.Embedding: SVDEmbedding,
    ExpertLinear: SVDExpertLinear,
    **dict.fromkeys(CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS, SVDConv),
}
SVD = Method("svd", ("r",), LAYERS, refuses, limits, analyse, factors, out_rank=0)

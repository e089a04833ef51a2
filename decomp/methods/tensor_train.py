"""Tensor train of a convolution kernel, and the asymmetric 3D decomposition, a train whose first rank is full."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from decomp.layers import AsymmetricConv, TensorTrainConv
from decomp.layers.kernels import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, step_lengths
from decomp.linalg import Values, as_float64, tail_sums
from decomp.methods import tucker
from decomp.methods.fitted import Unchanged
from decomp.methods.record import Analysis, Method, Ranks, needs_two_axes

RANKS_PER_MODE = 24

Train = tuple[Tensor | None, Tensor, Tensor, Tensor | None]


def asymmetric_limits(kernels: Tensor) -> Ranks:
    """The largest ranks (d2, d1): that of the (S kh) x (T kw) unfolding, and T."""
    folded = _fold(kernels)
    return (min(folded.shape[2], folded.shape[1] * folded.shape[3]), folded.shape[1])


def analyse_asymmetric(kernels: Tensor) -> Analysis:
    """Spectra of the (S kh) x (T kw) and the T x (S kh kw) unfoldings, and the exact error of every pair of ranks.

    With kernels read as T x (S kh) x kw this is a Tucker-2 of the modes T and S kh.
    """
    (out, inside), table, _ = tucker.error_table(_fold(kernels))
    most = asymmetric_limits(kernels)[0]
    return Analysis.of_table((inside, out), np.ascontiguousarray(table[:, : most + 1].T))


def asymmetric_factors(kernels: Tensor, ranks: Ranks) -> Train:
    """The train (None, G2, G3, G4) by HOOI on the kernels read as T x (S kh) x kw, ranks (d2, d1)."""
    core, (left, right) = tucker.factors(_fold(as_float64(kernels)), (ranks[1], ranks[0]))
    first = right.unflatten(1, (kernels.shape[2], -1)).permute(0, 3, 1, 2)
    if ranks[1] == kernels.shape[1]:
        return None, first, torch.einsum("gta,gab...->gtb...", left, core), None
    return None, first, core, left


def train_limits(kernels: Tensor) -> Ranks:
    """The largest ranks: S, that of the (S kh) x (T kw) unfolding, and T."""
    return (kernels.shape[2], *asymmetric_limits(kernels))


def analyse_train(kernels: Tensor) -> Analysis:
    """Spectra of the three unfoldings S, S kh and T, and the error at a thinned grid of ranks.

    The error^2 is at most the sum of the tails of the three spectra (Oseledets 2011, theorem 2.2). The grid holds
    this bound; at single ranks the exact error is computed.
    """
    asymmetric = analyse_asymmetric(kernels)
    spectra = (tucker.spectrum_of(kernels, 2), *asymmetric.spectra)
    modes = [_thinned(limit) for limit in train_limits(kernels)]
    bound: Values = np.zeros(())
    for spectrum, ranks in zip(spectra, modes, strict=True):
        bound = np.add.outer(
            bound, tail_sums((spectrum.values**2).sum(0))[np.minimum(ranks, spectrum.values.shape[1])]
        )
    grid = np.stack(np.meshgrid(*modes, indexing="ij"), -1).reshape(-1, 3).astype(np.int32)
    squared = np.minimum(bound, asymmetric.energy).ravel()
    tensor = kernels.detach()
    return Analysis(asymmetric.energy, grid, lambda: squared, partial(_train_error, Unchanged(tensor)), spectra)


def train_factors(kernels: Tensor, ranks: Ranks) -> Train:
    """The train (G1, G2, G3, G4): HOSVD of the input mode, then :func:`asymmetric_factors`.

    >>> reduce, first, second, expand = train_factors(torch.randn(1, 8, 6, 3, 3), (4, 7, 5))
    >>> reduce.shape, first.shape, second.shape, expand.shape
    (torch.Size([1, 4, 6]), torch.Size([1, 7, 4, 3]), torch.Size([1, 5, 7, 3]), torch.Size([1, 8, 5]))
    """
    tensor = as_float64(kernels)
    if ranks[0] == kernels.shape[2]:
        return asymmetric_factors(tensor, ranks[1:])
    basis = tucker.leading_basis(tensor, 2, ranks[0])
    projected = torch.einsum("gts...,gsa->gta...", tensor, basis)
    # The middle rank is at most that of the projected kernel; surplus channels are zero.
    middle = min(ranks[1], asymmetric_limits(projected)[0])
    _, first, second, expand = asymmetric_factors(projected, (middle, ranks[2]))
    missing = ranks[1] - middle
    first = torch.nn.functional.pad(first, (0, 0, 0, 0, 0, missing))
    second = torch.nn.functional.pad(second, (0, 0, 0, missing))
    return basis.mT, first, second, expand


def _train_error(kernels: Unchanged, ranks: Ranks) -> float:
    """||K - K~||^2, from the product of the train."""
    tensor = as_float64(kernels())
    reduce, first, second, expand = train_factors(tensor, ranks)
    rebuilt = torch.einsum("gtaj,gasi->gtsij", second, first)
    if expand is not None:
        rebuilt = torch.einsum("gta,gasij->gtsij", expand, rebuilt)
    if reduce is not None:
        rebuilt = torch.einsum("gtaij,gas->gtsij", rebuilt, reduce)
    return float((tensor.flatten(3) - rebuilt.flatten(3)).square().sum())


def _fold(kernels: Tensor) -> Tensor:
    """(groups, T, S, *kernel) to (groups, T, S kh, kw): the axes of the first step go with the input channels."""
    first, _ = step_lengths(kernels.shape[3:])
    folded: Tensor = kernels.flatten(3).unflatten(3, (first, -1)).flatten(2, 3)
    return folded


def _thinned(limit: int) -> Values:
    """About ``RANKS_PER_MODE`` ranks on a log scale, and the nearest multiples of 8, efficient on GPUs."""
    ranks = np.geomspace(1, limit, RANKS_PER_MODE).round().astype(np.int64)
    eights = np.maximum(8 * np.round(ranks / 8).astype(np.int64), min(8, limit))
    return np.unique(np.concatenate([ranks, np.minimum(eights, limit)]))


LAYERS = CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS
ASYMMETRIC = Method(
    "asymmetric",
    ("d2", "d1"),
    dict.fromkeys(LAYERS, AsymmetricConv),
    needs_two_axes("asymmetric"),
    asymmetric_limits,
    analyse_asymmetric,
    asymmetric_factors,
    out_rank=1,
)
TENSOR_TRAIN = Method(
    "tensor_train",
    ("r1", "r2", "r3"),
    dict.fromkeys(LAYERS, TensorTrainConv),
    needs_two_axes("tensor_train"),
    train_limits,
    analyse_train,
    train_factors,
    out_rank=2,
)

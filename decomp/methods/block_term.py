"""Block-term decomposition of a convolution kernel (De Lathauwer 2008): Tucker-2 blocks that add up."""

from dataclasses import replace
from functools import partial
from numbers import Integral

import torch
from torch import Tensor

from decomp.layers import BlockTermConv
from decomp.layers.kernels import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from decomp.linalg import as_float64
from decomp.methods import cp, tucker
from decomp.methods.fitted import Fit, fitted_analysis
from decomp.methods.record import Analysis, Method, Ranks, spatial
from decomp.methods.solvers.block_term import fit_block_term

DEFAULT_BLOCKS = 4
POINTS = 64

Factors = tuple[Tensor, Tensor, Tensor]


def limits(kernels: Tensor) -> Ranks:
    """The largest (G, out, in): a single block of full ranks is exact."""
    return (min(kernels.shape[1:3]), kernels.shape[1], kernels.shape[2])


def fit(kernels: Tensor, ranks: Ranks) -> Fit:
    """Factors (U, C, V); one block is the Tucker-2 by HOOI, blocks of rank 1 are the terms of a CP.

    The note states sum_g ||C_g||^2 / ||K||^2: far above 1, blocks cancel each other.
    """
    blocks, rank_out, rank_in = ranks
    if blocks == 1:
        core, (left, right) = tucker.factors(kernels, (rank_out, rank_in))
        tensor = as_float64(kernels)
        squared_error = float(tensor.square().sum() - core.square().sum())
        return Fit((left[:, None], core[:, None], right[:, None]), max(squared_error, 0.0))
    if (rank_out, rank_in) == (1, 1):
        (_, (left, right, spatial_factor)), squared_error, note = cp.fit(kernels, (blocks,), split=False)
        core = spatial_factor.mT.reshape(len(kernels), blocks, 1, 1, *kernels.shape[3:])
        return Fit((left.mT[..., None], core, right.mT[..., None]), squared_error, note)
    fits = [fit_block_term(tensor, *ranks) for tensor in as_float64(kernels).flatten(3)]
    left = torch.stack([blocks.left.transpose(0, 1) for blocks, _, _ in fits])
    right = torch.stack([blocks.right.transpose(0, 1) for blocks, _, _ in fits])
    core = torch.stack([blocks.core for blocks, _, _ in fits]).unflatten(4, kernels.shape[3:])
    degeneracy = max(each for _, _, each in fits)
    return Fit((left, core, right), sum(error for _, error, _ in fits), f"energy of its blocks x{degeneracy:.2f}")


def factors(kernels: Tensor, ranks: Ranks) -> Factors:
    """Factors (U, C, V) of shapes (groups, G, T, out), (groups, G, out, in, *kernel), (groups, G, S, in)."""
    return fit(kernels, ranks).factors  # type: ignore[no-any-return]


def analyse(blocks: int, kernels: Tensor) -> Analysis:
    """Fits at ranks (G, out, in) with out and in equal shares of T and S."""
    _, outputs, inputs = kernels.shape[:3]
    blocks = min(blocks, outputs, inputs)
    shares = [(point + 1) / POINTS for point in range(POINTS)]
    path = {(blocks, max(1, round(share * outputs)), max(1, round(share * inputs))) for share in shares}
    paying = [ranks for ranks in path if _params(kernels, ranks) < kernels[0].numel()]
    return fitted_analysis(kernels, sorted(paying) or [(blocks, 1, 1)], fit)


def _params(kernels: Tensor, ranks: Ranks) -> int:
    blocks, out, inside = ranks
    taps = kernels[0, 0, 0].numel()
    return blocks * (kernels.shape[2] * inside + taps * out * inside + kernels.shape[1] * out)


def block_term(*, blocks: int = DEFAULT_BLOCKS) -> Method:
    """The method with a default number of blocks, for rules and for ranks given as an int.

    Raises:
        ValueError: ``blocks`` is not an int of at least 1.
    """
    if isinstance(blocks, bool) or not isinstance(blocks, Integral) or blocks < 1:
        raise ValueError(f"blocks={blocks!r}: write an int of at least 1")
    count = int(blocks)
    return replace(BLOCK_TERM, analyse=partial(analyse, count), preset=(count, None, None))


BLOCK_TERM = Method(
    "block_term",
    ("G", "out", "in"),
    dict.fromkeys(CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS, BlockTermConv),
    spatial("block_term"),
    limits,
    partial(analyse, DEFAULT_BLOCKS),
    factors,
    preset=(DEFAULT_BLOCKS, None, None),
    closed_form=False,
)

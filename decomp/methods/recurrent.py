"""SVD of the weights of LSTM, GRU and RNN layers: of the input weights alone, or of the recurrent ones as well."""

from collections.abc import Mapping
from functools import partial
from math import prod

import numpy as np
from torch import Tensor, nn

from decomp.layers import SVDRNN, InputSVDRNN
from decomp.layers.kernels import recurrent_matrices
from decomp.linalg import Spectrum, Values, as_float64, gram_eigenvalues, tail_sums
from decomp.methods import svd
from decomp.methods.record import Analysis, Method, Ranks

MOST_RANKS = 2**20  # tuples of ranks that budgets choose from

Kernels = Mapping[str, Tensor]


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """What is decomposed: the weights as :func:`decomp.layers.kernels.recurrent_matrices` gives them."""
    assert isinstance(module, nn.RNNBase)
    return {role: each.detach() for role, each in recurrent_matrices(module).items()}


def limits(kernels: Kernels, roles: tuple[str, ...]) -> Ranks:
    """The largest rank of each batch of matrices; matrices of that rank stay as they are."""
    return tuple(min(kernels[role].shape[1:]) for role in roles if role in kernels)


def analyse(kernels: Kernels, roles: tuple[str, ...]) -> Analysis:
    """The error^2 is the sum of the tails of all spectra, over the energy of all weights, decomposed or not.

    The grid holds every tuple of ranks, or beyond ``MOST_RANKS`` of them every second, fourth, ... rank.
    """
    energies = {role: gram_eigenvalues(as_float64(each)).cpu().numpy() for role, each in kernels.items()}
    own = [role for role in roles if role in kernels]
    spectra = tuple(Spectrum(energies[role] ** 0.5, *kernels[role].shape[1:]) for role in own)
    tails = [tail_sums(energies[role].sum(0)) for role in own]
    most = int(MOST_RANKS ** (1 / len(own))) if prod(map(len, tails)) > MOST_RANKS else MOST_RANKS
    modes = [_thinned(len(tail) - 1, most) for tail in tails]
    squared: Values = np.zeros(())
    for tail, ranks in zip(tails, modes, strict=True):
        squared = np.add.outer(squared, tail[ranks])
    grid = np.stack(np.meshgrid(*modes, indexing="ij"), -1).reshape(-1, len(own)).astype(np.int32)
    table = squared.ravel()

    def squared_error(ranks: Ranks) -> float:
        return float(sum(tail[rank] for tail, rank in zip(tails, ranks, strict=True)))

    return Analysis(float(sum(map(np.sum, energies.values()))), grid, lambda: table, squared_error, spectra)


def factors(kernels: Kernels, ranks: Ranks, roles: tuple[str, ...]) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
    """A balanced pair (B, A) per batch of matrices, from the truncated SVD; the matrices themselves at full rank.

    >>> import torch
    >>> pair, full = factors({"input": torch.randn(1, 12, 8), "recurrent": torch.eye(3)[None]}, (2, 3), ROLES)
    >>> [tuple(each.shape) for each in pair], tuple(full.shape)
    ([(1, 12, 2), (1, 2, 8)], (1, 3, 3))
    """
    own = [kernels[role] for role in roles if role in kernels]
    return tuple(
        each if rank == min(each.shape[1:]) else svd.factors(each, (rank,))
        for each, rank in zip(own, ranks, strict=True)
    )


def _thinned(limit: int, most: int) -> Values:
    """The ranks from 1 on; of more than ``most`` 1, the full one, and the multiples of a power of 2."""
    step = 1
    while limit // step > most:
        step *= 2
    return np.unique(np.array([1, *range(step, limit + 1, step), limit]))


def _row(layer: type[InputSVDRNN]) -> Method:
    return Method(
        layer.method,
        layer.roles,
        dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), layer),
        lambda module: "",
        partial(limits, roles=layer.roles),
        partial(analyse, roles=layer.roles),
        partial(factors, roles=layer.roles),
        kernels=matrices,
        affine=False,
    )


ROLES = SVDRNN.roles
SVD_RNN_INPUT = _row(InputSVDRNN)
SVD_RNN = _row(SVDRNN)

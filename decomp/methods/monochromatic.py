"""Filters of one colour each, the colours shared by clusters (Denton et al. 2014, section 3.1.1)."""

import torch
from torch import Tensor

from decomp.layers import MonochromaticConv
from decomp.layers.kernels import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from decomp.linalg import as_float64, leading_eigenvectors
from decomp.methods.fitted import Fit, fitted_analysis
from decomp.methods.record import Analysis, Method, Ranks, spatial

MAX_ROUNDS = 100

Factors = tuple[Tensor, Tensor, Tensor]


def limits(kernels: Tensor) -> Ranks:
    """A colour for every filter."""
    return (kernels.shape[1],)


def fit(kernels: Tensor, ranks: Ranks) -> Fit:
    """Colours c (C x S), clusters q (T) and filters F[t] = c[q(t)]^T K[t], by Lloyd's rounds on the error itself.

    Each filter is assigned to the colour with the least error, each colour is the leading left singular vector of
    the filters of its cluster: sum_t ||K[t] - c[q(t)] F[t]||^2 never rises. Initial colours are those of the
    filters with the largest error under the colours before. The paper instead clusters the colours of rank-1
    approximations of the filters, without regard to their norm.
    """
    tensor = as_float64(kernels).flatten(3)
    parts = [_cluster(filters, ranks[0]) for filters in tensor]
    colours, clusters, filters = (torch.stack(each) for each in zip(*parts, strict=True))
    chosen = torch.stack([each[cluster] for each, cluster in zip(colours, clusters, strict=True)])
    rebuilt = chosen[:, :, :, None] * filters[:, :, None]
    squared_error = float((tensor - rebuilt).square().sum())
    return Fit((colours, clusters, filters.unflatten(2, kernels.shape[3:])), squared_error)


def factors(kernels: Tensor, ranks: Ranks) -> Factors:
    """The factors (c, q, F) of shapes (groups, C, S), (groups, T) and (groups, T, *kernel)."""
    return fit(kernels, ranks).factors  # type: ignore[no-any-return]


def analyse(kernels: Tensor) -> Analysis:
    """Fits at a few numbers of colours; even one colour per filter is exact only for filters of rank 1."""
    return fitted_analysis(kernels, [(colours,) for colours in range(1, kernels.shape[1] + 1)], fit)


def _cluster(filters: Tensor, count: int) -> Factors:
    """One group: filters (T, S, k), in a basis of their joint span if that has fewer than S dimensions."""
    wide = filters.transpose(0, 1).flatten(1)
    basis = None
    if wide.shape[0] > wide.shape[1]:
        basis, small = torch.linalg.qr(wide)
        filters = small.unflatten(1, (len(filters), -1)).transpose(0, 1)
    colours = _first_colours(filters, count)
    cluster = torch.full((len(filters),), -1, device=filters.device)
    for _ in range(MAX_ROUNDS):
        captured = torch.einsum("cs,tsk->tck", colours, filters).square().sum(2)
        before, cluster = cluster, captured.argmax(1)
        if torch.equal(before, cluster):
            break
        for each in cluster.unique().tolist():
            own = filters[cluster == each].transpose(0, 1).flatten(1)
            colours[each] = leading_eigenvectors(own @ own.T, 1)[:, 0]
    spatial_filters = torch.einsum("ts,tsk->tk", colours[cluster], filters)
    return colours if basis is None else colours @ basis.T, cluster, spatial_filters


def _first_colours(filters: Tensor, count: int) -> Tensor:
    """Leading vectors of the filters with the largest error under the colours before, one after the other."""
    energies = filters.square().sum((1, 2))
    missing, colours = energies.clone(), []
    for _ in range(count):
        colour = torch.linalg.svd(filters[int(missing.argmax())], full_matrices=False)[0][:, 0]
        colours.append(colour)
        missing = torch.minimum(missing, energies - torch.einsum("s,tsk->tk", colour, filters).square().sum(1))
    return torch.stack(colours)


MONOCHROMATIC = Method(
    "monochromatic",
    ("colours",),
    dict.fromkeys(CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS, MonochromaticConv),
    spatial("monochromatic"),
    limits,
    analyse,
    factors,
    closed_form=False,
)

"""Factors made best for given moments of the patches, the ones before them left as they are."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from decomp.layers import Factorized, TuckerConv, group_kernels


def refitted(
    layer: type[Factorized], dense: nn.Module, kernels: Mapping[str, Tensor], whole: Tensor, patches: Tensor
) -> dict[str, Tensor]:
    """The same first factors, and those behind them that are best for patches of moments C (groups, S k^2, S k^2).

    Of a Tucker-2 core and last factor: with the features z = (V (x) I) x of the first one, the best kernel on
    them is M = W C_xz C_zz^-1, and of its rank-R4 versions U U^T M, with U the leading eigenvectors of M C_zz
    M^T. Of the others the last 1x1 convolution: A = W C_xz C_zz^-1. ``whole`` is the dense kernel W.
    """
    if "expand" not in kernels:
        return dict(kernels)
    if layer is TuckerConv and "reduce" in kernels:
        return _tucker(kernels, whole, patches)
    features = _features(layer, dense, kernels)
    cross = whole.flatten(2) @ patches @ features.mT
    return {**kernels, "expand": _solve(features @ patches @ features.mT, cross)}


def _tucker(kernels: Mapping[str, Tensor], whole: Tensor, patches: Tensor) -> dict[str, Tensor]:
    reduce, core = kernels["reduce"].flatten(2), kernels["core"]
    taps = core[0, 0, 0].numel()
    identity = torch.eye(taps, dtype=reduce.dtype, device=reduce.device)
    features = torch.stack([torch.kron(each, identity) for each in reduce])
    inside = features @ patches @ features.mT
    best = _solve(inside, whole.flatten(2) @ patches @ features.mT)
    vectors: Tensor = torch.linalg.eigh(best @ inside @ best.mT)[1]
    basis = vectors.flip(-1)[:, :, : core.shape[1]]
    return {**kernels, "core": (basis.mT @ best).reshape(core.shape), "expand": basis}


def _features(layer: type[Factorized], dense: nn.Module, kernels: Mapping[str, Tensor]) -> Tensor:
    """The kernels of all factors but the last, (groups, r, S k^2), read off with unit rows for the last."""
    expand = kernels["expand"].flatten(2)
    _, outputs, rank = expand.shape
    wide = copy.deepcopy(dense).to(torch.float64)
    found = []
    for start in range(0, rank, outputs):
        units = torch.zeros_like(expand)
        count = min(outputs, rank - start)
        units[:, torch.arange(count), start + torch.arange(count)] = 1
        built = layer.from_kernels(wide, {**kernels, "expand": units})
        found.append(group_kernels(built.to_dense()).detach().to(expand.device)[:, :count].flatten(2))
    return torch.cat(found, 1)


def _solve(inside: Tensor, cross: Tensor) -> Tensor:
    """cross inside^-1 for positive semidefinite matrices that may be singular."""
    mean = inside.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(inside.shape[1], dtype=inside.dtype, device=inside.device)
    solved: Tensor = torch.linalg.solve(inside + 1e-9 * mean * identity, cross.mT)
    return solved.mT

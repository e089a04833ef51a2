"""Last factors fitted by least squares to moments of the patches; the factors before them stay as they are."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from decomp.layers import Factorized, group_kernels
from decomp.linalg import leading_eigenvectors


def refitted(
    layer: type[Factorized], dense: nn.Module, kernels: Mapping[str, Tensor], whole: Tensor, patches: Tensor
) -> dict[str, Tensor]:
    """The same first factors, and the last ones that make E ||W x - W' x||^2 least for patches x.

    C (groups, S k^2, S k^2) are the moments of the patches and W, ``whole``, is the dense kernel. With z = F x
    what the first factors give, the best matrix on z is M = W C_xz C_zz^-1. Where the layer lets one factor be
    refitted, it becomes M. Where it lets two, they become the best A C of rank r: A = U, C = U^T M, with U the r
    leading eigenvectors of M C_zz M^T.
    """
    roles = layer.refittable(kernels)
    if not roles:
        return dict(kernels)
    features = _features(layer, dense, kernels) if len(roles) == 1 else _patch_features(kernels)
    inside = features @ patches @ features.mT
    best = _solve(inside, whole.flatten(2) @ patches @ features.mT)
    if len(roles) == 1:
        return {**kernels, roles[0]: best}
    core = kernels[roles[0]]
    basis = leading_eigenvectors(best @ inside @ best.mT, core.shape[1])
    return {**kernels, roles[0]: (basis.mT @ best).reshape(core.shape), roles[1]: basis}


def _patch_features(kernels: Mapping[str, Tensor]) -> Tensor:
    """V^T (x) I: what a first 1x1 convolution V^T gives at every place of a patch, (groups, r k^2, S k^2)."""
    reduce, core = (kernels[role] for role in list(kernels)[:2])
    taps = core[0, 0, 0].numel()
    identity = torch.eye(taps, dtype=reduce.dtype, device=reduce.device)
    return torch.stack([torch.kron(each, identity) for each in reduce.flatten(2)])


def _features(layer: type[Factorized], dense: nn.Module, kernels: Mapping[str, Tensor]) -> Tensor:
    """The kernels of all factors but the last, (groups, r, S k^2), read off with unit rows for the last."""
    last = list(kernels)[-1]
    expand = kernels[last].flatten(2)
    _, outputs, rank = expand.shape
    wide = copy.deepcopy(dense).to(torch.float64)
    found = []
    for start in range(0, rank, outputs):
        units = torch.zeros_like(expand)
        count = min(outputs, rank - start)
        units[:, torch.arange(count), start + torch.arange(count)] = 1
        built = layer.from_kernels(wide, {**kernels, last: units})
        found.append(group_kernels(built.to_dense()).detach().to(expand.device)[:, :count].flatten(2))
    return torch.cat(found, 1)


def _solve(inside: Tensor, cross: Tensor) -> Tensor:
    """cross inside^-1 for positive semidefinite matrices that may be singular."""
    mean = inside.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(inside.shape[1], dtype=inside.dtype, device=inside.device)
    solved: Tensor = torch.linalg.solve(inside + 1e-9 * mean * identity, cross.mT)
    return solved.mT

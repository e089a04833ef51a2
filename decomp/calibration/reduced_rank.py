"""Least-squares refit of the last factors of a layer to moments of its patches, with the first factors fixed."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from decomp.layers import Factorized, group_kernels
from decomp.layers.factorized import copy_alone
from decomp.linalg import leading_eigenvectors
from decomp.network.restoring import LOCK


def refitted(
    layer: type[Factorized], dense: nn.Module, kernels: Mapping[str, Tensor], whole: Tensor, patches: Tensor
) -> dict[str, Tensor]:
    """The kernels with the last factors replaced by those that minimize E ||W x - W' x||^2 over patches x.

    ``patches`` is C_xx = E[x x^T] (groups, S k^2, S k^2) and ``whole`` the dense kernel W. With z = F x the output
    of the first factors F, the least-squares matrix on z is M = W C_xz C_zz^-1. A single refitted factor is M. Two
    are the best product A B of rank r: A = U, B = U^T M, with U the r leading eigenvectors of M C_zz M^T
    (reduced-rank regression).
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
    """V^T (x) I: a first 1x1 convolution V^T applied at every position of a patch, (groups, r k^2, S k^2)."""
    reduce, core = (kernels[role] for role in list(kernels)[:2])
    taps = core[0, 0, 0].numel()
    identity = torch.eye(taps, dtype=reduce.dtype, device=reduce.device)
    return torch.stack([torch.kron(each, identity) for each in reduce.flatten(2)])


def _features(layer: type[Factorized], dense: nn.Module, kernels: Mapping[str, Tensor]) -> Tensor:
    """The product of all factors but the last, (groups, r, S k^2), from unit vectors as the last factor."""
    last = list(kernels)[-1]
    expand = kernels[last].flatten(2)
    _, outputs, rank = expand.shape
    with LOCK:  # other threads may set hooks on the layer, for the time of a call
        wide = copy_alone(dense).to(torch.float64)
    parts = []
    for start in range(0, rank, outputs):
        units = torch.zeros_like(expand)
        count = min(outputs, rank - start)
        places = torch.arange(count, device=units.device)
        units[:, places, start + places] = 1
        built = layer.from_kernels(wide, {**kernels, last: units})
        parts.append(group_kernels(built.to_dense()).detach().to(expand.device)[:, :count].flatten(2))
    return torch.cat(parts, 1)


def _solve(inside: Tensor, cross: Tensor) -> Tensor:
    """cross inside^-1 for positive semidefinite matrices that may be singular."""
    mean = inside.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(inside.shape[1], dtype=inside.dtype, device=inside.device)
    solved: Tensor = torch.linalg.solve(inside + 1e-9 * mean * identity, cross.mT)
    return solved.mT

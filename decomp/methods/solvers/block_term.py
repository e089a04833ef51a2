"""Block-term decomposition by alternating least squares (De Lathauwer and Nion 2008)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from decomp.linalg import leading_eigenvectors

MAX_SWEEPS = 200
LAST_SWEEPS = 20
TOLERANCE = 1e-5
CORE_STEPS = 25
RIDGE = 1e-2
LAST_RIDGE = 1e-4
RELATIVE_RIDGE = 1e-10


@dataclass
class Blocks:
    """K[t, s, j] ~= sum over n, a, b of left[t, n, a] core[n, a, b, j] right[s, n, b]."""

    left: Tensor
    core: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """Multiply the blocks: (T, S, J)."""
        return torch.einsum("tna,nabj,snb->tsj", self.left, self.core, self.right)


def fit_block_term(tensor: Tensor, blocks: int, rank_out: int, rank_in: int) -> tuple[Blocks, float, float]:
    """G blocks of ranks (out, in, J) of one (T, S, J) tensor, their squared error, and their degeneracy.

    The tensor is compressed by HOSVD to G times the ranks and initialized by deflation, one block after the
    other. Alternating least squares then update all left factors, all right factors and all cores, in the last
    sweeps with a very small ridge. Left and right factors of each block are orthonormal in the result.
    Degeneracy is sum_g ||C_g||^2 / ||K||^2: far above 1, blocks cancel each other.

    >>> blocks, squared_error, degeneracy = fit_block_term(torch.randn(12, 10, 9, dtype=torch.float64), 2, 4, 3)
    >>> blocks.left.shape, blocks.core.shape, blocks.right.shape
    (torch.Size([12, 2, 4]), torch.Size([2, 4, 3, 9]), torch.Size([10, 2, 3]))
    """
    energy = float(tensor.square().sum())
    left_basis = _leading(tensor, 0, min(tensor.shape[0], blocks * rank_out))
    right_basis = _leading(tensor, 1, min(tensor.shape[1], blocks * rank_in))
    small = torch.einsum("tsj,tx,sy->xyj", tensor, left_basis, right_basis)
    model = _sweeps(small, _deflated(small, blocks, rank_out, rank_in), energy, MAX_SWEEPS, RIDGE)
    model.left = torch.einsum("tx,xna->tna", left_basis, model.left)
    model.right = torch.einsum("sy,ynb->snb", right_basis, model.right)
    model = _sweeps(tensor, model, energy, LAST_SWEEPS, LAST_RIDGE)
    squared_error = float((tensor - model.dense()).square().sum())
    return model, squared_error, float(model.core.square().sum()) / energy if energy else 0.0


def _sweeps(tensor: Tensor, model: Blocks, energy: float, most: int, ridge: float) -> Blocks:
    before = energy
    for _ in range(most):
        model.left = _side(tensor, model.core, model.right)
        model.left, model.core = _orthonormal(model.left, model.core)
        turned = model.core.transpose(1, 2)
        model.right = _side(tensor.transpose(0, 1), turned, model.left)
        model.right, turned = _orthonormal(model.right, turned)
        model.core, squared_error = _cores(tensor, model.left, turned.transpose(1, 2), model.right, ridge)
        if before - squared_error <= TOLERANCE * energy:
            break
        before = squared_error
    return model


def _side(tensor: Tensor, core: Tensor, other: Tensor) -> Tensor:
    """The least-squares left factors of all blocks, given cores and right ones: two products, one solve."""
    blocks, rank = core.shape[:2]
    projected = torch.einsum("tsj,snb->tnbj", tensor, other)
    moments = torch.einsum("tnbj,nabj->tna", projected, core).flatten(1)
    overlaps = torch.einsum("snb,smc->nbmc", other, other)
    normal = torch.einsum("nbmc,mdcj->nbmdj", overlaps, core)
    normal = torch.einsum("nabj,nbmdj->namd", core, normal).flatten(2).flatten(0, 1)
    ridge = RELATIVE_RIDGE * float(normal.diagonal().mean()) + torch.finfo(normal.dtype).tiny
    normal = normal + ridge * torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
    factor: Tensor = torch.linalg.solve(normal, moments.T).T.unflatten(1, (blocks, rank))
    return factor


def _cores(tensor: Tensor, left: Tensor, core: Tensor, right: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Conjugate gradients for all cores, from the present ones; also the objective, error^2 + ridge ||C||^2.

    The ridge keeps blocks from cancelling each other, and exact blocks are recovered far more often with it.
    The normal matrix (U_g^T U_h) (x) (V_g^T V_h) has an identity for every block on its diagonal.
    """
    target = torch.einsum("tsj,tna->nasj", tensor, left)
    target = torch.einsum("nasj,snb->nabj", target, right)
    overlap_left = torch.einsum("tna,tmd->namd", left, left)
    overlap_right = torch.einsum("snb,smc->nbmc", right, right)

    def apply(cores: Tensor) -> Tensor:
        half = torch.einsum("namd,mdcj->namcj", overlap_left, cores)
        return torch.einsum("namcj,nbmc->nabj", half, overlap_right) + ridge * cores

    residual = target - apply(core)
    direction, size = residual, float(residual.square().sum())
    enough = 1e-16 * float(target.square().sum())
    for _ in range(CORE_STEPS):
        if size <= enough:
            break
        image = apply(direction)
        step = size / float((direction * image).sum())
        core, residual = core + step * direction, residual - step * image
        size, last = float(residual.square().sum()), size
        direction = residual + size / last * direction
    # ||K - M||^2 + ridge ||C||^2 = ||K||^2 - <C, target> - <C, residual> for any C.
    return core, float(tensor.square().sum() - (core * (target + residual)).sum())


def _orthonormal(factor: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """Make the columns of each block orthonormal, and multiply its core by the change of basis."""
    basis, triangle = torch.linalg.qr(factor.transpose(0, 1))
    return basis.transpose(0, 1), torch.einsum("nad,ndbj->nabj", triangle, core)


def _deflated(tensor: Tensor, blocks: int, rank_out: int, rank_in: int) -> Blocks:
    """Deflation: one Tucker-2 block after the other, each of the residual of those before."""
    lefts, cores, rights = [], [], []
    for _ in range(blocks):
        right = _leading(tensor, 1, rank_in)
        left = _leading(torch.einsum("tsj,sb->tbj", tensor, right), 0, rank_out)
        right = _leading(torch.einsum("tsj,ta->asj", tensor, left), 1, rank_in)
        core = torch.einsum("tsj,ta,sb->abj", tensor, left, right)
        tensor = tensor - torch.einsum("ta,abj,sb->tsj", left, core, right)
        lefts.append(left)
        cores.append(core)
        rights.append(right)
    return Blocks(torch.stack(lefts, 1), torch.stack(cores), torch.stack(rights, 1))


def _leading(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """Leading left singular vectors of an unfolding, by its Gram matrix."""
    unfolded = tensor.transpose(0, mode).flatten(1)
    return leading_eigenvectors(unfolded @ unfolded.T, rank)

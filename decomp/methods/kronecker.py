"""A matrix as a sum of Kronecker products (Van Loan and Pitsianis 1993): the SVD of the rearranged weight."""

from collections.abc import Sequence

from torch import Tensor, nn

from decomp.layers import KroneckerLinear
from decomp.layers.kernels import HUGGING_FACE_CONV1D, group_kernels
from decomp.layers.kronecker import proper_divisors, split_sizes
from decomp.methods import svd
from decomp.methods.record import Analysis, Method, Ranks


def refuses(module: nn.Module) -> str:
    """A matrix whose outputs or inputs are a product of two numbers: else a Kronecker product splits nothing."""
    outputs, inputs = group_kernels(module).shape[1:]
    if proper_divisors(outputs) or proper_divisors(inputs):
        return ""
    return f"kronecker splits outputs or inputs into two factors, and neither {outputs} nor {inputs} has any"


def rearranged(kernels: Tensor) -> Tensor:
    """R(W) (groups, t1 s1, t2 s2): a row for each t2 x s2 block of W (groups, T, S); A (x) B becomes a b^T.

    ||W - sum_i A_i (x) B_i|| = ||R(W) - sum_i vec(A_i) vec(B_i)^T||.
    """
    t1, s1, t2, s2 = split_sizes(*kernels.shape[1:3])
    blocks: Tensor = kernels.unflatten(2, (s1, s2)).unflatten(1, (t1, t2)).transpose(2, 3)
    return blocks.flatten(3).flatten(1, 2)


def limits(kernels: Tensor) -> Ranks:
    """The largest rank: that of the rearranged matrix."""
    t1, s1, t2, s2 = split_sizes(*kernels.shape[1:3])
    return (min(t1 * s1, t2 * s2),)


def analyse(kernels: Tensor) -> Analysis:
    """The error^2 at every rank is a tail sum of the spectrum of the rearranged matrix."""
    return svd.analyse(rearranged(kernels))


def factors(kernels: Tensor, ranks: Ranks, bases: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """The best A (r, t1, s1) and B (r, t2, s2), from the truncated SVD of the rearranged matrix.

    >>> import torch
    >>> weight = torch.kron(torch.ones(3, 2), torch.eye(2, 3))
    >>> a, b = factors(weight[None], (1,))
    >>> torch.allclose(torch.kron(a[0], b[0]), weight.double())
    True
    """
    t1, s1, t2, s2 = split_sizes(*kernels.shape[1:3])
    left, right = svd.factors(rearranged(kernels), ranks, bases)
    return left[0].mT.unflatten(1, (t1, s1)), right[0].unflatten(1, (t2, s2))


KRONECKER = Method(
    "kronecker",
    ("r",),
    {nn.Linear: KroneckerLinear, HUGGING_FACE_CONV1D: KroneckerLinear},
    refuses,
    limits,
    analyse,
    factors,
)

"""Two small linear layers for a matrix that is a sum of Kronecker products."""

from collections.abc import Mapping
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from decomp.layers.factorized import Factorized


class Bias(nn.Module):
    """Adds a bias to the last axis."""

    def __init__(self, length: int, device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(length, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the bias to zero."""
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return input + self.bias.to(input.dtype)  # under autocast the input has the lower precision


class KroneckerLinear(Factorized):
    """``nn.Linear(s2 -> r t2)`` and ``nn.Linear(r s1 -> t1)`` over a grid of the inputs, then the bias.

    W = sum_i A_i (x) B_i with A_i (t1 x s1) and B_i (t2 x s2), T = t1 t2 and S = s1 s2; :func:`split_sizes`
    chooses them. With the input as an s1 x s2 grid X, the output is the t1 x t2 grid sum_i A_i X B_i^T. Params r
    (t1 s1 + t2 s2), MACs r (S t2 + T s1) per row. It replaces ``nn.Linear`` and the ``Conv1D`` of Hugging
    Face.

    Factors are (A, B) of shapes (r, t1, s1) and (r, t2, s2). Source: Van Loan and Pitsianis 1993.

    >>> layer = KroneckerLinear.like(nn.Linear(64, 48), (3,))
    >>> layer.reduce.weight.shape, layer.expand.weight.shape
    (torch.Size([6, 32]), torch.Size([24, 6]))
    """

    method = "kronecker"
    absorbs_inputs = "nothing"
    absorbs_outputs = "nothing"
    reduce: nn.Module
    expand: nn.Module

    def build(self, dense: Any, device: Any) -> None:
        (rank,) = self.ranks
        t1, s1, t2, s2 = self.sizes
        dtype = dense.weight.dtype
        self.reduce = nn.Linear(s2, rank * t2, bias=False, device=device, dtype=dtype)
        self.expand = nn.Linear(rank * s1, t1, bias=False, device=device, dtype=dtype)
        if dense.bias is not None:
            self.shift = Bias(t1 * t2, device, dtype)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The sizes (t1, s1, t2, s2) of the factors of each product."""
        first, second = self.dense_shape
        return split_sizes(second, first) if self.input_first else split_sizes(first, second)

    @classmethod
    def factor_kernels(cls, dense: nn.Module, factors: Any) -> Mapping[str, Tensor]:
        left, right = factors
        # Kernels are (groups, T, S). B stands with the rank as its groups, which become rows of the weight; the
        # ranks of A are columns of one group.
        return {"reduce": right, "expand": left.transpose(0, 1).flatten(1)[None]}

    @classmethod
    def refittable(cls, kernels: Mapping[str, Tensor]) -> tuple[str, ...]:
        return ()

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (kernels["reduce"].shape[0],)

    def dense_kernels(self) -> Tensor:
        left = self.expand.weight.unflatten(1, (self.ranks[0], -1))  # type: ignore[operator]
        right = self.reduce.weight.unflatten(0, (self.ranks[0], -1))  # type: ignore[operator]
        kernels: Tensor = torch.einsum("prs,rqu->pqsu", left, right)
        return kernels.flatten(2).flatten(0, 1)[None]

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        _, s1, t2, s2 = self.sizes
        grid = self.reduce(input.unflatten(-1, (s1, s2)))  # (..., s1, r t2)
        grid = grid.unflatten(-1, (self.ranks[0], t2)).transpose(-3, -1)  # (..., t2, r, s1)
        output: Tensor = self.expand(grid.flatten(-2)).transpose(-2, -1).flatten(-2)
        return self.shift(output) if hasattr(self, "shift") else output


@cache
def split_sizes(outputs: int, inputs: int) -> tuple[int, int, int, int]:
    """The sizes (t1, s1, t2, s2) of both sides of the product, with the fewest parameters t1 s1 + t2 s2.

    T and S are each split into two numbers above 1; a prime one goes to one side whole. Without that rule a square
    matrix would get a column times a row, which is a term of its SVD. Among equals the sizes are those with the
    fewest MACs, S t2 + T s1, then the smallest t1 and s1. Squarer sizes have as few parameters but more MACs, so
    that few ranks are cheaper than the dense layer: for 768 x 768, (32 x 24) (x) (24 x 32) is up to rank 15, and
    the sizes below are up to rank 191. The other order, A_i before B_i, costs what this one costs with A and B
    exchanged: it would gain nothing.

    Raises:
        ValueError: neither number can be split.

    >>> split_sizes(768, 768), split_sizes(48, 64), split_sizes(7, 12)
    ((384, 2, 2, 384), (24, 2, 2, 32), (7, 2, 1, 6))
    """
    if not (proper_divisors(outputs) or proper_divisors(inputs)):
        raise ValueError(f"neither {outputs} outputs nor {inputs} inputs are a product of two numbers above 1")
    pairs = product(proper_divisors(outputs) or (1, outputs), proper_divisors(inputs) or (1, inputs))

    def cost(sizes: tuple[int, int, int, int]) -> tuple[int, ...]:
        t1, s1, t2, s2 = sizes
        return (t1 * s1 + t2 * s2, inputs * t2 + outputs * s1, t1, s1)

    return min(((t1, s1, outputs // t1, inputs // s1) for t1, s1 in pairs), key=cost)


def proper_divisors(number: int) -> tuple[int, ...]:
    """The divisors but for 1 and the number itself.

    >>> proper_divisors(12), proper_divisors(13)
    ((2, 3, 4, 6), ())
    """
    return tuple(each for each in range(2, number // 2 + 1) if number % each == 0)

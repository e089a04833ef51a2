"""Conversion of factors to TensorLy, and its decompositions as solvers.

TensorLy is imported on first use: it takes longer than the rest of ``import decomp``.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from decomp.layers import CPConv, Factorized, TuckerConv, group_kernels

Solver: TypeAlias = Callable[..., Any]


def by_tensorly(solver: Solver, kernel: Tensor, **arguments: Any) -> Any:
    """Call a decomposition of TensorLy on a torch tensor, with a backend that is local to this call and thread."""
    import tensorly

    with tensorly.backend_context("pytorch", local_threadsafe=True):
        return solver(kernel, **arguments)


def to_tensorly(layer: Factorized) -> list[Any]:
    """The factors of a Tucker-2 or CP layer as one ``TuckerTensor`` or ``CPTensor`` per group.

    Each represents the kernel (T, S, *kernel) of its group. The spatial modes of a Tucker-2, which have no
    factors, get identity matrices. A CP with k x k filters has one spatial mode of length k^2.

    Raises:
        TypeError: the layer is neither Tucker-2 nor CP.

    >>> from torch import nn
    >>> from tensorly import backend_context
    >>> layer = TuckerConv.like(nn.Conv2d(8, 6, 3), (3, 2))
    >>> with backend_context("pytorch", local_threadsafe=True):
    ...     [tensor.rank for tensor in to_tensorly(layer)]
    [(3, 2, 3, 3)]
    """
    import tensorly

    with tensorly.backend_context("pytorch", local_threadsafe=True):
        if isinstance(layer, TuckerConv):
            return _tucker(layer)
        if isinstance(layer, CPConv):
            return _cp(layer)
    raise TypeError(
        f"{type(layer).__name__} cannot be converted to TensorLy: give a TuckerConv, CPConv or CP4Conv"
    )


def _tucker(layer: Any) -> list[Any]:
    from tensorly.tucker_tensor import TuckerTensor

    cores = group_kernels(layer.core).detach()
    left = group_kernels(layer.expand).flatten(2).detach() if hasattr(layer, "expand") else None
    right = group_kernels(layer.reduce).flatten(2).mT.detach() if hasattr(layer, "reduce") else None
    tensors = []
    for group, core in enumerate(cores):
        eyes = [torch.eye(length, dtype=core.dtype, device=core.device) for length in core.shape]
        first = eyes[0] if left is None else left[group]
        second = eyes[1] if right is None else right[group]
        tensors.append(TuckerTensor((core, [first, second, *eyes[2:]])))
    return tensors


def _cp(layer: Any) -> list[Any]:
    from tensorly.cp_tensor import CPTensor

    left = group_kernels(layer.expand).flatten(2).detach()
    right = group_kernels(layer.reduce).flatten(2).mT.detach()
    axes = [child for role, child in layer.named_children() if role.startswith("axis")]
    spatial = [group_kernels(child).detach().flatten(1).unflatten(0, (len(left), -1)).mT for child in axes]
    ones = torch.ones(left.shape[2], dtype=left.dtype, device=left.device)
    return [CPTensor((ones, [factor[group] for factor in (left, right, *spatial)])) for group in range(len(left))]

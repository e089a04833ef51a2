"""Which convolutions a method is for, by their kernel size."""

from collections.abc import Callable
from typing import Any

from decomp.layers.kernels import spatial_steps

Refuses = Callable[[Any], str]


def spatial(name: str) -> Refuses:
    """Spatial convolutions: a kernel of size 1 is a matrix."""

    def refuses(module: Any) -> str:
        if set(module.kernel_size) != {1}:
            return ""
        return f"{name} is for spatial kernels, this is a matrix"

    return refuses


def needs_two_axes(name: str, *, more: bool = False) -> Refuses:
    """Kernels that are longer than 1 along two spatial axes, or ``more``."""

    def refuses(module: Any) -> str:
        long = len(spatial_steps(module.kernel_size)) if set(module.kernel_size) != {1} else 0
        if long == 2 or (more and long > 2):
            return ""
        return (
            f"{name} is for kernels longer than 1 along {'at least ' if more else ''}two axes, this one has {long}"
        )

    return refuses

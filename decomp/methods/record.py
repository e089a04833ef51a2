"""What a decomposition method is, as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from torch import Tensor, nn

from decomp.layers import Factorized
from decomp.spectra import Spectrum, Values

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Analysis:
    """What one factorization of a weight tells about every rank.

    ``spectra`` holds one spectrum per rank. ``squared_errors[r1, r2, ...]`` is ||W - W'||^2 at those ranks,
    summed over the groups; ``energy`` is ||W||^2.
    """

    spectra: tuple[Spectrum, ...]
    squared_errors: Values
    energy: float

    def error(self, ranks: Ranks) -> float:
        """Return the relative error of the weight, ||W - W'|| / ||W||, at these ranks."""
        return sqrt(float(self.squared_errors[ranks]) / self.energy) if self.energy else 0.0


@dataclass(frozen=True)
class Method:
    """A decomposition: the functions that take kernels (groups, T, S, *kernel) apart, and the layers that run it.

    ``limits(kernels)`` are the largest ranks, ``analyse(kernels)`` the spectra and errors of all ranks at once,
    ``factors(kernels, ranks)`` what ``from_factors`` of the layer takes. ``layers`` maps the exact type of a
    dense layer to its factorized layer, ``takes(module)`` says which of these the method is for.
    """

    name: str
    rank_names: tuple[str, ...]
    layers: Mapping[type[nn.Module], type[Factorized]]
    takes: Callable[[nn.Module], bool]
    limits: Callable[[Tensor], Ranks]
    analyse: Callable[[Tensor], Analysis]
    factors: Callable[[Tensor, Ranks], Any]

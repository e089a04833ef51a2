"""What a decomposition method is, as data, and for which kernels the common ones are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from decomp.layers import Factorized
from decomp.layers.kernels import qualified_name, spatial_steps
from decomp.linalg import Spectrum, Values

Ranks = tuple[int, ...]
Refuses = Callable[[Any], str]
Layers = Mapping[Any, type[Factorized]]  # by type, or by qualified name


@dataclass(frozen=True)
class Analysis:
    """What is known of one weight at all ranks.

    ``energy`` is ||W||^2 over all groups. ``ranks`` (n, modes) are those that rules and budgets choose among, and
    ``squared_errors()`` are ||W - W'||^2 at each of them. ``squared_error(ranks)`` is the value for one, exact
    where it has to be fitted. ``spectra`` holds one spectrum per rank, or none. ``factors(kernels, ranks)``
    returns what was fitted on the way, ``note(ranks)`` what a user must know about it.
    """

    energy: float
    ranks: NDArray[np.int32]
    squared_errors: Callable[[], Values]
    squared_error: Callable[[Ranks], float]
    spectra: tuple[Spectrum, ...] = ()
    factors: Callable[[Tensor, Ranks], Any] | None = None
    note: Callable[[Ranks], str] = lambda ranks: ""

    @classmethod
    def of_table(cls, spectra: tuple[Spectrum, ...], table: Values) -> "Analysis":
        """From the squared errors at ranks 0 to limit of every mode: ``table[r1, r2, ...]``."""
        limits = tuple(length - 1 for length in table.shape)
        ranks = np.indices(limits, np.int32).reshape(len(limits), -1).T + 1
        inner = table[(slice(1, None),) * table.ndim].ravel()
        energy = float(table[(0,) * table.ndim])
        return cls(energy, ranks.astype(np.int32), lambda: inner, lambda ranks: float(table[ranks]), spectra)

    def error(self, ranks: Ranks) -> float:
        """Return the relative error of the weight, ||W - W'|| / ||W||, at these ranks."""
        return sqrt(max(self.squared_error(ranks), 0.0) / self.energy) if self.energy else 0.0


@dataclass(frozen=True)
class Method:
    """A decomposition: the functions that take kernels (groups, T, S, *kernel) apart, and the layers that run it.

    ``limits(kernels)`` are the largest ranks, ``analyse(kernels)`` what is known at all ranks,
    ``factors(kernels, ranks)`` what ``from_factors`` of the layer takes. ``layers`` maps the exact type of a dense
    layer, or its qualified name, to its factorized layer; ``refuses(module)`` says why one of these types is out
    of the question, or returns an empty string. ``preset`` fills the ranks that an int does not set. ``out_rank``
    is the place of the rank of the outputs, for whose basis U the rest of the decomposition is that of U^T K.
    ``closed_form`` methods know their error at all ranks at once; the others fit.
    """

    name: str
    rank_names: tuple[str, ...]
    layers: Layers
    refuses: Callable[[Any], str]
    limits: Callable[[Tensor], Ranks]
    analyse: Callable[[Tensor], Analysis]
    factors: Callable[[Tensor, Ranks], Any]
    preset: tuple[int | None, ...] = ()
    out_rank: int | None = None
    closed_form: bool = True

    def layer_of(self, module: nn.Module) -> type[Factorized] | None:
        """The factorized layer that stands for one of this type."""
        kind = type(module)
        return self.layers.get(kind) or self.layers.get(qualified_name(kind))

    def why_not(self, module: nn.Module) -> str:
        """Why this method does not take a layer; empty where it does."""
        if self.layer_of(module) is None:
            return f"{self.name} is not for {type(module).__name__}"
        return self.refuses(module)


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

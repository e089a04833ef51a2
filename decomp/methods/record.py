"""The record of a decomposition method, and common conditions on the kernels that a method supports."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from decomp.layers import Factorized, group_kernels
from decomp.layers.kernels import kind_of, qualified_name, spatial_steps
from decomp.linalg import Spectrum, Values

Ranks = tuple[int, ...]
Refuses = Callable[[Any], str]
Layers = Mapping[Any, type[Factorized]]  # by type, or by qualified name


class Bases:
    """The bases that factors of given ranks are made of, for methods that know them from their analysis.

    ``of(ranks)`` computes them from what the analysis left, such as a Gram matrix; :meth:`keep` releases that.
    """

    def __init__(self, of: Callable[[Ranks], Sequence[Tensor]]) -> None:
        self._of: Callable[[Ranks], Sequence[Tensor]] | None = of
        self._kept: Sequence[Tensor] = ()

    def keep(self, ranks: Ranks = ()) -> None:
        """Compute the bases at these ranks, and release everything else; without ranks release all."""
        if self._of is not None and ranks:
            self._kept = [basis.clone() for basis in self._of(ranks)]  # views would hold all columns
        self._of = None

    def __call__(self, ranks: Ranks) -> Sequence[Tensor]:
        """The bases at these ranks; empty if only smaller ones were kept, or none."""
        if self._of is not None:
            return self._of(ranks)
        wide = all(rank <= basis.shape[-1] for rank, basis in zip(ranks, self._kept, strict=False))
        return [basis[..., :rank] for rank, basis in zip(ranks, self._kept, strict=False)] if wide else ()


@dataclass(frozen=True)
class Analysis:
    """Errors of one weight at all ranks.

    ``energy`` is ||W||^2 over all groups. ``ranks`` (n, modes) are those that rules and budgets choose from, and
    ``squared_errors()`` returns ||W - W'||^2 at each of them, interpolated for methods that are fitted.
    ``squared_error(ranks)`` is the exact value at one. ``spectra`` holds one spectrum per rank, or none.
    ``bases`` are what ``Method.factors`` takes as ``bases=``, for the same weight. ``factors(kernels, ranks)``
    returns factors that were fitted already, or None; ``note(ranks)`` is a note on the fit for the user.
    """

    energy: float
    ranks: NDArray[np.int32]
    squared_errors: Callable[[], Values]
    squared_error: Callable[[Ranks], float]
    spectra: tuple[Spectrum, ...] = ()
    bases: Bases | None = None
    factors: Callable[[Tensor, Ranks], Any] | None = None
    note: Callable[[Ranks], str] = lambda ranks: ""

    @classmethod
    def of_table(cls, spectra: tuple[Spectrum, ...], table: Values, bases: Bases | None = None) -> "Analysis":
        """From the squared errors at ranks 0 to limit of every mode: ``table[r1, r2, ...]``."""
        limits = tuple(length - 1 for length in table.shape)
        ranks = np.indices(limits, np.int32).reshape(len(limits), -1).T + 1
        inner = table[(slice(1, None),) * table.ndim].ravel()
        energy = float(table[(0,) * table.ndim])
        return cls(
            energy, ranks.astype(np.int32), lambda: inner, lambda ranks: float(table[ranks]), spectra, bases
        )

    def error(self, ranks: Ranks) -> float:
        """Return the relative error of the weight, ||W - W'|| / ||W||, at these ranks."""
        return sqrt(max(self.squared_error(ranks), 0.0) / self.energy) if self.energy else 0.0


def detached_kernels(module: nn.Module) -> Tensor:
    """The weight of a layer as kernels (groups, T, S, *kernel), without a gradient."""
    return group_kernels(module).detach()


@dataclass(frozen=True)
class Method:
    """A decomposition: the functions that decompose kernels (groups, T, S, *kernel), and the layers that run it.

    ``rank_names`` name the ranks, of which a layer may have only the first ones. ``limits(kernels)`` are the
    largest ranks, ``analyse(kernels)`` the errors at all ranks, and ``factors(kernels, ranks)`` the factors
    for ``from_factors`` of the layer, with ``bases=`` of the analysis where that has bases. ``layers`` maps
    the exact type of a dense layer, or its qualified name, to its factorized layer; ``refuses(module)``
    returns the reason why a layer of one of these types is not supported, or an empty string. ``preset`` are
    default ranks, of which an int sets only those that are None. ``out_rank`` is the index of the rank of the
    output mode, if that mode can be projected on a basis U first and the rest of the decomposition applied to
    U^T K. ``closed_form`` methods know their error at all ranks from one decomposition; the others are fitted
    at each. ``kernels(module)`` is what the functions are given, for layers with more than one weight. Layers
    that are not ``affine`` have no least-squares fit of their outputs.
    """

    name: str
    rank_names: tuple[str, ...]
    layers: Layers
    refuses: Callable[[Any], str]
    limits: Callable[[Tensor], Ranks]
    analyse: Callable[[Tensor], Analysis]
    factors: Callable[..., Any]
    preset: tuple[int | None, ...] = ()
    out_rank: int | None = None
    closed_form: bool = True
    kernels: Callable[[Any], Any] = detached_kernels
    affine: bool = True

    def layer_of(self, module: nn.Module) -> type[Factorized] | None:
        """The type of the factorized layer for this layer, or None."""
        kind = kind_of(module)
        return self.layers.get(kind) or self.layers.get(qualified_name(kind))

    def why_not(self, module: nn.Module) -> str:
        """The reason why this method does not support a layer; an empty string if it does."""
        if self.layer_of(module) is None:
            return f"{self.name} is not for {type(module).__name__}"
        return self.refuses(module)


def spatial(name: str) -> Refuses:
    """A condition: spatial convolutions only, because a 1x1 kernel is a matrix."""

    def refuses(module: Any) -> str:
        if set(module.kernel_size) != {1}:
            return ""
        return f"{name} is for spatial kernels, this is a matrix"

    return refuses


def needs_two_axes(name: str, *, more: bool = False) -> Refuses:
    """A condition: kernels longer than 1 along exactly two spatial axes, or with ``more`` along at least two."""

    def refuses(module: Any) -> str:
        long = len(spatial_steps(module.kernel_size)) if set(module.kernel_size) != {1} else 0
        if long == 2 or (more and long > 2):
            return ""
        return (
            f"{name} is for kernels longer than 1 along {'at least ' if more else ''}two axes, this one has {long}"
        )

    return refuses

"""The protocol of rank rules: functions from the spectra, costs and errors of a layer to its ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Ranks = tuple[int, ...]


class SpectrumLike(Protocol):
    """Singular values of one unfolding: ``values`` is (groups, n) of a rows x columns matrix per group."""

    @property
    def values(self) -> Values: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...


class GridLike(Protocol):
    """Costs and errors at many ranks: row i of every array belongs to ``ranks[i]``, of shape (n, modes)."""

    @property
    def ranks(self) -> NDArray[Any]: ...
    @property
    def params_share(self) -> Values: ...
    @property
    def macs_share(self) -> Values: ...
    @property
    def error(self) -> Values: ...
    @property
    def pays(self) -> NDArray[np.bool_]: ...


class CandidateLike(Protocol):
    """The attributes of a layer under one method that a rule can use."""

    @property
    def spectra(self) -> tuple[Any, ...]: ...
    @property
    def output_spectra(self) -> tuple[Any, ...]: ...
    @property
    def limits(self) -> Ranks: ...
    @property
    def grid(self) -> GridLike: ...
    def error(self, ranks: Ranks) -> float: ...
    def params_share(self, ranks: Ranks) -> float: ...
    def macs_share(self, ranks: Ranks) -> float: ...


class Rule(Protocol):
    """A rank rule: a function from a candidate to its ranks, one per mode.

    A rank of 0 means that the layer stays dense, and ``nothing`` is the reason in the plan. A rule with
    ``reads_spectra`` is applied to the Tucker-2 of a layer if the method of the layer has no spectra.
    """

    @property
    def reads_spectra(self) -> bool: ...
    @property
    def nothing(self) -> str: ...
    def __call__(self, candidate: CandidateLike, /) -> Ranks: ...


@dataclass(frozen=True)
class FunctionRule:
    """A user's function as a rule.

    >>> FunctionRule(lambda candidate: (4,))(None)
    (4,)
    """

    function: Callable[[Any], Ranks]
    reads_spectra: ClassVar[bool] = False

    @property
    def nothing(self) -> str:
        return f"{self!r} returned rank 0"

    def __call__(self, candidate: CandidateLike, /) -> Ranks:
        return self.function(candidate)

    def __repr__(self) -> str:
        return repr(self.function)


def require_share(name: str, share: float, *, upper_included: bool = False) -> None:
    """Check that a value is a share.

    Raises:
        ValueError: ``share`` is not in (0, 1), or in (0, 1] where 1 is included.
    """
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if not number or not (0 < share < 1 or (upper_included and share == 1)):
        allowed = f"(0, 1{']' if upper_included else ')'}"
        raise ValueError(f"{name}({share!r}): a share in {allowed} is needed, e.g. {name}(0.5)")

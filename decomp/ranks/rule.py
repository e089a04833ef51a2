"""What a rank rule is: a function from what is known of one layer to its ranks."""

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
    """Many ranks at once: row i of every array is about ``ranks[i]``, of shape (n, modes)."""

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
    """One layer under one method: what a rule may ask about it."""

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
    """A rank rule: from what is known of a layer to its ranks, one per spectrum.

    A rank of 0 says that nothing of the weight is worth keeping, and ``nothing`` is the reason that the plan gives
    then. A rule that ``reads_spectra`` is asked about the Tucker-2 of a layer whose own method has no spectra.
    """

    @property
    def reads_spectra(self) -> bool: ...
    @property
    def nothing(self) -> str: ...
    def __call__(self, candidate: CandidateLike, /) -> Ranks: ...


@dataclass(frozen=True)
class FunctionRule:
    """A function of the user's as a rule.

    >>> FunctionRule(lambda candidate: (4,))(None)
    (4,)
    """

    function: Callable[[Any], Ranks]
    reads_spectra: ClassVar[bool] = False

    @property
    def nothing(self) -> str:
        return f"{self!r} keeps nothing of it"

    def __call__(self, candidate: CandidateLike, /) -> Ranks:
        return self.function(candidate)

    def __repr__(self) -> str:
        return repr(self.function)


def require_share(name: str, share: float, *, upper_included: bool = False) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: ``share`` is not in (0, 1), or in (0, 1] where 1 is included.
    """
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if not number or not (0 < share < 1 or (upper_included and share == 1)):
        allowed = f"(0, 1{']' if upper_included else ')'}"
        raise ValueError(f"{name}({share!r}): a share in {allowed} is needed, e.g. {name}(0.5)")

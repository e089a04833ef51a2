"""Analysis of methods whose error is known only after a fit: a few fits, and interpolation between them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from decomp._util.io import fingerprint
from decomp.linalg import Values, as_float64
from decomp.methods.record import Analysis, Ranks

KNOTS = 5


class Fit(NamedTuple):
    """Factors, their squared error ||W - W'||^2, and a note for the user."""

    factors: Any
    squared_error: float
    note: str = ""


def fitted_analysis(kernels: Tensor, path: Sequence[Ranks], fit: Callable[[Tensor, Ranks], Fit]) -> Analysis:
    """Analysis along ``path``, ranks of growing cost; fits are computed on demand."""
    fits = _Fits(kernels, path, fit)
    energy = float(as_float64(kernels).square().sum())
    return Analysis(
        energy,
        np.array(path, np.int32),
        fits.curve,
        lambda ranks: fits(ranks).squared_error,
        factors=fits.factors,
        note=lambda ranks: fits(ranks).note,
    )


class Unchanged:
    """A weight that is read later; calling this returns it.

    Raises:
        ValueError: on call, if the weight has changed since.
    """

    def __init__(self, kernels: Tensor) -> None:
        self._kernels, self.fingerprint = kernels, fingerprint(kernels)

    def __call__(self) -> Tensor:
        if fingerprint(self._kernels) != self.fingerprint:
            raise ValueError("the weight has changed since the plan was made: make a new plan")
        return self._kernels


class _Fits:
    """Fits of one weight, with a cache of all errors and of the factors of the last fit."""

    def __init__(self, kernels: Tensor, path: Sequence[Ranks], fit: Callable[[Tensor, Ranks], Fit]) -> None:
        self._kernels = Unchanged(kernels)
        self._places = {ranks: place for place, ranks in enumerate(path)}
        self._fit = fit
        self._errors: dict[Ranks, float] = {}
        self._last: tuple[Ranks, Fit] | None = None

    def __call__(self, ranks: Ranks) -> Fit:
        kernels = self._kernels()
        if self._last is None or self._last[0] != ranks:
            self._last = (ranks, self._fit(kernels, ranks))
            self._errors[ranks] = self._last[1].squared_error
        return self._last[1]

    def factors(self, kernels: Tensor, ranks: Ranks) -> Any:
        """The factors of the last fit if it was of these kernels and ranks, else None."""
        if self._last is None or self._last[0] != ranks or fingerprint(kernels) != self._kernels.fingerprint:
            return None
        return self._last[1].factors

    def curve(self) -> Values:
        """Squared errors along the path: a few fits, and between them errors linear in the log of the index."""
        last = len(self._places) - 1
        path = list(self._places)
        for place in np.unique(np.geomspace(1, last + 1, KNOTS).round().astype(int) - 1):
            if path[place] not in self._errors:
                self(path[place])
        known = sorted(
            (self._places[ranks], error) for ranks, error in self._errors.items() if ranks in self._places
        )
        places, errors = (np.array(column, np.float64) for column in zip(*known, strict=True))
        # The error must not rise with the rank: the error of a worse fit is replaced by that of a lower rank.
        roots = np.sqrt(np.minimum.accumulate(np.maximum(errors, 0)))
        return np.asarray(np.interp(np.log1p(np.arange(last + 1)), np.log1p(places), roots) ** 2, np.float64)

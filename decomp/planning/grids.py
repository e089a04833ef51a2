"""Many ranks of one layer side by side: what they cost, and how far they are from the dense layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from decomp.planning.allocation import Front


@dataclass(frozen=True)
class Grid:
    """Many ranks of a candidate at once: row i of every array is about ``ranks[i]``, of shape (n, modes)."""

    ranks: NDArray[np.int32]
    params: NDArray[np.int64]
    macs: NDArray[np.int64]
    params_share: NDArray[np.float64]
    macs_share: NDArray[np.float64]
    error: NDArray[np.float64]

    @property
    def pays(self) -> NDArray[np.bool_]:
        """Where both costs are below the dense layer's, or parameters where that has no MACs."""
        return (self.params_share < 1) & (self.macs_share < 1)


def undominated(
    grid: Grid,
    costs: NDArray[np.float64],
    dense_cost: float,
    limits: Sequence[int],
    multiple_of: int,
    fixed: Sequence[bool],
) -> NDArray[np.int64]:
    """Rows that pay, cost less than the dense layer, and that no others beat in cost and error.

    Ranks are multiples of ``multiple_of``, or full, but for those that are ``fixed``.
    """
    allowed = grid.pays & (costs < dense_cost)
    for mode, limit in enumerate(limits):
        ranks = grid.ranks[:, mode]
        allowed &= (ranks % multiple_of == 0) | (ranks == limit) | fixed[mode]
    places = np.flatnonzero(allowed)
    return places[Front.of(costs[places], grid.error[places] ** 2).places] if len(places) else places

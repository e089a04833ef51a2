"""Many ranks of one layer side by side: what they cost, and how far they are from the dense layer."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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

"""What calibration saw of one layer."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """What calibration saw of one layer, in float64.

    ``inputs`` (groups, S, S) are second moments of the input channels and ``outputs`` (groups, T, T) those of the
    outputs without their bias; about the mean where the layer has a bias or feeds a BatchNorm (``normalization``),
    which then takes up the shift, about zero where there is neither. Either is None where it would be too large,
    or says nothing more than the other. ``means`` are mean inputs, one for each size that was seen, with how
    often it was seen. ``shrinkage`` in [0, 1] is how far both are moved towards the metric of the weight.
    ``row_metric`` (groups, T, T), or its diagonal (groups, T), is a root D of how errors of the outputs count,
    ||D dy||^2: by the gradient of a loss or of the network's output where there is one, else by the scale of the
    BatchNorm behind them. D is relative; ``importance`` is the scale that makes layers comparable, where there
    were gradients.
    """

    shape: tuple[int, ...]
    samples: int
    inputs: Tensor | None
    outputs: Tensor | None
    means: tuple[tuple[Tensor, int], ...]
    shrinkage: float
    row_metric: Tensor | None = None
    importance: float | None = None
    normalization: str = ""
    patches: Tensor | None = None

    def to(self, device: torch.device) -> "Moments":
        """The same moments on another device."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        means = tuple((mean.to(device), count) for mean, count in self.means)
        return replace(
            self,
            inputs=moved(self.inputs),
            outputs=moved(self.outputs),
            means=means,
            row_metric=moved(self.row_metric),
            patches=moved(self.patches),
        )

"""Least squares for the last factor of a layer and its bias, from moments that are summed batch by batch."""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from decomp.calibration.unfold import patches_like, rows_of
from decomp.layers import Factorized, group_kernels, join_kernels
from decomp.layers.kernels import is_input_first
from decomp.network.forward import hooked
from decomp.recovery.batch_norm_shift import Frame

RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)
LARGEST_PATCH = 4096
PATCH_ELEMENTS = 2**24

State = tuple[Tensor, Tensor | None]
"""A last factor (groups, T, patch) and its bias (groups, T), in float64."""


class OtherSize(Exception):
    """The layer gave an output of another size than its options alone would."""


class Refit:
    """The normal equations of y ~= A z + b for the last factor A of a layer, or for the weight of a dense one.

    ``z`` is what the factors before make of the layer's input. A k x k factor sees patches: those are what a
    convolution with unit kernels and all its options gives, so that no option needs code of its own. ``frame`` is
    what the BatchNorm behind the layer says of its targets; it has a bias for a layer without one.
    """

    def __init__(self, layer: nn.Module, frame: Frame | None = None) -> None:
        self._layer = layer
        self._last: Any = cast(Any, [*layer.children()][-1] if isinstance(layer, Factorized) else layer)
        self._weight = group_kernels(self._last).detach().to(torch.float64).flatten(2).clone()
        self._patches = patches_like(self._last)
        self.equations, self._held_out = NormalEquations(), NormalEquations()
        self.ridge = RIDGES[0]
        self._frame = frame
        self._bias: Tensor | None = None if frame is None else torch.zeros_like(self._weight[:, :, 0])
        if getattr(self._last, "bias", None) is not None:
            self._bias = self._last.bias.detach().to(torch.float64).reshape(self._weight.shape[:2]).clone()

    @property
    def fits(self) -> bool:
        """Whether the patches are small enough for normal equations."""
        return self._weight.shape[2] <= LARGEST_PATCH

    @property
    def axes(self) -> int:
        """How many spatial axes the layer has."""
        return len(getattr(self._last, "kernel_size", ()))

    @property
    def state(self) -> State:
        """What the last factor and its bias are now."""
        return self._weight, self._bias

    def add(self, received: Tensor, target: Tensor, *, held_out: bool) -> None:
        """Take in an input of the layer, and what its output should be."""
        if self.fits:
            for rows in self.rows(received, target if self._frame is None else self._frame.target(target)):
                (self._held_out if held_out else self.equations).add(*rows)

    def rows(self, received: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What reaches the last factor and what should come out, (groups, rows, channels), a part at a time.

        Raises:
            OtherSize: they are not of one size.
        """
        axes, groups = self.axes, len(self._weight)
        if received.is_floating_point():
            received = received.to(self._last.weight.dtype)
        if received.dim() == axes + 1:
            received, target = received[None], target[None]
        per_chunk = max(1, PATCH_ELEMENTS // max(1, target[0].numel() * self._weight.shape[2]))
        for x, y in zip(received.split(per_chunk), target.split(per_chunk), strict=True):
            x = self._reaching_last(x)
            z = x if self._patches is None else self._patches(x)
            rows = rows_of(z, axes, groups), rows_of(y, axes, groups)
            if rows[0].shape[1] != rows[1].shape[1]:
                raise OtherSize
            yield rows

    def _reaching_last(self, received: Tensor) -> Tensor:
        seen: list[Tensor] = []
        with hooked(before=[(self._last, lambda module, args, kwargs: seen.append(args[0]))]):
            self._layer(received)
        return seen[0]

    def error(self) -> float:
        """Relative error of the layer's output as it is, on the batches held out (on all where none was)."""
        return self._judge.error(*self.state)

    @property
    def _judge(self) -> "NormalEquations":
        return self._held_out if self._held_out.count else self.equations

    @property
    def holds_out(self) -> bool:
        """Whether there is data that is measured on alone."""
        return self._held_out.count > 0

    @torch.no_grad()
    def apply(self) -> float:
        """Put the best of a few ridges into the layer, or leave it; return the relative error that is left."""
        best = self.error()
        if not self.fits or not self.equations.count:
            return best
        found = None
        for ridge in RIDGES:
            weight, bias = self.equations.solve(self._weight, ridge, centred=self._bias is not None)
            error = self._judge.error(weight, bias)
            if math.isfinite(error) and error < best:
                best, found, self.ridge = error, (weight, bias), ridge
        if found is not None:
            self.put(found)
        return best

    def put(self, state: State) -> None:
        """Make these the last factor of the layer, and its bias."""
        weight, bias = state
        last: Any = self._last
        kernels = weight.reshape(group_kernels(last).shape)
        last.weight.copy_(join_kernels(kernels, input_first=is_input_first(last)))
        if last.bias is not None and bias is not None:
            last.bias.copy_(bias.flatten())
        elif self._frame is not None and bias is not None:
            self._frame.take(bias)
        self._weight, self._bias = weight, bias


class NormalEquations:
    """Sums over rows z and y of a group: counts, means and products."""

    def __init__(self) -> None:
        self.count = 0
        self._zz: Any = 0.0
        self._yz: Any = 0.0
        self._z: Any = 0.0
        self._y: Any = 0.0
        self._yy: Any = 0.0

    def add(self, z: Tensor, y: Tensor) -> None:
        """Take in rows (groups, n, inputs) and (groups, n, outputs)."""
        self._zz, self._z = self._zz + z.mT @ z, self._z + z.sum(1)
        self.count += z.shape[1]
        self.aim(z, y)

    def aim(self, z: Tensor, y: Tensor) -> None:
        """Take in targets of rows whose inputs are known."""
        self._yz, self._y = self._yz + y.mT @ z, self._y + y.sum(1)
        self._yy = self._yy + y.square().sum((1, 2))

    def aimless(self) -> "NormalEquations":
        """The same inputs, with no targets yet."""
        new = NormalEquations()
        new._zz, new._z, new.count = self._zz, self._z, self.count
        return new

    def solve(self, weight: Tensor, ridge: float, *, centred: bool) -> tuple[Tensor, Tensor | None]:
        """A = (S_yz + rho A_0) (S_zz + rho I)^-1, b = mean(y) - A mean(z)."""
        zz, yz = self._zz / self.count, self._yz / self.count
        z, y = self._z / self.count, self._y / self.count
        if centred:
            zz, yz = zz - z[:, :, None] * z[:, None], yz - y[:, :, None] * z[:, None]
        identity = torch.eye(zz.shape[1], dtype=zz.dtype, device=zz.device)
        mean = zz.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(zz.dtype).tiny)
        rho = ridge * mean[:, None, None]
        solved = torch.linalg.solve(zz + rho * identity, (yz + rho * weight).mT).mT
        return solved, y - torch.einsum("gtz,gz->gt", solved, z) if centred else None

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """sqrt(sum ||y - A z - b||^2 / sum ||y||^2), from the sums alone."""
        if not self.count:
            return math.nan
        lost = self._yy.sum() - 2 * (weight * self._yz).sum() + ((weight @ self._zz) * weight).sum()
        if bias is not None:
            shift = torch.einsum("gtz,gz->gt", weight, self._z) - self._y
            lost = lost + 2 * (bias * shift).sum() + self.count * bias.square().sum()
        energy = float(self._yy.sum())
        return math.sqrt(max(float(lost), 0.0) / energy) if energy else 0.0

"""Least squares for the last factor of a layer and its bias, from normal equations summed batch by batch."""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from decomp.calibration.moments import Products
from decomp.calibration.sampling import Sampling, stratified
from decomp.calibration.unfold import Patches, count_rows, some_rows
from decomp.data.batches import unpadded
from decomp.layers import Factorized, group_kernels, join_kernels
from decomp.layers.kernels import is_input_first
from decomp.network.forward import hooked
from decomp.recovery.batch_norm_shift import BatchNormShift

RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)
LARGEST_NORMAL_EQUATIONS = 4096  # columns: 134 MB in float64
EQUATION_CHUNK_ELEMENTS = 2**24

State = tuple[Tensor, Tensor | None]
"""A last factor (groups, T, patch) and its bias (groups, T), in float64."""


class OutputSizeMismatch(Exception):
    """The output has another spatial size than the options of the layer imply: it was called with output_size."""


class Refit:
    """The normal equations of y ~= A z + b for the last factor A of a layer, or for the weight of a dense one.

    z is the input of the last factor: the output of the factors before it, unfolded to patches for a k x k factor.
    With ``norm_shift`` the targets are those for the BatchNorm after the layer, which also stands in for a missing
    bias. The rows are a sample of the positions of each batch, the same in every pass.
    """

    def __init__(
        self, layer: nn.Module, norm_shift: BatchNormShift | None = None, sampling: Sampling | None = None
    ) -> None:
        self._layer = layer
        self._last: Any = cast(Any, [*layer.children()][-1] if isinstance(layer, Factorized) else layer)
        self._weight = group_kernels(self._last).detach().to(torch.float64).flatten(2).clone()
        self._patches = Patches(self._last) if self.axes else None
        self._rows_per_batch = (sampling or Sampling("all")).share(self._weight.shape[2])
        self.equations, self._held_out = NormalEquations(), NormalEquations()
        self.ridge = RIDGES[0]
        self._norm_shift = norm_shift
        self._bias: Tensor | None = None if norm_shift is None else torch.zeros_like(self._weight[:, :, 0])
        if getattr(self._last, "bias", None) is not None:
            self._bias = self._last.bias.detach().to(torch.float64).reshape(self._weight.shape[:2]).clone()

    @property
    def is_solvable(self) -> bool:
        """Whether the patches are small enough for normal equations."""
        return self._weight.shape[2] <= LARGEST_NORMAL_EQUATIONS

    def patch_moments(self, *, centred: bool) -> Tensor | None:
        """Second moments of the rows z of a spatial layer, from the sums of the equations; None without them."""
        if not self.equations.count + self._held_out.count:
            return None
        return self.equations.moments_with(self._held_out, centred=centred)

    @property
    def axes(self) -> int:
        """The number of spatial axes of the layer."""
        return len(getattr(self._last, "kernel_size", ()))

    @property
    def state(self) -> State:
        """The current last factor and its bias."""
        return self._weight, self._bias

    def add(
        self, received: Tensor, target: Tensor, *, held_out: bool, batch: int = 0, mask: Tensor | None = None
    ) -> None:
        """Accumulate an input of the layer and the output that it should have."""
        if self.is_solvable:
            for z, y in self.rows(received, target, batch, mask):
                y = y if self._norm_shift is None else self._norm_shift.target_rows(y)
                (self._held_out if held_out else self.equations).add(z, y)

    def rows(
        self, received: Tensor, target: Tensor, batch: int = 0, mask: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows z of the last factor's input and rows y of its targets, (groups, rows, channels), in chunks.

        Raises:
            OutputSizeMismatch: z and y have different numbers of rows.
        """
        axes, groups = self.axes, len(self._weight)
        if received.is_floating_point():
            received = received.to(self._last.weight.dtype)
        if not axes:
            received = unpadded(received, mask, dims=3 if received.is_floating_point() else 2)
            target = unpadded(target, mask)
            if not target.numel():
                return  # nothing but padding
        elif received.dim() == axes + 1:
            received, target = received[None], target[None]
        total = count_rows(target, axes)
        wanted = self._rows_per_batch
        indices = None if wanted >= total else stratified(total, max(1, math.ceil(wanted)), seed=batch)
        if indices is None:
            per_chunk = max(1, EQUATION_CHUNK_ELEMENTS // max(1, target[0].numel() * self._weight.shape[2]))
            chunks: Any = zip(received.split(per_chunk), target.split(per_chunk), strict=True)
        else:
            chunks = iter([(received, target)])
        for x, y in chunks:
            x = self._input_of_last(x)
            if count_rows(y, axes) != (count_rows(x, 0) if self._patches is None else self._patches.count(x)):
                raise OutputSizeMismatch
            for part in [None] if indices is None else indices.split(self._rows_per_chunk):
                z = some_rows(x, 0, groups, part) if self._patches is None else self._patches.rows(x, part)
                yield z.to(torch.float64), some_rows(y, axes, groups, part).to(torch.float64)

    @property
    def _rows_per_chunk(self) -> int:
        return max(1, EQUATION_CHUNK_ELEMENTS // self._weight.shape[2])

    def _input_of_last(self, received: Tensor) -> Tensor:
        inputs: list[Tensor] = []
        with hooked(before=[(self._last, lambda module, args, kwargs: inputs.append(args[0]))]):
            self._layer(received)
        return inputs[0]

    def error(self) -> float:
        """Relative error of the output now, on held-out batches, or on all if there are none."""
        return self._validation.error(*self.state)

    @property
    def _validation(self) -> "NormalEquations":
        return self._held_out if self._held_out.count else self.equations

    @property
    def has_held_out(self) -> bool:
        """Whether some batches are held out of the fit."""
        return self._held_out.count > 0

    @property
    def unknowns(self) -> int:
        """How many unknowns each output has: the inputs of the last factor, and the constant."""
        return self._weight.shape[2] + (self._bias is not None)

    @torch.no_grad()
    def apply(self) -> float:
        """Solve with a few ridges, set the best solution if it lowers the error; return the relative error."""
        best = self.error()
        if not self.is_solvable or not self.equations.count:
            return best
        best_state = None
        for ridge in RIDGES:
            weight, bias = self.equations.solve(self._weight, ridge, centred=self._bias is not None)
            error = self._validation.error(weight, bias)
            if math.isfinite(error) and error < best:
                best, best_state, self.ridge = error, (weight, bias), ridge
        if best_state is not None:
            self.set_state(best_state)
        return best

    def set_state(self, state: State) -> None:
        """Copy a last factor and its bias into the layer; without a bias, into the BatchNorm that follows."""
        weight, bias = state
        last: Any = self._last
        kernels = weight.reshape(group_kernels(last).shape)
        last.weight.copy_(join_kernels(kernels, input_first=is_input_first(last)))
        if last.bias is not None and bias is not None:
            last.bias.copy_(bias.flatten())
        elif self._norm_shift is not None and bias is not None:
            self._norm_shift.absorb(bias)
        self._weight, self._bias = weight, bias


class NormalEquations:
    """Sums over rows z and targets y per group: S_zz, S_yz, z, y, ||y||^2 and the number of rows."""

    def __init__(self) -> None:
        self.count = 0
        self._zz, self._yz = Products(), Products()
        self._z: Any = 0.0
        self._y: Any = 0.0
        self._yy: Any = 0.0

    def add(self, z: Tensor, y: Tensor) -> None:
        """Accumulate rows z (groups, n, inputs) and their targets y (groups, n, outputs)."""
        self._zz.add(z)
        self._z = self._z + z.sum(1)
        self.count += z.shape[1]
        self.add_targets(z, y)

    def add_targets(self, z: Tensor, y: Tensor) -> None:
        """Accumulate targets y of rows z that are in the sums over the inputs already."""
        self._yz.add(y, z)
        self._y = self._y + y.sum(1)
        self._yy = self._yy + y.square().sum((1, 2))

    def without_targets(self) -> "NormalEquations":
        """A copy with the sums over the inputs alone."""
        new = NormalEquations()
        new._zz, new._z, new.count = self._zz, self._z, self.count
        return new

    def moments_with(self, other: "NormalEquations", *, centred: bool) -> Tensor:
        """Second moments of the inputs of both, about their mean or about zero."""
        count = self.count + other.count
        mean = (self._z + other._z) / count
        second: Tensor = (self._zz.total + other._zz.total) / count
        return second - mean[:, :, None] * mean[:, None] if centred else second

    def solve(self, weight: Tensor, ridge: float, *, centred: bool) -> tuple[Tensor, Tensor | None]:
        """A = (S_yz + rho A_0) (S_zz + rho I)^-1, b = mean(y) - A mean(z)."""
        zz, yz = self._zz.total / self.count, self._yz.total / self.count
        z, y = self._z / self.count, self._y / self.count
        if centred:
            zz, yz = zz - z[:, :, None] * z[:, None], yz - y[:, :, None] * z[:, None]
        identity = torch.eye(zz.shape[1], dtype=zz.dtype, device=zz.device)
        mean = zz.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(zz.dtype).tiny)
        rho = ridge * mean[:, None, None]
        solved = _solve(zz + rho * identity, (yz + rho * weight).mT).mT
        return solved, y - torch.einsum("gtz,gz->gt", solved, z) if centred else None

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """sqrt(sum ||y - A z - b||^2 / sum ||y||^2), computed from the sums."""
        if not self.count:
            return math.nan
        squared = self._yy.sum() - 2 * (weight * self._yz.total).sum()
        squared = squared + ((weight @ self._zz.total) * weight).sum()
        if bias is not None:
            shift = torch.einsum("gtz,gz->gt", weight, self._z) - self._y
            squared = squared + 2 * (bias * shift).sum() + self.count * bias.square().sum()
        energy = float(self._yy.sum())
        return math.sqrt(max(float(squared), 0.0) / energy) if energy else 0.0


def _solve(symmetric: Tensor, right: Tensor) -> Tensor:
    """Solve with positive definite matrices, which are singular to rounding at worst."""
    factor, info = torch.linalg.cholesky_ex(symmetric)
    return torch.linalg.solve(symmetric, right) if bool(info.any()) else torch.cholesky_solve(right, factor)

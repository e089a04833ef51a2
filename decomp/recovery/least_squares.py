"""Least squares for the last factor of a layer and its bias, from normal equations summed batch by batch."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from decomp.calibration.moments import Products, RowSample
from decomp.calibration.sampling import Sampling, stratified
from decomp.calibration.unfold import Patches, count_rows, some_rows
from decomp.data.batches import BatchSplit, FitSplit, unpadded
from decomp.layers import Factorized, group_kernels, join_kernels
from decomp.layers.kernels import is_input_first
from decomp.network.forward import hooked
from decomp.recovery.batch_norm_shift import BatchNormShift

RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0)
RIDGES_FOR_SAMPLES = (*RIDGES, 10.0, 100.0, 1000.0)
LARGEST_NORMAL_EQUATIONS = 4096  # columns: 134 MB in float64
NONE_HELD_OUT = BatchSplit(None)
LARGEST_SAMPLE = 2048  # rows that more columns are fitted to: the equations have as many unknowns
SAMPLE_ELEMENTS = 2**26  # 268 MB in float32
EQUATION_CHUNK_ELEMENTS = 2**24

State = tuple[Tensor, Tensor | None]
"""A last factor (groups, T, patch) and its bias (groups, T), in float64."""

Candidate = tuple[float, Callable[[], State]]
"""An error, and what makes the state that has it."""


class OutputSizeMismatch(Exception):
    """The output has another spatial size than the options of the layer imply: it was called with output_size."""


def rows_to_fit(last: nn.Module, sampling: Sampling) -> float:
    """How many rows of all data the last factor of a layer, or the weight of a dense one, is fitted to."""
    columns = math.prod(group_kernels(last).shape[2:])
    return min(_most_rows(columns), sampling.to_fit(columns))


def rows_needed(last: nn.Module, sampling: Sampling) -> float:
    """How many rows the batches should have together that these are chosen from."""
    columns = math.prod(group_kernels(last).shape[2:])
    return min(_most_rows(columns), sampling.least(columns))


def _most_rows(columns: int) -> float:
    """Fitted and held-out ones, where there are too many columns for normal equations."""
    return 2.0 * _largest_sample(columns) if columns > LARGEST_NORMAL_EQUATIONS else math.inf


def _largest_sample(columns: int) -> int:
    """How many rows are fitted to where there are too many columns for normal equations."""
    return max(1, min(LARGEST_SAMPLE, SAMPLE_ELEMENTS // columns))


class Refit:
    """The normal equations of y ~= A z + b for the last factor A of a layer, or for the weight of a dense one.

    z is the input of the last factor: the output of the factors before it, unfolded to patches for a k x k factor.
    With ``norm_shift`` the targets are those for the BatchNorm after the layer, which also stands in for a missing
    bias. The rows are a sample of the positions of each batch, the same in every pass, which counts as all of
    them. Where z is too wide for its normal equations, they are solved for a sample of the rows
    (:class:`RowEquations`).
    """

    def __init__(
        self,
        layer: nn.Module,
        split: BatchSplit | FitSplit = NONE_HELD_OUT,
        norm_shift: BatchNormShift | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self._layer, self._split = layer, split
        self._last: Any = cast(Any, [*layer.children()][-1] if isinstance(layer, Factorized) else layer)
        self._weight = group_kernels(self._last).detach().to(torch.float64).flatten(2).clone()
        self._patches = Patches(self._last) if self.axes else None
        columns = self._weight.shape[2]
        self.is_wide = columns > LARGEST_NORMAL_EQUATIONS
        sampling = sampling or Sampling("all")
        most = _largest_sample(columns)
        self._rows, self._sampling = rows_to_fit(self._last, sampling), sampling
        self._wanted_of: dict[int, float] = {}
        self._taken = 0
        self.equations: NormalEquations | RowEquations = NormalEquations()
        self._held_out: NormalEquations | RowEquations = NormalEquations()
        if self.is_wide:
            self.equations, self._held_out = RowEquations(most), RowEquations(max(1, most // 4))
        self.ridge = RIDGES[0]
        self._norm_shift = norm_shift
        self._bias: Tensor | None = None if norm_shift is None else torch.zeros_like(self._weight[:, :, 0])
        if getattr(self._last, "bias", None) is not None:
            self._bias = self._last.bias.detach().to(torch.float64).reshape(self._weight.shape[:2]).clone()
        self._given = self._weight

    def patch_moments(self) -> Tensor | None:
        """Second moments of the rows z of a spatial layer, from the sums of the equations; None without them.

        They are about the mean where a bias, or the BatchNorm that follows, absorbs a constant shift.
        """
        if not isinstance(self.equations, NormalEquations) or not self.equations.count:
            return None
        return self.equations.input_moments(centred=self._bias is not None)

    @property
    def axes(self) -> int:
        """The number of spatial axes of the layer."""
        return len(getattr(self._last, "kernel_size", ()))

    @property
    def state(self) -> State:
        """The current last factor and its bias."""
        return self._weight, self._bias

    def add(self, received: Tensor, target: Tensor, *, batch: int = 0, mask: Tensor | None = None) -> None:
        """Accumulate an input of the layer and the output that it should have."""
        for z, y, weight, held_out in self.rows(received, target, batch, mask):
            y = y if self._norm_shift is None else self._norm_shift.target_rows(y)
            (self._held_out if held_out else self.equations).add(z, y, weight)

    def rows(
        self, received: Tensor, target: Tensor, batch: int = 0, mask: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor, float, bool]]:
        """Rows z of the last factor's input and rows y of its targets, (groups, rows, channels), in chunks.

        Each chunk comes with the weight of its rows, and whether they are held out.

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
        first = self._split.fitted_rows(batch, total, len(target))
        wanted = self._wanted(batch, total)
        if wanted >= total and first in (0, total):
            per_chunk = max(1, EQUATION_CHUNK_ELEMENTS // max(1, target[0].numel() * self._weight.shape[2]))
            for x, y in zip(received.split(per_chunk), target.split(per_chunk), strict=True):
                x = self._checked_input(x, y)
                z = some_rows(x, 0, groups, None) if self._patches is None else self._patches.rows(x, None)
                yield z.to(torch.float64), some_rows(y, axes, groups, None).to(torch.float64), 1.0, first == 0
            return
        x = self._checked_input(received, target)
        for begin, end, held_out in ((0, first, False), (first, total, True)):
            here = end - begin
            count = max(1, math.ceil(min(1.0, wanted / total) * here)) if here else 0
            indices = begin + (
                torch.arange(here, device="cpu") if count == here else stratified(here, count, batch)
            )
            for part in indices.split(self._rows_per_chunk) if count else ():
                z = some_rows(x, 0, groups, part) if self._patches is None else self._patches.rows(x, part)
                y = some_rows(target, axes, groups, part)
                yield z.to(torch.float64), y.to(torch.float64), here / count, held_out

    def _wanted(self, batch: int, total: int) -> float:
        """How many rows of a batch are used, in every pass: those that earlier ones lacked are made up for."""
        if batch not in self._wanted_of:
            self._wanted_of[batch] = self._sampling.wanted(self._rows, batch, self._taken)
            self._taken += int(min(total, self._wanted_of[batch]))
        return self._wanted_of[batch]

    @property
    def _rows_per_chunk(self) -> int:
        return max(1, EQUATION_CHUNK_ELEMENTS // self._weight.shape[2])

    def _input_of_last(self, received: Tensor) -> Tensor:
        if self._last is self._layer:
            return received
        inputs: list[Tensor] = []
        with hooked(before=[(self._last, lambda module, args, kwargs: inputs.append(args[0]))]):
            self._layer(received)
        return inputs[0]

    def _checked_input(self, received: Tensor, target: Tensor) -> Tensor:
        """The input of the last factor, which has as many rows as the target.

        Raises:
            OutputSizeMismatch: it has not.
        """
        x = self._input_of_last(received)
        if count_rows(target, self.axes) != (
            count_rows(x, 0) if self._patches is None else self._patches.count(x)
        ):
            raise OutputSizeMismatch
        return x

    def error(self) -> float:
        """Relative error of the output now, on held-out batches, or on all if there are none."""
        return self._validation.error(*self.state)

    @property
    def _validation(self) -> "NormalEquations | RowEquations":
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
        if not self.equations.count:
            return best
        best_state: Callable[[], State] | None = None
        ridges = RIDGES_FOR_SAMPLES if self.is_wide else RIDGES
        candidates = self.equations.candidates(
            self._weight, ridges, self._validation, centred=self._bias is not None
        )
        for ridge, (error, state) in zip(ridges, candidates, strict=True):
            if math.isfinite(error) and error < best:
                best, best_state, self.ridge = error, state, ridge
        if best_state is not None:
            self.set_state(best_state())
        return best

    @torch.no_grad()
    def use_held_out(self) -> bool:
        """Solve once more with the ridge that was chosen, for the held-out rows too; whether that was possible.

        Nothing is left to measure the solution on.
        """
        fitted, held_out = self.equations, self._held_out
        if not isinstance(fitted, NormalEquations) or not isinstance(held_out, NormalEquations):
            return False
        if not held_out.count or self._weight is self._given:
            return False
        both = fitted.joined(held_out)
        state = next(both.solutions(self._given, (self.ridge,), centred=self._bias is not None))
        if not bool(torch.isfinite(state[0]).all()):
            return False
        self.equations, self._held_out = both, NormalEquations()
        self.set_state(state)
        return True

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
    """Weighted sums over rows z and targets y per group: S_zz, S_yz, z, y, ||y||^2 and the number of rows.

    ``count`` is the sum of the weights, ``rows`` the number of rows that were added.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.rows = 0
        self._zz, self._yz = Products(), Products()
        self._z: Any = 0.0
        self._y: Any = 0.0
        self._yy: Any = 0.0

    def add(self, z: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Accumulate rows z (groups, n, inputs) and their targets y (groups, n, outputs), with one weight."""
        self._zz.add(z if weight == 1 else z * weight**0.5)
        self._z = self._z + weight * z.sum(1)
        self.count += weight * z.shape[1]
        self.rows += z.shape[1]
        self.add_targets(z, y, weight)

    def add_targets(self, z: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Accumulate targets y of rows z that are in the sums over the inputs already."""
        self._yz.add(y if weight == 1 else y * weight, z)
        self._y = self._y + weight * y.sum(1)
        self._yy = self._yy + weight * y.square().sum((1, 2))

    def without_targets(self) -> "NormalEquations":
        """A copy with the sums over the inputs alone."""
        new = NormalEquations()
        new._zz, new._z, new.count, new.rows = self._zz, self._z, self.count, self.rows
        return new

    def joined(self, other: "NormalEquations") -> "NormalEquations":
        """The sums of both."""
        new = NormalEquations()
        new._zz, new._yz = self._zz.joined(other._zz), self._yz.joined(other._yz)
        new._z, new._y, new._yy = self._z + other._z, self._y + other._y, self._yy + other._yy
        new.count, new.rows = self.count + other.count, self.rows + other.rows
        return new

    def input_moments(self, *, centred: bool) -> Tensor:
        """Second moments of the inputs, about their mean or about zero."""
        mean = self._z / self.count
        second: Tensor = self._zz.total / self.count
        return second - mean[:, :, None] * mean[:, None] if centred else second

    def candidates(
        self,
        weight: Tensor,
        ridges: Iterable[float],
        validation: "NormalEquations | RowEquations",
        *,
        centred: bool,
    ) -> Iterator[Candidate]:
        """The solutions for each ridge, with their errors on ``validation``."""
        for state in self.solutions(weight, ridges, centred=centred):
            yield validation.error(*state), partial(_same, state)

    def solutions(self, weight: Tensor, ridges: Iterable[float], *, centred: bool) -> Iterator[State]:
        """A = (S_yz + rho A_0) (S_zz + rho I)^-1, b = mean(y) - A mean(z), for each ridge."""
        zz, yz = self._zz.total / self.count, self._yz.total / self.count
        z, y = self._z / self.count, self._y / self.count
        if centred:
            zz, yz = zz - z[:, :, None] * z[:, None], yz - y[:, :, None] * z[:, None]
        identity = torch.eye(zz.shape[1], dtype=zz.dtype, device=zz.device)
        mean = zz.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(zz.dtype).tiny)
        for ridge in ridges:
            rho = ridge * mean[:, None, None]
            solved = _solve(zz + rho * identity, (yz + rho * weight).mT).mT
            yield solved, y - torch.einsum("gtz,gz->gt", solved, z) if centred else None

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


class RowEquations:
    """A sample of rows z and targets y, solved for the rows in place of the columns, which are more.

    With R = Y - Z A_0^T and K = Z Z^T, A = A_0 + R^T (K + n rho I)^-1 Z is the solution of the normal equations
    with the ridge rho towards A_0.
    """

    def __init__(self, most: int) -> None:
        self._chosen = RowSample(1, most)
        self._columns = 0

    @property
    def rows(self) -> int:
        """The number of rows in the sample."""
        return sum(part.shape[1] for part in self._chosen.parts)

    @property
    def count(self) -> float:
        """The number of rows in the sample."""
        return float(self.rows)

    def add(self, z: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Offer rows z (groups, n, inputs) and their targets y (groups, n, outputs) to the sample."""
        self._columns = z.shape[2]
        chosen = self._chosen.choose(0, z.shape[1]).to(z.device)
        self._chosen.add(torch.cat([z[:, chosen], y[:, chosen]], 2).to(torch.float32))

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The rows z and y of the sample, in float64."""
        rows = torch.cat(self._chosen.parts, 1)
        return rows[:, :, : self._columns].to(torch.float64), rows[:, :, self._columns :].to(torch.float64)

    def candidates(
        self,
        weight: Tensor,
        ridges: Iterable[float],
        validation: "NormalEquations | RowEquations",
        *,
        centred: bool,
    ) -> Iterator[Candidate]:
        """As those of :class:`NormalEquations`; A is made for the ridge that is taken alone.

        Rows Z_v, Y_v to validate on are lost by Y_v - Z_v A_0^T - Z_v Z^T (K + n rho I)^-1 R.
        """
        z, y = self.pairs()
        z_held, y_held = (z, y) if validation is self else cast(RowEquations, validation).pairs()
        energy = float(y_held.square().sum())
        mean_z, mean_y = z.mean(1, keepdim=True), y.mean(1, keepdim=True)
        if centred:
            z, y, z_held, y_held = z - mean_z, y - mean_y, z_held - mean_z, y_held - mean_y
        gram, missing = z @ z.mT, y - z @ weight.mT
        cross, missing_held = z_held @ z.mT, y_held - z_held @ weight.mT
        mean = gram.diagonal(dim1=1, dim2=2).sum(1) / z.shape[2]
        identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)

        def state(by_row: Tensor) -> State:
            solved = weight + by_row.mT @ z
            return solved, (mean_y - mean_z @ solved.mT)[:, 0] if centred else None

        for ridge in ridges:
            rho = (ridge * mean).clamp(min=torch.finfo(gram.dtype).tiny)[:, None, None]
            by_row = _solve(gram + rho * identity, missing)
            lost = float((missing_held - cross @ by_row).square().sum())
            yield math.sqrt(lost / energy) if energy else 0.0, partial(state, by_row)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """sqrt(sum ||y - A z - b||^2 / sum ||y||^2) over the sample."""
        if not self.rows:
            return math.nan
        z, y = self.pairs()
        lost = y - z @ weight.mT - (0.0 if bias is None else bias[:, None])
        energy = float(y.square().sum())
        return math.sqrt(float(lost.square().sum()) / energy) if energy else 0.0


def _same(state: State) -> State:
    return state


def _solve(symmetric: Tensor, right: Tensor) -> Tensor:
    """Solve with positive definite matrices; what is singular gives a solution that is not finite."""
    factor, info = torch.linalg.cholesky_ex(symmetric)
    if not bool(info.any()):
        return torch.cholesky_solve(right, factor)
    solution, singular = torch.linalg.solve_ex(symmetric, right)
    return torch.where(singular[..., None, None] == 0, solution, torch.nan)

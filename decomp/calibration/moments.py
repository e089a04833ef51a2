"""Moments of the inputs and outputs of one layer, from running sums whose memory does not grow with the data."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from decomp.calibration.sampling import Sampler, Sampling
from decomp.calibration.unfold import Patches, count_rows, rows_of_experts, some_rows
from decomp.data.batches import FitSplit, unpadded
from decomp.layers import group_kernels, routes_rows
from decomp.linalg import leading_eigenvectors, symmetric_power
from decomp.network.forward import norm_scale

LARGEST_MOMENTS = 4096  # channels: 134 MB in float64
LARGEST_VALIDATED_MOMENTS = 1024  # with more channels the shrinkage is that of the formula
LARGEST_PATCH_MOMENTS = 2304  # input channels of a group times kernel positions
MOMENT_CHUNK_ELEMENTS = 2**22
ROWS_PER_PRODUCT = 2048
MAX_INPUT_SIZES = 8
LARGEST_ROW_METRIC = 1536
SHARE_OF_ALL_EXPERTS = 0.01  # in the moments of each: data may hardly reach one
LEAST_WEIGHT = 0.02  # of an output whose gradient is zero, relative to the mean
ROUNDING = 1e-12
HELD_OUT_ROWS = 512
HELD_OUT_ELEMENTS = 2**21  # of the rows that a layer is judged on: 8 MB in float32
LEAST_HELD_OUT_ROWS = 16
SHRINKAGES = (0.01, 0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Moments:
    """Second moments of one layer's inputs and outputs on the calibration data, in float64.

    ``inputs`` (groups, S, S) is E[x x^T] over the input channels, ``outputs`` (groups, T, T) is E[y y^T] over the
    output channels without their bias, and ``patches`` (groups, S k^2, S k^2) is E[p p^T] over the unfolded inputs
    of a spatial convolution. They are central moments where the layer has a bias or a BatchNorm follows
    (``normalization``, its name), which absorbs a constant shift; else moments about zero. Each is None where it
    would be too large or is not needed.

    The rows that are held out (see :class:`decomp.data.batches.FitSplit`) are in none of them. Some are kept, as
    ``held_out`` (groups, rows, S k^2): rows that the kernel multiplies, of an embedding the indices (rows,), on
    which factors are judged. None where there are none.

    They are sums over a sample of ``positions`` out of ``of_positions`` (positions of images, tokens, rows), which
    is no sample where the two are equal. ``standard_error`` is the root mean square by which the moments then
    differ from those over all positions, ||C' - C|| relative to ||C||, for positions that are independent; a
    stratified sample of smooth images does better. All three are those of the largest moments.

    ``means`` holds one mean input per input size, with its number of samples, over all positions. ``shrinkage``
    in [0, 1] is the share rho of the shrinkage target in the shrunk moments, (1 - rho) C + rho target.
    ``row_metric`` D (groups, T, T), or its diagonal (groups, T), weights errors dy of the output as ||D dy||^2:
    by gradients of a loss or of the network's output where they were measured, else by the scale of the
    BatchNorm that follows. D is normalized per layer; ``importance`` is the factor that was divided out, None
    without gradients.
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
    positions: int = 0
    of_positions: int = 0
    standard_error: float = 0.0
    held_out: Tensor | None = None

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
            held_out=moved(self.held_out),
        )


class RowSample:
    """Some of the rows that are offered, evenly, in bounded memory."""

    def __init__(self, channels: int, most: int | None = None) -> None:
        self._most = most or max(LEAST_HELD_OUT_ROWS, min(HELD_OUT_ROWS, HELD_OUT_ELEMENTS // channels))
        self._step, self._seen = 1, 0
        self.parts: list[Tensor] = []

    def choose(self, first: int, total: int) -> Tensor:
        """Indices of the rows to add, out of those from ``first`` to ``total``."""
        self._seen += total - first
        while self._seen > self._step * self._most:
            self.parts = [part[:, ::2] for part in self.parts]
            self._step *= 2
        return torch.arange(first + self._step // 2, total, self._step, device="cpu")

    def add(self, rows: Tensor) -> None:
        """Add rows (groups, rows, channels)."""
        if rows.shape[1]:
            self.parts.append(rows.detach().clone())

    @property
    def rows(self) -> Tensor | None:
        """All rows (groups, rows, channels); None if there are none."""
        return torch.cat(self.parts, 1) if self.parts else None


class LayerSums:
    """Running sums over the inputs, outputs and gradients of one layer; rows that are held out of them apart.

    Args:
        name: of the layer.
        module: the layer.
        sampling: how many positions are summed over.
        split: which rows are held out; by default none.
        centred: whether a shift of the outputs will be absorbed even if the layer has no bias.
        patches: whether moments of patches are needed.
        judged: whether rows are kept to judge factors on.
    """

    def __init__(
        self,
        name: str,
        module: Any,
        sampling: Sampling | None = None,
        *,
        split: FitSplit | None = None,
        centred: bool = False,
        patches: bool = True,
        judged: bool = True,
    ) -> None:
        self.name, self.module = name, module
        self._split = split
        self._absorbs_shift = centred or getattr(module, "bias", None) is not None
        self.kernels = group_kernels(module).detach()
        groups, outputs, inputs = self.kernels.shape[:3]
        self._axes = len(getattr(module, "kernel_size", ()))
        self._taps = self.kernels[0, 0, 0].numel()
        spatial = self._taps > 1
        needs_inputs = inputs <= LARGEST_MOMENTS and (spatial or inputs <= outputs)
        needs_outputs = outputs <= LARGEST_MOMENTS and (spatial or outputs < inputs)
        if isinstance(module, nn.Embedding):
            needs_inputs, needs_outputs = False, True
        needs_patches = patches and spatial and inputs * self._taps <= LARGEST_PATCH_MOMENTS

        def sums(needed: bool, channels: int) -> MomentSums | None:
            return MomentSums(groups, channels, sampling) if needed else None

        self._inputs, self._outputs = sums(needs_inputs, inputs), sums(needs_outputs, outputs)
        self._patches = sums(needs_patches, inputs * self._taps)
        self._unfold = Patches(module) if spatial else None
        self._held_out = RowSample(inputs * self._taps) if judged and split is not None else None
        self._held_out_sampler = Sampler(sampling or Sampling("all"), inputs)
        self._means: dict[tuple[int, ...], tuple[Tensor, int]] = {}
        self._gradients: Any = None
        self._gradient_sampler = Sampler(sampling or Sampling("all"), outputs)
        self._experts: Any = torch.zeros(groups) if routes_rows(module) else None  # rows of each
        self.samples = 0
        self.normalization = ""
        self._norm_scale: Tensor | None = None

    @property
    def _centred(self) -> bool:
        return self._absorbs_shift or bool(self.normalization)

    def set_following_norm(self, name: str, norm: Any) -> None:
        """Record the BatchNorm after the layer, which scales by gamma / sigma and absorbs a constant shift."""
        self.normalization = name
        self._norm_scale = norm_scale(norm.running_var, norm.eps, norm.weight).abs()

    def add(
        self,
        received: Tensor,
        output: Tensor,
        *,
        batch: int,
        mask: Tensor | None = None,
        experts: Tensor | None = None,
    ) -> None:
        """Accumulate the input and the output of one call, where it has them without what ``mask`` leaves out.

        ``experts`` are those of the rows, where they route.
        """
        if experts is not None:
            if received.numel():
                self._add_routed(received, output, experts, batch)
            return
        is_embedding = isinstance(self.module, nn.Embedding)
        if not self._axes:
            received, output = unpadded(received, mask, dims=3 - is_embedding), unpadded(output, mask)
        if not received.numel():
            return
        groups = self.kernels.shape[0]
        if not is_embedding:
            received = received.reshape(-1, *received.shape[received.dim() - self._axes - 1 :])
            self._add_mean(received, batch)
            if self._inputs is not None:
                total = count_rows(received, self._axes)
                first = self._fitted(batch, total, len(received))
                indices, weight = self._inputs.sampler.draw(first, batch)
                rows = some_rows(received, self._axes, groups, _leading(indices, first, total))
                self._inputs.add(rows, weight=weight)
                if first < total:
                    indices, weight = self._held_out_sampler.draw(total - first, batch)
                    every = torch.arange(total - first, device="cpu")
                    indices = first + (every if indices is None else indices)
                    rows = some_rows(received, self._axes, groups, indices)
                    self._inputs.add(rows, weight=weight, held_out=True)
            self._add_patches(received, batch)
        self._add_held_out(received, batch)
        if self._outputs is not None:
            total = count_rows(output, self._axes)
            first = self._fitted(batch, total, len(received))
            indices, weight = self._outputs.sampler.draw(first, batch)
            rows = some_rows(output, self._axes, groups, _leading(indices, first, total))
            bias = getattr(self.module, "bias", None)
            if bias is not None:
                rows = rows - bias.detach().to(rows.dtype).reshape(groups, 1, -1)
            self._outputs.add(rows, weight=weight)
        self.samples += received.numel() if is_embedding else len(received)

    def _fitted(self, batch: int, rows: int, samples: int) -> int:
        """How many of the rows of a call, the first ones, are not held out."""
        return rows if self._split is None else self._split.fitted_rows(batch, rows, samples)

    def _add_routed(self, received: Tensor, output: Tensor, experts: Tensor, batch: int) -> None:
        groups = self.kernels.shape[0]
        first = self._fitted(batch, len(received), len(received))
        self.samples += len(received)
        if first < len(received):
            rows = rows_of_experts(received[first:], experts[first:], groups)
            if self._inputs is not None:
                self._inputs.add_padded(rows, len(received) - first, held_out=True)
            if self._held_out is not None:
                chosen = self._held_out.choose(first, len(received)).to(experts.device)
                self._held_out.add(rows_of_experts(received[chosen], experts[chosen], groups))
            received, output, experts = received[:first], output[:first], experts[:first]
        if not first:
            return
        self._experts = self._experts.to(experts.device) + torch.bincount(experts, minlength=groups)
        if self._inputs is not None:
            rows = rows_of_experts(received, experts, groups)
            self._inputs.add_padded(rows, first)
        if self._outputs is not None:
            self._outputs.add_padded(rows_of_experts(output, experts, groups), first)

    def _add_held_out(self, received: Tensor, batch: int) -> None:
        """Keep rows that are held out."""
        if self._held_out is None:
            return
        if isinstance(self.module, nn.Embedding):
            flat = received.reshape(1, -1, 1)
            first = self._fitted(batch, flat.shape[1], len(received))
            self._held_out.add(flat[:, self._held_out.choose(first, flat.shape[1]).to(flat.device)])
            return
        total = count_rows(received, self._axes) if self._unfold is None else self._unfold.count(received)
        first = self._fitted(batch, total, len(received))
        if first == total:
            return
        indices = self._held_out.choose(first, total)
        groups = self.kernels.shape[0]
        for part in indices.split(max(1, MOMENT_CHUNK_ELEMENTS // (received.shape[-self._axes - 1] * self._taps))):
            rows = (
                some_rows(received, self._axes, groups, part)
                if self._unfold is None
                else self._unfold.rows(received, part)
            )
            self._held_out.add(rows)

    def add_gradient(
        self, grad: Tensor, *, batch: int, mask: Tensor | None = None, experts: Tensor | None = None
    ) -> None:
        """Accumulate the gradient g by the output: g g^T, or only its diagonal g^2 for very many channels."""
        groups, outputs = self.kernels.shape[:2]
        if experts is None:
            if not self._axes:
                grad = unpadded(grad, mask)
            indices, weight = self._gradient_sampler.draw(count_rows(grad, self._axes), batch)
            rows = some_rows(grad, self._axes, groups, indices)
        else:
            rows, weight = rows_of_experts(grad, experts, groups), 1.0
        scale = float(rows.abs().max()) if rows.numel() else 0.0
        if not scale:
            rows, scale = torch.zeros_like(rows), 1.0
        rows = rows / scale  # squares of small gradients are too small for float32
        products = rows.mT @ rows if outputs <= LARGEST_ROW_METRIC else rows.square().sum(1)
        products = weight * scale**2 * products.to(torch.float64)
        self._gradients = products if self._gradients is None else self._gradients + products

    def _add_patches(self, received: Tensor, batch: int) -> None:
        if self._patches is None or self._unfold is None:
            return
        total = self._unfold.count(received)
        first = self._fitted(batch, total, len(received))
        indices, weight = self._patches.sampler.draw(first, batch)
        indices = _leading(indices, first, total)
        if indices is not None:
            per_chunk = max(1, MOMENT_CHUNK_ELEMENTS // max(1, received.shape[1] * self._taps))
            for part in indices.split(per_chunk):
                self._patches.add(self._unfold.rows(received, part), weight=weight)
            return
        each = received[0].numel() * self._taps
        for part in received.split(max(1, MOMENT_CHUNK_ELEMENTS // max(1, each))):
            self._patches.add(self._unfold.rows(part, None))

    def _add_mean(self, received: Tensor, batch: int) -> None:
        # The mean of one sample is over all of its positions.
        received = received[: self._fitted(batch, len(received), len(received))]
        size = tuple(received.shape[1:])
        if len(received) and (size in self._means or len(self._means) < MAX_INPUT_SIZES):
            total, count = self._means.get(size, (torch.zeros((), dtype=torch.float64, device=received.device), 0))
            self._means[size] = (total + received.sum(0, dtype=torch.float64), count + len(received))

    def moments(self, energy: float = 1.0) -> Moments:
        """The moments; central where a bias or a BatchNorm can absorb a constant shift.

        Squared gradients are divided by ``energy`` to get the importance of the layer.
        """
        centred = self._centred
        inputs = None if self._inputs is None else self._inputs.second(centred=centred)
        outputs = None if self._outputs is None else self._outputs.second(centred=centred)
        if self._experts is not None:
            inputs, outputs = self._with_all_experts(inputs, outputs)
        patches = (
            self._patches.second(centred=centred) if self._patches is not None and self._patches.count else None
        )
        means = tuple((total / count, count) for total, count in self._means.values())
        shape = tuple(self.module.weight.shape)
        largest = self._patches or self._inputs or self._outputs
        return Moments(
            shape,
            self.samples,
            inputs,
            outputs,
            means,
            self._shrinkage(centred),
            *self._row_metric(energy),
            self.normalization,
            patches,
            0 if largest is None else largest.sampler.taken if self._experts is None else self.samples,
            0 if largest is None else largest.sampler.seen if self._experts is None else self.samples,
            0.0 if largest is None else largest.standard_error(centred=centred),
            self._rows_to_judge(),
        )

    def _rows_to_judge(self) -> Tensor | None:
        rows = None if self._held_out is None else self._held_out.rows
        return rows.flatten() if rows is not None and isinstance(self.module, nn.Embedding) else rows

    def _with_all_experts(
        self, inputs: Tensor | None, outputs: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Mix into the moments of each expert those of all inputs, or the outputs that white inputs would give."""
        share = SHARE_OF_ALL_EXPERTS
        if inputs is not None:
            inputs = (1 - share) * inputs + share * inputs.mean(0)
        if outputs is not None:
            kernels = self.kernels.flatten(2).to(outputs)
            gram = kernels @ kernels.mT
            scale = outputs.diagonal(dim1=1, dim2=2).sum() / gram.diagonal(dim1=1, dim2=2).sum().clamp(min=1e-300)
            outputs = (1 - share) * outputs + share * scale * gram
        return inputs, outputs

    def _row_metric(self, energy: float) -> tuple[Tensor | None, float | None]:
        """The metric D of output errors or its diagonal, normalized to mean 1; the importance of the layer."""
        if self._gradients is None and self._norm_scale is None:
            return None, None
        squared = self._gradients
        if squared is None:
            squared = cast(Tensor, self._norm_scale).square().reshape(self.kernels.shape[:2])
        elif self._experts is not None:
            # The moments of an expert are sums over its rows divided by all rows: count the rows only once.
            share = self._experts / self._experts.sum().clamp(min=1)
            squared = squared / share.clamp(min=1e-6).to(squared).reshape(-1, *(1,) * (squared.dim() - 1))
        diagonal = squared if squared.dim() == 2 else squared.diagonal(dim1=1, dim2=2)
        scale = float(diagonal.mean())
        importance = None if self._gradients is None else scale / energy
        # No output gets weight 0: one with zero gradient here may matter on other data.
        metric = (1 - LEAST_WEIGHT) * squared / max(scale, 1e-300)
        if squared.dim() == 2:
            return (metric + LEAST_WEIGHT).sqrt(), importance
        identity = torch.eye(squared.shape[1], dtype=squared.dtype, device=squared.device)
        return symmetric_power(metric + LEAST_WEIGHT * identity, 0.5), importance

    def _shrinkage(self, centred: bool) -> float:
        """Chosen on the held-out batches; by :func:`oracle_shrinkage` without them, or with too many channels."""
        sums = self._inputs or self._outputs
        rows = self.samples if sums is None else min(self.samples, sums.sampler.taken or self.samples)
        formula = oracle_shrinkage(sums.second(centred=True), rows) if sums is not None else 0.0
        if self._inputs is None or not 1 < self.kernels.shape[2] <= LARGEST_VALIDATED_MOMENTS:
            return formula
        if not self._inputs.has(held_out=False) or not self._inputs.has(held_out=True):
            return formula
        train, held_out = (self._inputs.second(centred=centred, held_out=part) for part in (False, True))
        return chosen_shrinkage(self.kernels, train, held_out, formula)


def _leading(indices: Tensor | None, first: int, total: int) -> Tensor | None:
    """Indices below ``first``; of all of them where none are given, and None where that is all there is."""
    return torch.arange(first, device="cpu") if indices is None and first < total else indices


@torch.no_grad()
def moments_of(
    layer: nn.Module,
    received: Iterable[tuple[Tensor, int, Tensor | None]],
    calibrated: Moments | None,
    sampling: Sampling,
    split: FitSplit | None,
    *,
    centred: bool,
    patches: Tensor | None = None,
) -> Moments:
    """The moments of a layer over these inputs, without rows to judge on.

    Args:
        layer: the layer; its outputs are computed here.
        received: its inputs, each with the number of its batch and its mask.
        calibrated: earlier moments of the layer, of which the row metric and the importance are used again.
        sampling: how many positions are used.
        split: which rows are held out; None for none.
        centred: whether a shift of the outputs will be absorbed even if the layer has no bias.
        patches: the moments of the patches, where they are known already.
    """
    sums = LayerSums("", layer, sampling, split=split, centred=centred, patches=patches is None, judged=False)
    for given, batch, mask in received:
        sums.add(given, layer(given), batch=batch, mask=mask)
    moments = sums.moments()
    if patches is not None and patches.shape[1] <= LARGEST_PATCH_MOMENTS:
        moments = replace(moments, patches=patches)
    if calibrated is None:
        return moments
    metric = None if calibrated.row_metric is None else calibrated.row_metric.to(sums.kernels.device)
    return replace(moments, row_metric=metric, importance=calibrated.importance)


class Products:
    """The sum of x y^T over rows x and y, in float64; rows wait until there are enough for one product.

    Adding n x n numbers for the few rows of every batch would take longer than the products themselves.
    """

    def __init__(self) -> None:
        self._total: Any = None
        self._waiting: list[tuple[Tensor, Tensor | None]] = []
        self._rows = 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Accumulate x y^T, or x x^T, of rows (groups, rows, channels)."""
        self._waiting.append((x, y))
        self._rows += x.shape[1]
        if self._rows >= max(x.shape[2], ROWS_PER_PRODUCT):
            self._multiply()

    def _multiply(self) -> None:
        x = torch.cat([x for x, _ in self._waiting], 1)
        pairs = [y for _, y in self._waiting if y is not None]
        product = (x.mT @ (torch.cat(pairs, 1) if pairs else x)).to(torch.float64)
        self._total = product if self._total is None else self._total + product
        self._waiting, self._rows = [], 0

    def joined(self, other: "Products") -> "Products":
        """The sum over the rows of both."""
        new = Products()
        new._total = self.total + other.total
        return new

    @property
    def total(self) -> Any:
        """The sum over all rows; 0.0 if there are none."""
        if self._waiting:
            self._multiply()
        return 0.0 if self._total is None else self._total


class MomentSums:
    """Weighted sums of the rows x and of their outer products x x^T, per group, of held-out rows separately.

    Products are taken about the mean of the first rows, in the precision of the rows, and summed in float64: the
    moments about the mean then lose no digits where the mean is large.
    """

    def __init__(self, groups: int, channels: int, sampling: Sampling | None = None) -> None:
        self.sampler = Sampler(sampling or Sampling("all"), channels)
        self._shape = groups, channels
        self._origin: Any = None
        self._parts: dict[bool, tuple[float, Tensor]] = {}
        self._products = {held_out: Products() for held_out in (False, True)}
        # Sums of w (w - 1) and of w (w - 1) ||x||^4, about the origin and about zero: for the standard error.
        self._spread: Any = torch.zeros(3, dtype=torch.float64, device="cpu")

    def add(self, rows: Tensor, *, weight: float = 1.0, held_out: bool = False) -> None:
        """Accumulate rows (groups, rows, channels), each of which counts ``weight`` times."""
        if not rows.shape[1]:
            return
        if self._origin is None:
            self._origin = rows.mean(1, dtype=torch.float64).to(rows.dtype)
        moved = rows - self._origin[:, None].to(rows)
        self._accumulate(moved, weight * rows.shape[1], weight=weight, held_out=held_out)
        if weight != 1:
            fourth = [each.square().sum((0, 2)).to(torch.float64).square().sum() for each in (moved, rows)]
            ones = torch.full_like(fourth[0], rows.shape[1])
            self._spread = self._spread.to(rows.device) + weight * (weight - 1) * torch.stack([ones, *fourth])

    def add_padded(self, rows: Tensor, count: int, *, held_out: bool = False) -> None:
        """Accumulate rows (groups, rows, channels) of which some are zeros, and which stand for ``count`` rows."""
        self._origin = torch.zeros(self._shape, dtype=rows.dtype, device=rows.device)
        self._accumulate(rows, count, weight=1.0, held_out=held_out)

    def _accumulate(self, moved: Tensor, count: float, *, weight: float, held_out: bool) -> None:
        """Add rows less the origin to their part, which stand for ``count`` rows."""
        empty = (0.0, torch.zeros((), dtype=torch.float64, device=moved.device))
        before, total = self._parts.get(held_out, empty)
        self._parts[held_out] = before + count, total + weight * moved.sum(1, dtype=torch.float64)
        self._products[held_out].add(moved if weight == 1 else moved * weight**0.5)

    @property
    def count(self) -> float:
        """The number of rows that are not held out."""
        return self._parts[False][0] if self.has(held_out=False) else 0.0

    def has(self, *, held_out: bool) -> bool:
        """Whether there are rows that are held out, or that are not."""
        return held_out in self._parts

    def second(self, *, centred: bool, held_out: bool = False) -> Tensor:
        """Second moments about the mean or about zero, of the rows that are held out or are not.

        Where all are held out, they are those of all.
        """
        chosen = [key for key in self._parts if held_out == key or len(self._parts) == 1]
        parts = [self._parts[key] for key in chosen]
        if not parts:
            return torch.zeros(self._shape[0], self._shape[1], self._shape[1], dtype=torch.float64)
        count = sum(part[0] for part in parts)
        mean: Any = sum(part[1] for part in parts) / count
        moved: Any = sum(self._products[key].total for key in chosen) / count
        origin = self._origin.to(torch.float64)
        central: Tensor = moved - mean[:, :, None] * mean[:, None]
        mean = mean + origin
        second: Tensor = central + mean[:, :, None] * mean[:, None]
        if not centred:
            return second
        # Inputs that are constant have central moments that are rounding errors alone: set them to zero.
        varies = central.diagonal(dim1=1, dim2=2).sum(1) > ROUNDING * second.diagonal(dim1=1, dim2=2).sum(1)
        return torch.where(varies[:, None, None], central, 0.0)

    def standard_error(self, *, centred: bool) -> float:
        """The expected ||C' - C|| / ||C|| of these moments C' and those of all rows C, for independent rows.

        E ||C' - C||^2 = sum_i w_i (w_i - 1) ||x_i x_i^T - C||^2 / (sum_i w_i)^2 for weights w_i = N / n.
        """
        extra, about_origin, about_zero = self._spread.tolist()
        if not extra:
            return 0.0
        squares = float(self.second(centred=centred).square().sum())
        squared = (about_origin if centred else about_zero) - extra * squares
        return float((max(squared, 0.0) / squares) ** 0.5 / self.count) if squares else 0.0


def oracle_shrinkage(second: Tensor, samples: int) -> float:
    """Oracle approximating shrinkage towards a multiple of the identity (Chen et al. 2010, equation 23).

    ``second`` are moments (groups, n, n).
    """
    size, squares = second.shape[1], float(second.square().sum())
    if size == 1:
        return 0.0
    trace = float(second.diagonal(dim1=1, dim2=2).sum(1).square().sum())
    above = (1 - 2 / size) * squares + trace
    below = (samples + 1 - 2 / size) * (squares - trace / size)
    return min(1.0, max(0.0, above / below)) if below > 0 else 1.0


def chosen_shrinkage(kernels: Tensor, moments: Tensor, held_out: Tensor, formula: float) -> float:
    """Of ``formula`` and a few fixed values the shrinkage with the least output error on the held-out moments.

    The error is that of the weight, (T k^2) x S, truncated to rank S / 4 by the SVD of W C^1/2 with C the shrunk
    moments of the other inputs. All C have the eigenvectors V of the moments, so that one basis serves them all.
    """
    weight = kernels.transpose(1, 2).flatten(2).mT.to(torch.float64)
    values, basis = torch.linalg.eigh(moments)
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)[:, None]
    turned = weight @ basis
    gram, held_out = turned.mT @ turned, basis.mT @ held_out @ basis
    errors = {}
    for rho in (formula, *SHRINKAGES):
        roots = ((1 - rho) * values + (rho + 1e-12) * mean).clamp(min=1e-300).sqrt()[:, None]
        leading = leading_eigenvectors(roots.mT * gram * roots, max(1, moments.shape[1] // 4))
        lost = -(leading * roots.mT) @ (leading.mT / roots)  # W V (I + lost) is the error of the weight, times V
        lost.diagonal(dim1=1, dim2=2).add_(1)
        errors[rho] = float(((lost.mT @ gram @ lost) * held_out).sum())
    return min(errors, key=lambda rho: errors[rho])

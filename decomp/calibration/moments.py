"""Moments of the inputs and outputs of one layer, from running sums whose memory does not grow with the data."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from decomp.calibration.unfold import patches_like, rows_of
from decomp.layers import group_kernels
from decomp.linalg import leading_eigenvectors, symmetric_power
from decomp.network.forward import slope_of_norm

LARGEST_MOMENTS = 4096  # channels: 134 MB in float64
LARGEST_SELECTION = 1024
LARGEST_PATCH = 2304
PATCH_ELEMENTS = 2**22
MOST_SIZES = 8
LARGEST_ROW_METRIC = 1536
LEAST_COUNT = 0.02
ROUNDING = 1e-12
SHRINKAGES = (0.01, 0.1, 0.5, 1.0)


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


class Sums:
    """Running sums of one layer, of all batches and of those held out."""

    def __init__(self, name: str, module: Any, *, centred: bool = False) -> None:
        self.name, self.module = name, module
        self._taken_up = centred or getattr(module, "bias", None) is not None
        self.kernels = group_kernels(module).detach()
        groups, outputs, inputs = self.kernels.shape[:3]
        spatial = self.kernels[0, 0, 0].numel() > 1
        wants_inputs = inputs <= LARGEST_MOMENTS and (spatial or inputs <= outputs)
        wants_outputs = outputs <= LARGEST_MOMENTS and (spatial or outputs < inputs)
        if isinstance(module, nn.Embedding):
            wants_inputs, wants_outputs = False, True
        self._inputs = Accumulator(groups, inputs) if wants_inputs else None
        self._held_out = Accumulator(groups, inputs) if wants_inputs else None
        self._outputs = Accumulator(groups, outputs) if wants_outputs else None
        taps = self.kernels[0, 0, 0].numel()
        wants_patches = spatial and inputs * taps <= LARGEST_PATCH
        self._patches = Accumulator(groups, inputs * taps) if wants_patches else None
        self._unfold = patches_like(module) if wants_patches else None
        self._means: dict[tuple[int, ...], tuple[Tensor, int]] = {}
        self._gradients: Any = None
        self.samples = 0
        self.normalization = ""
        self._scale: Tensor | None = None

    @property
    def _centred(self) -> bool:
        return self._taken_up or bool(self.normalization)

    def feed(self, name: str, norm: Any) -> None:
        """Note the BatchNorm behind the layer: it scales every output by gamma / sigma, and takes up a shift."""
        self.normalization = name
        self._scale = slope_of_norm(norm.running_var, norm.eps, norm.weight).abs()

    def add(self, received: Tensor, output: Tensor, *, held_out: bool) -> None:
        """Take in the input and the output of one call."""
        if not received.numel():
            return
        axes = len(getattr(self.module, "kernel_size", ()))
        is_embedding = isinstance(self.module, nn.Embedding)
        bias = getattr(self.module, "bias", None)
        if bias is not None:
            output = output - bias.detach().reshape(-1, *(1,) * axes)
        if not is_embedding:
            received = received.reshape(-1, *received.shape[len(received.shape) - axes - 1 :])
            self._add_mean(received)
            if self._inputs is not None and self._held_out is not None:
                rows = rows_of(received, axes, self.kernels.shape[0])
                self._inputs.add(rows)
                if held_out:
                    self._held_out.add(rows)
            self._add_patches(received, axes)
        if self._outputs is not None:
            self._outputs.add(rows_of(output, axes, self.kernels.shape[0]))
        self.samples += received.numel() if is_embedding else len(received)

    def add_gradient(self, grad: Tensor) -> None:
        """Take in the gradient by the output: sums of its products, or of squares where these are too many."""
        axes, (groups, outputs) = len(getattr(self.module, "kernel_size", ())), self.kernels.shape[:2]
        rows = rows_of(grad, axes, groups)
        products = rows.mT @ rows if outputs <= LARGEST_ROW_METRIC else rows.square().sum(1)
        self._gradients = products if self._gradients is None else self._gradients + products

    def _add_patches(self, received: Tensor, axes: int) -> None:
        if self._patches is None or self._unfold is None:
            return
        each = received[0].numel() * self.kernels[0, 0, 0].numel()
        for part in received.split(max(1, PATCH_ELEMENTS // max(1, each))):
            self._patches.add(rows_of(self._unfold(part), axes, self.kernels.shape[0]))

    def _add_mean(self, received: Tensor) -> None:
        size = tuple(received.shape[1:])
        if size in self._means or len(self._means) < MOST_SIZES:
            total, count = self._means.get(size, (torch.zeros((), dtype=torch.float64, device=received.device), 0))
            self._means[size] = (total + received.to(torch.float64).sum(0), count + len(received))

    def moments(self, energy: float = 1.0) -> Moments:
        """The moments, about the mean where a bias or a BatchNorm can take up the shift.

        ``energy`` is what the squares of gradients are relative to.
        """
        centred = self._centred
        inputs = None if self._inputs is None else self._inputs.second(centred=centred)
        outputs = None if self._outputs is None else self._outputs.second(centred=centred)
        patches = None if self._patches is None else self._patches.second(centred=centred)
        means = tuple((total / count, count) for total, count in self._means.values())
        shape = tuple(self.module.weight.shape)
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
        )

    def _row_metric(self, energy: float) -> tuple[Tensor | None, float | None]:
        """How errors of the outputs count, a root or its diagonal, and the scale that compares layers."""
        if self._gradients is None and self._scale is None:
            return None, None
        counts = self._gradients
        if counts is None:
            counts = cast(Tensor, self._scale).square().reshape(self.kernels.shape[:2])
        diagonal = counts if counts.dim() == 2 else counts.diagonal(dim1=1, dim2=2)
        scale = float(diagonal.mean())
        told = None if self._gradients is None else scale / energy
        # What counts for nothing still counts a little: it may matter on other data.
        metric = (1 - LEAST_COUNT) * counts / max(scale, 1e-300)
        if counts.dim() == 2:
            return (metric + LEAST_COUNT).sqrt(), told
        identity = torch.eye(counts.shape[1], dtype=counts.dtype, device=counts.device)
        return symmetric_power(metric + LEAST_COUNT * identity, 0.5), told

    def _shrinkage(self, centred: bool) -> float:
        """Chosen on the batches held out; by formula where there are none, or too many channels."""
        sums = self._inputs or self._outputs
        formula = oracle_shrinkage(sums.second(centred=True), self.samples) if sums is not None else 0.0
        if self._inputs is None or self._held_out is None or not 1 < self.kernels.shape[2] <= LARGEST_SELECTION:
            return formula
        train = self._inputs.without(self._held_out)
        if not train.count or not self._held_out.count:
            return formula
        held_out = self._held_out.second(centred=centred)
        return chosen_shrinkage(self.kernels, train.second(centred=centred), held_out, formula)


@torch.no_grad()
def moments_of(
    layer: nn.Module, received: Iterable[tuple[Tensor, bool]], calibrated: Moments | None, *, centred: bool
) -> Moments:
    """The moments of a layer for these inputs, each with whether it is held out.

    How errors of its outputs count is what ``calibrated`` says of it.

    ``centred`` says that a shift of the outputs will be taken up, by more than the layer's own bias.
    """
    sums = Sums("", layer, centred=centred)
    for given, held_out in received:
        sums.add(given, layer(given), held_out=held_out)
    moments = sums.moments()
    if calibrated is None:
        return moments
    metric = None if calibrated.row_metric is None else calibrated.row_metric.to(sums.kernels.device)
    return replace(moments, row_metric=metric, importance=calibrated.importance)


class Accumulator:
    """Sums of rows and of their outer products per group."""

    def __init__(self, groups: int, channels: int) -> None:
        self._total: Any = torch.zeros(groups, channels, dtype=torch.float64)
        self._outer: Any = torch.zeros(groups, channels, channels, dtype=torch.float64)
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Take in (groups, rows, channels)."""
        self._total = self._total.to(rows.device) + rows.sum(1)
        self._outer = self._outer.to(rows.device) + rows.mT @ rows
        self.count += rows.shape[1]

    def without(self, other: "Accumulator") -> "Accumulator":
        """What is left when the rows of another are taken away."""
        left = Accumulator(*self._total.shape)
        left._total, left._outer = self._total - other._total.to(self._total.device), self._outer - other._outer
        left.count = self.count - other.count
        return left

    def second(self, *, centred: bool) -> Tensor:
        """Second moments, about the mean or about zero."""
        mean = self._total / max(self.count, 1)
        second: Tensor = self._outer / max(self.count, 1)
        if not centred:
            return second
        about = second - mean[:, :, None] * mean[:, None]
        # What rounding leaves of inputs that do not move is no signal.
        moves = about.diagonal(dim1=1, dim2=2).sum(1) > ROUNDING * second.diagonal(dim1=1, dim2=2).sum(1)
        return torch.where(moves[:, None, None], about, 0.0)


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
    """The shrinkage, by formula or from a few, whose truncated weight errs least on moments held out."""
    errors = {rho: _held_out_error(kernels, moments, held_out, rho) for rho in (formula, *SHRINKAGES)}
    return min(errors, key=lambda rho: errors[rho])


def _held_out_error(kernels: Tensor, moments: Tensor, held_out: Tensor, shrinkage: float) -> float:
    """Squared error on held-out inputs of the weight, (T k^2) x S, cut to a quarter of its rank by other
    inputs."""
    weight = kernels.transpose(1, 2).flatten(2).mT.to(torch.float64)
    size = moments.shape[1]
    identity = torch.eye(size, dtype=moments.dtype, device=moments.device)
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    values, vectors = torch.linalg.eigh((1 - shrinkage) * moments + (shrinkage + 1e-12) * mean * identity)
    roots = values.clamp(min=1e-300).sqrt()[:, None]
    white = weight @ (vectors * roots)
    leading = leading_eigenvectors(white.mT @ white, max(1, size // 4))
    cut = ((white @ leading) @ leading.mT / roots) @ vectors.mT
    lost = weight - cut
    return float(torch.einsum("gts,gsr,gtr->", lost, held_out, lost))

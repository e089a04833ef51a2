"""Moments of the inputs and outputs of one layer, from running sums whose memory does not grow with the data."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from decomp.calibration.unfold import patches_like, rows_of
from decomp.layers import group_kernels
from decomp.linalg import leading_eigenvectors, symmetric_power
from decomp.network.forward import norm_scale

LARGEST_MOMENTS = 4096  # channels: 134 MB in float64
LARGEST_VALIDATED_MOMENTS = 1024  # with more channels the shrinkage is that of the formula
LARGEST_PATCH_MOMENTS = 2304  # input channels of a group times kernel positions
MOMENT_CHUNK_ELEMENTS = 2**22
MAX_INPUT_SIZES = 8
LARGEST_ROW_METRIC = 1536
LEAST_WEIGHT = 0.02  # of an output whose gradient is zero, relative to the mean
ROUNDING = 1e-12
SHRINKAGES = (0.01, 0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Moments:
    """Second moments of one layer's inputs and outputs on the calibration data, in float64.

    ``inputs`` (groups, S, S) is E[x x^T] over the input channels, ``outputs`` (groups, T, T) is E[y y^T] over the
    output channels without their bias, and ``patches`` (groups, S k^2, S k^2) is E[p p^T] over the unfolded inputs
    of a spatial convolution. They are central moments where the layer has a bias or a BatchNorm follows
    (``normalization``, its name), which absorbs a constant shift; else moments about zero. Each is None where it
    would be too large or is not needed.

    ``means`` holds one mean input per input size, with its number of samples. ``shrinkage`` in [0, 1] is the share
    rho of the shrinkage target in the shrunk moments, (1 - rho) C + rho target. ``row_metric`` D (groups, T, T),
    or its diagonal (groups, T), weights errors dy of the output as ||D dy||^2: by gradients of a loss or of the
    network's output where they were measured, else by the scale of the BatchNorm that follows. D is normalized per
    layer; ``importance`` is the factor that was divided out, None without gradients.
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


class LayerSums:
    """Running sums over the inputs, outputs and gradients of one layer; also those of held-out inputs alone."""

    def __init__(self, name: str, module: Any, *, centred: bool = False) -> None:
        self.name, self.module = name, module
        self._absorbs_shift = centred or getattr(module, "bias", None) is not None
        self.kernels = group_kernels(module).detach()
        groups, outputs, inputs = self.kernels.shape[:3]
        spatial = self.kernels[0, 0, 0].numel() > 1
        needs_inputs = inputs <= LARGEST_MOMENTS and (spatial or inputs <= outputs)
        needs_outputs = outputs <= LARGEST_MOMENTS and (spatial or outputs < inputs)
        if isinstance(module, nn.Embedding):
            needs_inputs, needs_outputs = False, True
        self._inputs = MomentSums(groups, inputs) if needs_inputs else None
        self._held_out = MomentSums(groups, inputs) if needs_inputs else None
        self._outputs = MomentSums(groups, outputs) if needs_outputs else None
        taps = self.kernels[0, 0, 0].numel()
        needs_patches = spatial and inputs * taps <= LARGEST_PATCH_MOMENTS
        self._patches = MomentSums(groups, inputs * taps) if needs_patches else None
        self._unfold = patches_like(module) if needs_patches else None
        self._means: dict[tuple[int, ...], tuple[Tensor, int]] = {}
        self._gradients: Any = None
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

    def add(self, received: Tensor, output: Tensor, *, held_out: bool) -> None:
        """Accumulate the input and the output of one call."""
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
        """Accumulate the gradient g by the output: g g^T, or only its diagonal g^2 for very many channels."""
        axes, (groups, outputs) = len(getattr(self.module, "kernel_size", ())), self.kernels.shape[:2]
        rows = rows_of(grad, axes, groups)
        products = rows.mT @ rows if outputs <= LARGEST_ROW_METRIC else rows.square().sum(1)
        self._gradients = products if self._gradients is None else self._gradients + products

    def _add_patches(self, received: Tensor, axes: int) -> None:
        if self._patches is None or self._unfold is None:
            return
        each = received[0].numel() * self.kernels[0, 0, 0].numel()
        for part in received.split(max(1, MOMENT_CHUNK_ELEMENTS // max(1, each))):
            self._patches.add(rows_of(self._unfold(part), axes, self.kernels.shape[0]))

    def _add_mean(self, received: Tensor) -> None:
        size = tuple(received.shape[1:])
        if size in self._means or len(self._means) < MAX_INPUT_SIZES:
            total, count = self._means.get(size, (torch.zeros((), dtype=torch.float64, device=received.device), 0))
            self._means[size] = (total + received.to(torch.float64).sum(0), count + len(received))

    def moments(self, energy: float = 1.0) -> Moments:
        """The moments; central where a bias or a BatchNorm can absorb a constant shift.

        Squared gradients are divided by ``energy`` to get the importance of the layer.
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
        """The metric D of output errors or its diagonal, normalized to mean 1; the importance of the layer."""
        if self._gradients is None and self._norm_scale is None:
            return None, None
        squared = self._gradients
        if squared is None:
            squared = cast(Tensor, self._norm_scale).square().reshape(self.kernels.shape[:2])
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
        formula = oracle_shrinkage(sums.second(centred=True), self.samples) if sums is not None else 0.0
        if (
            self._inputs is None
            or self._held_out is None
            or not 1 < self.kernels.shape[2] <= LARGEST_VALIDATED_MOMENTS
        ):
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
    """The moments of a layer over these inputs.

    Args:
        layer: the layer; its outputs are computed here.
        received: its inputs, each with whether its batch is held out.
        calibrated: earlier moments of the layer, of which the row metric and the importance are used again.
        centred: whether a shift of the outputs will be absorbed even if the layer has no bias.
    """
    sums = LayerSums("", layer, centred=centred)
    for given, held_out in received:
        sums.add(given, layer(given), held_out=held_out)
    moments = sums.moments()
    if calibrated is None:
        return moments
    metric = None if calibrated.row_metric is None else calibrated.row_metric.to(sums.kernels.device)
    return replace(moments, row_metric=metric, importance=calibrated.importance)


class MomentSums:
    """Sums of the rows x and of their outer products x x^T, per group."""

    def __init__(self, groups: int, channels: int) -> None:
        self._total: Any = torch.zeros(groups, channels, dtype=torch.float64, device="cpu")
        self._outer: Any = torch.zeros(groups, channels, channels, dtype=torch.float64, device="cpu")
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Accumulate rows (groups, rows, channels)."""
        self._total = self._total.to(rows.device) + rows.sum(1)
        self._outer = self._outer.to(rows.device) + rows.mT @ rows
        self.count += rows.shape[1]

    def without(self, other: "MomentSums") -> "MomentSums":
        """The sums over the rows that are not among those of ``other``, a part of this one."""
        rest = MomentSums(*self._total.shape)
        rest._total, rest._outer = self._total - other._total.to(self._total.device), self._outer - other._outer
        rest.count = self.count - other.count
        return rest

    def second(self, *, centred: bool) -> Tensor:
        """Second moments, about the mean or about zero."""
        mean = self._total / max(self.count, 1)
        second: Tensor = self._outer / max(self.count, 1)
        if not centred:
            return second
        central = second - mean[:, :, None] * mean[:, None]
        # Inputs that are constant have central moments that are rounding errors alone: set them to zero.
        varies = central.diagonal(dim1=1, dim2=2).sum(1) > ROUNDING * second.diagonal(dim1=1, dim2=2).sum(1)
        return torch.where(varies[:, None, None], central, 0.0)


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
    """Of ``formula`` and a few fixed values the shrinkage with the least output error on the held-out moments."""
    errors = {rho: _held_out_error(kernels, moments, held_out, rho) for rho in (formula, *SHRINKAGES)}
    return min(errors, key=lambda rho: errors[rho])


def _held_out_error(kernels: Tensor, moments: Tensor, held_out: Tensor, shrinkage: float) -> float:
    """Squared output error on held-out inputs of the weight, (T k^2) x S, truncated to rank S / 4.

    The truncation is the SVD of W C^1/2 with C the shrunk moments of the other inputs.
    """
    weight = kernels.transpose(1, 2).flatten(2).mT.to(torch.float64)
    size = moments.shape[1]
    identity = torch.eye(size, dtype=moments.dtype, device=moments.device)
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    values, vectors = torch.linalg.eigh((1 - shrinkage) * moments + (shrinkage + 1e-12) * mean * identity)
    roots = values.clamp(min=1e-300).sqrt()[:, None]
    white = weight @ (vectors * roots)
    leading = leading_eigenvectors(white.mT @ white, max(1, size // 4))
    cut = ((white @ leading) @ leading.mT / roots) @ vectors.mT
    error = weight - cut
    return float(torch.einsum("gts,gsr,gtr->", error, held_out, error))

"""The error of a layer's output in place of that of its weight: moments of inputs and outputs as a metric."""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from decomp.layers import Factorized, group_kernels
from decomp.methods import Method, Ranks
from decomp.projecting import refitted
from decomp.spectra import as_float64

RELATIVE_RIDGE = 1e-6
NOTHING = 1e-18  # a mean square below is what centring leaves of constant inputs
LARGEST_PATCH_SHRINKAGE = 0.1


@dataclass(frozen=True)
class Moments:
    """What calibration saw of one layer, in float64.

    ``inputs`` (groups, S, S) are second moments of the input channels and ``outputs`` (groups, T, T) those of the
    outputs without their bias; about the mean where the layer has a bias or feeds a BatchNorm (``normalization``),
    which then takes up the shift, about zero where there is neither. Either is None where it would be too large,
    or says nothing more than the other. ``means`` are mean inputs, one for each size that was seen, with how
    often it was seen. ``shrinkage`` in [0, 1] is how far both are moved towards the metric of the weight.
    ``row_weights`` (groups, T) are the roots of how much an error of each output counts: by the
    gradient of a loss where there is one, else by the scale of the BatchNorm behind it.
    """

    shape: tuple[int, ...]
    samples: int
    inputs: Tensor | None
    outputs: Tensor | None
    means: tuple[tuple[Tensor, int], ...]
    shrinkage: float
    row_weights: Tensor | None = None
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
            row_weights=moved(self.row_weights),
            patches=moved(self.patches),
        )


def output_kernels(layer: type[Factorized], kernels: Tensor, moments: Moments) -> Tensor | None:
    """A matrix whose distance from others in the Frobenius norm is that of the outputs; None for spatial kernels.

    E ||(W - W') x||^2 = ||(W - W') C^1/2||^2; without the moments of the inputs, the root of those of the outputs
    has the same singular values. The moments of the channels of a spatial kernel do not say it: as if positions
    were not correlated, they put the error far too low.
    """
    if not _is_matrix(kernels):
        return None
    kernels = _weighted(as_float64(kernels), moments)
    if moments.inputs is None:
        return _power(_output_moments(kernels, moments), 0.5)
    return _mixed(kernels, _power(_input_moments(layer, moments.inputs, moments.shrinkage), 0.5))


@torch.no_grad()
def output_error(layer: Factorized, dense: nn.Module, moments: Moments) -> float | None:
    """Relative error of the output about its mean, ||(W - W') x|| / ||W x||; None without the moments for it."""
    kernels = as_float64(group_kernels(dense))
    inside = moments.inputs if _is_matrix(kernels) else moments.patches
    if inside is None:
        return None
    weight = _weighted(kernels, moments).flatten(2)
    lost = weight - _weighted(as_float64(layer.dense_kernels()), moments).flatten(2)
    squared, energy = (float(((each @ inside) * each).sum()) for each in (lost, weight))
    return (max(squared, 0.0) / energy) ** 0.5 if energy > 0 else 0.0


def output_factors(
    method: Method, layer: type[Factorized], dense: nn.Module, ranks: Ranks, moments: Moments
) -> Any:
    """One kernel per role such that the error of the output is small, for ``from_kernels``.

    A rank of the outputs is spent on the leading eigenvectors U of E[y y^T]: K' = U U^T K needs no inverse and is
    the best there is for a matrix. What is left is decomposed as K C^1/2, and C^-1/2 put into the first factor.

    Source: Zhang et al. 2016, section 3.1, for the outputs; whitening as in SVD-LLM (Wang et al. 2024), section
    3.1.
    """
    kernels = _weighted(as_float64(group_kernels(dense)), moments)
    basis = None
    known = moments.outputs is not None
    if known and method.out_rank is not None and ranks[method.out_rank] < kernels.shape[1]:
        basis = _leading(_output_moments(kernels, moments), ranks[method.out_rank])
        kernels = torch.einsum("gta,gt...->ga...", basis, kernels)
    if basis is not None and len(ranks) == 1:
        # Nothing is left to decompose: each side gets the root of the norm.
        root = kernels.flatten(2).norm(dim=2).clamp(min=torch.finfo(kernels.dtype).tiny).sqrt()
        inside = kernels / root.reshape(*root.shape, *(1,) * (kernels.dim() - 2))
        inside = inside.flatten(2) if _is_matrix(kernels) else inside
        found = layer.factor_kernels(dense, (basis * root[:, None], inside))
    else:
        found = _whitened(method, layer, dense, kernels, ranks, moments)
        found = found if basis is None else layer.expand_outputs(found, basis)
        if moments.patches is not None:
            whole = _weighted(as_float64(group_kernels(dense)), moments)
            found = refitted(layer, dense, found, whole, _patch_moments(moments))
    return found if moments.row_weights is None else layer.scale_outputs(found, 1 / moments.row_weights)


@torch.no_grad()
def lost_mean(layer: Factorized, dense: Any, moments: Moments) -> Tensor | None:
    """What the factors take off the mean of the outputs; None where no mean was seen.

    Both are linear but for the bias, so that the change of the mean is that of the mean input.
    """
    if not moments.means:
        return None
    total: int = 0
    shift: Any = 0.0
    axes = len(getattr(dense, "kernel_size", ()))
    for mean, count in moments.means:
        given = mean.to(dense.weight.device, dense.weight.dtype)[None]
        change = (dense(given) - layer(given)).to(torch.float64)
        shift = shift + count * (change[0].flatten(1).mean(1) if axes else change[0])
        total += count
    return shift / total  # type: ignore[no-any-return]


def _whitened(
    method: Method, layer: type[Factorized], dense: nn.Module, kernels: Tensor, ranks: Ranks, moments: Moments
) -> dict[str, Tensor]:
    if moments.inputs is None:
        return dict(layer.factor_kernels(dense, method.factors(kernels, ranks)))
    metric = _input_moments(layer, moments.inputs, moments.shrinkage)
    factors = method.factors(_mixed(kernels, _power(metric, 0.5)), ranks)
    return layer.mix_inputs(layer.factor_kernels(dense, factors), _power(metric, -0.5))


def _input_moments(layer: type[Factorized], moments: Tensor, shrinkage: float) -> Tensor:
    """(1 - rho) C + rho tr(C) / S I; the diagonal alone where a layer cannot mix its inputs."""
    if not layer.mixes_inputs:
        moments = torch.diag_embed(moments.diagonal(dim1=1, dim2=2))
    least = torch.finfo(moments.dtype).eps * moments.shape[1]  # a singular moment has a root as well
    return _shrunk(moments, max(shrinkage, least))


def _patch_moments(moments: Moments) -> Tensor:
    rho = max(min(moments.shrinkage, LARGEST_PATCH_SHRINKAGE), RELATIVE_RIDGE)
    return _shrunk(cast(Tensor, moments.patches), rho)


def _shrunk(moments: Tensor, rho: float) -> Tensor:
    """(1 - rho) C + rho tr(C) / n I; the identity, the metric of the weight, where inputs do not move."""
    mean = moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    identity = torch.eye(moments.shape[1], dtype=moments.dtype, device=moments.device)
    still = mean <= NOTHING
    moments, mean = torch.where(still, identity, moments), torch.where(still, 1.0, mean)
    return (1 - rho) * moments + rho * mean * identity


def _output_moments(kernels: Tensor, moments: Moments) -> Tensor:
    """Moments of the outputs, moved towards K K^T as those of the inputs are towards the identity."""
    found = cast(Tensor, moments.outputs)
    if moments.row_weights is not None:
        found = moments.row_weights[:, :, None] * moments.row_weights[:, None] * found
    own = kernels.flatten(2) @ kernels.flatten(2).mT
    energy, energy_own = (each.diagonal(dim1=1, dim2=2).sum(1) for each in (found, own))
    share = (energy / energy_own.clamp(min=torch.finfo(own.dtype).tiny))[:, None, None]
    mixed: Tensor = (1 - moments.shrinkage) * found + moments.shrinkage * share * own
    return torch.where((energy > 0)[:, None, None], mixed, own)


def _is_matrix(kernels: Tensor) -> bool:
    return kernels[0, 0, 0].numel() == 1


def _weighted(kernels: Tensor, moments: Moments) -> Tensor:
    if moments.row_weights is None:
        return kernels
    return kernels * moments.row_weights.reshape(*moments.row_weights.shape, *(1,) * (kernels.dim() - 2))


def _mixed(kernels: Tensor, mixing: Tensor) -> Tensor:
    return torch.einsum("gtr...,grs->gts...", kernels, mixing)


def _power(moments: Tensor, power: float) -> Tensor:
    """A power of symmetric matrices; eigenvalues below rounding count as that, so that the inverse is finite."""
    values, vectors = torch.linalg.eigh(moments)
    floor = (
        values[:, -1:].clamp(min=torch.finfo(values.dtype).tiny) * values.shape[1] * torch.finfo(values.dtype).eps
    )
    powers: Tensor = torch.maximum(values, floor).pow(power)
    result: Tensor = (vectors * powers[:, None]) @ vectors.mT
    return result


def _leading(moments: Tensor, rank: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(moments)[1]
    return vectors.flip(-1)[:, :, :rank]

"""The error of a layer's output in place of that of its weight: moments of inputs and outputs as a metric."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from decomp.calibration.moments import Moments
from decomp.calibration.reduced_rank import refitted
from decomp.layers import Factorized, SVDLinear, group_kernels
from decomp.layers.factorized import Absorbs
from decomp.linalg import as_float64, leading_eigenvectors, shrunk, symmetric_power
from decomp.methods import Method, Ranks

RELATIVE_RIDGE = 1e-6
LARGEST_PATCH_SHRINKAGE = 0.1


def output_kernels(layer: type[Factorized], kernels: Tensor, moments: Moments) -> Tensor | None:
    """Kernels whose distance from others in the Frobenius norm is that of the outputs; None without the moments.

    For a matrix E ||(W - W') x||^2 = ||(W - W') C^1/2||^2; without the moments of the inputs, the root of those of
    the outputs has the same singular values. The moments of patches are taken as a Kronecker product of those of
    the channels and of each axis of the kernel, scaled to the energy of the outputs: exact where they are one.
    Where patches are too large, or the factors can take up nothing of a metric, the kernel itself is scaled so.
    """
    if _is_matrix(kernels) and layer.absorbs_inputs == "nothing":
        return _scaled(as_float64(kernels), _output_energy(as_float64(kernels), moments))
    kernels = _weighted(layer, as_float64(kernels), moments)
    if _is_matrix(kernels):
        if moments.inputs is None:
            return symmetric_power(_output_moments(layer, kernels, moments), 0.5)
        return _mixed(kernels, symmetric_power(_input_moments(layer, moments.inputs, moments.shrinkage), 0.5))
    if moments.patches is None:
        if moments.outputs is None:
            return None
        return _scaled(kernels, _output_moments(layer, kernels, moments).diagonal(dim1=1, dim2=2).sum())
    patches = _patch_moments(moments)
    energy = ((kernels.flatten(2) @ patches) * kernels.flatten(2)).sum()
    for mode, marginal in enumerate(_marginals(patches, tuple(kernels.shape[2:])), start=2):
        if mode == 2:
            marginal = _absorbable(marginal, layer.absorbs_inputs)
        moved = torch.einsum("gij,gj...->gi...", symmetric_power(marginal, 0.5), kernels.movedim(mode, 1))
        kernels = moved.movedim(1, mode)
    return _scaled(kernels, energy)


def _output_energy(kernels: Tensor, moments: Moments) -> Tensor:
    """E ||D W x||^2 of a matrix, with all of D: budgets compare it with that of layers that absorb D."""
    kernels = _weighted(SVDLinear, kernels, moments)
    if moments.inputs is None:
        return _output_moments(SVDLinear, kernels, moments).diagonal(dim1=1, dim2=2).sum()
    inputs = _input_moments(SVDLinear, moments.inputs, moments.shrinkage)
    return ((kernels.flatten(2) @ inputs) * kernels.flatten(2)).sum()


def _scaled(kernels: Tensor, energy: Tensor) -> Tensor:
    return kernels * (energy / kernels.square().sum().clamp(min=torch.finfo(kernels.dtype).tiny)).sqrt()


def _marginals(patches: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Of moments over (S, *kernel) those of each of these modes by itself, summed over the others."""
    tensor = patches.unflatten(2, sizes).unflatten(1, sizes)
    found = []
    for mode in range(len(sizes)):
        kept = tensor.movedim((1 + mode, 1 + len(sizes) + mode), (1, 2)).flatten(3)
        count = patches.shape[1] // sizes[mode]
        found.append(kept.unflatten(3, (count, count)).diagonal(dim1=3, dim2=4).sum(3))
    return found


@torch.no_grad()
def output_error(layer: Factorized, dense: nn.Module, moments: Moments) -> float | None:
    """Relative error of the output about its mean, ||(W - W') x|| / ||W x||; None without the moments for it."""
    kernels = as_float64(group_kernels(dense))
    inside = moments.inputs if _is_matrix(kernels) else moments.patches
    if inside is None:
        return None
    weight = _weighted(type(layer), kernels, moments).flatten(2)
    lost = weight - _weighted(type(layer), as_float64(layer.dense_kernels()), moments).flatten(2)
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
    kernels = _weighted(layer, as_float64(group_kernels(dense)), moments)
    basis = None
    known = moments.outputs is not None
    if known and method.out_rank is not None and ranks[method.out_rank] < kernels.shape[1]:
        basis = leading_eigenvectors(_output_moments(layer, kernels, moments), ranks[method.out_rank])
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
            whole = _weighted(layer, as_float64(group_kernels(dense)), moments)
            found = refitted(layer, dense, found, whole, _patch_moments(moments))
    metric = _row_metric(layer, moments)
    if metric is None:
        return found
    return layer.mix_outputs(found, 1 / metric if metric.dim() == 2 else torch.linalg.inv(metric))


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
    if moments.inputs is None or layer.absorbs_inputs == "nothing":
        return dict(layer.factor_kernels(dense, method.factors(kernels, ranks)))
    metric = _input_moments(layer, moments.inputs, moments.shrinkage)
    factors = method.factors(_mixed(kernels, symmetric_power(metric, 0.5)), ranks)
    return layer.mix_inputs(layer.factor_kernels(dense, factors), symmetric_power(metric, -0.5))


def _input_moments(layer: type[Factorized], moments: Tensor, shrinkage: float) -> Tensor:
    """(1 - rho) C + rho tr(C) / S I, with of C what the first factor of the layer can absorb the root of."""
    moments = _absorbable(moments, layer.absorbs_inputs)
    least = torch.finfo(moments.dtype).eps * moments.shape[1]  # a singular moment has a root as well
    return shrunk(moments, max(shrinkage, least))


def _patch_moments(moments: Moments) -> Tensor:
    rho = max(min(moments.shrinkage, LARGEST_PATCH_SHRINKAGE), RELATIVE_RIDGE)
    return shrunk(cast(Tensor, moments.patches), rho)


def _output_moments(layer: type[Factorized], kernels: Tensor, moments: Moments) -> Tensor:
    """Moments of the outputs, shrunk towards K K^T as those of the inputs are towards the identity."""
    found, metric = cast(Tensor, moments.outputs), _row_metric(layer, moments)
    if metric is not None and metric.dim() == 2:
        found = metric[:, :, None] * found * metric[:, None]
    elif metric is not None:
        found = metric @ found @ metric
    own = kernels.flatten(2) @ kernels.flatten(2).mT
    energy, energy_own = (each.diagonal(dim1=1, dim2=2).sum(1) for each in (found, own))
    share = (energy / energy_own.clamp(min=torch.finfo(own.dtype).tiny))[:, None, None]
    mixed: Tensor = (1 - moments.shrinkage) * found + moments.shrinkage * share * own
    return torch.where((energy > 0)[:, None, None], mixed, own)


def _is_matrix(kernels: Tensor) -> bool:
    return kernels[0, 0, 0].numel() == 1


def _row_metric(layer: type[Factorized], moments: Moments) -> Tensor | None:
    """The root D of how errors of the outputs count, or its diagonal: what the last factor can absorb of it."""
    metric = moments.row_metric
    if layer.absorbs_outputs == "nothing":
        return None
    if metric is None or layer.absorbs_outputs == "full" or metric.dim() == 2:
        return metric
    return (metric @ metric).diagonal(dim1=1, dim2=2).sqrt()


def _absorbable(moments: Tensor, absorbs: Absorbs) -> Tensor:
    """Of moments (groups, n, n) what a factor can absorb: all, the diagonal, or the mean as a multiple of I."""
    if absorbs == "full":
        return moments
    return torch.diag_embed(moments.diagonal(dim1=1, dim2=2)) if absorbs == "diagonal" else shrunk(moments, 1.0)


def _weighted(layer: type[Factorized], kernels: Tensor, moments: Moments) -> Tensor:
    metric = _row_metric(layer, moments)
    if metric is None:
        return kernels
    if metric.dim() == 2:
        return kernels * metric.reshape(*metric.shape, *(1,) * (kernels.dim() - 2))
    return torch.einsum("gtu,gu...->gt...", metric, kernels)


def _mixed(kernels: Tensor, mixing: Tensor) -> Tensor:
    return torch.einsum("gtr...,grs->gts...", kernels, mixing)

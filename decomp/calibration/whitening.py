"""Decomposition by the error of the output: kernels whitened by the moments of inputs or outputs."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from decomp.calibration.moments import Moments
from decomp.calibration.recurrent import AnyMoments, RecurrentMoments, gate_error, gate_factors, gate_kernels
from decomp.calibration.reduced_rank import refitted
from decomp.layers import Factorized, SVDLinear, group_kernels
from decomp.layers.factorized import Absorbs
from decomp.linalg import as_float64, leading_eigenvectors, shrunk, symmetric_power, symmetric_powers
from decomp.methods import Method, Ranks

RELATIVE_RIDGE = 1e-6
MAX_PATCH_SHRINKAGE = 0.1


def output_kernels(layer: type[Factorized], kernels: Any, moments: AnyMoments) -> Any:
    """Whitened kernels: the Frobenius norm of their error is the error of the output; None without the moments.

    For a matrix, K = W C^1/2: E ||(W - W') x||^2 = ||(W - W') C^1/2||^2 with C = E[x x^T]. Without the moments
    of the inputs, K = E[y y^T]^1/2, which has the same singular values. For a spatial kernel the moments of
    the patches are approximated by a Kronecker product of the moments of the channels and of each axis of the
    kernel, and the result is scaled to the energy of the outputs. Where patches are too large, or the factors
    cannot absorb a metric, the kernel is only scaled to the energy of the outputs.
    """
    if isinstance(moments, RecurrentMoments):
        return gate_kernels(kernels, moments)
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
    """The moments of each mode of (S, *kernel), the other modes traced out."""
    tensor = patches.unflatten(2, sizes).unflatten(1, sizes)
    marginals = []
    for mode in range(len(sizes)):
        first = tensor.movedim((1 + mode, 1 + len(sizes) + mode), (1, 2)).flatten(3)
        count = patches.shape[1] // sizes[mode]
        marginals.append(first.unflatten(3, (count, count)).diagonal(dim1=3, dim2=4).sum(3))
    return marginals


@torch.no_grad()
def output_error(layer: Factorized, dense: nn.Module, moments: AnyMoments) -> float | None:
    """Relative error of the output, ||(W - W') x|| / ||W x||, by the moments of the inputs; None without."""
    if isinstance(moments, RecurrentMoments):
        return gate_error(layer, cast(nn.RNNBase, dense), moments.seconds)
    kernels = as_float64(group_kernels(dense))
    inside = moments.inputs if _is_matrix(kernels) else moments.patches
    if inside is None:
        return None
    weight = _weighted(type(layer), kernels, moments).flatten(2)
    difference = weight - _weighted(type(layer), as_float64(layer.dense_kernels()), moments).flatten(2)
    squared, energy = (float(((each @ inside) * each).sum()) for each in (difference, weight))
    return (max(squared, 0.0) / energy) ** 0.5 if energy > 0 else 0.0


@torch.no_grad()
def held_out_error(
    layer: Factorized, dense: nn.Module, moments: AnyMoments, shift: Tensor | None = None
) -> float | None:
    """Relative error of the output on the rows that the moments hold out; None where there are none.

    ``shift`` (T,) is added to the output of ``layer``.
    """
    if isinstance(moments, RecurrentMoments):
        return None if moments.held_out is None else gate_error(layer, cast(nn.RNNBase, dense), moments.held_out)
    if moments.held_out is None:
        return None
    kernels = as_float64(group_kernels(dense))
    groups, outputs = kernels.shape[:2]
    constant = 0.0 if shift is None else shift.to(kernels).reshape(groups, outputs, 1)
    lost, energy = (
        _weighted(SVDLinear, outputs_of, moments)
        for outputs_of in (
            _rows_of(kernels - as_float64(layer.dense_kernels()), moments.held_out) - constant,
            _rows_of(kernels, moments.held_out),
        )
    )
    if moments.means and (moments.normalization or getattr(dense, "bias", None) is not None):
        energy = energy - energy.mean(2, keepdim=True)
    squared, of_dense = float(lost.square().sum()), float(energy.square().sum())
    return math.sqrt(squared / of_dense if of_dense > 0 else squared)


def unknowns(layer: Factorized, moments: Moments) -> int:
    """How many unknowns of each output of this layer are fitted to the moments."""
    children = dict(layer.named_children())
    roles = layer.refittable(cast(Any, children))
    if moments.patches is None or not roles:
        of_channels = moments.outputs if moments.inputs is None else moments.inputs
        return 0 if of_channels is None else of_channels.shape[1]
    return group_kernels(children[roles[0]])[0, 0].numel()


def _rows_of(kernels: Tensor, rows: Tensor) -> Tensor:
    """The outputs (groups, T, rows) of kernels for rows, or for the indices of an embedding."""
    flat = kernels.flatten(2)
    return flat[:, :, rows] if rows.dim() == 1 else flat @ rows.to(flat.dtype).mT


def output_factors(
    method: Method,
    layer: type[Factorized],
    dense: nn.Module,
    ranks: Ranks,
    moments: AnyMoments,
) -> Any:
    """One kernel per role for ``from_kernels``, with a small error of the output.

    The output mode is projected on the leading eigenvectors U of E[y y^T]: K' = U U^T K needs no inverse and is
    optimal for a matrix. The other modes are decomposed by the method as U^T K C^1/2, and C^-1/2 is merged into
    the first factor. Where the moments of the patches are known, the last factors are refitted to them.

    Source: Zhang et al. 2016, section 3.1, for the outputs; whitening as in SVD-LLM (Wang et al. 2024), section
    3.1.
    """
    if isinstance(moments, RecurrentMoments):
        return layer.factor_kernels(dense, gate_factors(method, method.kernels(dense), ranks, moments))
    kernels = _weighted(layer, as_float64(group_kernels(dense)), moments)
    basis = None
    if moments.outputs is not None and method.out_rank is not None and ranks[method.out_rank] < kernels.shape[1]:
        basis = leading_eigenvectors(_output_moments(layer, kernels, moments), ranks[method.out_rank])
        kernels = torch.einsum("gta,gt...->ga...", basis, kernels)
    if basis is not None and len(ranks) == 1:
        # A matrix needs no further decomposition; the norm is split evenly between the two factors.
        root = kernels.flatten(2).norm(dim=2).clamp(min=torch.finfo(kernels.dtype).tiny).sqrt()
        inside = kernels / root.reshape(*root.shape, *(1,) * (kernels.dim() - 2))
        inside = inside.flatten(2) if _is_matrix(kernels) else inside
        role_kernels = layer.factor_kernels(dense, (basis * root[:, None], inside))
    else:
        role_kernels = _whitened(method, layer, dense, kernels, ranks, moments)
        role_kernels = role_kernels if basis is None else layer.expand_outputs(role_kernels, basis)
        if moments.patches is not None:
            whole = _weighted(layer, as_float64(group_kernels(dense)), moments)
            role_kernels = refitted(layer, dense, role_kernels, whole, _patch_moments(moments))
    metric = _row_metric(layer, moments)
    if metric is None:
        return role_kernels
    return layer.mix_outputs(role_kernels, 1 / metric if metric.dim() == 2 else torch.linalg.inv(metric))


@torch.no_grad()
def mean_error(layer: Factorized, dense: Any, moments: Moments) -> Tensor | None:
    """The error of the mean output, E[W x - W' x]; None where the moments hold no mean inputs.

    Both layers are affine, so that it is the difference of their outputs for the mean input. Of inputs of several
    sizes each counts with its number of output positions, as in a BatchNorm.
    """
    if not moments.means:
        return None
    total: int = 0
    shift: Any = 0.0
    for mean, count in moments.means:
        x = mean.to(dense.weight.device, dense.weight.dtype)[None]
        change = (dense(x) - layer(x))[0].to(torch.float64).unsqueeze(-1).flatten(1)
        shift = shift + count * change.sum(1)
        total += count * change.shape[1]
    return shift / total  # type: ignore[no-any-return]


def _whitened(
    method: Method, layer: type[Factorized], dense: nn.Module, kernels: Tensor, ranks: Ranks, moments: Moments
) -> dict[str, Tensor]:
    if moments.inputs is None or layer.absorbs_inputs == "nothing":
        return dict(layer.factor_kernels(dense, method.factors(kernels, ranks)))
    metric = _input_moments(layer, moments.inputs, moments.shrinkage)
    root, inverse_root = symmetric_powers(metric, 0.5, -0.5)
    factors = method.factors(_mixed(kernels, root), ranks)
    return layer.mix_inputs(layer.factor_kernels(dense, factors), inverse_root)


def _input_moments(layer: type[Factorized], moments: Tensor, shrinkage: float) -> Tensor:
    """(1 - rho) C + rho tr(C) / S I, with C reduced to the part whose root the first factor can absorb."""
    moments = _absorbable(moments, layer.absorbs_inputs)
    least = torch.finfo(moments.dtype).eps * moments.shape[1]  # keeps singular moments invertible
    return shrunk(moments, max(shrinkage, least))


def _patch_moments(moments: Moments) -> Tensor:
    rho = max(min(moments.shrinkage, MAX_PATCH_SHRINKAGE), RELATIVE_RIDGE)
    return shrunk(cast(Tensor, moments.patches), rho)


def _output_moments(layer: type[Factorized], kernels: Tensor, moments: Moments) -> Tensor:
    """Moments of the outputs in the row metric, shrunk towards K K^T, their value for white inputs."""
    outputs, metric = cast(Tensor, moments.outputs), _row_metric(layer, moments)
    if metric is not None and metric.dim() == 2:
        outputs = metric[:, :, None] * outputs * metric[:, None]
    elif metric is not None:
        outputs = metric @ outputs @ metric
    gram = kernels.flatten(2) @ kernels.flatten(2).mT
    energy, gram_energy = (each.diagonal(dim1=1, dim2=2).sum(1) for each in (outputs, gram))
    share = (energy / gram_energy.clamp(min=torch.finfo(gram.dtype).tiny))[:, None, None]
    mixed: Tensor = (1 - moments.shrinkage) * outputs + moments.shrinkage * share * gram
    return torch.where((energy > 0)[:, None, None], mixed, gram)


def _is_matrix(kernels: Tensor) -> bool:
    return kernels[0, 0, 0].numel() == 1


def _row_metric(layer: type[Factorized], moments: Moments) -> Tensor | None:
    """The metric D of output errors, reduced to what the last factor can absorb: all, the diagonal, or None."""
    metric = moments.row_metric
    if layer.absorbs_outputs == "nothing":
        return None
    if metric is None or layer.absorbs_outputs == "full" or metric.dim() == 2:
        return metric
    return (metric @ metric).diagonal(dim1=1, dim2=2).sqrt()


def _absorbable(moments: Tensor, absorbs: Absorbs) -> Tensor:
    """Moments (groups, n, n) reduced to what a factor can absorb: all, the diagonal, or tr(C) / n I."""
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

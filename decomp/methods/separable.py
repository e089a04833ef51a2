"""m separable filters per input channel, per output channel, or for all channels together, fitted by CP."""

from collections.abc import Callable

import torch
from torch import Tensor

from decomp.layers import Factorized, FlattenedConv, SeparableConv, SharedBankConv
from decomp.layers.kernels import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from decomp.methods.cp import as_tensor, most_terms
from decomp.methods.fitted import Fit, fitted_analysis
from decomp.methods.record import Analysis, Method, Ranks, Refuses, needs_two_axes, spatial
from decomp.methods.solvers import fit_cp

Factors = tuple[Tensor, ...]


def separable_factors(kernels: Tensor, terms: int) -> tuple[Factors, float]:
    """(A, v, h): for each input channel s the CP of rank m of K[:, s], a T x kh x kw tensor.

    Source: Jaderberg et al. 2014, scheme 1 (filter reconstruction).
    """
    tensor = as_tensor(kernels, split=True).transpose(1, 2)
    (left, *spatial_factors), error = _filters(tensor.flatten(0, 1), terms)
    groups = (len(tensor), -1)
    parts = [factor.unflatten(0, groups).transpose(2, 3) for factor in spatial_factors]
    return (left.unflatten(0, groups).transpose(1, 2), *parts), error


def flattened_factors(kernels: Tensor, terms: int) -> tuple[Factors, float]:
    """(a, v, h): for each output channel t the CP of rank m of K[t], an S x kh x kw tensor.

    Source: Jin et al. 2015, who train the structure with m = 1.
    """
    tensor = as_tensor(kernels, split=True)
    parts, error = _filters(tensor.flatten(0, 1), terms)
    return tuple(factor.unflatten(0, (len(tensor), -1)).transpose(2, 3) for factor in parts), error


def shared_factors(kernels: Tensor, terms: int) -> tuple[Factors, float]:
    """(A, v, h): the CP of rank M of all filters, a (T S) x kh x kw tensor.

    Source: Rigamonti et al. 2013, equation 8: a learned bank by sums of separable filters.
    """
    tensor = as_tensor(kernels, split=True)
    parts, error = _filters(tensor.flatten(0, 2)[None], terms)
    left, *spatial_factors = (factor[0] for factor in parts)
    return (left.unflatten(0, tensor.shape[:3]), *(factor.T for factor in spatial_factors)), error


def _filters(tensor: Tensor, terms: int) -> tuple[list[Tensor], float]:
    """CP of each (n, kh, kw) tensor; a long first mode is compressed to an orthonormal basis before."""
    flat = tensor.flatten(2)
    basis = None
    if flat.shape[1] > flat.shape[2]:
        basis, flat = torch.linalg.qr(flat)
    model = fit_cp(flat.unflatten(2, tensor.shape[2:]), terms)
    left, *spatial_factors = model.factors
    return [left if basis is None else basis @ left, *spatial_factors], float(model.squared_errors.sum())


def _method(
    name: str,
    layer: type[Factorized],
    channel: int | None,
    decompose: Callable[[Tensor, int], tuple[Factors, float]],
    refuses: Refuses,
) -> Method:
    """``channel`` is the axis of the kernels that is a mode of the CP along with the filters, None if both are."""

    def limits(kernels: Tensor) -> Ranks:
        """The rank at which the CP is exact, see :func:`most_terms`."""
        channels = kernels.shape[:3].numel() if channel is None else kernels.shape[channel]
        return (most_terms((channels, *as_tensor(kernels, split=True).shape[3:])),)

    def fit(kernels: Tensor, ranks: Ranks) -> Fit:
        return Fit(*decompose(kernels, ranks[0]))

    def analyse(kernels: Tensor) -> Analysis:
        return fitted_analysis(kernels, [(terms,) for terms in range(1, limits(kernels)[0] + 1)], fit)

    def factors(kernels: Tensor, ranks: Ranks) -> Factors:
        return decompose(kernels, ranks[0])[0]

    layers = dict.fromkeys(CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS, layer)
    return Method(name, ("m",), layers, refuses, limits, analyse, factors, closed_form=False)


CHANNELWISE = _method(
    "separable_channelwise",
    SeparableConv,
    1,
    separable_factors,
    needs_two_axes("separable_channelwise", more=True),
)
FLATTENED = _method("flattened", FlattenedConv, 2, flattened_factors, needs_two_axes("flattened", more=True))
SHARED_BANK = _method("shared_bank", SharedBankConv, None, shared_factors, spatial("shared_bank"))

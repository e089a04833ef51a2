"""The decomposition methods: one file each, one row in the table."""

from collections.abc import Callable
from inspect import signature
from typing import Annotated, Any, TypedDict

from torch import nn

from decomp._util.arguments import Argument
from decomp.methods.block_term import BLOCK_TERM, block_term
from decomp.methods.cp import CP, CP4, cp
from decomp.methods.folded_svd import CHANNEL, DEPTHWISE_POINTWISE, FOLDS, INPUT, POINTWISE_DEPTHWISE, SPATIAL
from decomp.methods.kronecker import KRONECKER
from decomp.methods.monochromatic import MONOCHROMATIC
from decomp.methods.record import Analysis, Method, Ranks
from decomp.methods.recurrent import SVD_RNN, SVD_RNN_INPUT
from decomp.methods.separable import CHANNELWISE, FLATTENED, SHARED_BANK
from decomp.methods.svd import SVD
from decomp.methods.tensor_train import ASYMMETRIC, TENSOR_TRAIN
from decomp.methods.tensorly import Solver, to_tensorly
from decomp.methods.tucker import TUCKER, tucker

_ROWS = (
    *(SVD, CHANNEL, INPUT, SPATIAL, TUCKER, CP, CP4, BLOCK_TERM),
    *(CHANNELWISE, DEPTHWISE_POINTWISE, POINTWISE_DEPTHWISE, SHARED_BANK, FLATTENED),
    *(ASYMMETRIC, TENSOR_TRAIN, MONOCHROMATIC, KRONECKER, SVD_RNN_INPUT, SVD_RNN),
)
METHODS: dict[str, Method] = {method.name: method for method in _ROWS}


def kinds_of(*methods: Method) -> set[Any]:
    """Types of layers, or qualified names of types, that any method of the table or any of these supports."""
    return {kind for method in (*_ROWS, *methods) for kind in method.layers}


# The methods that a budget chooses from by default. Adding asymmetric, tensor train and the depthwise methods
# lowered the error of the weights, but without fine-tuning also the accuracy. svd_rnn makes small recurrent layers
# several times slower (benchmarks/recurrent.py).
AUTO = ("svd", "tucker", "svd_rnn_input")

# The method for linear layers and 1x1 convolutions in calls with a method for spatial kernels.
MATRICES = SVD

# The method for LSTM, GRU and RNN layers in calls with another method.
RECURRENT = SVD_RNN_INPUT


def method_for(named: Method, module: nn.Module) -> Method:
    """The named method if it supports a layer, else the one for recurrent layers or the one for matrices.

    If none does, the one with the more specific reason: the named one if it supports the type of the layer.
    """
    if not named.why_not(module) or (MATRICES.why_not(module) and named.layer_of(module)):
        return named
    return RECURRENT if RECURRENT.layer_of(module) else MATRICES


def spectral_reference(module: nn.Module) -> Method:
    """The method whose spectra choose the ranks of methods without spectra: Tucker-2, or svd for matrices."""
    return MATRICES if TUCKER.why_not(module) else TUCKER


SCHEMES = {
    "spatial": SPATIAL,
    "channelwise": CHANNELWISE,
    "depthwise_pointwise": DEPTHWISE_POINTWISE,
    "pointwise_depthwise": POINTWISE_DEPTHWISE,
    "shared_bank": SHARED_BANK,
}


def svd(*, fold: str = "channel") -> Method:
    """SVD of spatial kernels folded to matrices; linear layers and 1x1 convolutions are matrices already."""
    return _row("fold", fold, FOLDS)


def separable(*, scheme: str = "spatial") -> Method:
    """Separable filters, by one of the schemes."""
    return _row("scheme", scheme, SCHEMES)


def _row(option: str, value: str, rows: Any) -> Method:
    if value not in rows:
        raise ValueError(f"{option}={value!r} is unknown: write one of {sorted(rows)}")
    return rows[value]  # type: ignore[no-any-return]


class MethodOptions(TypedDict, total=False):
    """The options of the families of methods; None means the default of the family."""

    fold: Annotated[str | None, Argument(None, 'of svd: "channel" (the default), "input" or "spatial".')]
    modes: Annotated[int | None, Argument(None, "of cp: 3 (the default) or 4.")]
    blocks: Annotated[int | None, Argument(None, "of block_term: the number of terms, by default 4.")]
    scheme: Annotated[str | None, Argument(None, "of separable: see :func:`decomp.separable`.")]
    solver: Annotated[
        Solver | None,
        Argument(None, "of tucker and cp: replaces the built-in solver, see :func:`decomp.tucker`."),
    ]


FAMILIES: dict[str, Callable[..., Method]] = {
    "svd": svd,
    "tucker": tucker,
    "cp": cp,
    "block_term": block_term,
    "separable": separable,
}


def default_options(family: str) -> dict[str, Any]:
    """The options of a family of methods and their defaults."""
    parameters = signature(FAMILIES[family]).parameters if family in FAMILIES else {}
    return {name: parameter.default for name, parameter in parameters.items()}


def method_named(method: str | Method, options: Any = None) -> Method:
    """A method by its name and its options, or the record itself.

    Raises:
        ValueError: the name or the value of an option is unknown.
        TypeError: the method has no such option.
    """
    options = options or {}
    if isinstance(method, str) and method in FAMILIES:
        allowed = default_options(method)
        unknown = [name for name in options if name not in allowed]
        if not unknown:
            return FAMILIES[method](**options)
        raise TypeError(f"{method} has no option {unknown[0]}=: write {', '.join(f'{name}=' for name in allowed)}")
    if options:
        raise TypeError(f"{getattr(method, 'name', method)} has no option {next(iter(options))}=")
    return row_named(method)


def row_named(method: str | Method) -> Method:
    """A row of the table by its name, or the record itself.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        known = sorted(METHODS)
        raise ValueError(f"method={method!r} is unknown: write one of {known}, or a decomp.methods.Method")
    return METHODS[method]


__all__ = [
    "AUTO",
    "FAMILIES",
    "METHODS",
    "Analysis",
    "Method",
    "MethodOptions",
    "Ranks",
    "Solver",
    "default_options",
    "kinds_of",
    "method_for",
    "method_named",
    "row_named",
    "spectral_reference",
    "to_tensorly",
]

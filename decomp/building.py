"""From choices to factorized layers: decomposed weights, or the bare structure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from decomp.candidates import Candidate, require_finite
from decomp.choices import Choice
from decomp.layers import Factorized, group_kernels
from decomp.methods import Method, Ranks
from decomp.naming import naming
from decomp.progress import bar

MethodOf = Callable[[str], Method]


def decomposed(
    dense: Mapping[str, nn.Module],
    choices: Mapping[str, Choice],
    method_of: MethodOf,
    candidates: Mapping[str, Sequence[Candidate]],
    progress: bool | None,
) -> dict[str, Factorized]:
    """Decompose the weight of each layer as chosen; none of the dense layers is changed.

    Raises:
        ValueError: a weight is not finite; the message names the layer.
    """
    new = {}
    for name, module in bar(progress, "decompose", dense.items()):
        require_finite(name, module)
        method, ranks = method_of(name), choices[name].ranks
        with naming(name):
            factors = _factors(group_kernels(module).detach(), method, ranks, candidates.get(name, ()))
            new[name] = _layer(method, module).from_factors(module, factors)
    return new


def structures(
    dense: Mapping[str, nn.Module], choices: Mapping[str, Choice], method_of: MethodOf
) -> dict[str, Factorized]:
    """The factorized layers as chosen, with torch's own initialization."""
    return {
        name: _layer(method_of(name), module).like(module, choices[name].ranks) for name, module in dense.items()
    }


def _layer(method: Method, module: nn.Module) -> type[Factorized]:
    return cast(type[Factorized], method.layer_of(module))


def _factors(kernels: Tensor, method: Method, ranks: Ranks, candidates: Sequence[Candidate]) -> Any:
    """What was fitted when the ranks were chosen, if the weight is still the same; else the factors anew."""
    for candidate in candidates:
        if candidate.method is method and candidate.analysis.factors is not None:
            factors = candidate.analysis.factors(kernels, ranks)
            if factors is not None:
                return factors
    return method.factors(kernels, ranks)

"""From choices to factorized layers: decomposed weights, or the bare structure."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from decomp._util.naming import naming, require_finite
from decomp._util.progress import bar
from decomp.calibration.moments import Moments
from decomp.calibration.whitening import lost_mean, output_error, output_factors
from decomp.layers import Factorized, group_kernels
from decomp.linalg import as_float64
from decomp.methods import Method, Ranks
from decomp.network import surgery
from decomp.network.eligibility import ALREADY_FACTORIZED
from decomp.planning.candidate import Candidate
from decomp.planning.choice import Choice, describe


def require_fit(
    choices: Mapping[str, Choice], method_of: Callable[[str], Method], modules: Mapping[str, nn.Module]
) -> None:
    """Refuse layers that are not those that were chosen for, and ranks that they cannot have.

    Raises:
        ValueError: names the layer, what it is, and what the plan says.
    """
    for name, choice in choices.items():
        if not choice.ranks or isinstance(modules.get(name), Factorized):
            continue
        if name not in modules:
            raise ValueError(f"the plan was made for another model: this one has no layer {name!r}")
        module, method = modules[name], method_of(name)
        shape = tuple(getattr(getattr(module, "weight", None), "shape", ()))
        if (shape, describe(module)) != (choice.shape, choice.layer) or method.layer_of(module) is None:
            raise ValueError(
                f"the plan was made for another model: layer {name!r} is {describe(module)} with weight "
                f"{shape}, the plan says {choice.layer} with {choice.shape}"
            )
        limits = method.limits(group_kernels(module))
        fits = len(choice.ranks) == len(limits)
        if not fits or any(not 1 <= r <= most for r, most in zip(choice.ranks, limits, strict=True)):
            raise ValueError(f"layer {name!r}: ranks {choice.ranks} do not fit it, allowed are 1 to {limits}")


def layers_to_replace(
    model: nn.Module,
    choices: Mapping[str, Choice],
    method_of: Callable[[str], Method],
    *,
    needs_values: bool,
) -> dict[str, nn.Module]:
    """The dense layers of ``model`` that the choices replace; what is factorized as chosen already is left out.

    Raises:
        ValueError: the choices do not fit the model, a layer must not be replaced, or none is left to replace.
    """
    surgery.check_model(model)
    known = {name: module for module, names in surgery.names_of(model) for name in names}
    require_fit(choices, method_of, known)
    shared = surgery.shared_parameters(model)
    replaced: dict[str, nn.Module] = {}
    reasons = Counter(choice.reason for choice in choices.values() if not choice.ranks)
    for name, choice in choices.items():
        if not choice.ranks:
            continue
        module = known[name]
        if isinstance(module, Factorized):
            if (module.method, module.ranks) != (choice.method, choice.ranks):
                raise ValueError(f"layer {name!r} is {ALREADY_FACTORIZED}, with other ranks: {module.ranks}")
            reasons[ALREADY_FACTORIZED] += 1
            continue
        reason = surgery.refusal(module, shared, needs_values=needs_values)
        if reason:
            raise ValueError(f"layer {name!r} cannot be replaced: {reason}")
        replaced[name] = module
    if not replaced:
        counts = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(4))
        raise ValueError(f"no layer would be replaced: {counts or 'the model has no linear layer or convolution'}")
    return replaced


MethodOf = Callable[[str], Method]


def decomposed(
    dense: Mapping[str, nn.Module],
    choices: Mapping[str, Choice],
    method_of: MethodOf,
    candidates: Mapping[str, Sequence[Candidate]],
    statistics: Mapping[str, Moments],
    progress: bool | None,
) -> dict[str, Factorized]:
    """Decompose each layer as chosen, for its output where there are moments of it; no dense layer is changed.

    Warns of layers that were chosen from data whose statistics are not there.

    Raises:
        ValueError: a weight is not finite; the message names the layer.
    """
    new = {}
    missing = [name for name in dense if choices[name].output_error is not None and name not in statistics]
    if missing:
        warnings.warn(
            f"layer {missing[0]!r} was planned from data, which neither a file nor a model keeps: it is "
            "decomposed by its weight alone. Make the plan anew from data with decomp.plan(model, ranks=plan, "
            "data=...)",
            stacklevel=3,
        )
    for name, module in bar(progress, "decompose", dense.items()):
        require_finite(name, module)
        method, ranks = method_of(name), choices[name].ranks
        with naming(name):
            if name in statistics:
                new[name] = from_moments(module, method, ranks, statistics[name])
            else:
                candidate = next((each for each in candidates.get(name, ()) if each.method is method), None)
                new[name] = _from_weight(module, method, ranks, candidate)
    return new


def structures(
    dense: Mapping[str, nn.Module], choices: Mapping[str, Choice], method_of: MethodOf
) -> dict[str, Factorized]:
    """The factorized layers as chosen, with torch's own initialization.

    The random numbers are those that torch would draw next; its generators are left as they are.
    """
    devices = {cast(Tensor, module.weight).device for module in dense.values()}
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        return {
            name: _layer(method_of(name), module).like(module, choices[name].ranks)
            for name, module in dense.items()
        }


def _layer(method: Method, module: nn.Module) -> type[Factorized]:
    return cast(type[Factorized], method.layer_of(module))


def _from_weight(module: nn.Module, method: Method, ranks: Ranks, candidate: Candidate | None) -> Factorized:
    """Decompose the weight; what was fitted when the ranks were chosen serves, if the weight is still the same."""
    layer, kernels = _layer(method, module), group_kernels(module).detach()
    fitted = None if candidate is None or candidate.analysis.factors is None else candidate.analysis.factors
    factors = None if fitted is None else fitted(kernels, ranks)
    return layer.from_factors(module, method.factors(kernels, ranks) if factors is None else factors)


def from_moments(module: nn.Module, method: Method, ranks: Ranks, moments: Moments) -> Factorized:
    """Decompose the output of a layer, of which moments are known."""
    layer, kernels = _layer(method, module), group_kernels(module).detach()
    moments = moments.to(kernels.device)
    role_kernels = output_factors(method, layer, module, ranks, moments)
    found = layer.from_kernels(module, role_kernels)
    if layer.refittable(role_kernels) and layer.absorbs_inputs == "full":
        return found
    # The metric of the channels is no more than near that of the patches: where it can be checked, it is.
    plain = layer.from_factors(module, method.factors(kernels, ranks))
    errors = [output_error(each, module, moments) for each in (found, plain)]
    return plain if errors[0] is not None and errors[1] is not None and errors[1] < errors[0] else found


@torch.no_grad()
def correct_means(
    model: nn.Module,
    dense: Mapping[str, nn.Module],
    new: Mapping[str, Factorized],
    statistics: Mapping[str, Moments],
) -> None:
    """Put what the factors took off the mean of the outputs into the bias, or into the BatchNorm that follows.

    Only layers decomposed by their output; one with neither a bias nor a BatchNorm gets none.
    """
    for name, layer in new.items():
        moments = statistics.get(name)
        shift = None if moments is None else lost_mean(layer, dense[name], moments)
        if moments is None or shift is None:
            continue
        bias = layer.bias
        if bias is not None:
            bias.add_(shift.to(bias.dtype))
        elif moments.normalization:
            mean = cast(Tensor, model.get_submodule(moments.normalization).running_mean)
            mean.sub_(shift.to(mean.device, mean.dtype))


@torch.no_grad()
def measured(
    choices: Mapping[str, Choice],
    dense: Mapping[str, nn.Module],
    new: Mapping[str, Factorized],
    statistics: Mapping[str, Moments],
) -> dict[str, Choice]:
    """The choices of layers planned from data, with both errors as they are; without the data there is one."""
    found = {}
    for name, layer in new.items():
        if name in statistics:
            moments = statistics[name].to(cast(Tensor, dense[name].weight).device)
            output = output_error(layer, dense[name], moments)
            output = choices[name].output_error if output is None else output
            found[name] = replace(choices[name], error=weight_error(layer, dense[name]), output_error=output)
        elif choices[name].output_error is not None:
            found[name] = replace(choices[name], error=weight_error(layer, dense[name]), output_error=None)
    return found


def weight_error(layer: Factorized, dense: nn.Module) -> float:
    """Relative error of the weight, ||W - W'|| / ||W||."""
    weight = as_float64(cast(Tensor, dense.weight))
    energy = float(weight.norm())
    return float((weight - as_float64(layer.dense_weight())).norm()) / energy if energy else 0.0

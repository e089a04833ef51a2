"""Factorized layers from choices, with decomposed weights or untrained."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from decomp._util.io import digest
from decomp._util.naming import naming, require_finite
from decomp._util.progress import bar
from decomp._util.warn import warn
from decomp.calibration.moments import Moments
from decomp.calibration.whitening import mean_error, output_error, output_factors
from decomp.layers import Factorized, group_kernels
from decomp.linalg import as_float64
from decomp.methods import Method, Ranks
from decomp.network import surgery
from decomp.network.eligibility import ALREADY_FACTORIZED
from decomp.network.restoring import on_failure, restoring_values
from decomp.planning.candidate import Candidate
from decomp.planning.choice import Choice, describe


def require_fit(
    choices: Mapping[str, Choice], method_of: Callable[[str], Method], modules: Mapping[str, nn.Module]
) -> None:
    """Check that the layers are those of the choices, and that they can have the chosen ranks.

    Raises:
        ValueError: the message names the layer, its type and shape, and those of the plan.
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
    """The dense layers of ``model`` that the choices replace, without those that are factorized as chosen already.

    Raises:
        ValueError: the choices do not fit the model, a layer must not be replaced, or no layer would be replaced.
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
    """Decompose each layer as chosen, by its output if it has statistics, else by its weight; none is changed.

    Warns if a layer was planned from data, but its statistics are missing.

    Raises:
        ValueError: a weight is not finite; the message names the layer.
    """
    new = {}
    missing = [name for name in dense if choices[name].output_error is not None and name not in statistics]
    if missing:
        warn(
            f"layer {missing[0]!r} was planned from data, but plans from a file or a model hold no statistics: it "
            "is decomposed by its weight alone. Plan again with data: decomp.plan(model, ranks=plan, data=...)"
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
    """The factorized layers as chosen, with torch's default initialization.

    Torch's random generators are left as they were.
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
    """Decompose the weight; factors fitted during planning are reused if the weight is still the same."""
    layer, kernels = _layer(method, module), group_kernels(module).detach()
    fitted = None if candidate is None or candidate.analysis.factors is None else candidate.analysis.factors
    factors = None if fitted is None else fitted(kernels, ranks)
    return layer.from_factors(module, method.factors(kernels, ranks) if factors is None else factors)


def from_moments(module: nn.Module, method: Method, ranks: Ranks, moments: Moments) -> Factorized:
    """Decompose a layer so that the error of its output is small, under these moments."""
    layer, kernels = _layer(method, module), group_kernels(module).detach()
    moments = moments.to(kernels.device)
    role_kernels = output_factors(method, layer, module, ranks, moments)
    whitened = layer.from_kernels(module, role_kernels)
    if layer.absorbs_inputs == "nothing" or (layer.refittable(role_kernels) and layer.absorbs_inputs == "full"):
        return whitened
    # The metric of the channels only approximates that of the patches: use the plain factors if they are better.
    plain = layer.from_factors(module, method.factors(kernels, ranks))
    errors = [output_error(each, module, moments) for each in (whitened, plain)]
    return plain if errors[0] is not None and errors[1] is not None and errors[1] < errors[0] else whitened


@torch.no_grad()
def correct_means(
    model: nn.Module,
    dense: Mapping[str, nn.Module],
    new: Mapping[str, Factorized],
    statistics: Mapping[str, Moments],
) -> None:
    """Correct the mean of the outputs by the bias, or by the running mean of the BatchNorm that follows.

    Only for layers decomposed by their output; a layer with neither a bias nor a BatchNorm is not corrected.
    """
    for name, layer in new.items():
        moments = statistics.get(name)
        shift = None if moments is None else mean_error(layer, dense[name], moments)
        if moments is None or shift is None:
            continue
        bias = layer.bias
        if bias is not None:
            bias.add_(shift.to(bias.dtype))
        elif moments.normalization:
            norm = model.get_submodule(moments.normalization)
            on_failure(restoring_values(norm))
            mean = cast(Tensor, norm.running_mean)
            mean.sub_(shift.to(mean.device, mean.dtype))


@torch.no_grad()
def measured(
    choices: Mapping[str, Choice],
    dense: Mapping[str, nn.Module],
    new: Mapping[str, Factorized],
    candidates: Mapping[str, Sequence[Candidate]],
    statistics: Mapping[str, Moments],
) -> dict[str, Choice]:
    """The choices whose errors differ from those that were planned, with the measured errors.

    These are layers planned from data (both errors; that of the output needs statistics), and layers whose weight
    has changed since.
    """
    updated = {}
    for name, layer in new.items():
        if name in statistics:
            moments = statistics[name].to(cast(Tensor, dense[name].weight).device)
            output = output_error(layer, dense[name], moments)
            output = choices[name].output_error if output is None else output
            updated[name] = replace(choices[name], error=weight_error(layer, dense[name]), output_error=output)
        elif choices[name].output_error is not None:
            updated[name] = replace(choices[name], error=weight_error(layer, dense[name]), output_error=None)
        elif _has_changed(dense[name], candidates.get(name, ())):
            note = "; ".join(filter(None, (choices[name].note, "the weight has changed since the plan was made")))
            updated[name] = replace(choices[name], error=weight_error(layer, dense[name]), note=note)
    return updated


def weight_error(layer: Factorized, dense: nn.Module) -> float:
    """Relative error of the weight, ||W - W'|| / ||W||."""
    weight = as_float64(cast(Tensor, dense.weight))
    energy = float(weight.norm())
    return float((weight - as_float64(layer.dense_weight())).norm()) / energy if energy else 0.0


def _has_changed(dense: nn.Module, candidates: Sequence[Candidate]) -> bool:
    """Whether a layer has another weight than its candidates were made of."""
    return bool(candidates) and candidates[0].digest != digest(group_kernels(dense))

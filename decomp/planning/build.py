"""Factorized layers from choices, with decomposed weights or untrained."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from decomp._util.io import fingerprint
from decomp._util.naming import naming, require_finite
from decomp._util.progress import bar
from decomp._util.warn import warn
from decomp.calibration.moments import Moments
from decomp.calibration.recurrent import AnyMoments, RecurrentMoments
from decomp.calibration.sampling import little_data
from decomp.calibration.whitening import held_out_error, mean_error, output_error, output_factors, unknowns
from decomp.layers import Factorized
from decomp.layers.kernels import shape_of, weight_of
from decomp.linalg import as_float64, safe_scale
from decomp.methods import Method, Ranks
from decomp.network import surgery
from decomp.network.eligibility import ALREADY_FACTORIZED
from decomp.network.restoring import on_failure, restoring_values
from decomp.network.unpacking import NOT_COPIED, why_packed
from decomp.planning.candidate import Candidate, scale_of
from decomp.planning.choice import Choice, describe

CHANGED = "the weight has changed since the plan was made"
BY_WEIGHT = "by its weight alone: its factors from data are no better on held-out data"


class NothingToDecompose(ValueError):
    """No layer would be replaced; the message counts the reasons.

    Compression in stages can go on where one of them finds nothing to do::

        for name in ("layer1.*", "layer2.*"):
            try:
                small = decomp.tucker(small, ranks="vbmf", layers=name)
            except decomp.NothingToDecompose:
                continue
            decomp.finetune(small, data, teacher=model)
    """


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
        shape = shape_of(module)
        if (shape, describe(module)) != (choice.shape, choice.layer) or method.layer_of(module) is None:
            raise ValueError(
                f"the plan was made for another model: layer {name!r} is {describe(module)} with weight "
                f"{shape}, the plan says {choice.layer} with {choice.shape}"
            )
        limits = method.limits(method.kernels(module))
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
        ValueError: the choices do not fit the model, or a layer must not be replaced.
        NothingToDecompose: no layer would be replaced.
    """
    surgery.check_model(model)
    known = {name: module for module, names in surgery.names_of(model) for name in names}
    shared = surgery.shared_parameters(model)
    _require_unpacked(model, choices, known, shared)
    require_fit(choices, method_of, known)
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
        raise NothingToDecompose(
            f"no layer would be replaced: {counts or 'the model has no linear layer or convolution'}"
        )
    return replaced


def _require_unpacked(
    model: nn.Module,
    choices: Mapping[str, Choice],
    known: Mapping[str, nn.Module],
    shared: Mapping[int, list[str]],
) -> None:
    """Refuse to replace a layer of a module that stays packed."""
    for name, choice in choices.items():
        parent, _, role = name.rpartition(".")
        holder = known.get(parent) if choice.ranks else None
        unpacker = holder and surgery.unpacker_of(holder)
        if holder and unpacker and role in unpacker.roles:
            reason = why_packed(model, holder, shared) or NOT_COPIED
            raise ValueError(f"layer {name!r} cannot be replaced: {reason}")


MethodOf = Callable[[str], Method]


@dataclass(frozen=True)
class Decomposed:
    """A layer, a note on what was found, and what corrects the mean of its outputs if it is added to them."""

    layer: Factorized
    note: str = ""
    shift: Tensor | None = None


def decomposed(
    dense: Mapping[str, nn.Module],
    choices: Mapping[str, Choice],
    method_of: MethodOf,
    candidates: Mapping[str, Sequence[Candidate]],
    statistics: Mapping[str, AnyMoments],
    progress: bool | None,
) -> dict[str, Decomposed]:
    """Decompose each layer as chosen, by its output if it has statistics, else by its weight; none is changed.

    Warns if a layer was planned from data, but its statistics are missing.

    Raises:
        ValueError: a weight is not finite; the message names the layer.
    """
    new: dict[str, Decomposed] = {}
    missing = [name for name in dense if choices[name].output_error is not None and name not in statistics]
    if missing:
        warn(
            f"layer {missing[0]!r} was planned from data, but plans from a file or a model hold no statistics: it "
            "is decomposed by its weight alone. Plan again with data: decomp.plan(model, ranks=plan, data=...)"
        )
    for name, module in bar(progress, "decompose", dense.items()):
        require_finite(name, module)
        method, ranks = method_of(name), choices[name].ranks
        is_changed = has_changed(module, candidates.get(name, ()))
        candidate = None if is_changed else candidate_of(method, candidates.get(name, ()))
        with naming(name):
            if name in statistics:
                new[name] = from_moments(module, method, ranks, statistics[name], candidate)
            else:
                new[name] = Decomposed(
                    from_weight(module, method, ranks, candidate), CHANGED if is_changed else ""
                )
    return new


def has_changed(module: nn.Module, candidates: Sequence[Candidate]) -> bool:
    """Whether a layer has another weight than its candidates were made of."""
    return bool(candidates) and candidates[0].fingerprint != fingerprint(candidates[0].method.kernels(module))


def candidate_of(method: Method, candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate of a method, if there is one."""
    return next((each for each in candidates if each.method is method), None)


def structures(
    dense: Mapping[str, nn.Module], choices: Mapping[str, Choice], method_of: MethodOf
) -> dict[str, Factorized]:
    """The factorized layers as chosen, with torch's default initialization.

    Torch's random generators are left as they were.
    """
    devices = {next(module.parameters()).device for module in dense.values()}
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        return {
            name: _layer(method_of(name), module).like(module, choices[name].ranks)
            for name, module in dense.items()
        }


def _layer(method: Method, module: nn.Module) -> type[Factorized]:
    return cast(type[Factorized], method.layer_of(module))


def from_weight(module: nn.Module, method: Method, ranks: Ranks, candidate: Candidate | None = None) -> Factorized:
    """Decompose the weight; ``candidate`` is what is known of this very weight."""
    layer, kernels = _layer(method, module), method.kernels(module)
    scale = scale_of(kernels)
    scaled = kernels if scale == 1 else kernels / scale
    analysis = None if candidate is None else candidate.weight_analysis
    factors = None if analysis is None or analysis.factors is None else analysis.factors(scaled, ranks)
    if factors is None:
        bases = () if analysis is None or analysis.bases is None else analysis.bases(ranks)
        factors = method.factors(scaled, ranks, **({"bases": bases} if bases else {}))
    if scale == 1:
        return layer.from_factors(module, factors)
    role_kernels = layer.factor_kernels(module, factors)
    linear = [role for role, kernel in role_kernels.items() if kernel.is_floating_point()]  # others are indices
    share = scale ** (1 / len(linear))
    return layer.from_kernels(module, {**role_kernels, **{role: role_kernels[role] * share for role in linear}})


def from_moments(
    module: nn.Module, method: Method, ranks: Ranks, moments: AnyMoments, candidate: Candidate | None = None
) -> Decomposed:
    """Decompose a layer so that the error of its output is small, under these moments.

    The metric of the channels only approximates that of the patches, a fit may end in a worse minimum, and moments
    of little data are not those of other data: the factors of the weight alone are taken unless those of the
    moments are better on the rows that are held out.
    """
    moments = moments.to(next(module.parameters()).device)
    whitened = by_moments(module, method, ranks, moments)
    note = (
        ""
        if isinstance(moments, RecurrentMoments)
        else little_data(moments.positions, unknowns(whitened, moments))
    )
    is_judged = moments.held_out is not None
    is_best = (
        method.closed_form
        and whitened.absorbs_inputs == "full"
        and bool(whitened.refittable(cast(Any, dict(whitened.named_children()))))
    )
    error, shift = judged(whitened, module, moments)
    if not is_judged and (whitened.absorbs_inputs == "nothing" or is_best):
        return Decomposed(whitened, note, shift)
    plain = from_weight(module, method, ranks, candidate)
    error_of_plain, shift_of_plain = judged(plain, module, moments)
    if error is None or error_of_plain is None or error <= error_of_plain:
        return Decomposed(whitened, note, shift)
    note = "; ".join(filter(None, (BY_WEIGHT if is_judged else "", note)))
    return Decomposed(plain, note, shift_of_plain)


def by_moments(module: nn.Module, method: Method, ranks: Ranks, moments: AnyMoments) -> Factorized:
    """The layer with the factors of :func:`decomp.calibration.whitening.output_factors`."""
    layer = _layer(method, module)
    return layer.from_kernels(module, output_factors(method, layer, module, ranks, moments))


def judged(layer: Factorized, dense: nn.Module, moments: AnyMoments) -> tuple[float | None, Tensor | None]:
    """The error of the output, on held-out rows if there are any, and the correction of its mean if that helps."""
    if isinstance(moments, RecurrentMoments):
        error = held_out_error(layer, dense, moments)
        return output_error(layer, dense, moments) if error is None else error, None
    absorbs = layer.bias is not None or bool(moments.normalization)
    shift = mean_error(layer, dense, moments) if absorbs else None
    without = held_out_error(layer, dense, moments)
    if without is None:
        return output_error(layer, dense, moments), shift
    error = without if shift is None else cast(float, held_out_error(layer, dense, moments, shift))
    return (error, shift) if error < without else (without, None)


@torch.no_grad()
def correct_means(
    model: nn.Module,
    layers: Mapping[str, Factorized],
    new: Mapping[str, Decomposed],
    statistics: Mapping[str, AnyMoments],
) -> None:
    """Correct the mean of outputs by the bias of ``layers``, or the running mean of the BatchNorm that follows.

    Only for layers decomposed by their output; a layer with neither a bias nor a BatchNorm is not corrected.
    """
    for name, each in new.items():
        if each.shift is None:
            continue
        bias, moments = layers[name].bias, cast(Moments, statistics[name])
        if bias is not None:
            bias.add_(each.shift.to(bias.dtype))
        elif moments.normalization:
            norm = model.get_submodule(moments.normalization)
            on_failure(restoring_values(norm))
            mean = cast(Tensor, norm.running_mean)
            mean.sub_(each.shift.to(mean.device, mean.dtype))


@torch.no_grad()
def measured(
    choices: Mapping[str, Choice],
    dense: Mapping[str, nn.Module],
    new: Mapping[str, Decomposed],
    statistics: Mapping[str, AnyMoments],
) -> dict[str, Choice]:
    """The choices whose errors differ from those that were planned, with the measured errors.

    These are layers planned from data (both errors; that of the output needs statistics), and layers whose weight
    has changed since.
    """
    updated = {}
    for name, each in new.items():
        layer = each.layer
        if name in statistics:
            moments = statistics[name].to(next(dense[name].parameters()).device)
            output = output_error(layer, dense[name], moments)
            output = held_out_error(layer, dense[name], moments) if output is None else output
            output = choices[name].output_error if output is None else output
            note = "; ".join(filter(None, (choices[name].note, each.note)))
            error = weight_error(layer, dense[name])
            updated[name] = replace(choices[name], error=error, output_error=output, note=note)
        elif choices[name].output_error is not None:
            updated[name] = replace(choices[name], error=weight_error(layer, dense[name]), output_error=None)
        elif each.note:
            note = "; ".join(filter(None, (choices[name].note, each.note)))
            updated[name] = replace(choices[name], error=weight_error(layer, dense[name]), note=note)
    return updated


def weight_error(layer: Factorized, dense: nn.Module) -> float:
    """Relative error of the weight, ||W - W'|| / ||W||."""
    weight = weight_of(dense)
    scale = safe_scale(weight)
    weight = as_float64(weight) / scale
    energy = float(weight.norm())
    return float((weight - as_float64(layer.dense_weight()) / scale).norm()) / energy if energy else 0.0

"""Whether choices fit a model: the layers that they replace, checked one by one."""

from collections import Counter
from collections.abc import Callable, Mapping

from torch import nn

from decomp.layers import Factorized, group_kernels
from decomp.methods import Method
from decomp.network import surgery
from decomp.network.eligibility import ALREADY_FACTORIZED
from decomp.planning.choices import Choice, describe


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

"""Packed weights as layers: a view of the model in which every matrix can be planned by its name."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from decomp.layers.kernels import qualified_name
from decomp.layers.unpacked import Unpacked
from decomp.network import surgery

_OF_ATTENTION = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
NOT_COPIED = "its weights are packed, and the model cannot be copied to unpack them"


@surgery.outside_inference_mode()
def unpacked(model: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """Return the model with attention and fused experts unpacked, in a copy that shares its tensors.

    In the copy ``self_attn.q_proj``, ``experts.down_proj`` and the like are layers that are called. The given
    model is not touched, and is returned where nothing is unpacked. What must not be replaced stays packed: see
    :func:`why_packed`.

    Args:
        model: any model.
        names: names of layers: only modules that one of these is packed in are unpacked.
    """
    if not isinstance(model, nn.Module):
        return model
    packed = {
        each[0]: (module, unpacker)
        for module, each in surgery.names_of(model)
        if (unpacker := surgery.unpacker_of(module)) and (names is None or _holds_any(each[0], unpacker, names))
    }
    shared = surgery.shared_parameters(model) if packed else {}
    new = {
        name: unpacker.of(module)
        for name, (module, unpacker) in packed.items()
        if not why_packed(model, module, shared)
    }
    if not new:
        return model
    try:
        return surgery.swap(model, new, inplace=False, share=True)
    except TypeError:
        return model  # it cannot be copied


def why_packed(model: nn.Module, module: nn.Module, shared: Mapping[int, list[str]]) -> str:
    """The reason why the layers that are packed in a module cannot be replaced, or an empty string.

    ``shared`` is the result of :func:`decomp.network.surgery.shared_parameters`.
    """
    own = dict(module.named_parameters(recurse=False))
    parts = {name for name, _ in (*module.named_buffers(recurse=False), *module.named_children())}
    attention = isinstance(module, nn.MultiheadAttention)
    known = (
        {*_OF_ATTENTION, "bias_k", "bias_v", "out_proj"} if attention else {"gate_up_proj", "down_proj", "act_fn"}
    )
    odd = sorted({*own, *parts} - known)
    more = f"holds more than the weights that are unpacked: {', '.join(odd)}" if odd else ""
    held = surgery.reparametrization(module) or ("" if attention else _odd_experts(module)) or more
    held = held or surgery.hooks_of(module)
    if held:
        return held
    reason = _odd_attention(model, module, shared) if attention else ""
    unpacker: Any = surgery.unpacker_of(module)
    reasons = (
        *(surgery.odd_weight(weight, needs_values=False) for weight, _ in unpacker.weights_of(module).values()),
        *(surgery.tied(parameter, shared) for parameter in own.values()),
    )
    return reason or next(filter(None, reasons), "")


def _odd_attention(model: nn.Module, attention: Any, shared: Mapping[int, list[str]]) -> str:
    if type(attention) is not nn.MultiheadAttention:
        return f"{type(attention).__name__}, a subclass of MultiheadAttention: its forward may differ"
    if type(attention.out_proj) not in _LINEAR:
        return f"its out_proj is a {qualified_name(type(attention.out_proj))}, not a torch.nn.Linear"
    places = [child for module in model.modules() for child in module._modules.values()]
    if sum(child is attention.out_proj for child in places) > 1:
        return "its out_proj is a layer of another module as well"
    return surgery.refusal(attention.out_proj, shared, needs_values=False)


def _odd_experts(experts: Any) -> str:
    """Why experts do not compute W_down (act(g) * u) with (g, u) = W_gate_up x, or are spread over devices."""
    (experts_up, doubled, hidden), (experts_down, outputs, inner) = (
        experts.gate_up_proj.shape,
        experts.down_proj.shape,
    )
    if experts.has_bias:
        return "its experts have biases: only the weights of experts without are unpacked"
    if not experts.has_gate or getattr(experts, "has_post_expert_norm", False):
        return "its experts are not gated, or normalized: only gated ones without a norm are unpacked"
    if experts.is_transposed or (hidden, doubled) != (outputs, 2 * inner):
        return "its weights are stored input first: only (experts, outputs, inputs) is unpacked"
    if getattr(experts, "_is_expert_parallel", False) or not experts_up == experts_down == experts.num_experts:
        return "its experts are spread over several devices"
    return ""


def _holds_any(packed: str, unpacker: type[Unpacked], names: Collection[str]) -> bool:
    start = f"{packed}." if packed else ""
    return any(f"{start}{role}" in names for role in unpacker.roles)

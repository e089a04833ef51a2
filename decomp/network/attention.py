"""Packed attention as layers: a view of the model in which every projection can be planned by its name."""

from collections.abc import Collection, Mapping

from torch import nn

from decomp.layers import UnpackedAttention
from decomp.layers.attention import PROJECTIONS, projections_of
from decomp.network import surgery

_PARAMETERS = {
    *("in_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
    *(f"{role}_weight" for role in PROJECTIONS[:3]),
}
_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


@surgery.outside_inference_mode()
def unpacked(model: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """Return the model with its packed attention unpacked, in a copy that shares all tensors; else the model.

    In the copy ``self_attn.q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` are linear layers that are called.
    The given model is not touched. Attention that must not be replaced stays packed: see :func:`why_packed`.

    Args:
        model: any model.
        names: names of layers: only attention that one of these is a projection of is unpacked.
    """
    if not isinstance(model, nn.Module):
        return model
    packed = {
        each[0]: module
        for module, each in surgery.names_of(model)
        if isinstance(module, nn.MultiheadAttention) and (names is None or _holds_any(each[0], names))
    }
    shared = surgery.shared_parameters(model) if packed else {}
    new = {
        name: UnpackedAttention(module, share=True)
        for name, module in packed.items()
        if not why_packed(model, module, shared)
    }
    if not new:
        return model
    try:
        return surgery.swap(model, new, inplace=False, share=True)
    except TypeError:
        return model  # it cannot be copied


def why_packed(model: nn.Module, attention: nn.MultiheadAttention, shared: Mapping[int, list[str]]) -> str:
    """The reason why the projections of an attention cannot be replaced.

    ``shared`` is the result of :func:`decomp.network.surgery.shared_parameters`. It is empty where nothing stands
    in the way.
    """
    own = dict(attention.named_parameters(recurse=False))
    parts = {name for name, _ in (*attention.named_buffers(recurse=False), *attention.named_children())}
    odd = sorted({*own, *parts} - _PARAMETERS - {"out_proj"})
    more = f"holds more than its projections: {', '.join(odd)}" if odd else ""
    held = surgery.held_by_torch(attention) or more or surgery.hooks_of(attention)
    if held:
        return held
    if type(attention) is not nn.MultiheadAttention:
        return f"{type(attention).__name__}, a subclass of MultiheadAttention: its forward may differ"
    if type(attention.out_proj) not in _LINEAR:
        return f"its out_proj is {type(attention.out_proj).__name__}, a Linear is needed"
    reasons = [
        surgery.refusal(attention.out_proj, shared, needs_values=False),
        *(surgery.odd_weight(weight, needs_values=False) for weight, _ in projections_of(attention).values()),
        *(surgery.tied(parameter, shared) for parameter in own.values()),
        _used_elsewhere(model, attention),
    ]
    return next(filter(None, reasons), "")


def _used_elsewhere(model: nn.Module, attention: nn.MultiheadAttention) -> str:
    places = {
        (id(module), name)
        for module in model.modules()
        for name, child in module._modules.items()
        if child is attention.out_proj
    }
    return "" if len(places) == 1 else "its out_proj is a layer of another module as well"


def _holds_any(attention: str, names: Collection[str]) -> bool:
    start = f"{attention}." if attention else ""
    return any(f"{start}{role}" in names for role in PROJECTIONS)

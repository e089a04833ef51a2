"""Swapping modules inside a model: which can be swapped, why the others can not, and the swap."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

_WRAPPERS = {
    "OptimizedModule": "give the model that torch.compile was called with, and compile the result",
    "DistributedDataParallel": "give model.module, and wrap the result",
    "DataParallel": "give model.module, and wrap the result",
    "FullyShardedDataParallel": "decompose before sharding",
}


def check_model(model: object) -> None:
    """Refuse what no module can be swapped in: scripted, compiled and distributed models.

    Raises:
        TypeError: says which part it is and what to do instead.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a torch.nn.Module is needed, not {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"model.{name}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{where} is TorchScript, whose layers cannot be swapped: give the nn.Module it was made from"
            )
        remedy = _WRAPPERS.get(type(module).__name__)
        if remedy:
            raise TypeError(f"{where} is wrapped in {type(module).__name__}: {remedy}")


def names_of(model: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    """Every module once, with all the names it goes by, in the order of ``named_modules``."""
    names: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), (module, []))[1].append(name)
    yield from names.values()


def refusal(module: Any, shared: Mapping[int, list[str]]) -> str:
    """Return why this layer must not be swapped, or an empty string.

    ``shared`` is what :func:`shared_parameters` found. A swap would drop hooks, parametrizations and pruning
    masks, and untie weights that another layer uses as well.
    """
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        return "not initialized yet: run one batch through the model first"
    others = [name for p in module.parameters(recurse=False) for name in shared.get(_memory(p), [])]
    if parametrize.is_parametrized(module):
        return "parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    if hasattr(module, "weight_g"):
        return "weight_norm: call torch.nn.utils.remove_weight_norm first"
    if hasattr(module, "weight_mask"):
        return "pruned: call torch.nn.utils.prune.remove first"
    if hasattr(module, "weight_orig"):
        return "spectral_norm: call torch.nn.utils.remove_spectral_norm first"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, kind) for kind in hooks):
        return "has hooks, which a swap would drop: remove them first"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if others:
        return f"its weight is tied: {', '.join(others)} share it"
    own = {name for name, _ in [*module.named_parameters(), *module.named_buffers(), *module.named_children()]}
    if own - {"weight", "bias"}:
        return f"holds more than a weight and a bias: {', '.join(sorted(own - {'weight', 'bias'}))}"
    if module.weight is None or module.weight.is_meta:
        return "its weight is on the meta device, without values"
    if module.weight.numel() == 0:
        return "its weight is empty"
    return ""


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Parameters that several modules hold: their memory, and the names that they go by."""
    names: dict[int, list[str]] = {}
    for module, aliases in names_of(model):
        for name, parameter in module.named_parameters(recurse=False):
            if not is_lazy(parameter) and parameter.numel():
                names.setdefault(_memory(parameter), []).append(f"{aliases[0]}.{name}".lstrip("."))
    return {memory: found for memory, found in names.items() if len(found) > 1}


def swap(model: nn.Module, new: Mapping[str, nn.Module], *, inplace: bool) -> nn.Module:
    """Return ``model``, or a deep copy of it, with the named modules replaced under every name they go by.

    The weights of replaced layers are never copied. Parents that would read a weight instead of calling the
    layer are told to call it.

    Raises:
        ValueError: the model is itself the layer and ``inplace`` is true.
        TypeError: the model cannot be copied.
    """
    old = {name: model.get_submodule(name) for name in new}
    if not inplace:
        # deepcopy takes what the memo holds for an object that it has seen before: the swap is the copy.
        memo: dict[int, Any] = {id(module): new[name] for name, module in old.items()}
        try:
            model = copy.deepcopy(model, memo)
        except Exception as error:
            raise TypeError(f"the model cannot be copied ({error}): inplace=True changes the one given") from error
    else:
        if "" in new:
            raise ValueError(
                "the model is itself the layer to replace: leave inplace=True out and take the result"
            )
        replacement = {id(module): new[name] for name, module in old.items()}
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if id(child) in replacement:
                    parent._modules[name] = replacement[id(child)]
    _call_children(model, {id(module) for module in new.values()})
    return model


def _call_children(model: nn.Module, new: set[int]) -> None:
    """Turn off the fused path of transformer encoders that hold a new layer: it would read dense weights."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _holds(module, new):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and _holds(module, new):
            module.use_nested_tensor = False  # nested tensors run on the fused path alone


def _holds(module: nn.Module, wanted: set[int]) -> bool:
    return any(id(child) in wanted for child in module.modules())


def _memory(parameter: nn.Parameter) -> int:
    return parameter.data_ptr() if not parameter.is_meta else id(parameter)

"""Replacement of modules inside a model, and the reasons why some cannot be replaced."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from decomp.layers import Unpacked, UnpackedAttention, UnpackedExperts
from decomp.layers.factorized import Factorized, attributes_of, is_plain
from decomp.network.restoring import LOCK, OwnHook, Undo, on_failure, remove_own_hooks, training_of

_WRAPPERS = {
    "OptimizedModule": "give the model that torch.compile was called with, and compile the result",
    "DistributedDataParallel": "give model.module, and wrap the result",
    "DataParallel": "give model.module, and wrap the result",
    "FullyShardedDataParallel": "decompose before sharding",
}

ADAPTER = "part of an adapter, which is small already"
ADAPTED = "an adapter is on it: call merge_and_unload() first, or decompose first and add the adapter afterwards"
_UNPACKERS: tuple[type[Unpacked], ...] = (UnpackedAttention, UnpackedExperts)

_FUSED = "decomp_fused_path"  # the attribute of an encoder that holds its settings from before the swap
_UNFUSED: dict[type[nn.Module], dict[str, Any]] = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"use_nested_tensor": False},  # nested tensors run on the fused path alone
}


def check_model(model: object) -> None:
    """Refuse models in which no module can be replaced: scripted, compiled and distributed ones.

    Raises:
        TypeError: the message names the part, and what to do instead.
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
    """Every module once, with all its names, in the order of ``named_modules``."""
    names: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), (module, []))[1].append(name)
    yield from names.values()


def walk(model: nn.Module, closed: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    """Modules by their first name, without the submodules of modules of the closed types."""
    inside: list[str] = []
    for module, names in names_of(model):
        if any(names[0].startswith(prefix) for prefix in inside):
            continue
        yield names[0], module
        if isinstance(module, closed):
            inside += [f"{name}." if name else "" for name in names]


def unpacker_of(module: nn.Module) -> type[Unpacked] | None:
    """The type that unpacks a module which multiplies by packed weights, or None."""
    return next((each for each in _UNPACKERS if each.takes(module)), None)


def refusal(module: Any, shared: Mapping[int, list[str]], *, needs_values: bool = True) -> str:
    """Return the reason why this layer must not be replaced, or an empty string.

    ``shared`` is the result of :func:`shared_parameters`. Replacement would drop hooks, parametrizations and
    pruning masks, and untie weights that another layer uses too.
    """
    own = dict(module.named_parameters(recurse=False))
    if any(is_lazy(parameter) for parameter in own.values()):
        return "not initialized yet: run one batch through the model first"
    weights = [parameter for name, parameter in own.items() if name.startswith("weight")]
    return (
        _subclassed_tensor(own)
        or reparametrization(module)
        or hooks_of(module)
        or _odd_parts(module, own)
        or next(filter(None, (odd_weight(p, needs_values=needs_values) for p in weights)), "")
        or next(filter(None, (tied(parameter, shared) for parameter in own.values())), "")
    )


def reparametrization(module: Any) -> str:
    """Return a reparametrization by one of torch's utilities, and the call that removes it; or an empty string."""
    if parametrize.is_parametrized(module):
        return "parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    if hasattr(module, "weight_g"):
        return "weight_norm: call torch.nn.utils.remove_weight_norm first"
    if hasattr(module, "weight_mask"):
        return "pruned: call torch.nn.utils.prune.remove first"
    if hasattr(module, "weight_orig"):
        return "spectral_norm: call torch.nn.utils.remove_spectral_norm first"
    return ""


def _subclassed_tensor(own: Mapping[str, nn.Parameter]) -> str:
    """Why tensors that are not plain ones, quantized or sharded, cannot be decomposed; or an empty string."""
    for name, parameter in own.items():
        kind = type(parameter)
        if kind.__name__ == "DTensor":
            return "sharded (its weight is a DTensor): decompose before sharding"
        if not _is_plain(parameter):
            return (
                f"its {name} is a tensor of the type {kind.__name__}, which holds quantized or otherwise encoded "
                "values: decompose first, quantize afterwards"
            )
    return ""


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter is torch's own, or of a subclass that changes nothing of what torch does with it."""
    kind: Any = type(parameter)
    overriding = ("__torch_function__", "__torch_dispatch__")
    return issubclass(kind, nn.Parameter) and all(
        getattr(kind, name) is getattr(nn.Parameter, name) for name in overriding
    )


def modules_of_adapters(model: nn.Module) -> dict[int, str]:
    """Modules that belong to an adapter, by ``id``, with the reason why they stay dense.

    An adapter is a module of peft, or one that holds children ``lora_A`` and ``lora_B``. The layer that it adapts
    is among them: merging writes into the weight of that layer, and what is written into a product is lost.
    """
    reasons: dict[int, str] = {}
    for holder in model.modules():
        parts = {name.lower() for name in holder._modules}
        if not ({"lora_a", "lora_b"} <= parts or any(_is_of_peft(kind) for kind in type(holder).__mro__)):
            continue
        for name, module in holder.named_modules():
            base = name.split(".")[0] in ("", "base_layer", "original_module")
            reasons.setdefault(id(module), ADAPTED if base else ADAPTER)
    return reasons


def _is_of_peft(kind: type) -> bool:
    is_adapter = kind.__name__ in ("BaseTunerLayer", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper")
    return is_adapter and kind.__module__.split(".")[0] == "peft"


def hooks_of(module: nn.Module) -> str:
    """Return which hooks or patches of this module a replacement would drop, or an empty string."""
    own = dict(module.named_parameters(recurse=False))
    tensor_hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    dicts = (value for name, value in list(vars(module).items()) if name.endswith("_hooks"))
    on_module = any(not isinstance(hook, OwnHook) for hooks in dicts for hook in list(hooks.values()))
    if on_module or any(getattr(parameter, kind, None) for parameter in own.values() for kind in tensor_hooks):
        return "has hooks, which a swap would drop: remove them first"
    return "its forward was replaced on the instance" if "forward" in vars(module) else ""


def _odd_parts(module: nn.Module, own: Mapping[str, nn.Parameter]) -> str:
    """Parameters, buffers and children that its kind does not have, or a weight that is no parameter."""
    buffers, children = module.named_buffers(recurse=False), module.named_children()
    parts = {*own, *(name for name, _ in buffers), *(name for name, _ in children)}
    if isinstance(module, nn.RNNBase):
        what, usual = "its weights and biases", module._flat_weights_names
        is_usual = all(name in own for name in usual)
    else:
        what, usual = "a weight and a bias", ["weight", "bias"]
        is_usual = "weight" in own and ("bias" in own or getattr(module, "bias", None) is None)
    more = parts - set(usual)
    if more:
        return f"holds more than {what}: {', '.join(sorted(more))}"
    tensors = {id(parameter): name for name, parameter in own.items()}
    for name, value in attributes_of(module):
        if id(value) in tensors:
            return f"its attribute {name!r} is its {tensors[id(value)]} again: delete the attribute first"
    return "" if is_usual else "its weight or bias is no parameter"


def odd_weight(weight: Tensor, *, needs_values: bool) -> str:
    """Return the reason why a weight cannot be decomposed, whatever its values are, or an empty string."""
    if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {weight.dtype}: float64, float32, bfloat16 and float16 are decomposed"
    if weight.numel() == 0:
        return "its weight is empty"
    return "its weight is on the meta device, without values" if needs_values and weight.is_meta else ""


def tied(parameter: nn.Parameter, shared: Mapping[int, list[str]]) -> str:
    """Return which parameters have the same memory, from :func:`shared_parameters`, or an empty string."""
    names = shared.get(_memory(parameter))
    return f"its weight is tied: {', '.join(names)} share it" if names else ""


def shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Parameters that several modules share: all their names, by memory address."""
    names: dict[int, list[str]] = {}
    for module, aliases in names_of(model):
        for name, parameter in module.named_parameters(recurse=False):
            if not is_lazy(parameter) and parameter.numel():
                names.setdefault(_memory(parameter), []).append(f"{aliases[0]}.{name}".lstrip("."))
    return {memory: shared for memory, shared in names.items() if len(shared) > 1}


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Make ordinary parameters where the caller is in ``torch.inference_mode``: its own could never be trained."""
    grad = torch.is_grad_enabled()  # leaving inference mode turns gradients on
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def swap(model: nn.Module, new: Mapping[str, nn.Module], *, inplace: bool, share: bool = False) -> nn.Module:
    """Return ``model``, or a deep copy of it, with the named modules replaced, under all their names.

    The weights of replaced layers are never copied. Other attributes that were set on them are copied with the
    model: a reference from a replaced layer to its parent leads to the parent in the copy. Fused paths that would
    read the weight of a replaced layer instead of calling it are disabled. A layer that is packed in a
    module is replaced by unpacking that module, which is packed again once all of its layers are dense.

    With ``share`` the copy uses the tensors of ``model`` itself.

    Raises:
        ValueError: the model is itself the layer and ``inplace`` is true.
        TypeError: the model cannot be copied.
    """
    new = _with_whole_packings(model, new)
    old = {name: model.get_submodule(name) for name in new}
    if not inplace:
        # deepcopy uses the memo's entry for an object in place of a copy: that is the replacement.
        memo: dict[int, Any] = {id(module): new[name] for name, module in old.items()}
        if share:
            held = (value for module in model.modules() for value in vars(module).values())
            tensors = (*model.parameters(), *model.buffers(), *(each for each in held if isinstance(each, Tensor)))
            memo |= {id(tensor): tensor for tensor in tensors}
        original = model
        try:
            with LOCK:  # other threads may set hooks and flags on the model, for the time of a call
                model = copy.deepcopy(original, memo)
                for name, module in old.items():
                    _take_attributes(new[name], module, lambda value: copy.deepcopy(value, memo))
                remove_own_hooks(model)
                for module in original.modules():
                    if isinstance(memo.get(id(module)), nn.Module):
                        memo[id(module)].training = training_of(module)
                for name, module in old.items():
                    new[name].train(training_of(module))
        except Exception as error:
            raise TypeError(
                f"the model cannot be copied ({error}): write inplace=True to change the given model"
            ) from error
    else:
        if "" in new:
            raise ValueError(
                "the model is itself the layer to replace: leave inplace=True out and use the returned layer"
            )
        replacement = {id(module): new[name] for name, module in old.items()}
        _require_no_alias(model, replacement)
        on_failure(_restoring_structure(model))
        for name, module in old.items():
            _take_attributes(new[name], module, lambda value: _leading_to_new(value, model, replacement))
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if id(child) in replacement:
                    parent._modules[name] = replacement[id(child)]
    _set_fused_paths(model)
    return model


def _with_whole_packings(model: nn.Module, new: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Replace layers that are packed in a module by a replacement of the module, and so those that end dense."""
    whole: dict[str, nn.Module] = {}
    parts: dict[str, dict[str, nn.Module]] = {}
    for name, module in new.items():
        parent, _, role = name.rpartition(".")
        holder = model.get_submodule(parent) if name else None
        unpacker = type(holder) if isinstance(holder, Unpacked) else holder and unpacker_of(holder)
        if unpacker and role in unpacker.roles:
            parts.setdefault(parent, {})[role] = module
        else:
            whole[name] = module
    for name, layers in parts.items():
        holder = model.get_submodule(name)
        if not isinstance(holder, Unpacked):
            whole[name] = cast(type[Unpacked], unpacker_of(holder))(holder, layers)
        elif all(type(layer) is holder.part for layer in holder.layers(layers).values()):
            whole[name] = holder.packed(layers)
        else:
            whole |= {f"{name}.{role}".lstrip("."): layer for role, layer in layers.items()}
    return whole


def _restoring_structure(model: nn.Module) -> Undo:
    """A function that gives all modules of a model their present children and attributes again."""
    saved = [(module, dict(module._modules), dict(attributes_of(module))) for module in model.modules()]

    def restore() -> None:
        for module, children, attributes in saved:
            if module._modules != children:
                module._modules.clear()
                module._modules.update(children)
            for name in [name for name, _ in attributes_of(module) if name not in attributes]:
                del vars(module)[name]
            vars(module).update(attributes)

    return restore


def _take_attributes(new: nn.Module, old: nn.Module, taken: Callable[[Any], Any]) -> None:
    """Set on a new layer what was set on the old one, but for plain values, which it took when it was made."""
    for name, value in attributes_of(old):
        if not is_plain(value) and name not in vars(new) and not hasattr(type(new), name):
            vars(new)[name] = taken(value)  # setattr would make a child of a module


class _Memo(dict[int, Any]):
    """The memo of a deep copy, which notes whether the copy reached one of some objects."""

    def __init__(self, entries: Mapping[int, Any], sought: Iterable[int]) -> None:
        super().__init__(entries)
        self._sought = frozenset(sought)
        self.reached = False

    def get(self, key: int, default: Any = None) -> Any:
        self.reached |= key in self._sought
        return super().get(key, default)


def _leading_to_new(value: Any, model: nn.Module, replacement: Mapping[int, nn.Module]) -> Any:
    """The value itself, or, where it leads to a replaced layer, a copy that leads to the new one.

    The copy shares the other modules and tensors of the model.
    """
    shared: dict[int, Any] = {id(part): part for part in (*model.modules(), *model.parameters(), *model.buffers())}
    memo = _Memo({**shared, **replacement}, replacement)
    try:
        copied = copy.deepcopy(value, memo)
    except Exception:  # of whatever cannot be copied: a lock, a generator
        return value
    return copied if memo.reached else value


def _require_no_alias(model: nn.Module, replaced: Mapping[int, nn.Module]) -> None:
    """Refuse layers in a plain list or dict of a module, which would still call the replaced layer."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            if attribute != "_modules" and any(id(item) in replaced for item in held):
                where = f"{name}.{attribute}".lstrip(".")
                raise ValueError(f"{where} holds a layer that would be replaced: leave inplace=True out")


def _set_fused_paths(model: nn.Module) -> None:
    """Turn off the fused path of encoders that hold a factorized layer or an unpacked module: it reads weights.

    The old settings stay on the encoder, and come back when no such layer is left in it.
    """
    for module in model.modules():
        off = next((off for kind, off in _UNFUSED.items() if isinstance(module, kind)), None)
        if off is None:
            continue
        if any(isinstance(child, (Factorized, Unpacked)) for child in module.modules()):
            if not hasattr(module, _FUSED):
                setattr(module, _FUSED, {name: getattr(module, name) for name in off})
            vars(module).update(off)
        elif hasattr(module, _FUSED):
            vars(module).update(vars(module).pop(_FUSED))


def _memory(parameter: nn.Parameter) -> int:
    """What tells whether two parameters are the same memory; some tensor subclasses have 0 as their address."""
    return parameter.data_ptr() if _is_plain(parameter) and not parameter.is_meta else id(parameter)

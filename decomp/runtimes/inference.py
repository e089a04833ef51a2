"""A model as it is best run: BatchNorm folded, and 1x1 factors of neighbouring layers merged."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from decomp.layers import Factorized
from decomp.layers.factorized import copy_alone
from decomp.layers.kernels import CONVOLUTIONS
from decomp.network.batch_norm_folding import FOLDABLE, folded_layers
from decomp.network.forward import call, evaluating, hooked, to_device_of
from decomp.network.restoring import all_or_nothing
from decomp.network.surgery import check_model, outside_inference_mode, refusal, shared_parameters, swap


@all_or_nothing()
@outside_inference_mode()
def for_inference(model: nn.Module, example_inputs: Any) -> nn.Module:
    """Return a copy of the model that computes the same in eval mode with fewer operations.

    Every BatchNorm that directly follows a layer is folded into it, or into its last factor where the layer is
    factorized. Two 1x1 convolutions, or linear layers, of which the second is the only consumer of the first, such
    as the last factor of a layer and the first one of the next, become one, W = W_2 W_1 and b = W_2 b_1 + b_2,
    where that has fewer parameters. The copy is for inference: fine-tune, repair and save the model before.

    Args:
        model: any model, compressed or not; it is not changed.
        example_inputs: a batch as the model is called with: what follows a layer is traced on it.

    Raises:
        TypeError: the model is compiled, scripted or wrapped, or cannot be called with ``example_inputs``.

    Source: Jacob et al. 2018, section 3.2 (folding).

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).eval()
    >>> for_inference(model, torch.zeros(1, 64))
    Sequential(
      (0): Linear(in_features=64, out_features=8, bias=True)
      (1): Identity()
    )
    """
    check_model(model)
    leaves = {name: module for name, module in model.named_modules() if type(module) in FOLDABLE}
    new, _ = folded_layers(model, example_inputs, leaves)
    folded = swap(model, new, inplace=False)
    merged = _merged(folded, example_inputs)
    return swap(folded, _in_whole_layers(folded, merged), inplace=True) if merged else folded


def _in_whole_layers(model: nn.Module, new: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The replacements, with a factorized layer of which a factor is replaced as a plain chain of its factors."""
    whole: dict[str, nn.Module] = {}
    for name, module in new.items():
        parent, _, _ = name.rpartition(".")
        holder = model.get_submodule(parent)
        if not isinstance(holder, Factorized):
            whole[name] = module
            continue
        roles = ((role, f"{parent}.{role}".lstrip("."), child) for role, child in holder.named_children())
        chain = OrderedDict((role, new.get(full, child)) for role, full, child in roles)
        whole[parent] = nn.Sequential(chain).train(holder.training)
    return whole


def _merged(model: nn.Module, example_inputs: Any) -> dict[str, nn.Module]:
    """Pointwise layers and what takes their place: a merged layer, or ``nn.Identity`` after it."""
    shared = shared_parameters(model)
    pointwise = {
        name: module
        for name, module in model.named_modules()
        if _is_pointwise(module) and not refusal(module, shared) and _runs_in_a_chain(model, name)
    }
    next_of = _direct_successors(model, example_inputs, pointwise)
    new: dict[str, nn.Module] = {}
    while next_of:
        layers = {name: new.get(name, module) for name, module in pointwise.items()}
        saved = {name: _saved(layers[name], layers[after]) for name, after in next_of.items()}
        first = max(saved, key=lambda name: saved[name])
        if saved[first] <= 0:
            break
        second = next_of.pop(first)
        new[first], new[second] = _product(layers[first], layers[second]), nn.Identity()
        if second in next_of:
            next_of[first] = next_of.pop(second)
    return new


def _runs_in_a_chain(model: nn.Module, name: str) -> bool:
    """Whether a layer is no factor, or one of a layer that runs its factors one after the other."""
    holder = model.get_submodule(name.rpartition(".")[0])
    return not isinstance(holder, Factorized) or type(holder).forward is Factorized.forward


def _is_pointwise(module: Any) -> bool:
    if type(module) is nn.Linear:
        return True
    if type(module) not in CONVOLUTIONS or module.groups != 1:
        return False
    return all(size == 1 for size in (*module.kernel_size, *module.stride)) and (
        module.padding in ("same", "valid") or not any(module.padding)
    )


def _saved(first: Any, second: Any) -> int:
    """How many parameters fewer the product of two layers has."""
    if type(first) is not type(second):
        return 0
    outputs, inputs = len(second.weight), first.weight.shape[1]
    return int(first.weight.numel() + second.weight.numel() - outputs * inputs)


@torch.no_grad()
def _product(first: Any, second: Any) -> nn.Module:
    left, right = (layer.weight.flatten(1).double() for layer in (second, first))
    new: Any = copy_alone(first)
    shape = (len(left), right.shape[1], *first.weight.shape[2:])
    new.weight = nn.Parameter((left @ right).reshape(shape).to(first.weight), first.weight.requires_grad)
    if first.bias is not None or second.bias is not None:
        bias = left.new_zeros(len(left)) if second.bias is None else second.bias.double()
        if first.bias is not None:
            bias = bias + left @ first.bias.double()
        new.bias = nn.Parameter(bias.to(first.weight), first.weight.requires_grad)
    if isinstance(new, nn.Linear):
        new.out_features = len(left)
    else:
        new.out_channels = len(left)
    checked: nn.Module = new
    return checked


def _direct_successors(model: nn.Module, example_inputs: Any, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """By layer, the one that is the only consumer of its output; both are called once."""
    outputs: dict[str, list[Any]] = {name: [] for name in layers}
    inputs: dict[str, list[Any]] = {name: [] for name in layers}

    def after(name: str) -> Any:
        return lambda module, args, kwargs, output: outputs[name].append(output)

    def before(name: str) -> Any:
        return lambda module, args, kwargs: inputs[name].append((*args, *kwargs.values())[0])

    uses = _Uses()
    hooks = [(module, before(name)) for name, module in layers.items()]
    leaving = [(module, after(name)) for name, module in layers.items()]
    with hooked(hooks, leaving), evaluating(model), torch.no_grad(), uses:
        result = call(model, to_device_of(model, example_inputs))
    returned = {id(leaf) for leaf in tree_leaves(result)}
    once = {name: given[0] for name, given in inputs.items() if len(given) == 1}
    alone = {
        name: made[0]
        for name, made in outputs.items()
        if len(made) == 1 and uses.count(made[0]) == 1 and id(made[0]) not in returned
    }
    return {name: later for name, made in alone.items() for later, given in once.items() if given is made}


class _Uses(TorchFunctionMode):
    """Notes which tensors are arguments of torch functions that return tensors; keeps them, so that ids stay."""

    def __init__(self) -> None:
        super().__init__()
        self._used: list[Tensor] = []

    def count(self, tensor: Tensor) -> int:
        """How often a tensor was an argument."""
        return sum(used is tensor for used in self._used)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)) or func is Tensor.__setitem__:
            self._used += [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return result

"""BatchNorm taken up by the layer in front of it."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from decomp.layers import Factorized
from decomp.layers.factorized import copy_alone
from decomp.layers.kernels import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, is_input_first
from decomp.linalg import as_float64
from decomp.network.flops import observe
from decomp.network.forward import BATCH_NORMS
from decomp.network.selection import Selector, select
from decomp.network.surgery import (
    check_model,
    hooks_of,
    outside_inference_mode,
    refusal,
    shared_parameters,
    swap,
    walk,
)
from decomp.network.tracing import norms_behind

_LAYERS = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear)


@outside_inference_mode()
def fold_batch_norm(
    model: nn.Module,
    example_inputs: Any,
    *,
    inplace: bool = False,
    layers: Selector = None,
    exclude: Selector = (),
) -> nn.Module:
    """Return a copy of the model in which every BatchNorm that directly follows a layer is folded into it.

    W' = gamma / sqrt(var + eps) W and b' = gamma / sqrt(var + eps) (b - mean) + beta, per output channel: in eval
    mode the output is the same within rounding, and an ``nn.Identity`` stands where the BatchNorm was. Fold before
    a decomposition: the error of the weight then counts each output channel by the scale that the norm gives it,
    and the norm costs nothing any more. A model that is to be trained end to end afterwards better keeps its
    BatchNorm, which keeps the scales of layers apart from one another.

    What follows what is seen in one pass of ``example_inputs``. A BatchNorm is folded where it is called once, has
    running statistics and is all that the output of a convolution, plain or transposed, or of a linear layer goes
    to, with the channels on axis 1. Layers and norms that are tied, parametrized, pruned, hooked or read without
    being called, and subclasses, are left as they are.

    Args:
        model: any model; its train flags do not matter, and are kept.
        example_inputs: what the model is called with: a tensor, a tuple or list of arguments, or a mapping.
        inplace: change the given model and return it.
        layers: which layers; see :func:`decomp.tucker`.
        exclude: which of these to leave as they are.

    Raises:
        ValueError: no BatchNorm directly follows a layer, or a glob matches nothing.
        TypeError: the model or the inputs are of no use.

    Source: Jacob et al. 2018, section 3.2; ``torch.nn.utils.fusion``.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> image = torch.randn(1, 3, 6, 6)
    >>> folded = fold_batch_norm(model, image)
    >>> type(folded[1]).__name__, torch.allclose(folded(image), model(image), atol=1e-5)
    ('Identity', True)
    """
    check_model(model)
    chosen = _chosen(model, layers, exclude)
    behind = norms_behind(model, example_inputs, chosen)
    refused = _refused(model, example_inputs, behind)
    new: dict[str, nn.Module] = {}
    for name, norm_name in behind.items():
        if name not in refused:
            norm = model.get_submodule(norm_name)
            new[name] = _folded(chosen[name], norm)
            new[norm_name] = nn.Identity().train(norm.training)
    if not new:
        reasons = "".join(f"; {name!r} stays: {reason}" for name, reason in list(refused.items())[:4])
        raise ValueError(
            f"no BatchNorm directly follows a layer that can take it up{reasons}: go on with the model as it is "
            "(example_inputs must reach the layers; fold before decomposing)"
        )
    return swap(model, new, inplace=inplace)


def _chosen(model: nn.Module, layers: Selector, exclude: Selector) -> dict[str, nn.Module]:
    found = {name: module for name, module in walk(model, (Factorized,)) if isinstance(module, _LAYERS)}
    names = set(found) if layers is None else select(layers, found, "layers")
    if exclude is not None and exclude != ():
        names -= select(exclude, found, "exclude")
    return {name: module for name, module in found.items() if name in names}


def _refused(model: nn.Module, example_inputs: Any, behind: Mapping[str, str]) -> dict[str, str]:
    """The layers that a norm follows, but that must not take it up, and why."""
    shared = shared_parameters(model)
    tied = {name.rpartition(".")[0] for names in shared.values() for name in names}
    both = {name: model.get_submodule(name) for pair in behind.items() for name in pair}
    read = observe(model, example_inputs, both).read if both else set()
    reasons = {}
    for name, norm_name in behind.items():
        norm = both[norm_name]
        reason = refusal(both[name], shared) or hooks_of(norm)
        if type(both[name]) not in _LAYERS or type(norm) not in BATCH_NORMS:
            kinds = f"{type(both[name]).__name__} or {type(norm).__name__}"
            reason = reason or f"{kinds} is a subclass of torch's layer: it may compute otherwise"
        if norm_name in tied:
            reason = reason or f"the weight or bias of {norm_name!r} is tied"
        if name in read or norm_name in read:
            reason = reason or "the model reads its weight, or that of its norm, without calling it"
        if reason:
            reasons[name] = reason
    return reasons


@torch.no_grad()
def _folded(layer: nn.Module, norm: Any) -> nn.Module:
    """Group by group, since torch folds into a transposed kernel of one group only."""
    old: Any = layer
    transposed = is_input_first(layer)
    groups = old.groups if transposed else 1
    of_norm = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    parts = [
        fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift, transpose=transposed)
        for weight, bias, mean, variance, scale, shift in zip(
            *(_in_groups(tensor, groups) for tensor in (old.weight, old.bias, *of_norm)), strict=True
        )
    ]
    weight, bias = (torch.cat(each) for each in zip(*parts, strict=True))
    new: Any = copy_alone(layer)
    # Over the old one, so that dtype, device and memory format stay.
    new.weight.copy_(weight)
    trained = next((tensor for tensor in (old.bias, norm.bias) if tensor is not None), old.weight).requires_grad
    new.bias = nn.Parameter(bias.to(old.weight), requires_grad=trained)
    return cast(nn.Module, new)


def _in_groups(tensor: Tensor | None, groups: int) -> list[Any]:
    return [None] * groups if tensor is None else list(as_float64(tensor).chunk(groups))

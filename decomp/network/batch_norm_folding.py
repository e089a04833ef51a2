"""Folding of BatchNorm into the layer before it."""

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
from decomp.network.restoring import all_or_nothing
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
from decomp.network.tracing import following_norms

FOLDABLE = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear)


@all_or_nothing()
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
    mode the output is the same up to rounding, and an ``nn.Identity`` replaces the BatchNorm. Fold before a
    decomposition: the error of the weight is then weighted by the scale of each output channel, and the BatchNorm
    no longer costs time. For a model that will be trained end to end afterwards, do not fold: BatchNorm makes its
    training more stable.

    Which layer a BatchNorm follows is traced in one pass over ``example_inputs``. It is folded where it is
    called once, has running statistics, and is the only consumer of the output of one linear layer or
    convolution, plain or transposed, with the channels on axis 1. Layers and BatchNorms that are tied,
    parametrized, pruned, hooked or read without being called are not changed, nor are instances of subclasses.

    Args:
        model: any model; its train flags have no effect and do not change.
        example_inputs: a batch as the model is called with: a tensor, a tuple or list of arguments, or a mapping.
        inplace: change the given model and return it.
        layers: which layers; see :func:`decomp.tucker`.
        exclude: which of these not to change.

    Raises:
        ValueError: no BatchNorm directly follows a layer, or a glob matches nothing.
        TypeError: the model is compiled, scripted or wrapped, or cannot be called with ``example_inputs``.

    Source: Jacob et al. 2018, section 3.2; ``torch.nn.utils.fusion``.

    >>> conv = nn.Conv2d(3, 8, 3, bias=False)
    >>> model = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> image = torch.randn(1, 3, 6, 6)
    >>> folded = fold_batch_norm(model, image)
    >>> type(folded[1]).__name__, torch.allclose(folded(image), model(image), atol=1e-5)
    ('Identity', True)
    """
    check_model(model)
    new, refused = folded_layers(model, example_inputs, _chosen(model, layers, exclude))
    if not new:
        reasons = "".join(f"; {name!r} stays: {reason}" for name, reason in list(refused.items())[:4])
        raise ValueError(
            f"no BatchNorm directly follows a layer into which it can be folded{reasons}: use the model unfolded "
            "(example_inputs must reach the layers, and layers must not be decomposed yet)"
        )
    return swap(model, new, inplace=inplace)


def folded_layers(
    model: nn.Module, example_inputs: Any, chosen: Mapping[str, nn.Module]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """What to put in the place of layers and of the BatchNorms that follow them, and why some layers stay.

    Factors count as layers here: a BatchNorm after a factorized layer is folded into its last factor.
    """
    norm_of = following_norms(model, example_inputs, chosen)
    refused = _refused(model, example_inputs, norm_of)
    new: dict[str, nn.Module] = {}
    for name, norm_name in norm_of.items():
        if name not in refused:
            norm = model.get_submodule(norm_name)
            new[name] = _folded(chosen[name], norm)
            new[norm_name] = nn.Identity().train(norm.training)
    return new, refused


def _chosen(model: nn.Module, layers: Selector, exclude: Selector) -> dict[str, nn.Module]:
    dense = {name: module for name, module in walk(model, (Factorized,)) if isinstance(module, FOLDABLE)}
    names = set(dense) if layers is None else select(layers, dense, "layers")
    if exclude is not None and exclude != ():
        names -= select(exclude, dense, "exclude")
    return {name: module for name, module in dense.items() if name in names}


def _refused(model: nn.Module, example_inputs: Any, norm_of: Mapping[str, str]) -> dict[str, str]:
    """The layers whose following BatchNorm must not be folded into them, and why."""
    shared = shared_parameters(model)
    tied = {name.rpartition(".")[0] for names in shared.values() for name in names}
    both = {name: model.get_submodule(name) for pair in norm_of.items() for name in pair}
    read = observe(model, example_inputs, both).read if both else set()
    reasons = {}
    for name, norm_name in norm_of.items():
        norm = both[norm_name]
        reason = refusal(both[name], shared) or hooks_of(norm)
        if type(both[name]) not in FOLDABLE or type(norm) not in BATCH_NORMS:
            kinds = f"{type(both[name]).__name__} or {type(norm).__name__}"
            reason = reason or f"{kinds} is a subclass of torch's layer: its forward may differ"
        if norm_name in tied:
            reason = reason or f"the weight or bias of {norm_name!r} is tied"
        if name in read or norm_name in read:
            reason = reason or "the model reads its weight, or that of its BatchNorm, without calling it"
        if reason:
            reasons[name] = reason
    return reasons


@torch.no_grad()
def _folded(layer: nn.Module, norm: Any) -> nn.Module:
    """Fold group by group, because torch supports only one group for transposed convolutions."""
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
    # Copied into the old weight, which preserves dtype, device and memory format.
    new.weight.copy_(weight)
    trained = next((tensor for tensor in (old.bias, norm.bias) if tensor is not None), old.weight).requires_grad
    new.bias = nn.Parameter(bias.to(old.weight), requires_grad=trained)
    return cast(nn.Module, new)


def _in_groups(tensor: Tensor | None, groups: int) -> list[Any]:
    return [None] * groups if tensor is None else list(as_float64(tensor).chunk(groups))

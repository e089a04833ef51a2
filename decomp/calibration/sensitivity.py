"""The sensitivity of the network to errors in each layer, measured on data: weights for a budget."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from decomp._util.naming import naming
from decomp._util.progress import bar
from decomp.calibration.gradients import tracked
from decomp.data.batches import Batches
from decomp.layers import group_kernels, join_kernels
from decomp.layers.kernels import is_input_first
from decomp.linalg import as_float64, eigenbasis
from decomp.methods import kinds_of
from decomp.network.eligibility import eligible
from decomp.network.forward import (
    Unfused,
    call,
    difference,
    differentiable_in_eval,
    evaluating,
    flat_output,
    hooked,
    to_device_of,
)
from decomp.network.restoring import all_or_nothing
from decomp.network.selection import Selector
from decomp.network.unpacking import unpacked

KEPT_ENERGY = 0.75
SQUARED_ROUNDING = 1e-10  # a smaller relative error is rounding: the weight has exactly low rank


@all_or_nothing()
def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    batches: int = 4,
    layers: Selector = None,
    exclude: Selector = (),
    progress: bool | None = None,
) -> dict[str, float]:
    """Return a weight per layer for ``decomp.compress(..., weights=)``, from a few batches; nothing is changed.

    Without ``loss``, measured and without labels: one layer at a time is projected on the leading output
    directions that hold 75 % of its energy, and the weight is ||f'(x) - f(x)||^2 / ||f(x)||^2 of the network's
    output f divided by the squared relative error of the layer's weight. With ``loss``, from one backward pass
    per batch (Fisher): the weight is ||dL/dy||^2 ||y||^2 / n, the expected squared change of the loss L, to
    first order, for an error of relative size 1 and random direction in the layer's n output values y.

    Args:
        model: the dense model.
        data: batches, as the model is called with, or converted by ``inputs``.
        loss: a function of the model and a batch of ``data`` that returns the loss.
        inputs: returns the arguments of the model for a batch of ``data``.
        batches: how many batches are used.
        layers: which layers; see :func:`decomp.tucker`.
        exclude: which of these to leave out.
        progress: show a progress bar.

    Source: Theis et al. 2018 (Fisher); measured as in ASVD (Yuan et al. 2023), section 3.3.
    """
    model = unpacked(model)
    chosen = eligible(model, kinds_of(), layers, exclude)
    # A loss is called with the whole batch, labels included.
    source = Batches.in_fixed_order(data, inputs if loss is None else None, one_pass=True)
    used = [to_device_of(model, batch) for batch in islice(iter(source), batches)]
    if not used:
        raise ValueError("data is empty: at least one batch is needed")
    with evaluating(model), Unfused():
        if loss is not None:
            return _fisher(model, chosen, used, loss)
        return _measured(model, chosen, used, progress)


@torch.no_grad()
def _measured(
    model: nn.Module, layers: dict[str, nn.Module], batches: list[Any], progress: bool | None
) -> dict[str, float]:
    outputs = [flat_output(call(model, batch)) for batch in batches]
    energy = float(sum(output.square().sum() for output in outputs))
    weights = {}
    for name, layer in bar(progress, "sensitivity", layers.items()):
        with naming(name):
            cut, squared_error = _cut(layer)
        with _running_with(layer, cut):
            squared_change = sum(
                float(difference(model, flat_output(call(model, batch)), output).square().sum())
                for batch, output in zip(batches, outputs, strict=True)
            )
        is_changed = energy > 0 and squared_error > SQUARED_ROUNDING
        weights[name] = squared_change / energy / squared_error if is_changed else 0.0
    return weights


def _fisher(
    model: nn.Module, layers: dict[str, nn.Module], batches: list[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, float]:
    weights = dict.fromkeys(layers, 0.0)
    outputs: list[tuple[str, Tensor, float]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            leaves, structure = tree_flatten(output)  # that of a recurrent layer is its sequence, then its states
            sequence = leaves[0]
            differentiable, leaves[0] = tracked(sequence)
            outputs.append((name, differentiable, float(sequence.detach().float().square().mean())))
            return tree_unflatten(leaves, structure)

        return hook

    hooks = [(layer, watch(name)) for name, layer in layers.items()]
    with hooked(after=hooks), differentiable_in_eval(model):
        for batch in batches:
            outputs.clear()
            with torch.enable_grad():
                value = loss(model, batch)
                grads = torch.autograd.grad(value, [output for _, output, _ in outputs], allow_unused=True)
            for (name, _, mean_square), grad in zip(outputs, grads, strict=True):
                if grad is not None:
                    weights[name] += float(grad.float().square().sum()) * mean_square
    return weights


def _cut(layer: nn.Module) -> tuple[dict[str, Tensor], float]:
    """The weights by name, each projected on its leading output directions, and their squared relative error."""
    if isinstance(layer, nn.RNNBase):
        dense = {
            name: p[None] for name, p in layer.named_parameters() if name.startswith(("weight_ih", "weight_hh"))
        }
    else:
        dense = {"weight": group_kernels(layer)}
    dense = {name: as_float64(kernels) for name, kernels in dense.items()}
    cut = {name: _projected(kernels) for name, kernels in dense.items()}
    lost = sum(float((kernels - cut[name]).square().sum()) for name, kernels in dense.items())
    energy = sum(float(kernels.square().sum()) for kernels in dense.values())
    joined = {}
    for name, kernels in cut.items():
        weight = layer.get_parameter(name)
        joined[name] = join_kernels(kernels, input_first=is_input_first(layer)).to(weight.device, weight.dtype)
    return joined, lost / max(energy, 1e-300)


def _projected(kernels: Tensor) -> Tensor:
    """The kernels projected on the output directions that hold ``KEPT_ENERGY``, never on all."""
    matrices = kernels.flatten(2)
    values, basis = eigenbasis(matrices @ matrices.mT)
    shares = values.clamp(min=0).cumsum(-1) / values.sum(-1, keepdim=True).clamp(min=1e-300)
    rank = min(int((shares < KEPT_ENERGY).sum(-1).max()) + 1, matrices.shape[1] - 1)
    leading = basis[:, :, :rank]
    return (leading @ (leading.mT @ matrices)).reshape(kernels.shape)


@contextmanager
def _running_with(layer: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run ``layer`` with other weights inside the block; its own are not changed."""
    other: Any = copy.copy(layer)  # shares all but its parameters: other threads may run the layer itself
    changed = {name: nn.Parameter(weight, requires_grad=False) for name, weight in weights.items()}
    vars(other)["_parameters"] = {**layer._parameters, **changed}
    if isinstance(layer, nn.RNNBase):
        vars(other)["_flat_weights"] = [getattr(other, name) for name in layer._flat_weights_names]

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return other.forward(*args, **kwargs)

    with hooked(after=[(layer, hook)]):
        yield

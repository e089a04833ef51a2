"""How much the error of a layer counts for the network: weights for a budget, from data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from decomp._util.naming import naming
from decomp._util.progress import bar
from decomp.calibration.gradients import tracked
from decomp.data.batches import Batches
from decomp.layers import group_kernels, join_kernels
from decomp.layers.kernels import is_input_first
from decomp.linalg import as_float64
from decomp.methods import kinds_of
from decomp.network.eligibility import eligible
from decomp.network.forward import Unfused, call, evaluating, flat_output, hooked, to_device_of
from decomp.network.selection import Selector

KEPT_ENERGY = 0.75
SQUARED_ROUNDING = 1e-10  # what is cut from a weight of exactly low rank is rounding, and says nothing


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

    Without ``loss``, measured and without labels: each layer by itself is cut to the leading output directions
    that hold 75 % of its energy, and the weight is ||f'(x) - f(x)||^2 / ||f(x)||^2 of the network's output over
    the squared relative error of the layer. With ``loss``, from one backward pass per batch (Fisher): the weight
    is ||dL/dy||^2 ||y||^2 / n, what an error of the layer's output y in no special direction does to the loss.

    Args:
        model: the dense model.
        data: batches as the model is called with, or what ``inputs`` makes such batches of.
        loss: a function of the model and a batch of ``data`` that gives the loss.
        inputs: what the model is called with, from a batch.
        batches: how many batches are looked at.
        layers: which layers; see :func:`decomp.tucker`.
        exclude: which of these to leave out.
        progress: show a progress bar.

    Source: Theis et al. 2018 (Fisher); measured as in ASVD (Yuan et al. 2023), section 3.3.
    """
    chosen = eligible(model, kinds_of(), layers, exclude)
    # A loss takes the batch as it is, labels and all.
    source = Batches.in_fixed_order(data, inputs if loss is None else None)
    taken = [to_device_of(model, batch) for batch in islice(iter(source), batches)]
    if not taken:
        raise ValueError("data is empty: at least one batch is needed")
    with evaluating(model), Unfused():
        if loss is not None:
            return _fisher(model, chosen, taken, loss)
        return _measured(model, chosen, taken, progress)


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
            lost = sum(
                float((flat_output(call(model, batch)) - output).square().sum())
                for batch, output in zip(batches, outputs, strict=True)
            )
        cut_something = energy > 0 and squared_error > SQUARED_ROUNDING
        weights[name] = lost / energy / squared_error if cut_something else 0.0
    return weights


def _fisher(
    model: nn.Module, layers: dict[str, nn.Module], batches: list[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, float]:
    weights = dict.fromkeys(layers, 0.0)
    seen: list[tuple[str, Tensor, float]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            kept, copy = tracked(output)
            seen.append((name, kept, float(kept.detach().float().square().mean())))
            return copy

        return hook

    with hooked(after=[(layer, watch(name)) for name, layer in layers.items()]):
        for batch in batches:
            seen.clear()
            with torch.enable_grad():
                value = loss(model, batch)
                grads = torch.autograd.grad(value, [kept for _, kept, _ in seen], allow_unused=True)
            for (name, _, mean_square), grad in zip(seen, grads, strict=True):
                if grad is not None:
                    weights[name] += float(grad.float().square().sum()) * mean_square
    return weights


def _cut(layer: nn.Module) -> tuple[Tensor, float]:
    """The weight in its leading output directions, at least one direction less, and its squared relative error."""
    kernels = as_float64(group_kernels(layer))
    matrices = kernels.flatten(2)
    values, basis = torch.linalg.eigh(matrices @ matrices.mT)
    shares = values.clamp(min=0).flip(-1).cumsum(-1) / values.sum(-1, keepdim=True).clamp(min=1e-300)
    rank = min(int((shares < KEPT_ENERGY).sum(-1).max()) + 1, matrices.shape[1] - 1)
    leading = basis.flip(-1)[:, :, :rank]
    cut = (leading @ (leading.mT @ matrices)).reshape(kernels.shape)
    squared_error = float((kernels - cut).square().sum() / kernels.square().sum().clamp(min=1e-300))
    weight: Any = layer.weight
    joined = join_kernels(cut, input_first=is_input_first(layer))
    return joined.to(weight.device, weight.dtype), squared_error


@contextmanager
def _running_with(layer: nn.Module, weight: Tensor) -> Iterator[None]:
    """Let ``layer`` give what it would give with another weight; its own is not touched."""
    busy = False

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal busy
        if busy:
            return output
        busy = True
        try:
            return functional_call(module, {"weight": weight}, args, kwargs)
        finally:
            busy = False

    with hooked(after=[(layer, hook)]):
        yield

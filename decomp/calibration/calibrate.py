"""Calibration: the moments of what flows through every layer, from data, in memory that does not grow with it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from decomp._util.by_layer import ByLayer
from decomp._util.naming import naming
from decomp._util.progress import bar
from decomp.calibration.gradients import Slope, tracked
from decomp.calibration.moments import Moments, Sums
from decomp.data.batches import CLOSED_FORM_SPLIT, Batches, naming_batch
from decomp.methods import kinds_of
from decomp.network.eligibility import eligible
from decomp.network.forward import Unfused, call, evaluating, hooked, to_device_of
from decomp.network.selection import Selector
from decomp.network.tracing import norms_behind


class Statistics(ByLayer[Moments]):
    """The moments of every layer, by its name: ``data=`` of many plans, from one pass over the data."""

    def __init__(self, moments: Mapping[str, Moments], example: Any) -> None:
        super().__init__(moments)
        self.example = example

    def __repr__(self) -> str:
        return f"<Statistics of {len(self)} layers>"


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    inputs: Callable[[Any], Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | Literal["output"] | None = None,
    layers: Selector = None,
    exclude: Selector = (),
    progress: bool | None = None,
) -> Statistics:
    """Return the statistics that make factors minimize the error of each layer's output: ``data=`` of every call.

    One pass in eval mode; nothing is changed, BatchNorm statistics neither. Per layer the sums of x x^T over the
    input channels and of y y^T over the outputs, in float64: memory depends on the channels alone. Every fourth
    batch is held out to choose how far the moments are shrunk towards the metric of the weight.

    Args:
        model: the dense model.
        data: batches as the model is called with; labels are not needed.
        inputs: what the model is called with, from a batch: ``lambda batch: batch[0]`` where labels come with it.
        loss: what an error of a layer does to the network then counts, to first order, from a backward pass per
            batch, and a budget compares layers by it. "output": to the network's output, no labels needed. A
            function of the model and a batch of ``data``: to the loss that it gives, a scalar (Fisher), or to what
            it takes from the output, a tensor (an embedding, say).
        layers: which layers; see :func:`decomp.tucker`.
        exclude: which of these to leave out.
        progress: show a progress bar.

    Raises:
        ValueError: the data is empty.
        TypeError: a batch does not fit the model.

    Source: Zhang et al. 2016, section 3.1 (outputs); Theis et al. 2018 (Fisher); the change of an output f is
    ||J dy||^2, and E[J^T v v^T J] = J^T J for random v (Gauss-Newton).

    >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> statistics = calibrate(model, [torch.randn(16, 32) for _ in range(4)], progress=False)
    >>> statistics["2"].samples, statistics["2"].outputs.shape
    (64, torch.Size([1, 8, 8]))
    """
    modules = eligible(model, kinds_of(), layers, exclude)
    sums = {name: Sums(name, module) for name, module in modules.items()}
    example = None
    slope = None if loss is None else Slope(loss)
    own = callable(loss)  # a loss of the caller's takes the batch as it is, labels and all
    batches = Batches.in_fixed_order(data, None if own else inputs)
    with evaluating(model), Unfused(), torch.inference_mode(False):
        for count, batch in bar(progress, "calibrate", batches.numbered()):
            with naming_batch(count, batch):
                if example is None:
                    example = inputs(batch) if inputs is not None and own else batch
                    for name, norm in norms_behind(model, example, modules).items():
                        sums[name].feed(norm, model.get_submodule(norm))
                _watch(model, batch, sums, held_out=CLOSED_FORM_SPLIT.held_out(count), slope=slope)
    if example is None:
        raise ValueError("data is empty: at least one batch is needed")
    energy = 1.0 if slope is None else slope.energy
    return Statistics({name: each.moments(energy) for name, each in sums.items() if each.samples}, example)


def _watch(model: nn.Module, batch: Any, sums: Mapping[str, Sums], *, held_out: bool, slope: Slope | None) -> None:
    seen: list[tuple[Sums, Tensor]] = []

    def watch(each: Sums) -> Any:
        def hook(module: nn.Module, positional: Any, keywords: Any, output: Tensor) -> Tensor | None:
            received = positional[0] if positional else next(iter(keywords.values()))
            with naming(each.name), torch.no_grad():
                each.add(received.detach(), output.detach(), held_out=held_out)
            if slope is None:
                return None
            kept, copy = tracked(output)
            seen.append((each, kept))
            return copy

        return hook

    moved = to_device_of(model, batch)
    with hooked(after=[(each.module, watch(each)) for each in sums.values()]):
        if slope is None:
            with torch.no_grad():
                call(model, moved)
            return
        with torch.enable_grad():
            value = slope(model, tree_map(_normal, moved))
            if not seen:
                return
            if not value.requires_grad:
                raise ValueError(
                    "loss=: what it gives has no gradient, because the model runs under torch.no_grad, or the "
                    "loss does not read what the layers give: write loss=None"
                )
            grads = torch.autograd.grad(value, [kept for _, kept in seen], allow_unused=True)
        for (each, _), grad in zip(seen, grads, strict=True):
            if grad is not None:
                each.add_gradient(grad)


def _normal(leaf: Any) -> Any:
    """A tensor made in inference mode as one that gradients can go through."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf

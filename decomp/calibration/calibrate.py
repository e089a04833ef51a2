"""Calibration: second moments of the inputs and outputs of every layer, in memory independent of the data."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from decomp._util.by_layer import ByLayer
from decomp._util.naming import naming
from decomp._util.progress import bar
from decomp.calibration.gradients import SensitivityScalar, tracked
from decomp.calibration.moments import LayerSums, Moments
from decomp.data.batches import CLOSED_FORM_SPLIT, Batches, naming_batch
from decomp.methods import kinds_of
from decomp.network.eligibility import eligible
from decomp.network.forward import Unfused, call, evaluating, hooked, to_device_of
from decomp.network.restoring import all_or_nothing
from decomp.network.selection import Selector
from decomp.network.tracing import following_norms


class Statistics(ByLayer[Moments]):
    """The moments of every layer by its name: ``data=`` of any number of plans, from one pass over the data."""

    def __init__(self, moments: Mapping[str, Moments], example: Any) -> None:
        super().__init__(moments)
        self.example = example

    def __repr__(self) -> str:
        return f"<Statistics of {len(self)} layers>"


@all_or_nothing()
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
    """Return the moments of each layer's inputs and outputs, with which factors minimize the error of the output.

    They are the ``data=`` of any call that plans.

    One pass in eval mode; the model is not changed, nor are its BatchNorm statistics. Per layer the sums of x x^T
    over the input channels and of y y^T over the output channels are accumulated in float64: memory depends only
    on the number of channels. Every fourth batch is held out to choose how strongly the moments are shrunk, those
    of the inputs towards a multiple of the identity and those of the outputs towards W W^T.

    Args:
        model: the dense model.
        data: batches as the model is called with; labels are not needed.
        inputs: returns the arguments of the model for a batch: ``lambda batch: batch[0]`` for (input, label)
            pairs.
        loss: also measure the sensitivity of the network to errors in each layer, to first order, by one backward
            pass per batch; budgets then weight layers by it. "output": sensitivity of the network's output, no
            labels needed. A function of the model and a batch of ``data``: sensitivity of what it returns, a
            scalar loss (Fisher) or a tensor computed from the output (an embedding, for instance).
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
    sums = {name: LayerSums(name, module) for name, module in modules.items()}
    example = None
    scalar = None if loss is None else SensitivityScalar(loss)
    is_function = callable(loss)  # it is called with the whole batch, labels included
    batches = Batches.in_fixed_order(data, None if is_function else inputs)
    with evaluating(model), Unfused(), torch.inference_mode(False):
        for count, batch in bar(progress, "calibrate", batches.numbered()):
            with naming_batch(count, batch):
                if example is None:
                    example = inputs(batch) if inputs is not None and is_function else batch
                    for name, norm in following_norms(model, example, modules).items():
                        sums[name].set_following_norm(norm, model.get_submodule(norm))
                _watch(model, batch, sums, held_out=CLOSED_FORM_SPLIT.held_out(count), scalar=scalar)
    if example is None:
        raise ValueError("data is empty: at least one batch is needed")
    energy = 1.0 if scalar is None else scalar.energy
    return Statistics({name: each.moments(energy) for name, each in sums.items() if each.samples}, example)


def _watch(
    model: nn.Module,
    batch: Any,
    sums: Mapping[str, LayerSums],
    *,
    held_out: bool,
    scalar: SensitivityScalar | None,
) -> None:
    outputs: list[tuple[LayerSums, Tensor]] = []

    def watch(each: LayerSums) -> Any:
        def hook(module: nn.Module, positional: Any, keywords: Any, output: Tensor) -> Tensor | None:
            received = positional[0] if positional else next(iter(keywords.values()))
            with naming(each.name), torch.no_grad():
                each.add(received.detach(), output.detach(), held_out=held_out)
            if scalar is None:
                return None
            differentiable, copy = tracked(output)
            outputs.append((each, differentiable))
            return copy

        return hook

    moved = to_device_of(model, batch)
    with hooked(after=[(each.module, watch(each)) for each in sums.values()]):
        if scalar is None:
            with torch.no_grad():
                call(model, moved)
            return
        with torch.enable_grad():
            value = scalar(model, tree_map(_normal, moved))
            if not outputs:
                return
            if not value.requires_grad:
                raise ValueError(
                    "loss=: its value has no gradient, because the model runs under torch.no_grad, or the loss "
                    "does not depend on the outputs of the layers: write loss=None"
                )
            grads = torch.autograd.grad(value, [output for _, output in outputs], allow_unused=True)
        for (each, _), grad in zip(outputs, grads, strict=True):
            if grad is not None:
                each.add_gradient(grad)


def _normal(leaf: Any) -> Any:
    """Clone a tensor made in inference mode, which autograd refuses; other leaves are returned unchanged."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf

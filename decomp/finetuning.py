"""Fine-tuning layer by layer: every factorized layer learns to give what the dense layer gave."""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decomp import tables
from decomp.activations import Activations, Batches, Pair, RoutedDifferently
from decomp.following import Tail, follow, tails
from decomp.forward import evaluating
from decomp.layers import Factorized
from decomp.naming import naming
from decomp.progress import bar

FINAL_LEARNING_RATE_SHARE = 0.01


@dataclass(frozen=True)
class LayerReport:
    """Relative error of one layer's output, after its normalization and activation, before and after training."""

    error_before: float
    error_after: float
    steps: int
    seconds: float
    note: str = ""


class FinetuneReport(Mapping[str, LayerReport]):
    """What fine-tuning did to each layer, in the order of execution; printed, a table."""

    def __init__(self, layers: Mapping[str, LayerReport]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, name: str) -> LayerReport:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __str__(self) -> str:
        rows = [
            (name, f"{r.error_before:.3f} => {r.error_after:.3f}", str(r.steps), f"{r.seconds:.1f}", r.note)
            for name, r in self.items()
        ]
        return tables.render("", ("layer", ">error of the output", ">steps", ">seconds", "note"), rows)


def finetune_layerwise(
    small: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    *,
    steps: int = 300,
    lr: float = 2e-3,
    inputs: Callable[[Any], Any] | None = None,
    cache_bytes: int = 2**28,
    progress: bool | None = None,
) -> FinetuneReport:
    """Train each factorized layer of ``small``, in place, to reproduce what the layer gave in ``dense``.

    Layer by layer in the order of execution: minimize ||phi(f(x)) - phi(y)||^2 / ||phi(y)||^2 over the factors of
    f, with x the input that the layer gets in the partly compressed network, y the output of the dense layer in
    the dense network, and phi the normalization and activation that follow the layer, where there are any. Adam,
    cosine schedule. No labels are needed. A layer whose error did not fall gets its old factors back.

    Args:
        small: what :func:`decomp.tucker` returned.
        dense: the model it was made from, in which nothing is changed.
        data: an iterable of batches that can be gone through again (a DataLoader, a list). A tensor is one
            argument of the model, a tuple or list positional ones, a mapping keywords.
        steps: gradient steps per layer.
        lr: learning rate at the start.
        inputs: what the model is called with, from a batch: ``lambda batch: batch[0]`` where labels come with it.
        cache_bytes: inputs and targets of a layer that are held in memory at once.
        progress: show a progress bar; by default where there is a terminal.

    Raises:
        ValueError: there is nothing to train, ``dense`` does not match ``small``, or the data is empty.
        TypeError: the data can be gone through only once, or a batch does not fit the model.

    Source: FitNets (Romero et al. 2015), equation 3, per layer; asymmetric inputs after Zhang et al. 2016, 3.3.
    """
    pairs = _pairs(small, dense)
    batches = Batches(data, inputs)
    small_tails = _tails(small, batches, {name: pair[0] for name, pair in pairs.items()})
    dense_tails = _tails(dense, batches, {name: pair[1] for name, pair in pairs.items()})
    order = [name for name in small_tails if name in dense_tails]
    reports: dict[str, LayerReport] = {}
    with bar(progress, "fine-tune", total=steps * len(order)) as steps_bar, torch.inference_mode(False):
        for name in order:
            steps_bar.set_postfix_str(name)
            activations = Activations(small, dense, *pairs[name], dense_tails[name], batches, cache_bytes)
            with evaluating(small, dense), naming(name):
                reports[name] = _train(pairs[name][0], activations, small_tails[name], steps, lr, steps_bar.update)
    for name in pairs.keys() - set(order):
        reports[name] = LayerReport(math.nan, math.nan, 0, 0.0, "the data never reaches it")
    return FinetuneReport(reports)


def _tails(model: nn.Module, batches: Batches, layers: Mapping[str, nn.Module]) -> dict[str, Tail]:
    """Tails in the order of execution, from as many batches as it takes to reach every layer."""
    found: dict[str, Tail] = {}
    empty = True
    for batch in batches:
        empty = False
        found |= tails(model, batch, {name: layer for name, layer in layers.items() if name not in found})
        if len(found) == len(layers):
            break
    if empty:
        raise ValueError("data is empty: at least one batch is needed")
    return found


def _pairs(small: nn.Module, dense: nn.Module) -> dict[str, tuple[Factorized, nn.Module]]:
    """The factorized layers of ``small`` and the layers of ``dense`` that they stand for."""
    factorized = {name: module for name, module in small.named_modules() if isinstance(module, Factorized)}
    known = dict(dense.named_modules())
    if not factorized:
        swapped = any(isinstance(module, Factorized) for module in known.values())
        hint = "the order is finetune_layerwise(small, dense, data)" if swapped else "compress the model first"
        raise ValueError(f"small has no factorized layer: {hint}")
    for name, layer in factorized.items():
        twin = known.get(name)
        shape = getattr(getattr(twin, "weight", None), "shape", None)
        if twin is None or isinstance(twin, Factorized) or shape != layer.dense_shape:
            found = "nothing" if twin is None else type(twin).__name__ + f" with weight {shape}"
            raise ValueError(
                f"layer {name!r}: dense has {found} where small has {type(layer).__name__} of weight "
                f"{layer.dense_shape}: give the model that small was made from"
            )
    return {name: (layer, known[name]) for name, layer in factorized.items()}


def _train(
    layer: Factorized, activations: Activations, tail: Tail, steps: int, lr: float, advance: Callable[[int], Any]
) -> LayerReport:
    """Train a copy of ``layer``, and take it over where its error is lower."""
    start = time.perf_counter()
    try:
        window, whole = next(activations.windows(), ([], True))
    except RoutedDifferently:
        advance(steps)
        return LayerReport(math.nan, math.nan, 0, time.perf_counter() - start, "routed differently: not trained")
    if not window:
        raise ValueError("data came out empty on a later pass: give what can be gone through again")
    before = _error(layer, window, tail)
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        advance(steps)
        return LayerReport(before, before, 0, time.perf_counter() - start, "frozen: not trained")
    student = copy.deepcopy(layer)
    if next(layer.parameters()).dtype.itemsize < 4:
        student.float()  # half precision is too coarse for the steps of an optimizer
    pairs = itertools.cycle(window) if whole else _stream(activations)
    done = _descend(student, itertools.islice(pairs, steps), tail, steps, lr, advance)
    advance(steps - done)
    trained = copy.deepcopy(layer)
    trained.load_state_dict(student.state_dict())
    after = _error(trained, window, tail)
    seconds = time.perf_counter() - start
    if not after < before:
        return LayerReport(before, before, done, seconds, "no gain: its factors were kept")
    layer.load_state_dict(trained.state_dict())
    return LayerReport(before, after, done, seconds)


def _stream(activations: Activations) -> Iterator[Pair]:
    while True:
        for window, _ in activations.windows():
            yield from window


def _descend(
    student: nn.Module, pairs: Iterable[Pair], tail: Tail, steps: int, lr: float, advance: Callable[[int], Any]
) -> int:
    """Run Adam over the pairs and return the number of steps; it ends early where the loss is not finite."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, lr * FINAL_LEARNING_RATE_SHARE)
    done = 0
    for received, target in pairs:
        with torch.enable_grad():
            energy = target.float().square().sum().clamp(min=torch.finfo(torch.float32).tiny)
            loss = _squared_error(student, received, target, tail) / energy
        if not torch.isfinite(loss):
            break
        optimizer.zero_grad()
        loss.backward(inputs=parameters)
        optimizer.step()
        schedule.step()
        done += 1
        advance(1)
    return done


def _squared_error(layer: nn.Module, received: Tensor, target: Tensor, tail: Tail) -> Tensor:
    dtype = next(layer.parameters()).dtype
    result = follow(layer(received.to(dtype)).to(target.dtype), tail)
    return (result.float() - target.float()).square().sum()


@torch.no_grad()
def _error(layer: nn.Module, window: list[Pair], tail: Tail) -> float:
    """Relative error over a window: sqrt(sum ||phi(f(x)) - phi(y)||^2 / sum ||phi(y)||^2)."""
    lost = sum(_squared_error(layer, received, target, tail).item() for received, target in window)
    energy = sum(target.float().square().sum().item() for _, target in window)
    return math.sqrt(lost / energy) if energy else math.sqrt(lost)

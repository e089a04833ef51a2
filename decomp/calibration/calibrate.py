"""Calibration: second moments of the inputs and outputs of every layer, in memory independent of the data."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from decomp._util import tables
from decomp._util.by_layer import ByLayer
from decomp._util.naming import naming
from decomp._util.progress import bar
from decomp.calibration.gradients import (
    NoGradient,
    SavesTooMuch,
    SensitivityScalar,
    saving_at_most,
    tracked,
)
from decomp.calibration.moments import LayerSums
from decomp.calibration.recurrent import AnyMoments, RecurrentSums, requiring_gradients
from decomp.calibration.sampling import Positions, Sampling
from decomp.data.batches import Batches, FitSplit, Mask, naming_batch, rows_of, some_rows
from decomp.data.levels import leveled
from decomp.layers import routes_rows
from decomp.methods import kinds_of
from decomp.network.eligibility import eligible
from decomp.network.forward import Unfused, call, differentiable_in_eval, evaluating, hooked, to_device_of
from decomp.network.restoring import all_or_nothing
from decomp.network.selection import Selector
from decomp.network.tracing import following_norms
from decomp.network.unpacking import unpacked

_Sums: TypeAlias = Mapping[str, LayerSums | RecurrentSums]


class Statistics(ByLayer[AnyMoments]):
    """The moments of every layer by its name: ``data=`` of any number of plans, from one pass over the data.

    Printed, it is a table of how many samples and positions were used, and of the standard errors.
    """

    def __init__(self, moments: Mapping[str, AnyMoments], example: Any) -> None:
        super().__init__(moments)
        self.example = example

    def __repr__(self) -> str:
        return f"<Statistics of {len(self)} layers>"

    def __str__(self) -> str:
        rows = [
            (
                name or "(the model)",
                str(m.samples),
                str(m.positions),
                str(m.of_positions),
                f"{m.standard_error:.3f}",
            )
            for name, m in self.items()
        ]
        return tables.render("", ("layer", ">samples", ">positions", ">of", ">standard error"), rows)


@all_or_nothing()
def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    inputs: Callable[[Any], Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | Literal["output"] | None = None,
    layers: Selector = None,
    exclude: Selector = (),
    positions: Positions = "auto",
    held_out: bool = True,
    mask: Mask = "attention_mask",
    progress: bool | None = None,
) -> Statistics:
    """Return the moments of each layer's inputs and outputs, with which factors minimize the error of the output.

    They are the ``data=`` of any call that plans.

    One pass in eval mode; the model is not changed, nor are its BatchNorm statistics. Per layer the sums of x x^T
    over the input channels and of y y^T over the output channels are accumulated in float64: memory depends only
    on the number of channels. The sums are over a sample of the positions, drawn with a fixed seed, evenly over
    batches and positions: ten positions per channel, and more where they cost little, say as much as all, because
    neighbouring positions are alike. ``print(statistics)`` shows how many were used. Every fourth batch is held
    out of the sums (of fewer than four different batches, and of a generator, the last quarter of the rows of
    each): on it is chosen how strongly the moments are shrunk, those of the inputs towards a multiple of the
    identity and those of the outputs towards W W^T, and factors from the moments are taken only where they are
    better there than those of the weight alone.

    Args:
        model: the dense model.
        data: batches as the model is called with; labels are not needed. They are gone through once: a generator
            will do.
        inputs: returns the arguments of the model for a batch: ``lambda batch: batch[0]`` for (input, label)
            pairs.
        loss: also measure the sensitivity of the network to errors in each layer, to first order, by one backward
            pass per batch; budgets then weight layers by it. "output": sensitivity of the network's output, no
            labels needed. A function of the model and a batch of ``data``: sensitivity of what it returns, a
            scalar loss (Fisher) or a tensor computed from the output (an embedding, for instance).
        layers: which layers; see :func:`decomp.tucker`.
        exclude: which of these to leave out.
        positions: how many positions of each layer's inputs and outputs (of images, of texts) are used: "auto", a
            number, or "all".
        held_out: hold rows out, to judge on. Without, the moments are those of all rows, and factors from them are
            taken unseen.
        mask: what is padding and does not count, for layers whose inputs and outputs are (batch, length,
            channels): a key of the batches, or a function of a batch of ``data`` that returns a tensor (batch,
            length), 0 at padding; None counts all. Other layers, convolutions and recurrent ones for instance,
            count all positions.
        progress: show a progress bar.

    Raises:
        ValueError: the data is empty, or ``positions`` is none of these.
        TypeError: a batch does not fit the model, or ``mask`` is none of these.

    Source: Zhang et al. 2016, section 3.1 (outputs; ten positions of each image); Theis et al. 2018 (Fisher);
    the change of an output f is ||J dy||^2, and E[J^T v v^T J] = J^T J for random v (Gauss-Newton).

    >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> data = [torch.randn(16, 32) for _ in range(4)]
    >>> statistics = calibrate(model, data, progress=False)
    >>> statistics["2"].samples, statistics["2"].outputs.shape
    (64, torch.Size([1, 8, 8]))
    """
    scalar = None if loss is None else SensitivityScalar(loss)
    chosen: Any = {"layers": layers, "exclude": exclude, "positions": positions, "held_out": held_out}
    return gather(model, data, scalar, inputs=inputs, mask=mask, progress=progress, **chosen)


def gather(
    model: nn.Module,
    data: Iterable[Any],
    scalar: SensitivityScalar | None,
    *,
    inputs: Callable[[Any], Any] | None,
    layers: Selector,
    exclude: Selector,
    positions: Positions,
    held_out: bool,
    mask: Mask,
    progress: bool | None,
    most_bytes: int | None = None,
) -> Statistics:
    """What :func:`calibrate` does, for any scalar to differentiate; with None there are no gradients.

    With ``most_bytes`` gradients are those of rows that nothing is judged on, and of as many of the first rows of
    each batch as need no more memory.

    Raises:
        NoGradient: there are none, and ``scalar`` was given.
    """
    is_function = scalar is not None and scalar.takes_whole_batches
    to_inputs = inputs or (lambda batch: batch)
    batches = Batches.in_fixed_order(data, None if is_function else inputs, mask, one_pass=True)
    sampling, split = Sampling(positions, batches.length), batches.fit_split() if held_out else None
    model = unpacked(model)
    modules = eligible(model, kinds_of(), layers, exclude)
    sums = {name: _sums_of(name, module, sampling, split) for name, module in modules.items()}
    cautious = None
    if most_bytes is not None and scalar is not None and split is not None:
        cautious = _CautiousGradients(scalar, split, most_bytes)
    example = None
    with evaluating(model), Unfused(), torch.inference_mode(False):
        for count, batch, kept in bar(progress, "calibrate", batches.masked()):
            with naming_batch(count, batch):
                if example is None:
                    example = to_inputs(batch) if is_function else batch
                    for name, norm in following_norms(model, example, modules).items():
                        cast(LayerSums, sums[name]).set_following_norm(norm, model.get_submodule(norm))
                batch, add = to_device_of(model, batch), _Adding(count, kept)
                if cautious is None:
                    _watch(model, batch, sums, add, scalar, None)
                else:
                    cautious.watch(model, batch, sums, add)
    if example is None:
        raise ValueError("data is empty: at least one batch is needed")
    energy = 1.0 if scalar is None else scalar.energy
    return Statistics({name: each.moments(energy) for name, each in sums.items() if each.samples}, example)


def _sums_of(
    name: str, module: nn.Module, sampling: Sampling, split: FitSplit | None
) -> LayerSums | RecurrentSums:
    if isinstance(module, nn.RNNBase):
        return RecurrentSums(name, module, split)
    return LayerSums(name, module, sampling, split=split)


def _watch(
    model: nn.Module, batch: Any, sums: _Sums, add: "_Adding", scalar: SensitivityScalar | None, rows: int | None
) -> None:
    """Add a batch to the sums, and with a scalar its gradients: of the first ``rows`` of the batch, or of all."""
    if scalar is None or rows is not None:
        with hooked(after=[(each.module, add.hook(each)) for each in sums.values()]), torch.no_grad():
            call(model, batch)
    if scalar is None or rows == 0:
        return
    mask = add.mask
    adds: _Adding | None = add
    if rows is not None:
        batch, mask, adds = some_rows(batch, slice(rows)), None if mask is None else mask[:rows], None
    with _tracking(model, sums, adds) as (outputs, weights):
        value = scalar(model, tree_map(_normal, batch), mask)
        if not outputs and not weights:
            return
        if not value.requires_grad:
            raise NoGradient(
                "loss=: its value has no gradient, because the model runs under torch.no_grad, or the loss "
                "does not depend on the outputs of the layers: write loss=None"
            )
        wanted = [*(each.output for each in outputs), *weights]
        grads = iter(torch.autograd.grad(value, wanted, allow_unused=True))
    for each, grad in zip(outputs, grads, strict=False):
        if grad is not None:
            each.sums.add_gradient(grad, batch=add.index, mask=mask, experts=each.experts)
    for layer in _recurrent(sums):
        layer.add_gradients(list(islice(grads, len(layer.weights))))


@dataclass(frozen=True)
class _Adding:
    """Adds what layers get and give in a batch to their sums."""

    index: int
    mask: Tensor | None

    def hook(self, each: LayerSums | RecurrentSums) -> Any:
        def of_layer(module: nn.Module, positional: Any, keywords: Any, output: Any) -> None:
            with naming(each.name), torch.no_grad():
                if isinstance(each, RecurrentSums):
                    each.add(positional, keywords, batch=self.index)
                    return
                received = positional[0] if positional else next(iter(keywords.values()))
                experts = _experts(module, positional)
                each.add(received.detach(), output.detach(), batch=self.index, mask=self.mask, experts=experts)

        return of_layer


class _Tracked(NamedTuple):
    """The output of a layer to differentiate by."""

    sums: LayerSums
    output: Tensor
    experts: Tensor | None


@contextmanager
def _tracking(
    model: nn.Module, sums: _Sums, add: "_Adding | None"
) -> Iterator[tuple[list[_Tracked], list[nn.Parameter]]]:
    """Track what passes are differentiated by: the outputs of layers, and the weights of recurrent ones."""
    outputs: list[_Tracked] = []

    def tracking(each: LayerSums) -> Any:
        def hook(module: nn.Module, positional: Any, keywords: Any, output: Tensor) -> Tensor:
            differentiable, copy = tracked(output)
            outputs.append(_Tracked(each, differentiable, _experts(module, positional)))
            return copy

        return hook

    adding = [] if add is None else [(each.module, add.hook(each)) for each in sums.values()]
    after = [(each.module, tracking(each)) for each in sums.values() if isinstance(each, LayerSums)]
    weights = [weight for each in _recurrent(sums) for weight in each.weights]
    with (
        hooked(after=[*adding, *after]),
        torch.enable_grad(),
        requiring_gradients(weights),
        differentiable_in_eval(model),
    ):
        yield outputs, weights


class _CautiousGradients:
    """Gradients that nobody asked for: of rows that nothing is judged on, and in bounded memory.

    Args:
        scalar: what is differentiated.
        split: which rows are fitted to.
        most_bytes: for what a backward pass needs of the forward pass.
    """

    def __init__(self, scalar: SensitivityScalar, split: FitSplit, most_bytes: int) -> None:
        self._scalar, self._split, self._most_bytes = scalar, split, most_bytes
        self._most_rows: int | None = None

    def watch(self, model: nn.Module, batch: Any, sums: _Sums, add: "_Adding") -> None:
        """As :func:`_watch`.

        Raises:
            NoGradient: the pass failed with gradients, or one row, or an undivided batch, needs too much memory.
        """
        whole = rows_of(batch)
        rows = self._split.fitted(add.index, whole)
        try:
            if rows and self._most_rows is None:
                self._most_rows = self._rows_within(model, batch, sums, rows)
            rows = min(rows, self._most_rows or whole)
            _watch(model, batch, sums, add, self._scalar, None if rows == whole else rows)
        except RuntimeError as error:
            raise NoGradient(str(error)) from error

    def _rows_within(self, model: nn.Module, batch: Any, sums: _Sums, rows: int) -> int:
        """How many rows can be differentiated: all, half of them, ...; a pass that saves too much ends there."""
        whole = rows_of(batch)
        while True:
            part = batch if rows == whole else some_rows(batch, slice(rows))
            try:
                with saving_at_most(self._most_bytes, model), _tracking(model, sums, None):
                    result = call(model, tree_map(_normal, part))
                    leveled(result, result)
            except SavesTooMuch:
                if rows <= 1:
                    raise NoGradient(f"a row saves more than {self._most_bytes:,} bytes") from None
                rows //= 2
                continue
            return rows


def _recurrent(sums: _Sums) -> list[RecurrentSums]:
    return [each for each in sums.values() if isinstance(each, RecurrentSums)]


def _experts(module: nn.Module, positional: Any) -> Any:
    """The expert of each row, of a layer that has several."""
    return positional[1] if routes_rows(module) else None


def _normal(leaf: Any) -> Any:
    """Clone a tensor made in inference mode, which autograd refuses; other leaves are returned unchanged."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf

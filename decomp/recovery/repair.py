"""Repair without gradients: last factors and biases refitted in the order of execution, BatchNorm re-estimated."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from decomp._util import tables
from decomp._util.by_layer import ByLayer
from decomp._util.naming import naming
from decomp._util.progress import bar
from decomp.data.activations import Activations, Example, ExampleCache, RoutedDifferently, reached_tails
from decomp.data.batches import CLOSED_FORM_SPLIT, Batches
from decomp.layers import Factorized
from decomp.network.forward import Unfused, call, evaluating, floating, moving_norms, to_device_of
from decomp.network.pairing import pairs_of
from decomp.network.tracing import Tail
from decomp.recovery.batch_norm_shift import frames_of
from decomp.recovery.least_squares import OtherSize, Refit
from decomp.recovery.relu import Rectified, Rectifier, rectifier


@dataclass(frozen=True)
class LayerRepair:
    """Relative error of one layer's output on the batches held out, before and after the refit.

    Where the note says so, it is that of what the ReLU behind the layer gives.
    """

    error_before: float
    error_after: float
    note: str = ""


class RepairReport(ByLayer[LayerRepair]):
    """What the repair did to each layer, in the order of execution; printed, a table.

    ``output_error_before`` and ``output_error_after`` are relative errors of what the network gives, on all
    batches.
    """

    def __init__(self, layers: Mapping[str, LayerRepair], before: float, after: float, note: str) -> None:
        super().__init__(layers)
        self.output_error_before, self.output_error_after, self.note = before, after, note

    def __str__(self) -> str:
        rows = [(name, f"{r.error_before:.3f} => {r.error_after:.3f}", r.note) for name, r in self.items()]
        whole = f"{self.output_error_before:.3f} => {self.output_error_after:.3f}"
        columns = ("layer", ">error of the output", "note")
        return tables.render("", columns, rows, ("whole model", whole, self.note))


def repair(
    small: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    *,
    inputs: Callable[[Any], Any] | None = None,
    batch_norm: bool = True,
    nonlinear: bool = False,
    cache_bytes: int = 2**28,
    progress: bool | None = None,
) -> RepairReport:
    """Refit the last factor and the bias of every factorized layer of ``small``, in place, by least squares.

    Layer by layer in the order of execution: with z what reaches the last factor in the compressed network, and y
    the output of the dense layer in the dense one, A = (S_yz + rho A_0) (S_zz + rho I)^-1 and b = mean(y) - A
    mean(z), with moments about the mean. The BatchNorm behind a layer without a bias takes b up; without either
    there is none, and moments are about zero. rho, a share
    of the mean diagonal of S_zz, is chosen on every fourth batch, which is held out of the fit, and the old
    factor stays where none is better. Then the statistics of BatchNorm are estimated anew, and kept where they
    lower the error of what the network gives. No labels and no gradients are needed.

    With ``nonlinear``, a layer that a ReLU or ReLU6 r follows, directly or behind a BatchNorm, goes on from there
    to minimize ||r(y) - r(A z + b)||^2: the fit is repeated for targets t that minimize, element by element,
    (r(y) - r(t))^2 + lambda (t - A z - b)^2, five times with lambda 0.01 and five times with 1. The errors that
    the report gives of it are those after norm and ReLU; of all states, the old factor and the linear fit among
    them, the best on the batches held out is kept. The data is gone through a dozen times more for each such
    layer, in memory where ``cache_bytes`` hold it all. Other layers get the linear fit.

    Args:
        small: what :func:`decomp.tucker` or another call returned.
        dense: the model it was made from, in which nothing is changed.
        data: an iterable of batches that can be gone through again.
        inputs: what the model is called with, from a batch.
        batch_norm: estimate the statistics of BatchNorm anew.
        nonlinear: refit what a ReLU follows for what the ReLU gives.
        cache_bytes: inputs and targets of a layer that are held in memory at once.
        progress: show a progress bar.

    Raises:
        ValueError: ``dense`` does not match ``small``, or the data is empty.
        TypeError: the data can be gone through only once, or a batch does not fit the model.

    Source: Zhang et al. 2016, section 3.3 (targets of the dense network, inputs of the compressed one) and 3.2
    (nonlinear); He, Zhang and Sun 2017, section 3.1 (reconstruction by least squares).

    >>> from decomp import tucker
    >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    >>> data = [torch.randn(64, 32) for _ in range(8)]
    >>> report = repair(tucker(model, ranks=8, data=data), model, data, progress=False)
    >>> report.output_error_after <= report.output_error_before
    True
    """
    pairs = pairs_of(small, dense)
    batches = Batches.in_fixed_order(data, inputs)
    reports: dict[str, LayerRepair] = {}
    with evaluating(small, dense), Unfused(), torch.inference_mode(False), torch.no_grad():
        before = _output_error(small, dense, batches)
        order = reached_tails(small, batches, {name: pair[0] for name, pair in pairs.items()})
        frames = frames_of(small, dense, batches, pairs)
        of_dense = reached_tails(dense, batches, {n: pair[1] for n, pair in pairs.items()}) if nonlinear else {}
        for name, tail in bar(progress, "repair", order.items()):
            if pairs[name][0].absorbs_outputs == "nothing":
                reports[name] = LayerRepair(math.nan, math.nan, "its last factor mixes no outputs: not refitted")
                continue
            activations = Activations(small, dense, *pairs[name], replace(tail, steps=()), batches, cache_bytes)
            with naming(name):
                behind = of_dense.get(name, Tail())
                refit = Refit(pairs[name][0], frames.get(name))
                reports[name] = _refit(pairs[name][0], refit, activations, rectifier(tail, behind), behind)
        after, note = _output_error(small, dense, batches), ""
        if batch_norm:
            after, note = _renormalized(small, dense, batches, after)
    for name in pairs.keys() - reports.keys():
        reports[name] = LayerRepair(math.nan, math.nan, "the data never reaches it")
    return RepairReport(reports, before, after, note)


def _refit(
    layer: Factorized, refit: Refit, activations: Activations, after: Rectifier | None, tail: Tail
) -> LayerRepair:
    examples = ExampleCache[Example](activations.windows)
    try:
        for example in examples:
            target = example.targets[0]
            refit.add(example.received, target, held_out=CLOSED_FORM_SPLIT.held_out(example.batch))
            after = after if after is not None and after.reads(target, refit.axes) else None
    except RoutedDifferently:
        return LayerRepair(math.nan, math.nan, "routed differently: not refitted")
    except OtherSize:
        return LayerRepair(math.nan, math.nan, "called with an output_size: not refitted")
    rectified = Rectified(refit, examples, after, tail) if after is not None and refit.fits else None
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        error = refit.error() if rectified is None else rectified.error()
        return LayerRepair(error, error, "frozen: not refitted")
    before, old = refit.error(), refit.state
    error = refit.apply()
    note = ""
    if rectified is not None:
        before, error = rectified.apply(old)
        note = "measured after its ReLU"
    return LayerRepair(before, error, note if error < before else "no gain: its factor was kept")


def _output_error(small: nn.Module, dense: nn.Module, batches: Batches) -> float:
    """Relative error of all floating outputs of the network, over the whole data."""
    lost, energy, empty = 0.0, 0.0, True
    for batch in batches:
        empty = False
        ours, theirs = (_outputs(model, batch) for model in (small, dense))
        lost += sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True))
        energy += sum(float(b.square().sum()) for b in theirs)
    if empty:
        raise ValueError("data is empty: at least one batch is needed")
    return math.sqrt(lost / energy) if energy else math.sqrt(lost)


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    return [tensor.double() for tensor in floating(call(model, to_device_of(model, batch)))]


def _renormalized(small: nn.Module, dense: nn.Module, batches: Batches, before: float) -> tuple[float, str]:
    """Estimate BatchNorm statistics by one cumulative average over the data; undone where the error would rise."""
    norms = list(moving_norms(small).values())
    if not norms:
        return before, ""
    kept = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        for batch in batches:
            call(small, to_device_of(small, batch))
    except ValueError as error:
        _put_back(norms, kept)
        return before, f"the statistics of BatchNorm were kept: {error}"
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.training = momentum, False
    reached = [norm for norm in norms if int(norm.num_batches_tracked or 0)]
    _put_back(
        [n for n in norms if n not in reached], [k for n, k in zip(norms, kept, strict=True) if n not in reached]
    )
    after = _output_error(small, dense, batches)
    if after < before:
        return after, f"{len(reached)} BatchNorm re-estimated"
    _put_back(norms, kept)
    return before, f"no gain: the statistics of {len(reached)} BatchNorm were kept"


def _put_back(norms: Sequence[nn.Module], kept: Sequence[Mapping[str, Tensor]]) -> None:
    for norm, values in zip(norms, kept, strict=True):
        for name, value in values.items():
            getattr(norm, name).copy_(value)

"""Repair without gradients: last factors and biases refitted in the order of execution, BatchNorm re-estimated."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from decomp._util import tables
from decomp._util.by_layer import ByLayer
from decomp._util.naming import naming
from decomp._util.progress import bar
from decomp._util.warn import warn
from decomp.calibration.sampling import ROWS_PER_UNKNOWN, Positions, Sampling
from decomp.data.activations import Activations, Example, ExampleCache, RoutedDifferently, reached_tails
from decomp.data.batches import Batches, BatchSplit, Mask, unpadded
from decomp.layers import Factorized, routes_rows
from decomp.network.forward import (
    Unfused,
    call,
    differences,
    evaluating,
    floating,
    norms_with_running_stats,
    to_device_of,
)
from decomp.network.pairing import factorized_names, pairs_of
from decomp.network.restoring import all_or_nothing, hooked, on_failure, restoring_values, training_as_now
from decomp.network.tracing import Tail
from decomp.network.unpacking import unpacked
from decomp.recovery.batch_norm_shift import batch_norm_shifts
from decomp.recovery.least_squares import OutputSizeMismatch, Refit
from decomp.recovery.relu import Rectifier, ReluRefit, rectifier

KEPT_WHOLE = "no gain in the output of the network: kept as it was"


@dataclass(frozen=True)
class LayerRepair:
    """Relative error of one layer's output on the held-out batches, before and after the refit.

    It is that against the output of the dense layer; where a skip connection is added to it, against what the sum
    of the dense network needs. The note says where the error is measured after the ReLU that follows the layer,
    and why a layer was kept.
    """

    error_before: float
    error_after: float
    note: str = ""


class RepairReport(tables.Tabular, ByLayer[LayerRepair]):
    """The errors of each layer before and after the repair, in the order of execution; prints as a table.

    ``output_error_before`` and ``output_error_after`` are relative errors of the network's output on the held-out
    batches.
    """

    def __init__(self, layers: Mapping[str, LayerRepair], before: float, after: float, note: str) -> None:
        super().__init__(layers)
        self.output_error_before, self.output_error_after, self.note = before, after, note

    def records(self) -> list[dict[str, Any]]:
        """Return the repair of every layer as a dictionary of plain values."""
        return [{"layer": name} | vars(repaired) for name, repaired in self.items()]

    def _table(self) -> tables.Table:
        columns = (
            tables.Column("layer", "name"),
            tables.Column("error of the output", measured=True),
            tables.Column("note", "remark"),
        )
        rows = [(name, tables.fall(r.error_before, r.error_after), r.note) for name, r in self.items()]
        whole = tables.fall(self.output_error_before, self.output_error_after)
        return tables.Table(columns, rows, ("whole model", whole, self.note))


@all_or_nothing()
def repair(
    small: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    *,
    inputs: Callable[[Any], Any] | None = None,
    batch_norm: bool = True,
    nonlinear: bool = False,
    cache_bytes: int = 2**28,
    positions: Positions = "auto",
    mask: Mask = "attention_mask",
    progress: bool | None = None,
) -> RepairReport:
    """Refit the last factor and the bias of every factorized layer of ``small``, in place, by least squares.

    Layer by layer in the order of execution, with z the input of the last factor in the compressed network and y
    the output of the layer in the dense one: A = (S_yz + rho A_0) (S_zz + rho I)^-1 and b = mean(y) - A mean(z),
    with central moments S. A layer without a bias adds b to the BatchNorm that follows; without either there is no
    b, and moments are about zero. rho, a multiple of the mean diagonal of S_zz, is chosen on every fourth batch,
    which is held out of the fit; the original factor A_0 stays if no rho is better. Then the BatchNorm statistics
    are re-estimated on the batches of the fit, and restored unless the error of the network's output falls. No
    labels and no gradients are needed.

    All errors are those of held-out batches: every fourth, or the last of two or three. If in the end the error of
    the network's output has not fallen on them, ``small`` is kept as it was. A warning says where the data is too
    little for the unknowns of a layer, and how much would be enough.

    With ``nonlinear``, a layer followed by a ReLU or ReLU6 r, directly or after a BatchNorm, is then refitted to
    minimize ||r(y) - r(A z + b)||^2: the fit is repeated for targets t that minimize, element by element,
    (r(y) - r(t))^2 + lambda (t - A z - b)^2, five times with lambda 0.01 and five times with 1. Of all states, the
    original factor and the linear fit among them, the best on the held-out batches stays, and the report gives
    errors after BatchNorm and ReLU. This takes a dozen more passes over the data per layer, in memory if it fits
    into ``cache_bytes``. Other layers get the linear fit.

    Args:
        small: the compressed model, as :func:`decomp.tucker` or another call returns it.
        dense: the model that it was made from; it is not changed.
        data: batches, in an iterable that can be iterated over several times, in the same order.
        inputs: returns the arguments of the model for a batch.
        batch_norm: re-estimate the BatchNorm statistics.
        nonlinear: minimize the error after the ReLU of layers that one follows.
        cache_bytes: the most memory for the inputs and targets of a layer.
        positions: how many positions of a layer are used; see :func:`decomp.calibrate`.
        mask: what is padding; see :func:`decomp.calibrate`.
        progress: show a progress bar.

    Raises:
        ValueError: ``dense`` does not match ``small``, or the data has fewer than two batches.
        TypeError: the data can be iterated over only once, or a batch does not fit the model.

    Source: Zhang et al. 2016, section 3.3 (targets of the dense network, inputs of the compressed one) and 3.2
    (nonlinear); He, Zhang and Sun 2017, section 3.1 (reconstruction by least squares).

    >>> from decomp import tucker
    >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    >>> data = [torch.randn(64, 32) for _ in range(8)]
    >>> report = repair(tucker(model, ranks=8, data=data), model, data, progress=False)
    >>> report.output_error_after <= report.output_error_before
    True
    """
    dense = unpacked(dense, factorized_names(small))
    pairs = pairs_of(small, dense)
    batches = Batches.in_fixed_order(data, inputs, mask)
    sampling = Sampling(positions, batches.count())
    reports: dict[str, LayerRepair] = {}
    amounts: dict[str, _Amount] = {}
    with evaluating(small, dense), Unfused(), torch.inference_mode(False), torch.no_grad():
        split = batches.batch_split()
        if split.every is None:
            raise ValueError(
                "data has fewer than two batches, and what is fitted to one is measured on another: "
                "split the batch, list(x.split(8)) for example"
            )
        restore = restoring_values(
            *(layer for layer, _ in pairs.values()), *norms_with_running_stats(small).values()
        )
        on_failure(restore)
        before = _output_error(small, dense, batches, split)
        order = reached_tails(small, batches, {name: pair[0] for name, pair in pairs.items()})
        norm_shifts = batch_norm_shifts(small, dense, batches, pairs)
        of_dense = reached_tails(dense, batches, {n: pair[1] for n, pair in pairs.items()})
        for name, tail in bar(progress, "repair", order.items()):
            if pairs[name][0].absorbs_outputs == "nothing":
                reports[name] = LayerRepair(math.nan, math.nan, "its last factor mixes no outputs: not refitted")
                continue
            if routes_rows(pairs[name][0]):
                reports[name] = LayerRepair(math.nan, math.nan, "each expert has weights of its own: not refitted")
                continue
            dense_tail = of_dense.get(name, Tail())
            plain = Tail((), tail.calls, dense_tail.skip)
            activations = Activations(small, dense, *pairs[name], plain, batches, cache_bytes)
            with naming(name):
                refit = Refit(pairs[name][0], split, norm_shifts.get(name), sampling)
                relu = rectifier(tail, dense_tail) if nonlinear else None
                reports[name] = _refit(pairs[name][0], refit, activations, relu, dense_tail)
                amounts[name] = _Amount(refit.equations.rows, refit.unknowns)
        after, note = _output_error(small, dense, batches, split), ""
        if batch_norm:
            after, note = _renormalized(small, dense, batches, split, after)
        if not after <= before:
            restore()
            after, note = before, KEPT_WHOLE
            reports = {
                name: replace(r, error_after=r.error_before, note=KEPT_WHOLE) for name, r in reports.items()
            }
    _warn_of_little_data(amounts)
    for name in pairs.keys() - reports.keys():
        reports[name] = LayerRepair(math.nan, math.nan, "the data never reaches it")
    return RepairReport(reports, before, after, note)


def _refit(
    layer: Factorized,
    refit: Refit,
    activations: Activations,
    relu: Rectifier | None,
    tail: Tail,
) -> LayerRepair:
    examples = ExampleCache[Example](activations.windows)
    try:
        for example in examples:
            target = example.targets[0]
            refit.add(example.received, target, batch=example.batch, mask=example.mask)
            relu = relu if relu is not None and relu.applies_to(target, refit.axes) else None
    except RoutedDifferently:
        return LayerRepair(math.nan, math.nan, "routed differently: not refitted")
    except OutputSizeMismatch:
        return LayerRepair(math.nan, math.nan, "called with an output_size: not refitted")
    relu_refit = None if relu is None or refit.is_wide else ReluRefit(refit, examples, relu, tail)
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        error = refit.error() if relu_refit is None else relu_refit.error()
        return LayerRepair(error, error, "frozen: not refitted")
    before, old = refit.error(), refit.state
    error = refit.apply()
    note = ""
    if relu_refit is not None:
        before, error = relu_refit.apply(old)
        note = "measured after its ReLU"
    return LayerRepair(before, error, note if error < before else "no gain: its factor was kept")


class _Amount(NamedTuple):
    """The rows that a layer was fitted to, and the unknowns of each of its outputs."""

    rows: int
    unknowns: int

    @property
    def share(self) -> float:
        """How much of what would be enough there is."""
        return self.rows / (ROWS_PER_UNKNOWN * self.unknowns)


def _warn_of_little_data(amounts: Mapping[str, _Amount]) -> None:
    """Warn of the layer with the least rows for its unknowns, if they are too few."""
    name = min(amounts, key=lambda name: amounts[name].share, default="")
    if not amounts or not 0 < amounts[name].share < 1:
        return
    rows, unknowns = amounts[name]
    few = sum(0 < amount.share < 1 for amount in amounts.values())
    warn(
        f"repair: the data is too little for {few} of {len(amounts)} layers, for {name!r} most of all: it has "
        f"{rows} rows to fit {unknowns} unknowns per output, and {ROWS_PER_UNKNOWN * unknowns} would be enough "
        f"(give {math.ceil(1 / amounts[name].share)} times as many samples)"
    )


def _output_error(small: nn.Module, dense: nn.Module, batches: Batches, split: BatchSplit) -> float:
    """Relative error of all floating outputs of the network, over the held-out batches."""
    squared_error, energy, empty = 0.0, 0.0, True
    for _, batch, mask in batches.masked(part=split.held_out):
        empty = False
        outputs, dense_outputs = (
            [unpadded(output, mask) for output in _outputs(model, batch)] for model in (small, dense)
        )
        errors = differences(small, outputs, dense_outputs)
        squared_error += sum(float(error.square().sum()) for error in errors)
        energy += sum(float(b.square().sum()) for b in dense_outputs)
    if empty:
        raise ValueError("data is empty: at least one batch is needed")
    return math.sqrt(squared_error / energy) if energy else math.sqrt(squared_error)


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    return [tensor.double() for tensor in floating(call(model, to_device_of(model, batch)))]


def _renormalized(
    small: nn.Module, dense: nn.Module, batches: Batches, split: BatchSplit, before: float
) -> tuple[float, str]:
    """Estimate BatchNorm statistics by an average over all positions; undone unless the error falls.

    The statistics of each batch count with its number of positions: of inputs (batch, channels, *positions), all
    dimensions but the second.
    """
    norms = list(norms_with_running_stats(small).values())
    if not norms:
        return before, ""
    restore = {norm: restoring_values(norm) for norm in norms}
    try:
        with training_as_now(*norms), hooked(before=[(norm, _weighted_by_positions()) for norm in norms]):
            for norm in norms:
                norm.reset_running_stats()
                norm.training = True
            for _, batch in batches.numbered(part=split.train):
                call(small, to_device_of(small, batch))
    except ValueError as error:
        for norm in norms:
            restore[norm]()
        return before, f"the statistics of BatchNorm were kept: {error}"
    reached = [norm for norm in norms if int(norm.num_batches_tracked or 0)]
    for norm in norms:
        if norm not in reached:
            restore[norm]()
    if all(bool(torch.isfinite(buffer).all()) for norm in reached for buffer in norm.buffers()):
        after = _output_error(small, dense, batches, split)
        if after < before:
            return after, f"{len(reached)} BatchNorm re-estimated"
        note = f"no gain: the statistics of {len(reached)} BatchNorm were kept"
    else:
        note = "a variance overflows on this data: the statistics of BatchNorm were kept"
    for norm in norms:
        restore[norm]()
    return before, note


def _weighted_by_positions() -> Any:
    """A hook that sets the momentum of a BatchNorm to the share of a batch in all positions so far."""
    seen = 0

    def hook(norm: Any, given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal seen
        received = (*given, *keywords.values())[0]
        here = received.numel() // max(1, norm.num_features)
        seen += here
        norm.momentum = here / max(1, seen)

    return hook

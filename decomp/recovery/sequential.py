"""Sequential decomposition: every layer for the inputs that it receives in the network compressed so far."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from decomp._util.naming import naming, require_finite
from decomp._util.progress import bar
from decomp.calibration.moments import Moments, moments_of
from decomp.calibration.recurrent import AnyMoments
from decomp.calibration.sampling import Positions, Sampling, little_data, stratified
from decomp.calibration.unfold import count_rows, some_rows
from decomp.data.activations import Example, RoutedDifferently, reached_tails
from decomp.data.batches import Batches, FitSplit, Mask, unpadded
from decomp.data.suspended import HeldExamples, LayerExamples
from decomp.layers import Factorized, routes_rows
from decomp.network import surgery
from decomp.network.forward import Unfused, evaluating
from decomp.network.restoring import training_of
from decomp.network.tracing import Tail
from decomp.network.unpacking import unpacked
from decomp.planning.build import (
    Decomposed,
    by_moments,
    candidate_of,
    correct_means,
    decomposed,
    from_weight,
    has_changed,
    layers_to_replace,
    measured,
    weight_error,
)
from decomp.planning.choice import Choice
from decomp.planning.plan import CompressedModule, Plan
from decomp.recovery.batch_norm_shift import BatchNormShift, batch_norm_shifts
from decomp.recovery.least_squares import OutputSizeMismatch, Refit, rows_needed

CACHE_BYTES = 2**30  # for the passes that are held
KEEP_BYTES = 2**28  # for the batches that layers use
LEAST_BATCHES = 8
JUDGED_ROWS = 2**16  # of all batches; candidates are compared on the same ones
ROWS_FOR_ALL_COEFFICIENTS = 10  # per unknown: of fewer, a fit of the last factor alone may be better
NO_TAIL = Tail()

AfterEach = Callable[[nn.Module, str], None]


@surgery.outside_inference_mode()
def apply_sequentially(
    model: nn.Module,
    plan: Plan,
    data: Any,
    *,
    inputs: Callable[[Any], Any] | None = None,
    after_each: AfterEach | None = None,
    positions: Positions = "auto",
    mask: Mask = "attention_mask",
    progress: bool | None = None,
) -> CompressedModule:
    """Return ``model`` with the layers of ``plan`` replaced one after the other, in the order of execution.

    For each layer, with x^ its input in the network compressed so far and y its output in the dense one (plus
    (r - r^) / s where a skip connection adds r, in the compressed network r^, after a BatchNorm of scale s): the
    weight is fitted to y ~= W^ x^ + b by least squares (ridge towards W, chosen on held-out rows), W^ is
    decomposed for the moments of x^, and the remaining error of the mean of y is added to the bias, or to the
    BatchNorm that follows. These factors, those of the plan's statistics and those of the weight alone are
    compared by the error of the output on rows that nothing was fitted to, and the best are taken; so is a refit
    of the last factor, and the correction of the mean. The fitted ones, where they are taken, are fitted once
    more, to these rows as well. ``after_each(small, name)`` is called after each layer,
    before the next one is decomposed. A layer uses as many batches as have the rows that it is fitted to, and at
    least eight, spread over the data. One pass of each batch through both networks serves all layers, held at
    each until that is decomposed; batches beyond the memory, and models for which that does not work, take a pass
    per layer.

    Source: Zhang et al. 2016, section 3.3 (asymmetric reconstruction); He et al. 2017 (channel pruning), section
    3.3, for skip connections.
    """
    model = unpacked(model, plan.replaced)
    replaced = layers_to_replace(model, plan, plan.method_of, needs_values=True)
    small = surgery.swap(model, {}, inplace=False)
    batches = Batches.in_fixed_order(data, inputs, mask, keep_bytes=KEEP_BYTES)
    sampling, split = Sampling(positions, batches.count()), batches.fit_split()
    preferred = split.spread(batches.count())
    pairs = {name: (small.get_submodule(name), dense) for name, dense in replaced.items()}
    final: dict[str, Choice] = {}
    with evaluating(model, small), Unfused(), torch.inference_mode(False), torch.no_grad():
        order = reached_tails(model, batches, replaced)
        norm_shifts = batch_norm_shifts(small, model, batches, pairs)
        calls = {name: replace(tail, steps=()) for name, tail in order.items()}
        with HeldExamples(small, model, pairs, calls, batches, CACHE_BYTES, preferred=preferred) as held:
            for name in bar(progress, "decompose", list(order)):
                require_finite(name, replaced[name])
                with naming(name):
                    refitted = plan.method_of(name).affine and not routes_rows(replaced[name])
                    needed = partial(batches_needed, pairs[name][0], sampling, split, preferred)
                    examples = held.of(name, LEAST_BATCHES, needed) if refitted else held.of(name, 0, no_batches)
                    metric = metric_of(plan.statistics.get(name), norm_shifts.get(name))
                    step = _LayerStep(*pairs[name], examples, norm_shifts.get(name), sampling, split, metric)
                    layer, final[name] = step.decompose(name, plan)
                del step, examples  # gone before the next ones are made
                small = surgery.swap(small, {name: layer}, inplace=bool(name))
                if after_each is not None:
                    after_each(small, name)
                held.replace(name, layer, small)
    unreached = {name: module for name, module in replaced.items() if name not in order}
    for name in order:
        small.get_submodule(name).train(training_of(replaced[name]))  # they were built in eval mode
    rest = decomposed(unreached, plan, plan.method_of, plan.candidates, plan.statistics, False)
    final |= measured(plan, unreached, rest, plan.statistics)
    layers = {name: each.layer for name, each in rest.items()}
    small = plan.swap(small, layers, final, inplace=True)
    correct_means(small, layers, rest, plan.statistics)
    return small


def batches_needed(
    layer: nn.Module,
    sampling: Sampling,
    split: FitSplit,
    order: Sequence[int],
    examples: Iterable[Example],
    seen: int,
) -> int:
    """How many batches, as they come in ``order``, have the rows that a layer is fitted to.

    The examples are those of the first ``seen`` of them; the others are taken to have as many rows on average.
    There are at least eight, of which some are held out: where the examples are all or none of them, all are used.
    """
    axes = len(getattr(layer, "kernel_size", ()))
    rows, reached = 0, set[int]()
    for example in examples:
        target = example.targets[0]
        rows += count_rows(target if axes else unpadded(target, example.mask), axes)
        reached.add(example.batch)
    if not split.divides(reached):
        return len(order)
    wanted = rows_needed(layer, sampling) * seen / rows if rows else math.inf
    return split.dividing(order, max(LEAST_BATCHES, math.ceil(min(wanted, len(order)))))


def metric_of(moments: AnyMoments | None, norm_shift: BatchNormShift | None) -> Tensor | None:
    """How errors of the outputs of a layer count: by gradients, or by the scale of the BatchNorm that follows."""
    if isinstance(moments, Moments) and moments.row_metric is not None:
        return moments.row_metric
    if norm_shift is None or not norm_shift.scale.any():
        return None
    return norm_shift.scale[None]


def no_batches(examples: Iterable[Example], seen: int) -> int:
    """For a layer that is decomposed by itself."""
    return 0


@dataclass(frozen=True)
class _Judged:
    """A layer with its relative error on the held-out rows, and with that on all.

    ``shift`` is what is added to its output by its bias or the BatchNorm; None where that does not help.
    """

    layer: Factorized
    held_out: float
    overall: float
    shift: Tensor | None


@dataclass(frozen=True)
class _LayerStep:
    """One layer: ``own``, not decomposed yet, in the compressed network, ``dense`` in the dense one, its data."""

    own: nn.Module
    dense: nn.Module
    examples: LayerExamples
    norm_shift: BatchNormShift | None
    sampling: Sampling
    split: FitSplit
    metric: Tensor | None  # of the outputs, see Moments.row_metric

    def decompose(self, name: str, plan: Plan) -> tuple[Factorized, Choice]:
        """Decompose the layer and correct its bias or BatchNorm; return it and the choice with its errors."""
        alone, choice = self._alone(name, plan)
        if not plan.method_of(name).affine or routes_rows(self.own):
            self._correct_mean(alone)
            return alone.layer, choice  # a refit has one weight for all rows
        try:
            best, note = self._best(name, plan, alone.layer)
        except RoutedDifferently:
            self._correct_mean(alone)
            return alone.layer, replace(choice, note="routed differently: decomposed by itself")
        layer = best.layer
        if best.shift is not None and layer.bias is not None:
            layer.bias.add_(best.shift.to(layer.bias.dtype))
        elif self.norm_shift is not None and layer.bias is None:
            self.norm_shift.absorb(torch.zeros(()) if best.shift is None else best.shift)
        error = weight_error(layer, self.dense)
        note = "; ".join(filter(None, (plan[name].note, note)))
        return layer, replace(plan[name], error=error, output_error=best.overall, note=note)

    def _best(self, name: str, plan: Plan, alone: Factorized) -> tuple[_Judged, str]:
        """The layer with the least error on held-out rows, and a note."""
        method, ranks = plan.method_of(name), plan[name].ranks
        best = self._judge(alone)
        if name in plan.statistics:
            candidates = plan.candidates.get(name, ())
            candidate = None if has_changed(self.dense, candidates) else candidate_of(method, candidates)
            best = min(best, self._judge(from_weight(self.dense, method, ranks, candidate)), key=_error_of)
        if math.isnan(best.held_out):
            return best, "all of its data is held out, or none: decomposed by itself"
        refit = self._refit(self.own)
        note = "" if refit is None else little_data(refit.equations.rows, refit.unknowns)
        moments = self._moments(name, plan, refit, self.split)
        fitted = self._judge(by_moments(self.own, method, ranks, moments))
        is_exact = fitted.held_out <= best.held_out and (moments.patches is not None or not self._is_spatial)
        best = min(fitted, best, key=_error_of)
        if best is not fitted:
            note = "; ".join(filter(None, ("not fitted to its inputs: no better on held-out data", note)))
        if not is_exact:
            return min(best, self._with_last_factor(best.layer), key=_error_of), note
        if refit is not None and refit.equations.rows < ROWS_FOR_ALL_COEFFICIENTS * refit.unknowns:
            other = self._with_last_factor(alone)
            if other.held_out < best.held_out:
                return other, "; ".join(filter(None, ("its last factor is fitted to its inputs", note)))
        if refit is not None and refit.use_held_out():  # the choice is made: nothing is measured on them any more
            moments = replace(self._moments(name, plan, refit, None), shrinkage=moments.shrinkage)
            best = self._judge(by_moments(self.own, method, ranks, moments))
        return best, note

    def _moments(self, name: str, plan: Plan, refit: Refit | None, split: FitSplit | None) -> Moments:
        """The moments of the inputs that the layer receives; those of the patches are in the sums of the fit."""
        patches = refit.patch_moments() if self._is_spatial and refit is not None else None
        received = ((example.received, example.batch, example.mask) for example in self.examples)
        calibrated = cast(Moments | None, plan.statistics.get(name))
        centred = self.norm_shift is not None
        return moments_of(self.own, received, calibrated, self._used, split, centred=centred, patches=patches)

    def _alone(self, name: str, plan: Plan) -> tuple[Decomposed, Choice]:
        """Decompose the layer as :meth:`Plan.apply` would, without the examples."""
        dense = {name: self.dense}
        statistics = {name: plan.statistics[name]} if name in plan.statistics else {}
        choices = {name: plan[name] if statistics else replace(plan[name], output_error=None)}
        alone = decomposed(dense, choices, plan.method_of, plan.candidates, statistics, False)
        choice = measured(choices, dense, alone, statistics).get(name, plan[name])
        return alone[name], choice

    def _correct_mean(self, alone: Decomposed) -> None:
        """Correct the mean of a layer that is decomposed by itself, as its statistics say."""
        bias = alone.layer.bias
        if alone.shift is None:
            return
        if bias is not None:
            bias.add_(alone.shift.to(bias.dtype))
        elif self.norm_shift is not None:
            self.norm_shift.absorb(alone.shift)

    @property
    def _used(self) -> Sampling:
        """As many rows, from the batches that reach the layer: known once the examples were gone through."""
        return self.sampling.of(self.examples.reached)

    @property
    def _is_spatial(self) -> bool:
        return math.prod(getattr(self.own, "kernel_size", ())) > 1

    def _refit(self, layer: nn.Module) -> Refit | None:
        """Fit the last factor of a layer, or the weight of a dense one, and its bias, to the targets.

        None where the inputs are no numbers, or the outputs have another size than the options of the layer imply.
        """
        refit = Refit(layer, self.split, self.norm_shift, self._used)
        try:
            for example in self.examples:
                if not example.received.is_floating_point():
                    return None
                refit.add(example.received, example.targets[0], batch=example.batch, mask=example.mask)
        except OutputSizeMismatch:
            return None
        refit.apply()
        return refit

    def _with_last_factor(self, layer: Factorized) -> _Judged:
        """A copy of the layer whose last factor is fitted to the targets on the inputs that it receives."""
        refitted = copy.deepcopy(layer)
        if layer.absorbs_outputs == "full":
            self._refit(refitted)
        return self._judge(refitted)

    def _rows(self, example: Example, output: Tensor) -> Iterator[tuple[Tensor, Tensor, float, int]]:
        """Rows (n, T) of the targets and of an output, and their weight; those to fit to are part 0, others 1.

        Of many rows they are a sample, the same for every output.
        """
        target, axes = example.targets[0], len(getattr(self.own, "kernel_size", ()))
        if not axes:
            target, output = (unpadded(each, example.mask) for each in (target, output))
        elif target.dim() == axes + 1:
            target, output = target[None], output[None]
        if not target.numel():
            return
        total = count_rows(target, axes)
        samples = len(target) if target.dim() > axes + 1 else 1
        first = self.split.fitted_rows(example.batch, total, samples)
        share = min(1.0, JUDGED_ROWS / len(self.examples.numbers) / total)
        for place, (begin, end) in enumerate(((0, first), (first, total))):
            if begin == end:
                continue
            count = math.ceil(share * (end - begin))
            indices = begin + stratified(end - begin, count, example.batch) if count < total else None
            wanted, given = (some_rows(each, axes, 1, indices) for each in (target, output))
            wanted = wanted if self.norm_shift is None else self.norm_shift.target_rows(wanted)
            yield wanted[0], given[0], (end - begin) / count, place

    def _weighted(self, rows: Tensor) -> Tensor:
        """Differences of the output (rows, T) as they count: D dy."""
        if self.metric is None:
            return rows
        metric = self.metric.to(rows)
        parts = rows.unflatten(1, metric.shape[:2])
        weighted = parts * metric if metric.dim() == 2 else torch.einsum("nga,gba->ngb", parts, metric)
        return weighted.flatten(1)

    def _judge(self, layer: Factorized) -> _Judged:
        """Measure a layer where nothing was fitted, with its mean corrected by the other rows if that helps.

        On the held-out rows errors count as the row metric says.
        """
        absorbs = layer.bias is not None or self.norm_shift is not None
        sums: list[Any] = [0.0, 0.0]  # of the differences, of rows to fit to and of those held out
        counts = [0.0, 0.0]
        held_out = energy_held_out = squares = energy = 0.0
        for example in self.examples:
            for wanted, given, weight, place in self._rows(example, example.run(layer, NO_TAIL)[0]):
                lost = wanted - given
                sums[place] = sums[place] + weight * lost.sum(0)
                counts[place] += weight * len(lost)
                squares += weight * float(lost.square().sum())
                energy += weight * float(wanted.square().sum())
                if place:
                    held_out += weight * float(self._weighted(lost).square().sum())
                    energy_held_out += weight * float(self._weighted(wanted).square().sum())
        if not all(counts):
            return _Judged(layer, math.nan, _relative(squares, energy), None)
        shift = None
        if absorbs:
            by_others = sums[0] / counts[0]
            weighted, rest = self._weighted(torch.stack([by_others, 2 * sums[1] - counts[1] * by_others]))
            gained = float((weighted * rest).sum())
            if gained > 0:
                held_out, shift = held_out - gained, (sums[0] + sums[1]) / sum(counts)
        squares -= 0.0 if shift is None else sum(counts) * float(shift.square().sum())
        return _Judged(layer, _relative(held_out, energy_held_out), _relative(squares, energy), shift)


def _error_of(judged: _Judged) -> float:
    return judged.held_out if math.isfinite(judged.held_out) else math.inf


def _relative(squares: float, energy: float) -> float:
    return math.sqrt(max(squares, 0.0) / energy) if energy else math.sqrt(max(squares, 0.0))

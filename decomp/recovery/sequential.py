"""Sequential decomposition: every layer for the inputs that it receives in the network compressed so far."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from decomp._util.naming import naming, require_finite
from decomp._util.progress import bar
from decomp.calibration.moments import moments_of
from decomp.calibration.unfold import rows_of
from decomp.data.activations import Activations, Example, ExampleCache, RoutedDifferently, reached_tails
from decomp.data.batches import CLOSED_FORM_SPLIT, Batches
from decomp.layers import Factorized
from decomp.network import surgery
from decomp.network.forward import Unfused, evaluating
from decomp.network.restoring import training_of
from decomp.network.tracing import Tail
from decomp.planning.build import (
    decomposed,
    from_moments,
    layers_to_replace,
    measured,
    weight_error,
)
from decomp.planning.choice import Choice
from decomp.planning.plan import CompressedModule, Plan
from decomp.recovery.batch_norm_shift import BatchNormShift, batch_norm_shifts
from decomp.recovery.least_squares import OutputSizeMismatch, Refit

CACHE_BYTES = 2**30
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
    progress: bool | None = None,
) -> CompressedModule:
    """Return ``model`` with the layers of ``plan`` replaced one after the other, in the order of execution.

    For each layer, with x^ its input in the network compressed so far and y its output in the dense one: the
    weight is fitted to y ~= W^ x^ + b by least squares (ridge towards W, chosen on held-out batches), W^ is
    decomposed for the moments of x^, and the remaining error of the mean of y is added to the bias, or to the
    BatchNorm that follows. ``after_each(small, name)`` is called after each layer, before the next one is
    decomposed.

    Source: Zhang et al. 2016, section 3.3 (asymmetric reconstruction).
    """
    replaced = layers_to_replace(model, plan, plan.method_of, needs_values=True)
    small = surgery.swap(model, {}, inplace=False)
    batches = Batches.in_fixed_order(data, inputs)
    pairs = {name: (small.get_submodule(name), dense) for name, dense in replaced.items()}
    final: dict[str, Choice] = {}
    with evaluating(model, small), Unfused(), torch.inference_mode(False), torch.no_grad():
        order = reached_tails(model, batches, replaced)
        norm_shifts = batch_norm_shifts(small, model, batches, pairs)
        for name, tail in bar(progress, "decompose", order.items()):
            require_finite(name, replaced[name])
            activations = Activations(small, model, *pairs[name], replace(tail, steps=()), batches, CACHE_BYTES)
            step = _LayerStep(*pairs[name], ExampleCache[Example](activations.windows), norm_shifts.get(name))
            with naming(name):
                layer, final[name] = step.decompose(name, plan)
            small = surgery.swap(small, {name: layer}, inplace=bool(name))
            if after_each is not None:
                after_each(small, name)
    unreached = {name: module for name, module in replaced.items() if name not in order}
    for name in order:
        small.get_submodule(name).train(training_of(replaced[name]))  # they were built in eval mode
    rest = decomposed(unreached, plan, plan.method_of, plan.candidates, plan.statistics, False)
    final |= measured(plan, unreached, rest, plan.candidates, plan.statistics)
    return plan.swap(small, rest, final, inplace=True)


@dataclass(frozen=True)
class _LayerStep:
    """One layer: ``own``, not decomposed yet, in the compressed network, ``dense`` in the dense one, its data."""

    own: nn.Module
    dense: nn.Module
    examples: ExampleCache[Example]
    norm_shift: BatchNormShift | None

    def decompose(self, name: str, plan: Plan) -> tuple[Factorized, Choice]:
        """Decompose the layer and correct its bias or BatchNorm; return it and the choice with its errors."""
        calibrated = plan.statistics.get(name)
        try:
            self._refit()
            received = ((example.received, CLOSED_FORM_SPLIT.held_out(example.batch)) for example in self.examples)
            moments = moments_of(self.own, received, calibrated, centred=self.norm_shift is not None)
        except RoutedDifferently:
            dense = {name: self.dense}
            alone = decomposed(dense, plan, plan.method_of, plan.candidates, plan.statistics, False)
            choice = measured(plan, dense, alone, plan.candidates, plan.statistics).get(name, plan[name])
            return alone[name], replace(choice, note="routed differently: decomposed by itself")
        layer = from_moments(self.own, plan.method_of(name), plan[name].ranks, moments)
        error = weight_error(layer, self.dense)
        return layer, replace(plan[name], error=error, output_error=self._centre(layer))

    def _refit(self) -> None:
        """Fit the weight of the layer, and its bias, to the targets on the inputs that it receives."""
        refit = Refit(self.own, self.norm_shift)
        try:
            for example in self.examples:
                if not example.received.is_floating_point():
                    return
                refit.add(example.received, example.targets[0], held_out=CLOSED_FORM_SPLIT.held_out(example.batch))
        except OutputSizeMismatch:
            return
        refit.apply()

    def _centre(self, layer: Any) -> float:
        """Correct the mean of the output by the bias or the BatchNorm; return the remaining relative error."""
        axes = len(getattr(layer, "kernel_size", ()))
        total: Any = 0.0
        squares = energy = 0.0
        count = 0
        for example in self.examples:
            target = example.targets[0] if self.norm_shift is None else self.norm_shift.target(example.targets[0])
            difference = rows_of(target - example.run(layer, NO_TAIL)[0], axes, 1)[0]
            total, count = total + difference.sum(0), count + len(difference)
            squares += float(difference.square().sum())
            energy += float(target.double().square().sum())
        mean = total / max(count, 1)
        if layer.bias is not None:
            layer.bias.add_(mean.to(layer.bias.dtype))
        elif self.norm_shift is not None:
            self.norm_shift.absorb(mean)
        if layer.bias is not None or self.norm_shift is not None:
            squares -= count * float(mean.square().sum())
        return math.sqrt(max(squares, 0.0) / energy) if energy else 0.0

"""Layer after layer: each decomposed for the inputs that it gets in the network compressed so far."""

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
from decomp.recovery.batch_norm_shift import Frame, frames_of
from decomp.recovery.least_squares import OtherSize, Refit

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

    Of each layer, with x^ what it gets in the network compressed so far and y what it gave in the dense one: the
    weight is fitted to y ~= W^ x^ + b by least squares (ridge towards W, chosen on held-out batches), W^ is
    decomposed for the moments of x^, and what is left of the mean of y goes into the bias, or into the BatchNorm
    that follows. ``after_each(small, name)`` is called after each layer, before the next one sees its output.

    Source: Zhang et al. 2016, section 3.3 (asymmetric reconstruction).
    """
    replaced = layers_to_replace(model, plan, plan.method_of, needs_values=True)
    small = surgery.swap(model, {}, inplace=False)
    batches = Batches.in_fixed_order(data, inputs)
    pairs = {name: (small.get_submodule(name), dense) for name, dense in replaced.items()}
    settled: dict[str, Choice] = {}
    with evaluating(model, small), Unfused(), torch.inference_mode(False), torch.no_grad():
        order = reached_tails(model, batches, replaced)
        frames = frames_of(small, model, batches, pairs)
        for name, tail in bar(progress, "decompose", order.items()):
            require_finite(name, replaced[name])
            flow = Activations(small, model, *pairs[name], replace(tail, steps=()), batches, CACHE_BYTES)
            step = _Step(*pairs[name], ExampleCache[Example](flow.windows), frames.get(name))
            with naming(name):
                layer, settled[name] = step.take(name, plan)
            small = surgery.swap(small, {name: layer}, inplace=bool(name))
            if after_each is not None:
                after_each(small, name)
    unreached = {name: module for name, module in replaced.items() if name not in order}
    for name in order:
        small.get_submodule(name).train(replaced[name].training)  # they were made in eval mode
    rest = decomposed(unreached, plan, plan.method_of, plan.candidates, plan.statistics, False)
    settled |= measured(plan, unreached, rest, plan.statistics)
    return plan.swap(small, rest, settled, inplace=True)


@dataclass(frozen=True)
class _Step:
    """One layer: ``own``, still dense, in the compressed network, and what it has to give."""

    own: nn.Module
    dense: nn.Module
    examples: ExampleCache[Example]
    frame: Frame | None

    def take(self, name: str, plan: Plan) -> tuple[Factorized, Choice]:
        """The factorized layer, its bias or the BatchNorm behind it corrected, and what became of the choice."""
        calibrated = plan.statistics.get(name)
        try:
            self._refit()
            received = ((example.received, CLOSED_FORM_SPLIT.held_out(example.batch)) for example in self.examples)
            moments = moments_of(self.own, received, calibrated, centred=self.frame is not None)
        except RoutedDifferently:
            dense = {name: self.dense}
            alone = decomposed(dense, plan, plan.method_of, plan.candidates, plan.statistics, False)
            choice = measured(plan, dense, alone, plan.statistics).get(name, plan[name])
            return alone[name], replace(choice, note="routed differently: decomposed by itself")
        layer = from_moments(self.own, plan.method_of(name), plan[name].ranks, moments)
        error = weight_error(layer, self.dense)
        return layer, replace(plan[name], error=error, output_error=self._centre(layer))

    def _refit(self) -> None:
        """Fit the weight of the layer, and its bias, to the targets for the inputs that it gets."""
        refit = Refit(self.own, self.frame)
        try:
            for example in self.examples:
                if not example.received.is_floating_point():
                    return
                refit.add(example.received, example.targets[0], held_out=CLOSED_FORM_SPLIT.held_out(example.batch))
        except OtherSize:
            return
        refit.apply()

    def _centre(self, layer: Any) -> float:
        """Correct the mean of the output, where something can; return the relative error that is left."""
        axes = len(getattr(layer, "kernel_size", ()))
        total: Any = 0.0
        squares = energy = 0.0
        count = 0
        for example in self.examples:
            target = example.targets[0] if self.frame is None else self.frame.target(example.targets[0])
            lost = rows_of(target - example.run(layer, NO_TAIL)[0], axes, 1)[0]
            total, count = total + lost.sum(0), count + len(lost)
            squares, energy = squares + float(lost.square().sum()), energy + float(target.double().square().sum())
        mean = total / max(count, 1)
        if layer.bias is not None:
            layer.bias.add_(mean.to(layer.bias.dtype))
        elif self.frame is not None:
            self.frame.take(mean)
        if layer.bias is not None or self.frame is not None:
            squares -= count * float(mean.square().sum())
        return math.sqrt(max(squares, 0.0) / energy) if energy else 0.0

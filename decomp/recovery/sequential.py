"""Sequential decomposition: every layer for the inputs that it receives in the network compressed so far."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from decomp._util.naming import naming, require_finite
from decomp._util.progress import bar
from decomp.calibration.moments import Moments, moments_of
from decomp.calibration.sampling import Positions, Sampling
from decomp.data.activations import Example, RoutedDifferently, reached_tails
from decomp.data.batches import CLOSED_FORM_SPLIT, Batches, Mask, unpadded
from decomp.data.suspended import HeldExamples
from decomp.layers import Factorized, routes_rows
from decomp.network import surgery
from decomp.network.forward import Unfused, evaluating
from decomp.network.restoring import training_of
from decomp.network.tracing import Tail
from decomp.network.unpacking import unpacked
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
    positions: Positions = "auto",
    mask: Mask = "attention_mask",
    progress: bool | None = None,
) -> CompressedModule:
    """Return ``model`` with the layers of ``plan`` replaced one after the other, in the order of execution.

    For each layer, with x^ its input in the network compressed so far and y its output in the dense one: the
    weight is fitted to y ~= W^ x^ + b by least squares (ridge towards W, chosen on held-out batches), W^ is
    decomposed for the moments of x^, and the remaining error of the mean of y is added to the bias, or to the
    BatchNorm that follows. ``after_each(small, name)`` is called after each layer, before the next one is
    decomposed. One pass of each batch through both networks serves all layers, held at each until that is
    decomposed; batches beyond the memory, and models for which that does not work, take a pass per layer.

    Source: Zhang et al. 2016, section 3.3 (asymmetric reconstruction).
    """
    model = unpacked(model, plan.replaced)
    replaced = layers_to_replace(model, plan, plan.method_of, needs_values=True)
    small = surgery.swap(model, {}, inplace=False)
    batches = Batches.in_fixed_order(data, inputs, mask)
    sampling = Sampling(positions, batches.count())
    pairs = {name: (small.get_submodule(name), dense) for name, dense in replaced.items()}
    final: dict[str, Choice] = {}
    with evaluating(model, small), Unfused(), torch.inference_mode(False), torch.no_grad():
        order = reached_tails(model, batches, replaced)
        norm_shifts = batch_norm_shifts(small, model, batches, pairs)
        calls = {name: replace(tail, steps=()) for name, tail in order.items()}
        with HeldExamples(small, model, pairs, calls, batches, CACHE_BYTES) as held:
            for name in bar(progress, "decompose", list(order)):
                require_finite(name, replaced[name])
                with naming(name):
                    step = _LayerStep(*pairs[name], held.of(name), norm_shifts.get(name), sampling)
                    layer, final[name] = step.decompose(name, plan)
                del step  # its examples are gone before the next ones are made
                small = surgery.swap(small, {name: layer}, inplace=bool(name))
                if after_each is not None:
                    after_each(small, name)
                held.replace(name, layer, small)
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
    examples: Iterable[Example]
    norm_shift: BatchNormShift | None
    sampling: Sampling

    def decompose(self, name: str, plan: Plan) -> tuple[Factorized, Choice]:
        """Decompose the layer and correct its bias or BatchNorm; return it and the choice with its errors."""
        if not plan.method_of(name).affine or routes_rows(self.own):
            return self._alone(name, plan)  # a refit has one weight for all rows
        calibrated = cast(Moments | None, plan.statistics.get(name))
        try:
            patches = self._refit()
            received = ((example.received, example.batch, example.mask) for example in self.examples)
            centred = self.norm_shift is not None
            moments = moments_of(self.own, received, calibrated, self.sampling, centred=centred, patches=patches)
        except RoutedDifferently:
            layer, choice = self._alone(name, plan)
            return layer, replace(choice, note="routed differently: decomposed by itself")
        layer = from_moments(self.own, plan.method_of(name), plan[name].ranks, moments)
        error = weight_error(layer, self.dense)
        return layer, replace(plan[name], error=error, output_error=self._centre(layer))

    def _alone(self, name: str, plan: Plan) -> tuple[Factorized, Choice]:
        """Decompose the layer as :meth:`Plan.apply` would, without the examples."""
        dense = {name: self.dense}
        alone = decomposed(dense, plan, plan.method_of, plan.candidates, plan.statistics, False)
        choice = measured(plan, dense, alone, plan.candidates, plan.statistics).get(name, plan[name])
        return alone[name], choice

    def _refit(self) -> Tensor | None:
        """Fit the weight of the layer, and its bias, to the targets on the inputs that it receives.

        Returns the second moments of the patches, if the sums of the fit hold them.
        """
        refit = Refit(self.own, self.norm_shift, self.sampling)
        try:
            for example in self.examples:
                if not example.received.is_floating_point():
                    return None
                held_out = CLOSED_FORM_SPLIT.held_out(example.batch)
                target = example.targets[0]
                refit.add(example.received, target, held_out=held_out, batch=example.batch, mask=example.mask)
        except OutputSizeMismatch:
            return None
        refit.apply()
        is_spatial = math.prod(getattr(self.own, "kernel_size", ())) > 1
        absorbs = self.norm_shift is not None or getattr(self.own, "bias", None) is not None
        return refit.patch_moments(centred=absorbs) if is_spatial else None

    def _centre(self, layer: Any) -> float:
        """Correct the mean of the output by the bias or the BatchNorm; return the remaining relative error."""
        axes = len(getattr(layer, "kernel_size", ()))
        total: Any = 0.0
        squares = energy = 0.0
        count = 0
        for example in self.examples:
            target, output = example.targets[0], example.run(layer, NO_TAIL)[0]
            if not axes:
                target, output = (unpadded(each, example.mask) for each in (target, output))
            target = target if self.norm_shift is None else self.norm_shift.target(target)
            difference = target - output
            channels = difference.dim() - axes - 1
            others = [axis for axis in range(difference.dim()) if axis != channels]
            total = total + difference.sum(others, dtype=torch.float64)
            count += difference.numel() // difference.shape[channels]
            squares += float(difference.square().sum(dtype=torch.float64))
            energy += float(target.square().sum(dtype=torch.float64))
        mean = total / max(count, 1)
        if layer.bias is not None:
            layer.bias.add_(mean.to(layer.bias.dtype))
        elif self.norm_shift is not None:
            self.norm_shift.absorb(mean)
        if layer.bias is not None or self.norm_shift is not None:
            squares -= count * float(mean.square().sum())
        return math.sqrt(max(squares, 0.0) / energy) if energy else 0.0

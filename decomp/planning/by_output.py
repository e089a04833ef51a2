"""Budgets by what the network's output feels, where data are batches, unless held-out batches say otherwise."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from decomp.calibration.calibrate import Statistics, gather
from decomp.calibration.gradients import NoGradient, SensitivityScalar, leveled
from decomp.data.batches import Batches
from decomp.network.forward import Unfused, call, difference, evaluating, to_device_of
from decomp.planning.arguments import Scope
from decomp.planning.plan import Plan

MASK = "attention_mask"
MOST_BATCHES = 8


def statistics_by_output(model: nn.Module, scope: Scope) -> Statistics | None:
    """The statistics of batches, with the sensitivity of the network's output to each layer.

    None where that cannot be measured: the data are no batches, or can be gone through only once, in which case a
    failure could not be made up for; or the output cannot be differentiated, or there is no memory to do so.
    """
    data = scope["data"]
    if data is None or isinstance(data, Statistics | Iterator):
        return None
    chosen: Any = {name: scope[name] for name in ("inputs", "layers", "exclude", "progress")}
    try:
        return gather(model, data, SensitivityScalar("output", level=True), mask=MASK, **chosen)
    except (NoGradient, RuntimeError):
        return None


def nearest(plans: Sequence[Plan], model: nn.Module, scope: Scope) -> Plan:
    """The plan whose model has the output nearest to that of the dense one, on batches held out from statistics.

    Of at most eight batches. The first plan where outputs cannot be compared, since their sizes depend on weights.
    """
    data: Any = scope["data"]
    batches = Batches.in_fixed_order(data, scope["inputs"], MASK)
    split = batches.batch_split()
    part = None if split.every is None else split.held_out
    judged = [(batch, mask) for _, batch, mask in islice(batches.masked(part=part), MOST_BATCHES)]
    with evaluating(model), Unfused(), torch.no_grad():
        expected = [call(model, to_device_of(model, batch)) for batch, _ in judged]
        try:
            errors = {
                place: _error(plan.apply(model, progress=False), judged, expected)
                for place, plan in enumerate(plans)
            }
        except ValueError:
            return plans[0]
    return plans[min(errors, key=lambda place: errors[place])]


def _error(small: nn.Module, judged: Sequence[tuple[Any, Any]], expected: Sequence[Any]) -> float:
    """The sum of the squared relative errors of the batches."""
    total = 0.0
    with evaluating(small):
        for (batch, mask), output in zip(judged, expected, strict=True):
            own, dense = (leveled(r, output, mask) for r in (call(small, to_device_of(small, batch)), output))
            total += float(difference(small, own, dense).square().sum() / dense.square().sum().clamp(min=1e-30))
    return total

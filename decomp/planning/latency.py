"""Measured seconds of models, and of a layer, dense or factorized at any ranks."""

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.benchmark import Timer

from decomp.layers.kernels import memory_format_of
from decomp.network.flops import Call, measure_per_module
from decomp.network.forward import arguments, evaluating, to_device_of, with_values
from decomp.planning.cost import Price, example_input

RANK_SHARES = (0.02, 0.1, 0.25, 0.5, 0.75)
LEAST_SECONDS_PER_ROUND = 0.01
ROUNDS = 3
TIMED_PASSES = 5

Timings = dict[tuple[Any, ...], float]
"""Seconds of the structures that one call has measured: layers of the same structure are measured once."""


def latency(models: list[nn.Module], batch: Any) -> list[float]:
    """Median seconds of one forward pass of each model; interleaved, so that drift affects all equally."""
    timers = []
    for model in models:
        positional, keywords = arguments(to_device_of(model, batch))
        names = {"model": model, "positional": positional, "keywords": keywords}
        timers.append(Timer("model(*positional, **keywords)", globals=names, num_threads=torch.get_num_threads()))
    with evaluating(*models), torch.no_grad(), with_values():
        rounds = [
            [timer.blocked_autorange(min_run_time=0.1).median for timer in timers] for _ in range(ROUNDS + 1)
        ]
    return [statistics.median(times) for times in zip(*rounds[1:], strict=True)]  # the first round warms up


def layer_seconds(model: nn.Module, batch: Any, units: Mapping[str, nn.Module]) -> dict[str, float]:
    """Median seconds of each unit inside the model, over a few passes with hooks."""
    parameter = next(model.parameters(), None)

    def clock() -> float:
        if parameter is not None and parameter.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(parameter.device)
        return time.perf_counter()

    batch = to_device_of(model, batch)
    passes = [measure_per_module(model, batch, units, clock) for _ in range(TIMED_PASSES)]
    return {name: statistics.median(times[name] for times in passes) for name in passes[0]}


class Stopwatch:
    """Seconds of one layer on this machine, measured at a few ranks and interpolated over MACs.

    The measured ranks are the same share of every limit: very uneven Tucker ranks can be faster than predicted.

    Args:
        price: the cost of the layer at any ranks, and the structures to build.
        limits: its largest ranks.
        calls: the inputs of the layer in one pass.
        device: where it is measured.
        timings: what the call has measured so far.
    """

    def __init__(
        self,
        price: Price,
        limits: tuple[int, ...],
        calls: Sequence[Call],
        device: torch.device,
        timings: Timings,
    ) -> None:
        self.dense = _seconds(price.spec, tuple(calls), device, timings)
        from scipy.optimize import isotonic_regression  # late: it takes longer than the rest of import decomp

        points: dict[int, float] = {}
        for share in RANK_SHARES:
            ranks = tuple(max(1, min(round(share * limit), limit)) for limit in limits)
            cost = price(ranks)
            if cost.macs < price.dense.macs or not price.dense.macs:  # a dense embedding has no MACs
                points[cost.macs] = _seconds(price.structure(ranks), tuple(calls), device, timings)
        points = points or {price.dense.macs: self.dense}
        self._macs = np.array(sorted(points), np.float64)
        # More MACs cannot be faster: violations are noise, removed by isotonic regression.
        self._seconds = isotonic_regression([points[count] for count in sorted(points)]).x

    def __call__(self, macs: NDArray[Any]) -> NDArray[np.float64]:
        """Predicted seconds of the factorized layer with so many MACs, extrapolated along the last two points."""
        seconds = np.interp(macs, self._macs, self._seconds)
        if len(self._macs) > 1:
            slope = (self._seconds[-1] - self._seconds[-2]) / (self._macs[-1] - self._macs[-2])
            seconds = np.where(macs > self._macs[-1], self._seconds[-1] + slope * (macs - self._macs[-1]), seconds)
        return np.asarray(seconds, np.float64)

    def rescale(self, factor: float) -> None:
        """Multiply all seconds by a factor: inside the network a layer is faster or slower than alone."""
        self.dense *= factor
        self._seconds *= factor


def _seconds(layer: nn.Module, calls: tuple[Call, ...], device: torch.device, timings: Timings) -> float:
    """Median seconds of all calls of a layer given on the meta device; each structure is measured once."""
    weight = max(layer.parameters(), key=lambda parameter: parameter.dim())
    layout = memory_format_of(weight)
    key = (str(layer), weight.dtype, layout, calls, device, torch.get_num_threads())
    if key not in timings:
        timings[key] = _measure(copy.deepcopy(layer).to_empty(device=device).eval(), calls, layout)
    return timings[key]


@torch.no_grad()
def _measure(layer: nn.Module, calls: tuple[Call, ...], layout: torch.memory_format) -> float:
    total = 0.0
    for parameter in layer.parameters():
        parameter.fill_(0.01)  # memory that was never written may hold denormal numbers, which are slow
    for buffer in layer.buffers():
        buffer.zero_()
    for each in calls:
        x = example_input(layer, each)
        x = x.contiguous(memory_format=layout) if len(each.shape) > 3 else x
        sizes = {} if each.output_size is None else {"output_size": each.output_size}
        names = {"layer": layer, "x": x, "sizes": sizes}
        timer = Timer("layer(x, **sizes)", globals=names, num_threads=torch.get_num_threads())
        with with_values():
            rounds = [timer.blocked_autorange(min_run_time=LEAST_SECONDS_PER_ROUND).median for _ in range(ROUNDS)]
        total += statistics.median(rounds)
    return total

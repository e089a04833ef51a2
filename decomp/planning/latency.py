"""Measured seconds of models, and of a layer, dense or factorized at any ranks, in PyTorch or in a runtime."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.benchmark import Timer

from decomp.layers.kernels import memory_format_of
from decomp.network.flops import Call, measure_per_module
from decomp.network.forward import arguments, evaluating, to_device_of, with_values
from decomp.network.tracing import Tail
from decomp.planning.cost import Price, example_input
from decomp.runtimes import Runtime, ready, time_in_turn

RANK_SHARES = (0.02, 0.1, 0.25, 0.5, 0.75)
RUNTIME_RANK_SHARES = (0.08, 0.25, 0.6)  # fewer, since a runtime takes a second to prepare a layer
LEAST_SECONDS_PER_ROUND = 0.01
ROUNDS = 3
TIMED_PASSES = 5

Timings = dict[tuple[Any, ...], float]
"""Seconds of the structures that one call has measured: layers of the same structure are measured once."""
Measure = Callable[[nn.Module, tuple[Call, ...]], float]
"""Seconds of all calls of a layer, which is given on the meta device."""
MULTIPLES = (1, 4, 8, 16, 32)
TOP_RANK = 64  # multiples are looked for at the upper half of the ranks up to here,
RANK_STEP = 4  # in these steps
CLEARLY = 0.7  # a multiple is taken where its residual is below this share of that without one


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
        measure: measures it.
        multiple: MACs are those of ranks rounded up to a multiple of it, to which the runtime pads them.
        shares: the ranks to measure, as shares of the limits.
    """

    def __init__(
        self,
        price: Price,
        limits: tuple[int, ...],
        calls: Sequence[Call],
        measure: Measure,
        multiple: int = 1,
        shares: Sequence[float] = RANK_SHARES,
    ) -> None:
        self._price, self._limits, self._multiple = price, np.array(limits), multiple
        self.dense = measure(price.spec, tuple(calls))
        from scipy.optimize import isotonic_regression  # late: it takes longer than the rest of import decomp

        points: dict[int, float] = {}
        for share in shares:
            ranks = tuple(min(max(1, round(share * limit / multiple)) * multiple, limit) for limit in limits)
            cost = price(ranks)
            if cost.macs < price.dense.macs or not price.dense.macs:  # a dense embedding has no MACs
                points[cost.macs] = measure(price.structure(ranks), tuple(calls))
        points = points or {price.dense.macs: self.dense}
        self._macs = np.array(sorted(points), np.float64)
        # More MACs cannot be faster: violations are noise, removed by isotonic regression.
        self._seconds = isotonic_regression([points[count] for count in sorted(points)]).x

    def __call__(self, ranks: NDArray[Any]) -> NDArray[np.float64]:
        """Predicted seconds of the factorized layer at ranks (n, modes), extrapolated along its last points."""
        padded = np.minimum(-(-ranks // self._multiple) * self._multiple, self._limits)
        macs = self._price.at(padded)["macs"]
        seconds = np.interp(macs, self._macs, self._seconds)
        if len(self._macs) > 1:
            slope = (self._seconds[-1] - self._seconds[-2]) / (self._macs[-1] - self._macs[-2])
            seconds = np.where(macs > self._macs[-1], self._seconds[-1] + slope * (macs - self._macs[-1]), seconds)
        return np.asarray(seconds, np.float64)

    def rescale(self, factor: float) -> None:
        """Multiply all seconds by a factor: inside the network a layer is faster or slower than alone."""
        self.dense *= factor
        self._seconds *= factor


def in_eager(device: torch.device, timings: Timings) -> Measure:
    """Measure layers by themselves in PyTorch eager."""
    return partial(_eager_seconds, device=device, timings=timings)


class RuntimeClock:
    """Measures layers in a runtime, each with the BatchNorm and the activation that follow it in the network.

    Args:
        runtime: where.
        tails: what follows each layer.
        timings: what the call has measured so far.
    """

    def __init__(self, runtime: Runtime, tails: Mapping[str, Tail], timings: Timings) -> None:
        self.runtime = runtime
        self._tails, self._timings = tails, timings

    def measure(self, name: str, device: torch.device) -> Measure:
        """What measures the layer of this name."""
        return partial(self._measure, tail=self._tails.get(name, Tail()), device=device)

    def _measure(self, layer: nn.Module, calls: tuple[Call, ...], *, tail: Tail, device: torch.device) -> float:
        after = [getattr(step.func, "__name__", str(step.func)) for step in tail.steps]
        dtype = next(layer.parameters()).dtype
        key = (self.runtime.name, str(layer), dtype, calls, device, *after)
        if key not in self._timings:
            self._timings[key] = sum(self._seconds(layer, call, tail, device) for call in calls)
        return self._timings[key]

    @torch.no_grad()
    def _seconds(self, layer: nn.Module, call: Call, tail: Tail, device: torch.device) -> float:
        values = torch.Generator().manual_seed(0)
        layer = copy.deepcopy(layer).to_empty(device=device).eval()
        for parameter in layer.parameters():
            scale = max(1, parameter[0].numel() if parameter.dim() else 1) ** -0.5  # outputs stay of size one
            parameter.copy_(scale * torch.randn(parameter.shape, generator=values))
        for buffer in layer.buffers():
            buffer.zero_()
        x = example_input(layer, call)
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x = torch.randn(x.shape, generator=values).to(x)
        piece = Piece(layer, tail, call)
        run = ready(self.runtime, piece, x, [x])
        (timing,) = time_in_turn([lambda: run(x)], seconds=0.03, rounds=ROUNDS)
        return min(timing.samples)  # layers are not timed in turn, and what else runs only adds


class Piece(nn.Module):
    """A layer with the functions that follow it in its network."""

    def __init__(self, layer: nn.Module, tail: Tail, call: Call) -> None:
        super().__init__()
        self.layer, self._steps = layer, tail.steps
        self._sizes = {} if call.output_size is None else {"output_size": call.output_size}

    def forward(self, x: Any) -> Any:
        result = self.layer(x, **self._sizes)
        result = result[0] if isinstance(result, tuple) else result
        for step in self._steps:
            result = step.func(result, *step.args, **step.kwargs)
        return result


def preferred_multiple(price: Price, limits: tuple[int, ...], calls: Sequence[Call], measure: Measure) -> int:
    """The multiple to which the runtime pads ranks, as far as the times of one layer show one.

    The layer is measured at the ranks 36, 40, ... 64, and each multiple m fitted by t = a + b MACs(ranks
    rounded up to m). The best is taken where it leaves clearly less than no multiple does, else 1.
    """
    top = min(TOP_RANK, max(limits))
    if top < TOP_RANK // 2:
        return 1
    steps = range(top // 2 + RANK_STEP, top + 1, RANK_STEP)
    ranks = np.array([[min(step, limit) for limit in limits] for step in steps])
    times = np.array([measure(price.structure(tuple(row)), tuple(calls)) for row in ranks.tolist()])
    residual: dict[int, float] = {}
    for multiple in MULTIPLES:
        macs = price.at(np.minimum(-(-ranks // multiple) * multiple, np.array(limits)))["macs"]
        columns = np.stack([np.ones(len(macs)), macs / price.dense.macs], 1)
        fitted = columns @ np.linalg.lstsq(columns, times, rcond=None)[0]
        residual[multiple] = float(np.square(fitted - times).sum())
    best = min(residual, key=lambda multiple: residual[multiple])
    return best if residual[best] < CLEARLY * residual[1] else 1


def seconds_of(runs: Sequence[Callable[[Any], Any]], batch: Any) -> list[float]:
    """Median seconds of one pass of each of these models, which are prepared in a runtime, in turn."""
    timings = time_in_turn([partial(run, batch) for run in runs], seconds=1.0)
    return [timing.seconds for timing in timings]


def _eager_seconds(layer: nn.Module, calls: tuple[Call, ...], device: torch.device, timings: Timings) -> float:
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

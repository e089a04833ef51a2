"""A bound on seconds in a runtime: layers are priced there, and the bound is kept as it is measured there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, cast

import torch
from torch import nn

from decomp.calibration.calibrate import Statistics
from decomp.layers import Factorized
from decomp.methods import Method
from decomp.network.tracing import tails
from decomp.planning.arguments import Scope
from decomp.planning.budget import OutOfReach, seconds
from decomp.planning.candidate import Candidate
from decomp.planning.choice import Change
from decomp.planning.cost import Price
from decomp.planning.latency import RUNTIME_RANK_SHARES, RuntimeClock, Stopwatch, preferred_multiple, seconds_of
from decomp.planning.plan import Plan
from decomp.planning.survey import Survey
from decomp.runtimes import Runtime, ready

CORRECTIONS = 5  # how often a bound is corrected by what was measured
WITHIN = 0.05  # it is not corrected any more where the measured time is below it by less than this,
MARGIN = 0.01  # and by more than this, by which two measurements of one model differ
MOST_BATCHES = 32  # of data, for the ranges of a quantizing runtime


class SecondsInRuntime:
    """A bound on the seconds of a model in a runtime.

    Args:
        runtime: where.
        asked: the bound as the call put it: a share of the dense model's time, or :class:`decomp.seconds`.
        model: the user's model.
        unpacked: the same with the layers of packed modules by themselves.
        surveyed: the layers of that.
        fitting: the methods that a layer may have.
        scope: the data, for the ranges of a quantizing runtime.

    Raises:
        ValueError: the bound is a number above 1, which is no share.
    """

    def __init__(
        self,
        runtime: Runtime,
        asked: float,
        model: nn.Module,
        unpacked: nn.Module,
        surveyed: Survey,
        fitting: Callable[[nn.Module], list[Method]],
        scope: Scope,
    ) -> None:
        if not isinstance(asked, seconds) and asked > 1:
            raise ValueError(
                f"seconds={asked!r} with runtime=: write a share of the dense model's time, in (0, 1], or "
                f"decomp.seconds({asked!r}) for a duration"
            )
        self._runtime, self._asked, self._model = runtime, asked, model
        self._surveyed, self._fitting = surveyed, fitting
        self._batches = _batches(scope, surveyed.example)
        self._clock = RuntimeClock(runtime, tails(unpacked, surveyed.example, surveyed.decomposable), {})

    @cached_property
    def multiple(self) -> int:
        """The multiple of ranks that the runtime likes, measured on the layer with the most MACs."""
        surveyed = self._surveyed
        most = surveyed.forward_pass.macs if surveyed.forward_pass else {}
        name = max(surveyed.decomposable, key=lambda name: most.get(name, 0), default=None)
        if name is None:
            return 1
        module = surveyed.decomposable[name]
        method, calls = self._fitting(module)[0], surveyed.calls(name) or []
        limits = method.limits(method.kernels(module))
        price = Price(module, cast(type[Factorized], method.layer_of(module)), limits, calls)
        measure = self._clock.measure(name, next(module.parameters()).device)
        return preferred_multiple(price, limits, calls, measure)

    def options(self, name: str, device: torch.device) -> dict[str, Any]:
        """How a candidate of this layer is timed."""
        measure = self._clock.measure(name, device)
        return {"measure": measure, "shares": RUNTIME_RANK_SHARES, "multiple": self.multiple}

    def timed(self, candidates: Mapping[str, list[Candidate]]) -> Change:
        """Time the dense model.

        Layers cannot be timed inside of it: where they take longer than the whole together, all are rescaled
        alike.
        """
        (total,) = seconds_of([self._run_dense], self._surveyed.example)
        alone = sum(cast(Stopwatch, first.stopwatch).dense for first, *_ in candidates.values())
        for each in candidates.values():
            for candidate in each:
                cast(Stopwatch, candidate.stopwatch).rescale(min(1.0, total / alone))
        return Change(total, total)

    def target(self, total: float) -> float:
        """The bound in seconds, for a dense model that takes ``total``."""
        return float(self._asked if isinstance(self._asked, seconds) else self._asked * total)

    def kept(self, plan: Plan, target: float) -> Plan:
        """The plan with the most seconds within the bound of ``target`` seconds, as measured.

        A plan that is predicted to save p seconds of the dense model's t and saves m leads to the next bound
        t - p (t - b) / m, with b just below the bound that was asked for: parts outside of the layers may take
        more or less than was predicted, and savings may be smaller, but they grow together. A time that is nearer
        to the bound than a measurement is exact is taken only where there is no other.

        Raises:
            OutOfReach: the fastest choice of ranks is above the bound.
        """
        total = cast(Change, plan.seconds).before
        if target >= total:
            return plan.with_budget(seconds=target)
        surely = (1 - MARGIN) * target

        def merit(found: float) -> tuple[bool, float]:
            return found <= surely, found if found <= surely else -found

        best: tuple[float, Plan] | None = None
        bound, least, fastest = target, 0.0, total
        for _ in range(CORRECTIONS):
            try:
                tried = plan.with_budget(seconds=bound)
            except OutOfReach as error:
                if bound <= least:
                    break  # the fastest choice that is predicted was measured
                least = bound = error.least * (1 + 1e-9)
                tried = plan.with_budget(seconds=bound)
            if not tried.replaced:
                break
            found = self._measured(tried) * total
            fastest = min(fastest, found)
            if found <= target and (best is None or merit(found) > merit(best[0])):
                best = found, tried
            if (1 - WITHIN) * target < found <= surely:
                break
            saved = total - cast(Change, tried.seconds).after
            if found < total:
                bound = total - saved * (total - (1 - WITHIN / 2) * target) / (total - found)
            else:
                bound = total - 2 * saved  # no faster: only more can help
            bound = max(bound, 1e-9 * total)  # out of reach, where the fastest choice is tried
            if bound <= least:
                break
        if best is None:
            raise OutOfReach(
                f"seconds={self._asked!r} cannot be reached in {self._runtime.name}: of the dense model's "
                f"{total:.3g} s the least that was measured is {fastest:.3g}, a share of {fastest / total:.3f}",
                fastest,
            )
        slowest, kept = best
        return kept.with_measured(self._runtime.name, Change(total, slowest))

    @cached_property
    def _run_dense(self) -> Callable[[Any], Any]:
        return ready(self._runtime, self._model, self._surveyed.example, self._batches)

    def _measured(self, plan: Plan) -> float:
        """The time of the model of a plan, as a share of the dense one's."""
        example = self._surveyed.example
        run = ready(self._runtime, plan.build(self._model), example, self._batches)
        before, after = seconds_of([self._run_dense, run], example)
        return after / before


def _batches(scope: Scope, example: Any) -> Sequence[Any]:
    """Batches for a quantizing runtime: of the data, or, where these are statistics, the example."""
    data, inputs = scope["data"], scope["inputs"]
    if data is None or isinstance(data, Statistics):
        return [example]
    given: Iterable[Any] = islice(data, MOST_BATCHES)
    return [inputs(batch) if inputs else batch for batch in given]

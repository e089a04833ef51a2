"""Timing that can be trusted: warm-up, calls in turn, medians, and whether the machine was quiet enough."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

LEAST_ROUNDS, MOST_ROUNDS = 9, 101
SECONDS_PER_ROUND = 0.002
WARM_UP_SECONDS = 0.05
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: ``samples`` in the order of the rounds, each the mean of a few calls."""

    samples: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a share of the median."""
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / (2 * self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times faster the first of two is: the median over rounds, and a 95 % confidence interval of it."""

    median: float
    low: float
    high: float

    @property
    def is_decided(self) -> bool:
        """Whether the interval leaves 1 out; else the machine is too noisy to tell which of both is faster."""
        return not self.low <= 1 <= self.high

    def __str__(self) -> str:
        doubt = "" if self.is_decided else ", too noisy to decide"
        return f"x{self.median:.2f} ({self.low:.2f} to {self.high:.2f}{doubt})"


def time_in_turn(
    calls: Sequence[Callable[[], object]], seconds: float = 0.5, rounds: int = LEAST_ROUNDS
) -> list[Timing]:
    """Time functions in turn, forwards and backwards alternately, so that a drift of the machine hits all alike.

    Each is warmed up first. A round calls each as often as fills 2 ms, and there are rounds until ``seconds`` per
    function have passed, at least ``rounds`` and at most 101. The garbage collector waits.

    >>> calls = [lambda: sum(range(100)), lambda: sum(range(10000))]
    >>> first, second = time_in_turn(calls, seconds=0.01)
    >>> first.seconds < second.seconds
    True
    """
    repeats = [_warmed_up(call) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds * len(calls)
        while len(samples[0]) < rounds or (time.perf_counter() < end and len(samples[0]) < MOST_ROUNDS):
            order = range(len(calls)) if len(samples[0]) % 2 else reversed(range(len(calls)))
            for place in order:
                samples[place].append(_mean_seconds(calls[place], repeats[place]))
    finally:
        if collecting:
            gc.enable()
    return [Timing(tuple(each)) for each in samples]


def ratio(slow: Timing, fast: Timing) -> Ratio:
    """How many times faster ``fast`` is, from the ratios within each round.

    The interval is between order statistics, x_(k) to x_(n + 1 - k) with the largest k for which
    2 P(Binomial(n, 1/2) < k) <= 5 %: it assumes no distribution. With fewer than six rounds it is the whole range.

    >>> print(ratio(Timing((2.0,) * 9), Timing((1.0,) * 9)))
    x2.00 (2.00 to 2.00)
    """
    ratios = sorted(one / other for one, other in zip(slow.samples, fast.samples, strict=True))
    count, outside, k = len(ratios), 0.0, 1
    while True:
        outside += 2 * comb(count, k - 1) / 2**count
        if outside > 1 - CONFIDENCE or 2 * k > count:
            break
        k += 1
    k = max(1, k - 1)
    return Ratio(statistics.median(ratios), ratios[k - 1], ratios[count - k])


def _warmed_up(call: Callable[[], object]) -> int:
    """Warm a function up, and return how many calls of it fill a round."""
    call()
    start, count, fastest = time.perf_counter(), 0, float("inf")
    while count < 2 or time.perf_counter() < start + WARM_UP_SECONDS:
        fastest = min(fastest, _mean_seconds(call, 1))
        count += 1
    return max(1, round(SECONDS_PER_ROUND / max(fastest, 1e-9)))


def _mean_seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats

"""CP of kernel-shaped tensors: fit_cp beside tensorly.decomposition.parafac, error and seconds.

Both get the same float32 tensor, rank, tolerance (1e-6, on the decrease of the relative error in a sweep), threads
and one start (parafac: init="svd", its default), in turn, in one process. parafac may take the sweeps it needs,
up to 1000, but no more than its default of 100 where a sweep is slow; fit_cp takes 100 at most, its default.

    python benchmarks/cp_tensorly.py [--quick]
"""

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import tensorly
import torch
from tensorly.decomposition import parafac
from torch import Tensor

from decomp._util.tables import render
from decomp.methods.solvers import als, fit_cp

TOLERANCE = 1e-6
SHORT = 1.0
RUNS = 3


@dataclass(frozen=True)
class Case:
    """One tensor: ``kind`` says how it is drawn, ``saving`` how many times fewer numbers its rank stores."""

    kind: str
    shape: tuple[int, ...]
    saving: int
    limit: int = 1000

    @property
    def rank(self) -> int:
        return max(1, round(math.prod(self.shape) / self.saving / sum(self.shape)))


@dataclass(frozen=True)
class Outcome:
    error: float
    seconds: float
    sweeps: int


def power_law(case: Case, generator: torch.Generator) -> Tensor:
    """Random Gaussian core that falls as 1 / max(a, b), in random bases of both channel modes."""
    outputs, inputs, *spatial = case.shape
    core = torch.randn(case.shape, generator=generator)
    rows, columns = torch.arange(1, outputs + 1.0), torch.arange(1, inputs + 1.0)
    core /= torch.maximum(rows[:, None], columns).reshape(outputs, inputs, *(1,) * len(spatial))
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (outputs, inputs))
    return torch.einsum("ta,ab...,sb->ts...", left, core, right).contiguous()


def gaussian(case: Case, generator: torch.Generator) -> Tensor:
    return torch.randn(case.shape, generator=generator)


def planted(case: Case, generator: torch.Generator) -> Tensor:
    """A CP of the very rank that is asked for, and noise of 0.3 times its norm."""
    factors = [torch.randn(size, case.rank, generator=generator) for size in case.shape]
    signal = tensorly_model(factors)
    noise = torch.randn(case.shape, generator=generator)
    return signal / signal.norm() + 0.3 * noise / noise.norm()


DRAWS: dict[str, Callable[[Case, torch.Generator], Tensor]] = {
    "power law": power_law,
    "gaussian": gaussian,
    "planted": planted,
}


def tensorly_model(factors: list[Tensor]) -> Tensor:
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        model: Tensor = tensorly.cp_to_tensor((None, factors))
    return model


def relative_error(tensor: Tensor, factors: list[Tensor]) -> float:
    exact = tensor.double()
    return float((exact - tensorly_model([factor.double() for factor in factors])).norm() / exact.norm())


def theirs(tensor: Tensor, case: Case) -> Outcome:
    sweeps: list[float] = []
    with tensorly.backend_context("pytorch", local_threadsafe=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        result, sweeps = parafac(
            tensor,
            *(case.rank, case.limit),
            init="svd",
            tol=TOLERANCE,
            random_state=0,
            return_errors=True,
        )
        seconds = time.perf_counter() - start
    return Outcome(relative_error(tensor, result.factors), seconds, len(sweeps))


def ours(tensor: Tensor, case: Case) -> Outcome:
    start = time.perf_counter()
    model = fit_cp(tensor[None], case.rank, tolerance=TOLERANCE)
    seconds = time.perf_counter() - start
    return Outcome(relative_error(tensor, [factor[0] for factor in model.factors]), seconds, 0)


def our_sweeps(tensor: Tensor, case: Case) -> int:
    """Sweeps of the same fit, counted in a run of its own that is not timed."""
    with mock.patch.object(als, "sweep", wraps=als.sweep) as sweep:
        fit_cp(tensor[None], case.rank, tolerance=TOLERANCE)
    return sweep.call_count


def compare(case: Case) -> tuple[Outcome, Outcome]:
    """Both in turn, three times where it takes seconds; the median of the times."""
    tensor = DRAWS[case.kind](case, torch.Generator().manual_seed(0))
    pairs: list[tuple[Outcome, Outcome]] = []
    while len(pairs) < RUNS and (not pairs or pairs[0][0].seconds < SHORT):
        pairs.append((theirs(tensor, case), ours(tensor, case)))
    other, mine = (
        Outcome(side[0].error, statistics.median(run.seconds for run in side), side[0].sweeps)
        for side in zip(*pairs, strict=True)
    )
    return other, replace(mine, sweeps=our_sweeps(tensor, case))


def cases(quick: bool) -> list[Case]:
    chosen = []
    for size in (16, 32) if quick else (64, 128):
        for spatial in ((9,), (3, 3)):
            slow = size == 128 and spatial == (3, 3)
            for kind in DRAWS:
                chosen += [
                    Case(kind, (size, size, *spatial), 4, 100 if slow else 1000),
                    Case(kind, (size, size, *spatial), 8),
                ]
    if not quick:
        chosen += [Case("power law", (128, 256, 9), saving) for saving in (4, 8)]
        chosen += [Case(kind, (256, 256, 9), saving, 100) for kind in DRAWS for saving in (4, 8)]
        chosen += [Case("power law", (512, 512, 9), saving, 100) for saving in (4, 8)]
        chosen += [Case("power law", (256, 256, 3, 3), saving, 100) for saving in (4, 8)]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small tensors only")
    rows, ratios, gaps = [], {3: [], 4: []}, []  # type: ignore[var-annotated]
    for case in cases(parser.parse_args().quick):
        other, mine = compare(case)
        ratio, gap = other.seconds / mine.seconds, mine.error - other.error
        ratios[len(case.shape)].append(ratio)
        print(f"{case}: {other}, {mine}", file=sys.stderr, flush=True)
        gaps.append(gap)
        rows.append(
            (
                *(case.kind, "x".join(map(str, case.shape)), str(case.rank)),
                *(f"{other.error:.5f}", f"{mine.error:.5f}", f"{other.seconds:.3f}", f"{mine.seconds:.3f}"),
                *(f"{ratio:.1f}", str(other.sweeps), str(mine.sweeps)),
            )
        )
    columns = ("tensor", "shape", ">rank", ">error theirs", ">ours", ">seconds theirs", ">ours", ">ratio")
    title = f"parafac (theirs) and fit_cp (ours), tolerance {TOLERANCE:g}, {torch.get_num_threads()} threads"
    print(render(title, (*columns, ">sweeps theirs", ">ours"), rows))
    for ways, values in ratios.items():
        print(f"\nCP{ways}: median ratio of the seconds {statistics.median(values):.1f}, least {min(values):.1f}")
    print(f"worst difference of the relative errors, ours - theirs: {max(gaps):+.5f}")


if __name__ == "__main__":
    main()

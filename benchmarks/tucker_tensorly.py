"""Tucker-2 of a 512 x 512 x 3 x 3 kernel at rank 128: decomp beside tensorly.decomposition.partial_tucker.

The same float32 tensor, ranks and tolerance (1e-4, TensorLy's default, on the decrease of the relative error),
the two in turn in one process; medians of three runs.

    python benchmarks/tucker_tensorly.py [--quick]
"""

import argparse
import statistics
import time

import tensorly
import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor

from decomp._util.tables import render
from decomp.methods import METHODS

RUNS = 3


def power_law(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(size, size, 3, 3, generator=generator)
    order = torch.arange(1, size + 1.0)
    return core / torch.maximum(order[:, None], order)[:, :, None, None]


def error(kernel: Tensor, core: Tensor, left: Tensor, right: Tensor) -> float:
    rebuilt = torch.einsum("ta,ab...,sb->ts...", left.double(), core.double(), right.double())
    return float((kernel.double() - rebuilt).norm() / kernel.double().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a 64 x 64 kernel at rank 16")
    size, rank = (64, 16) if parser.parse_args().quick else (512, 128)
    kernel = power_law(size)
    ours, theirs = [], []
    for _ in range(RUNS):
        start = time.perf_counter()
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            (core, (left, right)), _ = partial_tucker(kernel, [rank, rank], modes=[0, 1])
        theirs.append(time.perf_counter() - start)
        their_error = error(kernel, core, left, right)
        start = time.perf_counter()
        core, (left, right) = METHODS["tucker"].factors(kernel[None], (rank, rank))
        ours.append(time.perf_counter() - start)
        our_error = error(kernel, core[0], left[0], right[0])
    seconds = [statistics.median(theirs), statistics.median(ours)]
    rows = [
        ("TensorLy", f"{their_error:.6f}", f"{seconds[0]:.2f}"),
        ("decomp", f"{our_error:.6f}", f"{seconds[1]:.2f}"),
    ]
    print(render(f"{size} x {size} x 3 x 3, rank {rank}", ("", ">relative error", ">seconds"), rows))
    print(f"\nratio {seconds[0] / seconds[1]:.1f}")


if __name__ == "__main__":
    main()

"""Seconds and memory of decompositions: another version of decomp, this one, the usual pipeline and a floor.

CPU seconds on one thread, medians of five (with --full one run of the large matrices), in one run. The floor is
a float32 Gram matrix and its eigendecomposition; the peers are torch.svd_lowrank, and full SVDs for the ranks
followed by tensorly.decomposition.partial_tucker. Memory is the peak of the tensors that torch makes, in multiples
of the weight; the workspace inside of LAPACK is not seen.

    python benchmarks/decomposition_speed.py [--base PATH] [--full] [--only svd,tucker,network,first,growth]

PATH is the root of a checkout of another version. With --full the matrices are those of VGG-16 (25088 x 4096).
"""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tensorly
import torch
from memory import PeakMemory
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

import decomp
from decomp._util.tables import render
from decomp.methods import METHODS
from decomp.ranks.spectral import evbmf_rank

RUNS = 5
ROOT = Path(__file__).parents[1]
SIZES = {False: [(1024, 1024, 64), (4096, 1024, 64)], True: [(4096, 4096, 256), (25088, 4096, 256)]}
CHANNELS = (64, 128, 256, 384, 512)
GROWTH = {False: (128, 256, 512, 1024), True: (128, 256, 512, 1024, 2048)}


def matrix(inputs: int, outputs: int) -> Tensor:
    """A power law of singular values, i^-1/2, and noise."""
    generator = torch.Generator().manual_seed(0)
    count = outputs // 2
    left, right = (torch.linalg.qr(torch.randn(n, count, generator=generator))[0] for n in (outputs, inputs))
    noise = torch.randn(outputs, inputs, generator=generator) * (0.02 / inputs**0.5)
    return (left * torch.arange(1, count + 1.0) ** -0.5) @ right.T + noise


def kernel(channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    order = torch.arange(1, channels + 1.0)
    core, noise = (torch.randn(channels, channels, 3, 3, generator=generator) for _ in range(2))
    return core / torch.maximum(order[:, None], order)[:, :, None, None] ** 0.6 + 0.02 * noise


def network(width: int, depth: int) -> nn.Sequential:
    """The linear layers of a vision transformer."""
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * depth
    model = nn.Sequential(*(nn.Linear(*shape) for shape in shapes))
    with torch.no_grad():
        for layer, shape in zip(model, shapes, strict=True):
            layer.weight.copy_(matrix(*shape) if shape[1] <= shape[0] else matrix(*shape[::-1]).T)
    return model


def seconds(function: Callable[[], Any], runs: int = RUNS) -> float:
    times = []
    for _ in range(runs):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def peak(function: Callable[[], Any], weight: Tensor) -> float:
    with PeakMemory(weight) as memory:
        function()
    return memory.peak_bytes / (weight.numel() * weight.element_size())


def error(weight: Tensor, left: Tensor, right: Tensor) -> float:
    return float((weight - left.float() @ right.float()).double().norm() / weight.double().norm())


def measure_svd(inputs: int, outputs: int, rank: int, runs: int) -> dict[str, float]:
    weight = matrix(inputs, outputs)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=False))
    model[0].weight = nn.Parameter(weight)
    decomp.plan(nn.Sequential(nn.Linear(8, 8)), "svd", ranks=2)
    plan = decomp.plan(model, "svd", ranks=rank)
    apply = seconds(lambda: METHODS["svd"].factors(weight[None], (rank,)), runs)
    left, right = METHODS["svd"].factors(weight[None], (rank,))
    return {
        "apply": apply,
        "plan": seconds(lambda: METHODS["svd"].analyse(weight[None]), runs),
        "both": seconds(lambda: decomp.plan(model, "svd", ranks=rank).apply(model), runs),
        "error": error(weight, left[0], right[0]),
        "planned": plan["0"].error,
        "peak": peak(lambda: METHODS["svd"].factors(weight[None], (rank,)), weight),
        "plan peak": peak(lambda: METHODS["svd"].analyse(weight[None]), weight),
    }


def measure_tucker(channels: list[int], runs: int) -> dict[str, float]:
    model = nn.Sequential(*(nn.Conv2d(each, each, 3) for each in channels))
    for layer, each in zip(model, channels, strict=True):
        layer.weight = nn.Parameter(kernel(each))
    # The ranks of the formula itself, which earlier versions always took.
    pure = {"pure": True} if "pure" in inspect.signature(decomp.ranks.vbmf).parameters else {}
    rule = decomp.ranks.vbmf(**pure)
    small = decomp.tucker(model, ranks=rule)
    return {
        "both": seconds(lambda: decomp.tucker(model, ranks=rule), runs),
        "error": statistics.mean(choice.error for choice in small.decomp_plan.values()),
        "peak": peak(lambda: decomp.tucker(model, ranks=rule), model[-1].weight),
    }


def measure_network(width: int, depth: int, runs: int) -> dict[str, float]:
    model = network(width, depth)
    plan = decomp.plan(model, "svd", ranks=width // 8)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return {
        "plan": seconds(lambda: decomp.plan(model, "svd", ranks=width // 8), runs),
        "apply": seconds(lambda: plan.apply(model), runs),
        "peak": peak(lambda: decomp.plan(model, "svd", ranks=width // 8).apply(model), weights),
    }


def measure_first(runs: int) -> dict[str, float]:
    model = nn.Sequential(nn.Linear(16, 16))
    first = seconds(lambda: decomp.plan(model, "svd", ranks=2).apply(model), 1)
    again = seconds(lambda: decomp.plan(model, "svd", ranks=2).apply(model), runs)
    return {"first": first - again}


MEASURES = {"svd": measure_svd, "tucker": measure_tucker, "network": measure_network, "first": measure_first}


def measured(tree: Path, name: str, *arguments: Any) -> dict[str, float]:
    """Run a measurement in a process of its own, with decomp from this tree."""
    command = [sys.executable, __file__, "--measure", json.dumps([name, *arguments])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(Path(__file__).parent)])}
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(run.stdout)
    return result


def gram_floor(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    short = weight if weight.shape[0] <= weight.shape[1] else weight.T
    basis = torch.linalg.eigh(short @ short.T)[1][:, -rank:]
    return (basis, basis.T @ short) if short is weight else ((basis.T @ short).T, basis.T)


def lowrank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, values, right = torch.svd_lowrank(weight, rank + 10, niter=2)
    return (left * values)[:, :rank], right.T[:rank]


def table_of_svd(trees: dict[str, Path], full: bool) -> None:
    for inputs, outputs, rank in SIZES[full]:
        weight, runs, rows = matrix(inputs, outputs), 1 if full else RUNS, []
        for name, tree in trees.items():
            each = measured(tree, "svd", inputs, outputs, rank, runs)
            times = [f"{each[key]:.2f}" for key in ("plan", "apply", "both")]
            memory = [f"{each[key]:.2f}" for key in ("plan peak", "peak")]
            rows.append((name, *times, f"{each['error']:.6f}", *memory))
        for name, function in (("float32 Gram, eigh", gram_floor), ("torch.svd_lowrank", lowrank)):
            call = partial(function, weight, rank)
            cells = (
                f"{seconds(call, runs):.2f}",
                "",
                f"{error(weight, *call()):.6f}",
                "",
                f"{peak(call, weight):.2f}",
            )
            rows.append((name, "", *cells))
        columns = (
            "",
            ">analyse, s",
            ">factors, s",
            ">plan and apply, s",
            ">error",
            ">peak of analyse",
            ">of factors",
        )
        print(render(f"SVD of Linear {inputs} -> {outputs} at rank {rank}", columns, rows), "\n")


def usual_tucker(weight: Tensor) -> None:
    unfolded = (weight.flatten(1), weight.transpose(0, 1).flatten(1))
    ranks = [max(1, evbmf_rank(torch.linalg.svd(each)[1].numpy(), *each.shape)) for each in unfolded]
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        partial_tucker(weight, ranks, modes=[0, 1])


def tucker_floor(weight: Tensor) -> None:
    for each in (weight.flatten(1), weight.transpose(0, 1).flatten(1)):
        torch.linalg.eigh(each @ each.T)


def table_of_tucker(trees: dict[str, Path], full: bool) -> None:
    rows = []
    for name, tree in trees.items():
        each = measured(tree, "tucker", CHANNELS, RUNS)
        rows.append((name, f"{each['both']:.3f}", f"{each['error']:.6f}", f"{each['peak']:.1f}"))
    kernels = [kernel(channels) for channels in CHANNELS]
    for name, function, runs in (
        ("full SVDs, TensorLy", usual_tucker, 1),
        ("float32 Gram, eigh", tucker_floor, RUNS),
    ):
        spent = sum(seconds(partial(function, each), runs) for each in kernels)
        rows.append((name, f"{spent:.3f}", "", ""))
    title = f"Tucker-2 with vbmf ranks, 3 x 3 kernels of {', '.join(map(str, CHANNELS))} channels"
    print(render(title, ("", ">plan and apply, s", ">mean error", ">peak, x the largest"), rows), "\n")


def table_of_network(trees: dict[str, Path], full: bool) -> None:
    width, depth = (768, 12) if full else (384, 4)
    rows = []
    for name, tree in trees.items():
        each = measured(tree, "network", width, depth, 1 if full else RUNS)
        rows.append((name, f"{each['plan']:.2f}", f"{each['apply']:.2f}", f"{each['peak']:.2f}"))
    title = f"SVD of the linear layers of a ViT of width {width} and depth {depth} at rank {width // 8}"
    print(render(title, ("", ">plan, s", ">apply, s", ">peak, x all weights"), rows), "\n")


def table_of_first(trees: dict[str, Path], full: bool) -> None:
    rows = [(name, f"{measured(tree, 'first', RUNS)['first']:.2f}") for name, tree in trees.items()]
    print(render("The first plan and apply in a process", ("", ">more than the next ones, s"), rows), "\n")


def table_of_growth(trees: dict[str, Path], full: bool) -> None:
    rows = []
    for channels in GROWTH[full]:
        row = [str(channels)]
        for tree in trees.values():
            each = measured(tree, "svd", channels, channels, channels // 16, 1 if channels > 1024 else RUNS)
            row += [f"{each['both']:.3f}", f"{each['peak']:.1f}"]
        rows.append(tuple(row))
    columns = [">channels", *(f">{name}: {unit}" for name in trees for unit in ("s", "peak"))]
    print(render("Growth: SVD of a square matrix at rank n/16, plan and apply", columns, rows), "\n")


TABLES = {
    "svd": table_of_svd,
    "tucker": table_of_tucker,
    "network": table_of_network,
    "first": table_of_first,
    "growth": table_of_growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="the root of a checkout of another version")
    parser.add_argument("--full", action="store_true", help="the sizes of VGG-16 and ViT-B")
    parser.add_argument("--only", default=",".join(TABLES), help="some of the tables, separated by commas")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        name, *given = json.loads(arguments.measure)
        print(json.dumps(MEASURES[name](*given)))
        return
    trees = {"base": arguments.base.resolve()} if arguments.base else {}
    trees["now"] = ROOT
    for name in arguments.only.split(","):
        TABLES[name](trees, arguments.full)


if __name__ == "__main__":
    main()

"""How seconds and memory grow with channels, layers and samples, against a floor in the same run.

CPU seconds on one thread, medians of three, each point in a process of its own; memory is how far the peak of the
process rises above what it held before. Floors: a float32 Gram matrix and its eigendecomposition for a
decomposition, one forward pass over the data for what uses data.

    python benchmarks/growth.py [--draw FOLDER] [--quick]

With --draw the curves are drawn, for light and for dark pages, on logarithmic axes.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decomposition_speed import gram_floor, tucker_floor
from speed import one_pass
from torch import Tensor, nn

import decomp
from decomp._util.tables import render

RUNS = 3
CHANNELS = (128, 256, 512, 1024, 2048)
KERNEL_CHANNELS = (32, 64, 128, 256, 512)
LAYERS = (4, 8, 16, 32)
BATCHES = (8, 16, 32, 64)
BATCH = 8
QUIET: dict[str, Any] = {"progress": False}


Pair = tuple[Callable[[], Any], Callable[[], Any]]


def seconds_and_megabytes(function: Callable[[], Any]) -> tuple[float, float]:
    """The median of three calls, and how far the first one raises the peak of the process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
        if len(times) == 1:
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return statistics.median(times), (after - before) / unit


def power_law(*shape: int) -> Tensor:
    """A weight with singular values i^-1/2."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    left, right = (torch.linalg.qr(torch.randn(n, rows, generator=generator))[0] for n in (rows, columns))
    return ((left * torch.arange(1, rows + 1.0) ** -0.5) @ right.T).reshape(shape)


def svd(channels: int) -> Pair:
    model, rank = nn.Sequential(nn.Linear(channels, channels)), channels // 16
    weight = model[0].weight.data = power_law(channels, channels)
    return lambda: decomp.svd(model, ranks=rank, **QUIET), lambda: gram_floor(weight, rank)


def tucker(channels: int) -> Pair:
    model = nn.Sequential(nn.Conv2d(channels, channels, 3))
    model[0].weight.data = power_law(channels, channels, 3, 3)
    return lambda: decomp.tucker(model, ranks=channels // 4, **QUIET), lambda: tucker_floor(model[0].weight.data)


def perceptron(layers: int, width: int = 256) -> nn.Module:
    model = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())))
    for layer in model[::2]:
        layer.weight.data = 8 * power_law(width, width)
    return model.eval()


def convolutions(channels: int = 64) -> nn.Module:
    layers = [nn.Conv2d(3, channels, 3, padding=1)]
    layers += [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).eval()


def calibrate_deep(layers: int) -> Pair:
    model, data = perceptron(layers), [torch.randn(512, 256) for _ in range(16)]
    return lambda: decomp.calibrate(model, data, **QUIET), lambda: one_pass(model, data)


def sequential_deep(layers: int) -> Pair:
    model, data = perceptron(layers), [torch.randn(512, 256) for _ in range(16)]
    return lambda: decomp.svd(model, ranks=64, data=data, sequential=True, **QUIET), lambda: one_pass(model, data)


def calibrate_long(batches: int) -> Pair:
    model, data = convolutions(), [torch.randn(BATCH, 3, 64, 64) for _ in range(batches)]
    return lambda: decomp.calibrate(model, data, **QUIET), lambda: one_pass(model, data)


def sequential_long(batches: int) -> Pair:
    model, data = convolutions(), [torch.randn(BATCH, 3, 64, 64) for _ in range(batches)]
    call: dict[str, Any] = {"data": data, "sequential": True, **QUIET}
    return lambda: decomp.tucker(model, ranks=16, **call), lambda: one_pass(model, data)


PANELS: dict[str, tuple[str, str, Callable[[int], Pair], tuple[int, ...]]] = {
    "SVD of Linear n -> n": ("channels n", "Gram, eigh", svd, CHANNELS),
    "Tucker-2 of Conv2d n -> n, 3 x 3": ("channels n", "Gram, eigh", tucker, KERNEL_CHANNELS),
    "calibrate, Linear 256 -> 256": ("layers", "one pass", calibrate_deep, LAYERS),
    "layer after layer, Linear 256 -> 256": ("layers", "one pass", sequential_deep, LAYERS),
    "calibrate, 4 convolutions": ("images", "one pass", calibrate_long, BATCHES),
    "layer after layer, 4 convolutions": ("images", "one pass", sequential_long, BATCHES),
}


def measured(title: str, size: int) -> tuple[float, float, float]:
    """Seconds, megabytes, and seconds of the floor."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    decomp.svd(nn.Sequential(nn.Linear(8, 8)), ranks=2, **QUIET)  # what a first call loads is not measured
    function, floor = PANELS[title][2](size)
    return *seconds_and_megabytes(function), seconds_and_megabytes(floor)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="write growth-light.svg and growth-dark.svg")
    parser.add_argument("--quick", action="store_true", help="the two smallest sizes")
    arguments = parser.parse_args()
    found: dict[str, list[tuple[int, float, float, float]]] = {}
    for title, (unit, floor, _, sizes) in PANELS.items():
        for size in sizes[:2] if arguments.quick else sizes:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                point = pool.apply(measured, (title, size))
            found.setdefault(title, []).append((size * (BATCH if unit == "images" else 1), *point))
        rows = [(f"{n:,}", f"{s:.3f}", f"{m:.0f}", f"{f:.3f}", f"{s / f:.1f}") for n, s, m, f in found[title]]
        print(render(title, (f">{unit}", ">s", ">MB", f">{floor}, s", ">ratio"), rows), "\n", flush=True)
    if arguments.draw:
        draw(found, arguments.draw)


def draw(found: dict[str, list[tuple[int, float, float, float]]], folder: Path) -> None:
    """Seconds, their floor, and megabytes of every panel, on logarithmic axes."""
    from matplotlib import pyplot, rc_context

    from decomp.analysis.drawing import new_figure

    for name, style in (("light", "default"), ("dark", "dark_background")):
        with rc_context(), pyplot.style.context(style), rc_context({"svg.hashsalt": "growth"}):
            figure, axes = new_figure(9.0, 8.4, 3, 2)
            for ax, (title, points) in zip(axes.flat, found.items(), strict=True):
                unit = PANELS[title][0]
                sizes, seconds, megabytes, floors = zip(*points, strict=True)
                ax.loglog(sizes, seconds, "o-", label="seconds")
                ax.loglog(sizes, floors, "s--", label="seconds of the floor")
                ax.loglog(sizes, [max(each, 1) / 1000 for each in megabytes], "^:", label="memory, GB")
                ax.set(title=title, xlabel=unit)
                ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
                ax.yaxis.set_major_formatter("{x:g}")
                ax.minorticks_off()
            lines, labels = axes[0, 0].get_legend_handles_labels()
            figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False)
            figure.savefig(folder / f"growth-{name}.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()

"""What the benchmarks of speed share: a stand-in network, the library of another commit, medians, tables.

A benchmark runs itself once per library: ``--worker`` in a process of its own, whose first import path is the
tree of the commit that is compared with. The processes take turns, so that all numbers of a table come from one
run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from networks import plant_spectra
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent


def stand_in() -> nn.Module:
    """Seven 3 x 3 convolutions with BatchNorm, 32 to 128 channels, as a word reader has them."""
    layers: list[nn.Module] = []
    inputs = 3
    for place, width in enumerate((32, 32, 64, 64, 128, 128, 128)):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if place in (1, 3) else []
        inputs = width
    return plant_spectra(nn.Sequential(*layers), decay=0.7).eval()


def smooth_images(count: int, size: int = 192) -> list[Tensor]:
    """Batches (1, 3, size, size) of noise that is smoothed along both axes."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 1, 3, size, size, generator=generator)
    for axis in (3, 4):
        noise = sum(noise.roll(step, axis) for step in range(5)) / 5
    return list(noise)


def network_and_data(craft: bool, count: int) -> tuple[nn.Module, list[Tensor]]:
    """CRAFT and pages of text, or the stand-in and smooth images."""
    if not craft:
        return stand_in(), smooth_images(count)
    from craft import craft as trained
    from craft import pages

    return trained(), pages(count)


clock = time.process_time if "--cpu" in sys.argv else time.perf_counter


def seconds(function: Callable[[], object]) -> float:
    """Seconds that a call takes, or with ``--cpu`` seconds of the processor."""
    start = clock()
    function()
    return clock() - start


@torch.inference_mode()
def one_pass(model: nn.Module, data: list[Tensor]) -> float:
    """Seconds of one forward pass over the data."""
    return seconds(lambda: [model(batch) for batch in data])


def run(
    description: str | None,
    measure: Callable[[argparse.Namespace], dict[str, float]],
    title: str,
    floors: dict[str, str],
    batches: int,
) -> None:
    """Run ``measure`` for the library as it is and for that of ``--base``, and print the medians side by side.

    Args:
        description: of the benchmark.
        measure: returns seconds by name; those named in ``floors`` are compared with a floor by its name.
        title: of the table.
        floors: the floor of each measured call.
        batches: how many batches by default.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the tree of a commit to compare with")
    parser.add_argument("--craft", action="store_true", help="the text detector CRAFT in place of the stand-in")
    parser.add_argument("--repeats", type=int, default=5, help="the table holds medians of so many runs")
    parser.add_argument("--batches", type=int, default=batches, help="batches of data")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu", action="store_true", help="seconds of the processor, where others use the machine"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.worker:
        print(json.dumps(measure(arguments)))
        return
    trees = {"now": HERE.parent} | ({"base": Path(arguments.base)} if arguments.base else {})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for _ in range(arguments.repeats):
        for name, tree in trees.items():
            found[name].append(_worker(tree))
    from decomp._util.tables import render

    rows = []
    for call, floor in floors.items():
        ratios = {name: statistics.median(run[call] / run[floor] for run in runs) for name, runs in found.items()}
        spent = {name: statistics.median(run[call] for run in runs) for name, runs in found.items()}
        floor_seconds = statistics.median(run[floor] for runs in found.values() for run in runs)
        base = (f"{spent['base']:.1f}", f"x{ratios['base']:.1f}") if "base" in spent else ("", "")
        rows.append((call, *base, f"{spent['now']:.1f}", f"x{ratios['now']:.1f}", floor, f"{floor_seconds:.2f}"))
    columns = ("seconds", ">base", ">base / floor", ">now", ">now / floor", "floor", ">floor")
    network = "CRAFT" if arguments.craft else "stand-in"
    print(
        render(
            f"{title}: {network}, {arguments.batches} batches, {arguments.threads} threads, "
            f"{'CPU ' if arguments.cpu else ''}seconds, "
            f"medians of {arguments.repeats}",
            columns,
            rows,
        )
    )


def _worker(tree: Path) -> dict[str, float]:
    paths = [str(tree), str(HERE)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, sys.argv[0], *sys.argv[1:], "--worker"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result

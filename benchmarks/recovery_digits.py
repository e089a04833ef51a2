"""Accuracy won back, step by step: plain factors, factors from data, repair, layer-wise and end-to-end
fine-tuning.

The network that reads digits, budgets of MACs over the whole network, methods that a budget chooses ranks for,
several seeds. Calibration (by the gradient of the network's output), repair and layer-wise fine-tuning see no
labels. Mean accuracy on held-out digits with standard errors.

    python benchmarks/recovery_digits.py [--seeds 3] [--quick]
"""

import argparse
import statistics
import time
from math import sqrt

import decomp
from decomp._util.tables import render
from decomp.digits import Digits, load_digits, train

BUDGETS = (0.5, 0.25, 0.125)
METHODS = {"tucker": ("svd", "tucker"), "svd": ("svd", "svd_channel"), "spatial": ("svd", "svd_spatial")}
STEPS = ("plain", "data-aware", "sequential", "+ repair", "+ layer-wise", "+ end to end")


def recover(
    dense: object, digits: Digits, statistics_: object, methods: tuple[str, ...], budget: float, quick: bool
):
    """Accuracy and seconds after each step."""
    image, images = digits.test[0][:1], digits.images
    accuracy, seconds = [], []

    def note(model: object, start: float) -> None:
        seconds.append(time.perf_counter() - start)
        accuracy.append(digits.accuracy(model))

    given = {"macs": budget, "methods": methods, "example_inputs": image, "progress": False}
    start = time.perf_counter()
    note(decomp.compress(dense, **given), start)
    start = time.perf_counter()
    plan = decomp.plan(dense, **given, data=statistics_)
    note(plan.apply(dense, progress=False), start)
    start = time.perf_counter()
    small = decomp.tucker(dense, plan, data=images, sequential=True, progress=False)
    note(small, start)
    start = time.perf_counter()
    decomp.repair(small, dense, images, progress=False)
    note(small, start)
    start = time.perf_counter()
    decomp.finetune_layerwise(small, dense, images, steps=20 if quick else 300, progress=False)
    note(small, start)
    start = time.perf_counter()
    decomp.finetune(
        small, digits.train, teacher=dense, epochs=1 if quick else 5, progress=False, inputs=lambda batch: batch[0]
    )
    note(small, start)
    return accuracy, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed, one budget, few steps")
    arguments = parser.parse_args()
    digits = load_digits()
    seeds, budgets = (1, (0.25,)) if arguments.quick else (arguments.seeds, BUDGETS)
    found: dict[tuple[str, float], list[list[float]]] = {}
    seconds: list[list[float]] = []
    dense_accuracy = []
    for seed in range(seeds):
        dense = train(digits, seed, progress=False)
        dense_accuracy.append(digits.accuracy(dense))
        moments = decomp.calibrate(dense, digits.images, loss="output", progress=False)
        for name, methods in METHODS.items():
            for budget in budgets:
                accuracy, spent = recover(dense, digits, moments, methods, budget, arguments.quick)
                found.setdefault((name, budget), []).append(accuracy)
                seconds.append(spent)
    rows = []
    for (name, budget), runs in found.items():
        means = [f"{statistics.mean(column):.1%}" for column in zip(*runs, strict=True)]
        rows.append((name, f"{budget:g}", *means))
    every = [run for runs in found.values() for run in runs]
    spread = [
        f"{statistics.mean(c):.1%} ± {statistics.stdev(c) / sqrt(len(c)):.1%}" for c in zip(*every, strict=True)
    ]
    rows.append(("seconds, median", "", *(f"{statistics.median(c):.1f}" for c in zip(*seconds, strict=True))))
    title = f"accuracy; dense {statistics.mean(dense_accuracy):.1%}, {seeds} seeds"
    print(render(title, ("method", ">MACs", *(f">{step}" for step in STEPS)), [*rows, ("mean", "", *spread)]))


if __name__ == "__main__":
    main()

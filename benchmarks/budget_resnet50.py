"""Planning a ResNet-50-shaped network for a new budget once its spectra are known, and for one of seconds.

python benchmarks/budget_resnet50.py
"""

import statistics
import time

import torch
from networks import plant_spectra, resnet50

import decomp
from decomp._util.tables import milliseconds, render
from decomp.planning.budget import OBJECTIVES

SHARES = [0.1 + 0.04 * step for step in range(20)]


def main() -> None:
    model = plant_spectra(resnet50(), seed=0).eval()
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    plan = decomp.plan(model, seconds=1e6, example_inputs=image, progress=False)
    rows = [("spectra, prices and timings of all layers", "", milliseconds(time.perf_counter() - start), "")]
    for kind in ("macs", "params"):
        for objective in OBJECTIVES:
            plan.with_budget(**{kind: 0.5}, objective=objective)
            times, used = [], []
            for share in SHARES:
                start = time.perf_counter()
                decided = plan.with_budget(**{kind: share}, objective=objective)
                times.append(time.perf_counter() - start)
                change = getattr(decided, kind)
                used.append(change.after / (share * change.before))
            cells = (milliseconds(statistics.median(times)), f"{min(used):.4f} to {max(used):.4f}")
            rows.append((f"a new budget of {kind}", objective, *cells))
    print(render(f"medians over {len(SHARES)} budgets", ("step", "objective", ">time", ">share of it used"), rows))
    rows = []
    for share in (0.9, 0.8, 0.7, 0.6):
        decided = plan.with_budget(seconds=share * plan.seconds.before)
        small = decided.apply(model, progress=False)
        comparison = decomp.compare(small, model, image)
        measured = comparison.small.total.seconds / comparison.dense.total.seconds
        predicted = decided.seconds.after / decided.seconds.before
        macs = decided.macs.after / decided.macs.before
        rows.append((f"{share:.2f}", f"{predicted:.3f}", f"{measured:.3f}", f"{macs:.3f}"))
    print()
    columns = (">budget of seconds", ">predicted", ">measured", ">MACs")
    print(render("shares of the dense network's, batch 1", columns, rows))


if __name__ == "__main__":
    main()

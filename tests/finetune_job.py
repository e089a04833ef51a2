"""A fine-tuning run by itself, to be killed or started twice at once: ``finetune_job.py FOLDER OUT [layerwise]``.

Everything that a resumed run has to find again is in it: shuffled data, dropout, BatchNorm, the moments of Adam, a
schedule, and a small cache, so that the data is streamed. Prints a line when training begins and one at its end.
"""

import os
import sys
from pathlib import Path

import torch
from networks import plant_spectra
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import decomp


def net():
    return nn.Sequential(
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def first(batch):
    return batch[0]


def say(word):
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


def main(folder, out, *, steps=40, accumulate=1, held_out=0.2, lr=None):
    from accelerate import Accelerator

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = plant_spectra(net())
    samples = TensorDataset(torch.randn(48, 8, 8, 8), torch.randint(10, (48,)))
    shuffled = DataLoader(samples, 4, shuffle=True)
    small = decomp.tucker(dense, ranks={"0": (8, 6), "3": (8, 8)})
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    common = {
        "steps": steps,
        "inputs": first,
        "checkpoint_every": 5,
        "progress": False,
        "accelerator": accelerator,
    }
    layers, network = (None if folder is None else Path(folder) / name for name in ("layers", "network"))
    say("training")
    first_report = decomp.finetune_layerwise(
        small, dense, shuffled, lr=lr, cache_bytes=150_000, held_out=held_out, checkpoint=layers, **common
    )
    rank = os.environ.get("RANK", "0")
    save_file(dict(small.state_dict()), f"{out}.layers.{rank}.safetensors")
    loss = decomp.losses.Distillation(dense, hard=0.5, attention={"3": 1.0}, inputs=first)
    second_report = decomp.finetune(
        small,
        shuffled,
        loss,
        validate=[samples[:16]],
        patience=None,
        frozen_norm=0.3,
        checkpoint=network,
        **common,
    )
    save_file(dict(small.state_dict()), f"{out}.{rank}.safetensors")
    say("done")
    return first_report, second_report


if __name__ == "__main__":
    main(*sys.argv[1:3])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads may abort a process that ends with them

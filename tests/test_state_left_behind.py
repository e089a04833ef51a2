"""What a call leaves behind in the process and in the model: no random numbers drawn, no gradients, no hooks."""

import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import plant_spectra
from torch import nn
from torch.utils.data import DataLoader

import decomp
from decomp.methods import METHODS
from decomp.training.checkpoint import Checkpoint

QUIET = {"progress": False}


def net():
    return plant_spectra(
        nn.Sequential(
            *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)),
            *(nn.Flatten(), nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, 10)),
        )
    ).eval()


class World:
    """A model, its factorized form, and data: what the public calls take."""

    def __init__(self, kind):
        self.x = torch.randn(32, 8, 6, 6)
        batches = {"a list": list(self.x.split(8)), "a loader": DataLoader(self.x, 8)}
        self.data = (batches | {"a shuffled loader": DataLoader(self.x, 8, shuffle=True)})[kind]
        self.model = net()
        self.plan = decomp.plan(self.model, ranks=4, example_inputs=self.x[:1])
        self.small = self.plan.apply(self.model)


def mean_square(model, batch):
    return model(batch).square().mean()


CALLS = {
    "tucker": lambda w: decomp.tucker(w.model, ranks=4),
    "tucker from data": lambda w: decomp.tucker(w.model, ranks=4, data=w.data, **QUIET),
    "tucker in sequence": lambda w: decomp.tucker(w.model, ranks=4, data=w.data, sequential=True, **QUIET),
    "tucker fine-tuned": lambda w: decomp.tucker(w.model, ranks=4, data=w.data, finetune={"steps": 2}, **QUIET),
    "svd": lambda w: decomp.svd(w.model, ranks=4),
    "cp": lambda w: decomp.cp(w.model, ranks=4),
    "block_term": lambda w: decomp.block_term(w.model, ranks=4),
    "separable": lambda w: decomp.separable(w.model, ranks=4),
    "flattened": lambda w: decomp.flattened(w.model, ranks=1),
    "plan": lambda w: decomp.plan(w.model, macs=0.5, example_inputs=w.x[:1]),
    "plan for seconds": lambda w: decomp.plan(w.model, seconds=1.0, example_inputs=w.x[:1]),
    "apply": lambda w: w.plan.apply(w.model),
    "build": lambda w: decomp.Plan.from_json(w.plan.to_json()).build(w.model),
    "compress": lambda w: decomp.compress(w.model, w.x[:1], macs=0.5, data=w.data, **QUIET),
    "calibrate": lambda w: decomp.calibrate(w.model, w.data, **QUIET),
    "calibrate for the output": lambda w: decomp.calibrate(w.model, w.data, loss="output", **QUIET),
    "sensitivity": lambda w: decomp.sensitivity(w.model, w.data, **QUIET),
    "sensitivity by a loss": lambda w: decomp.sensitivity(w.model, w.data, loss=mean_square, **QUIET),
    "profile": lambda w: decomp.profile(w.model, w.x),
    "compare": lambda w: decomp.compare(w.small, w.model, w.x),
    "densify": lambda w: decomp.densify(w.small),
    "fold_batch_norm": lambda w: decomp.fold_batch_norm(w.model, w.x),
    "repair": lambda w: decomp.repair(w.small, w.model, w.data, **QUIET),
    "repair after ReLU": lambda w: decomp.repair(w.small, w.model, w.data, nonlinear=True, **QUIET),
    "finetune_layerwise": lambda w: decomp.finetune_layerwise(w.small, w.model, w.data, steps=2, **QUIET),
    "finetune": lambda w: decomp.finetune(
        w.small, w.data, teacher=w.model, epochs=1, validate=w.data, loss=mean_square, **QUIET
    ),
    "tradeoff": lambda w: decomp.tradeoff(w.model, w.x[:1], budgets=(0.5,), data=w.data, **QUIET),
    "explore": lambda w: decomp.explore(w.model, w.x[:1]),
    "print": lambda w: str(w.plan),
}


def save_and_load(world):
    with tempfile.TemporaryDirectory() as folder:
        decomp.save(world.small, Path(folder, "small.safetensors"))
        decomp.load(Path(folder, "small.safetensors"), world.model)


CALLS["save and load"] = save_and_load


def random_states():
    name, keys, *rest = np.random.get_state(legacy=True)
    return torch.get_rng_state().tolist(), random.getstate(), (name, keys.tolist(), *rest)


@pytest.mark.parametrize("kind", ["a list", "a loader", "a shuffled loader"])
@pytest.mark.parametrize("name", CALLS)
def test_no_public_call_draws_random_numbers_of_the_program(name, kind):
    world = World(kind)
    before = random_states()
    CALLS[name](world)
    assert random_states() == before


@pytest.mark.parametrize("method", METHODS)
def test_no_method_draws_random_numbers_of_the_program(method):
    world = World("a list")
    ranks = 1 if method == "flattened" else 3
    before = random_states()
    decomp.plan(world.model, method, ranks=ranks).apply(world.model)
    decomp.plan(world.model, method, ranks=ranks, data=world.data, **QUIET).apply(world.model)
    assert random_states() == before


def test_the_first_table_of_a_process_draws_none_either():
    code = (
        "import random; from decomp._util.tables import render; before = random.getstate(); "
        "render('', ['a'], [['1']]); print(random.getstate() == before)"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"


def test_what_is_built_has_the_weights_that_torch_would_draw():
    model = net()
    plan = decomp.plan(model, ranks=4)
    torch.manual_seed(3)
    first = plan.build(model)[0]
    assert torch.equal(type(first).like(model[0], first.ranks).dense_weight(), first.dense_weight())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
@pytest.mark.parametrize("call", ["finetune", "finetune_layerwise"])
@pytest.mark.parametrize("at", ["step", "loss", "save"])
def test_training_that_is_ended_leaves_no_gradients_and_no_hooks(tmp_path, monkeypatch, call, error, at):
    model, count = net(), 0
    small = decomp.tucker(model, ranks=4)
    data = list(torch.randn(32, 8, 6, 6).split(8))

    def ending(*given, **options):
        nonlocal count
        count += 1
        if count > 3:
            raise error("the end")
        return original(*given, **options)

    holder, name = {
        "step": (torch.optim.Adam, "step"),
        "loss": (torch.Tensor, "backward"),
        "save": (Checkpoint, "save"),
    }[at]
    original = getattr(holder, name)
    monkeypatch.setattr(holder, name, ending)
    options = {"steps": 8, "checkpoint": tmp_path, "checkpoint_every": 1, **QUIET}
    calls = {
        "finetune": lambda: decomp.finetune(small, data, teacher=model, **options),
        "finetune_layerwise": lambda: decomp.finetune_layerwise(small, model, data, **options),
    }
    with pytest.raises(error, match="the end"):
        calls[call]()
    for each in (small, model):
        assert all(parameter.grad is None for parameter in each.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in each.modules())


def test_a_running_variance_that_overflows_is_noticed_and_taken_back():
    model = net()
    small = decomp.tucker(model, ranks=4)
    data = list(torch.randn(32, 8, 6, 6).split(8))
    data[2] = data[2] * 1e20  # finite, and so is the loss after BatchNorm, but not the variance
    report = decomp.finetune(small, data, loss=mean_square, steps=8, **QUIET)
    assert "back to the last good state" in report.note
    assert all(torch.isfinite(buffer).all() for buffer in small.buffers())

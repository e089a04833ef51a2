"""A run that is killed goes on where it was, and ends with the same weights, bit by bit."""

import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from finetune_job import main
from safetensors.torch import load_file
from torch import nn

import decomp
from decomp._util.io import write_atomically
from decomp.training.checkpoint import Checkpoint, pack, unpack

TESTS = Path(__file__).parent
JOB = TESTS / "finetune_job.py"


def environment(**more):
    paths = [TESTS, TESTS.parent, TESTS.parent / "benchmarks", os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", **more}


def started(folder, out):
    """A run at the moment when it begins to train."""
    run = subprocess.Popen(
        [sys.executable, JOB, folder, out],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == "training\n", run.communicate()[1]
    return run


def check(tmp_path, kills, seed):
    """Kill a run so many times, at random, let it end, and compare with one that was not killed."""
    draw = random.Random(seed)
    threads = torch.get_num_threads()
    begin = time.perf_counter()
    try:
        main(tmp_path / "whole", tmp_path / "expected")
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(True)
    span = time.perf_counter() - begin
    left = 0
    for _ in range(kills):
        run = started(tmp_path / "killed", tmp_path / "got")
        time.sleep(draw.uniform(0, 2 / kills) * span)
        run.kill()
        run.communicate()
        left += bool(list((tmp_path / "killed").rglob("current.safetensors")))
    assert left, "no run came as far as a checkpoint"
    run = started(tmp_path / "killed", tmp_path / "got")
    assert run.communicate()[0] == "done\n", "a run that goes on has to end"
    expected, got = (load_file(tmp_path / f"{name}.0.safetensors") for name in ("expected", "got"))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_killed_twice_and_the_same_weights(tmp_path):
    check(tmp_path, 2, seed=0)


@pytest.mark.slow
def test_killed_twenty_times_and_the_same_weights(tmp_path):
    check(tmp_path, 20, seed=1)


@pytest.fixture
def nets():
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    return dense, decomp.tucker(dense, ranks=4)


DATA = [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]


class Interrupted(Exception):
    pass


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr, momentum=0.9)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("after", [1, 7, 12])
def test_every_part_of_the_state_comes_back(nets, tmp_path, monkeypatch, cached, after):
    dense, _ = nets
    options = {"steps": 10, "lr": 0.05, "checkpoint_every": 3, "cache_bytes": 2**20 if cached else 1}
    one, two = (decomp.tucker(dense, ranks=4) for _ in range(2))
    decomp.finetune_layerwise(one, dense, DATA, optimizer=sgd, **options)
    step = torch.optim.SGD.step
    count = 0

    def dying(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count > after:
            raise Interrupted
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", dying)
    with pytest.raises(Interrupted):
        decomp.finetune_layerwise(two, dense, DATA, optimizer=sgd, checkpoint=tmp_path, **options)
    monkeypatch.undo()
    two = decomp.tucker(dense, ranks=4)
    torch.manual_seed(9)  # whatever the random numbers of the new process are
    report = decomp.finetune_layerwise(two, dense, DATA, optimizer=sgd, checkpoint=tmp_path, **options)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert all(layer.steps == 10 for layer in report.values())
    again = decomp.tucker(dense, ranks=4)
    assert str(
        decomp.finetune_layerwise(again, dense, DATA, optimizer=sgd, checkpoint=tmp_path, **options)
    ) == str(report)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(nets, tmp_path):
    dense, small = nets
    decomp.finetune_layerwise(small, dense, DATA, steps=2, checkpoint=tmp_path)
    tune = partial(decomp.finetune_layerwise, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"another run.*lr: 0.002 there, 0.5 now.*name another folder"):
        tune(decomp.tucker(dense, ranks=4), dense, DATA, steps=2, lr=0.5)
    with pytest.raises(ValueError, match=r"layers of small"):
        tune(decomp.tucker(dense, ranks=3), dense, DATA, steps=2)
    with pytest.raises(ValueError, match=r"weights of small"):
        tune(small, dense, DATA, steps=2)  # it is trained already
    again = decomp.tucker(dense, ranks=4)
    dense[0].bias.data += 1
    with pytest.raises(ValueError, match=r"weights of dense"):
        tune(again, dense, DATA, steps=2)
    with pytest.raises(ValueError, match=r"call: finetune_layerwise there, finetune now"):
        decomp.finetune(again, DATA, teacher=dense, steps=2, checkpoint=tmp_path)


def test_states_come_back_as_they_were():
    state = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3), "empty": torch.zeros(0, 2)}},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "flag": None, "inf": float("inf"), "on": True}],
        "bytes": torch.get_rng_state(),
    }
    again = unpack(pack(state))
    assert again["groups"] == state["groups"]
    assert torch.equal(again["state"][0]["m"], state["state"][0]["m"])
    assert again["state"][0]["empty"].shape == (0, 2)
    assert torch.equal(again["bytes"], state["bytes"])
    with pytest.raises(TypeError, match=r"state\.x is a function"):
        pack({"x": pack})


def test_what_a_killed_run_left_half_written_is_cleared_away(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # killed before it could clean up
        patch.setattr(os, "replace", lambda *_: None)
        write_atomically(tmp_path / "current.safetensors", b"half")
    assert len(list(tmp_path.iterdir())) == 1
    Checkpoint(tmp_path, {}, writes=False)
    assert any(path.name != "run.json" for path in tmp_path.iterdir()), "another process may be about to write it"
    Checkpoint(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]

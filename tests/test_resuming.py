"""A run that is killed goes on where it was, and ends with the same weights, bit by bit."""

import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import mutants
import pytest
import torch
from safetensors.torch import load_file, save
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
    run = started(tmp_path / "whole", tmp_path / "expected")
    begin = time.perf_counter()
    assert run.communicate()[0] == "done\n"
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
    with pytest.raises(ValueError, match=r"another run.*lr: None there, 0.5 now.*name another folder"):
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run of a tiny network that was cut off in its second layer, and the weights that it ends with."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    dense = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))
    options = {"steps": 4, "lr": 2e-3, "checkpoint_every": 1, "progress": False}
    small, whole = decomp.tucker(dense, ranks=2), decomp.tucker(dense, ranks=2)
    decomp.finetune_layerwise(whole, dense, DATA, **options)
    step, count = torch.optim.Adam.step, 0

    def dying(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count > 6:
            raise Interrupted
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", dying)
        with pytest.raises(Interrupted):
            decomp.finetune_layerwise(small, dense, DATA, checkpoint=folder, **options)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(files) == ["current.safetensors", "data.safetensors", "layer-000.safetensors", "run.json"]
    return dense, options, files, whole.state_dict()


def resumed(checkpoint, folder, files):
    """The network after resuming from these files, and the message of the ValueError where they are refused."""
    dense, options, _, _ = checkpoint
    for name, content in files.items():
        (folder / name).write_bytes(content)
    small = decomp.tucker(dense, ranks=2)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    try:
        decomp.finetune_layerwise(small, dense, DATA, checkpoint=folder, **options)
    except ValueError as error:
        assert alike(small.state_dict(), before), "a refused checkpoint must not have changed the model"
        return small, str(error)
    return small, ""


def alike(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def check_damaged(checkpoint, folder, count, seed):
    _, _, whole, expected = checkpoint
    draw, refused = random.Random(seed), 0
    for _ in range(count):
        name = draw.choice(sorted(whole))
        small, message = resumed(checkpoint, folder, {**whole, name: mutants.in_the_bytes(whole[name], draw)})
        if message:
            refused += 1
            of_another_run = f"checkpoint={str(folder)!r} belongs to another run, by its run.json ("
            damaged = f"checkpoint: the file {str(folder / name)!r} is damaged"
            assert message.startswith((damaged, of_another_run) if name == "run.json" else damaged)
        else:
            assert alike(small.state_dict(), expected)
    assert refused > 0.8 * count


def test_damaged_checkpoints_are_refused_by_their_file_and_leave_the_model_alone(checkpoint, tmp_path):
    check_damaged(checkpoint, tmp_path, 200, seed=0)


@pytest.mark.slow
def test_thousands_of_damaged_checkpoints(checkpoint, tmp_path):
    check_damaged(checkpoint, tmp_path, 4000, seed=1)


def test_a_flipped_bit_of_a_weight_is_noticed(checkpoint, tmp_path):
    whole = checkpoint[2]
    for name in ("layer-000.safetensors", "current.safetensors"):
        flipped = bytearray(whole[name])
        flipped[-2] ^= 1  # the tensors are at the end
        _, message = resumed(checkpoint, tmp_path, {**whole, name: bytes(flipped)})
        assert f"the file {str(tmp_path / name)!r} is damaged" in message
        assert "checksum" in message
        assert "remove the folder to start from the beginning" in message


def test_whole_files_of_something_else_are_refused(checkpoint, tmp_path):
    whole = checkpoint[2]
    foreign = {
        "of torch": save({"weight": torch.ones(3)}),
        "of another run": pack({"layer": {}, "report": {}}, "another run layer-000"),
        "of another name": whole["current.safetensors"],
        "empty": b"",
        "huge header": (2**63).to_bytes(8, "little") + b"{}",
    }
    for content in foreign.values():
        _, message = resumed(checkpoint, tmp_path, {**whole, "layer-000.safetensors": content})
        assert f"{str(tmp_path / 'layer-000.safetensors')!r} is damaged, or belongs to another run" in message
    for content in (b"", b"[]", b"[" * 100_000, b'"x"', b"\xff"):
        _, message = resumed(checkpoint, tmp_path, {**whole, "run.json": content})
        assert f"{str(tmp_path / 'run.json')!r} is damaged" in message
    small, message = resumed(checkpoint, tmp_path, whole)
    assert not message
    assert alike(small.state_dict(), checkpoint[3])


@pytest.mark.parametrize("call", ["finetune", "finetune_layerwise"])
def test_a_run_that_is_interrupted_leaves_the_model_and_goes_on_when_it_is_called_again(tmp_path, call):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8)).eval()
    data = [torch.randn(16, 32) for _ in range(5)]
    batches = 0

    class Source:
        def __iter__(self):
            nonlocal batches
            for batch in data:
                batches += 1
                if batches == ends_at:
                    raise KeyboardInterrupt
                yield batch

        def __len__(self):
            return len(data)

    def run(small, folder):
        options = {"steps": 12, "checkpoint": folder, "checkpoint_every": 2, "progress": False}
        if call == "finetune":
            return decomp.finetune(small, Source(), teacher=dense, lr=1e-2, **options)
        return decomp.finetune_layerwise(small, dense, Source(), lr=1e-2, cache_bytes=1, **options)

    ends_at = -1
    expected, small = (decomp.svd(dense, ranks=4) for _ in range(2))
    run(expected, tmp_path / "whole")
    before = {name: value.clone() for name, value in small.state_dict().items()}
    whole, batches = batches, 0
    ends_at = whole * 2 // 3
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "ended")
    assert (tmp_path / "ended" / "current.safetensors").exists()
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    ends_at = -1
    run(small, tmp_path / "ended")
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in small.state_dict().items())

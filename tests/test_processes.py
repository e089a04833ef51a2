"""Two processes on gloo, each with its share of the data, end with one and the same model."""

import copy
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from finetune_job import main
from safetensors.torch import load_file
from test_resuming import TESTS, environment
from torch import nn

import decomp

JOB = """
import sys
import torch
from finetune_job import main
layers, network = main(None, sys.argv[1], steps=20, held_out=0.0, lr=2e-3)
assert all(layer.error_after < layer.error_before for layer in layers.values()), layers
assert network.loss_after < network.loss_before, network
torch.distributed.destroy_process_group()  # its threads may abort a process that ends with them
"""

DEFAULT = """
import sys
import torch
from accelerate import Accelerator
from torch import nn
import decomp
torch.manual_seed(0)
dense = nn.Sequential(nn.Linear(16, 8))
data = [torch.randn(4, 16) for _ in range(6)]
small = decomp.tucker(dense, ranks=2)
layers = decomp.finetune_layerwise(small, dense, data, steps=10, held_out=0.0, progress=False)
network = decomp.finetune(small, data, teacher=dense, steps=10, progress=False)
assert torch.distributed.get_world_size() == 2
accelerator = Accelerator(mixed_precision="bf16")
decomp.finetune(small, data, teacher=dense, steps=2, progress=False, accelerator=accelerator)
weights = torch.cat([parameter.detach().flatten() for parameter in small.parameters()])
assert all(torch.equal(weights, other) for other in accelerator.gather(weights[None]))
assert len(set(accelerator.gather(torch.tensor([layers["0"].error_after])).tolist())) == 1
torch.distributed.destroy_process_group()  # its threads may abort a process that ends with them
"""


def launched(script, *arguments):
    """The script in two processes, in a session of their own, so that they can be killed together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script]
    return subprocess.Popen(
        [*command, *arguments],
        env=environment(ACCELERATE_USE_CPU="true"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TESTS,
        start_new_session=True,
    )


def ended(run):
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors[-3000:]


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_to_the_same_model(tmp_path):
    script = TESTS / "finetune_job.py"
    ended(launched(script, tmp_path / "whole", tmp_path / "expected"))
    for seconds in (1.0, 3.0, 5.0):
        run = launched(script, tmp_path / "killed", tmp_path / "got")
        while run.stdout.readline() != "training\n":
            assert run.poll() is None, run.communicate()[1][-3000:]
        time.sleep(seconds)
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    assert list((tmp_path / "killed").rglob("current.safetensors"))
    ended(launched(script, tmp_path / "killed", tmp_path / "got"))
    for rank in range(2):
        expected, got = (load_file(tmp_path / f"{name}.{rank}.safetensors") for name in ("expected", "got"))
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_two_processes_end_with_the_same_model_as_one_that_sees_both_shares(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    ended(launched(script, tmp_path / "two"))
    first, second = (load_file(tmp_path / f"two.{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    try:
        main(
            None, tmp_path / "one", steps=20, held_out=0.0, lr=2e-3, accumulate=2
        )  # the same batches in every step
    finally:
        AcceleratorState._reset_state(True)
    one, two = (load_file(tmp_path / f"{name}.layers.0.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_two_processes_without_an_accelerator_train_together_and_can_make_one_later(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(DEFAULT)
    ended(launched(script))


def test_without_an_accelerator_none_is_left_behind():
    dense = nn.Sequential(nn.Linear(16, 8))
    small = decomp.tucker(dense, ranks=2)
    data = [torch.randn(4, 16)]
    decomp.finetune_layerwise(small, dense, data, steps=2)
    decomp.finetune(small, data, teacher=dense, steps=2)
    assert not is_initialized()
    try:
        bf16 = Accelerator(cpu=True, mixed_precision="bf16")
        report = decomp.finetune(small, data, teacher=dense, steps=4, accelerator=bf16)
        assert report.steps == 4
        assert decomp.finetune_layerwise(small, dense, data, steps=2, accelerator=bf16)["0"].steps == 2
    finally:
        AcceleratorState._reset_state(True)


def test_the_accelerator_of_the_program_counts_where_none_is_given():
    seen = []

    def loss(model, batch):
        seen.append(model(batch).dtype)
        return model(batch).float().square().mean()

    try:
        bf16 = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
        decomp.finetune(nn.Linear(16, 8), [torch.randn(4, 16)], loss, steps=2)
        assert seen == [torch.bfloat16] * 6
        assert bf16.gradient_accumulation_steps == 3, "and stays as it is"
    finally:
        AcceleratorState._reset_state(True)


def test_the_mixed_precision_of_the_launcher_counts(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    seen = []

    def loss(model, batch):
        seen.append(model(batch).dtype)
        return model(batch).float().square().mean()

    try:
        decomp.finetune(nn.Linear(16, 8), [torch.randn(4, 16)], loss, steps=1)
    finally:
        AcceleratorState._reset_state(True)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("shared", [False, True])
def test_threads_fine_tune_at_once_as_one_after_the_other(shared):
    nets = [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval() for _ in range(4)]
    data = [torch.randn(8, 16) for _ in range(5)]

    smalls = [decomp.tucker(nets[0] if shared else net, ranks=2 + number) for number, net in enumerate(nets)]

    def trained(number):
        dense, small = nets[0] if shared else nets[number], copy.deepcopy(smalls[number])
        layers = decomp.finetune_layerwise(small, dense, data, steps=40, progress=False)
        network = decomp.finetune(small, data, teacher=dense, steps=40, progress=False)
        return small.state_dict(), [layer.error_after for layer in layers.values()], network.losses

    def threads(count):
        # On one core each: how a sum is split over cores decides its last digit.
        return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    with threads(1) as pool:
        expected = list(pool.map(trained, range(4)))
    for _ in range(2):
        with threads(4) as pool:
            got = list(pool.map(trained, range(4)))
        for (ours, *numbers), (theirs, *expected_numbers) in zip(got, expected, strict=True):
            assert numbers == expected_numbers
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(module._forward_hooks or module._forward_pre_hooks for net in nets for module in net.modules())


def test_targets_are_not_in_mixed_precision_whichever_window_they_are_in():
    dense = nn.Sequential(nn.Linear(16, 8))
    small = decomp.tucker(dense, ranks=2)
    seen = []
    dense[0].register_forward_hook(lambda module, args, result: seen.append(result.dtype))
    data = [torch.randn(4, 16) for _ in range(6)]
    try:
        bf16 = Accelerator(cpu=True, mixed_precision="bf16")
        decomp.finetune_layerwise(small, dense, data, steps=8, accelerator=bf16, cache_bytes=1)
    finally:
        AcceleratorState._reset_state(True)
    assert len(seen) > 5, "windows of one batch, made between the steps as well"
    assert set(seen) == {torch.float32}


def test_without_accelerate_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    dense = nn.Sequential(nn.Linear(16, 8))
    with pytest.raises(ImportError, match=r"pip install 'decomp\[finetune\]'"):
        decomp.finetune_layerwise(decomp.tucker(dense, ranks=2), dense, [torch.randn(4, 16)])

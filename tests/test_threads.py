"""Threads that use one dense network at the same time, also in train mode: each gets what it would get alone."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from networks import plant_spectra
from torch import nn
from torch.utils.data import DataLoader

import decomp
from decomp.network.forward import evaluating, hooked
from decomp.network.restoring import LOCK, all_or_nothing, locks_held

QUIET = {"progress": False}
THREADS = 4


def net():
    layers = [nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5)]
    layers += [nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 32)]
    model = plant_spectra(nn.Sequential(*layers))
    model[5].eval()
    return model


CALLS = {
    "tucker": lambda model, data: decomp.tucker(model, ranks=4, data=data, **QUIET),
    "in sequence": lambda model, data: decomp.tucker(model, ranks=4, data=data, sequential=True, **QUIET),
    "fine-tuned": lambda model, data: decomp.svd(model, ranks=4, data=data, finetune={"steps": 3}, **QUIET),
    "compress": lambda model, data: decomp.compress(model, data[0], params=0.5, **QUIET),
    "sensitivity": lambda model, data: decomp.sensitivity(model, data, **QUIET),
    "fold": lambda model, data: decomp.fold_batch_norm(model, data[0]),
}


@pytest.fixture
def switching_often():
    """Threads take turns every few microseconds, so that what collides does so."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


def at_once(function, count=THREADS):
    """What a function gives in several threads that begin together."""
    barrier = Barrier(count)

    def run(_):
        torch.set_num_threads(1)
        barrier.wait(60)
        return [function() for _ in range(2)]

    with ThreadPoolExecutor(count) as pool:
        return [result for results in pool.map(run, range(count)) for result in results]


def same(result, alone):
    if isinstance(alone, dict):
        return result == pytest.approx(alone)
    flags = [module.training for module in alone.modules()]
    ours, theirs = result.state_dict(), alone.state_dict()
    hooks = any(module._forward_hooks or module._forward_pre_hooks for module in result.modules())
    close = all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    return ours.keys() == theirs.keys() and close and not hooks and [m.training for m in result.modules()] == flags


@pytest.mark.parametrize("name", CALLS)
def test_calls_on_one_network_in_train_mode_do_not_meet(name, switching_often):
    model, data = net(), list(torch.randn(16, 8, 6, 6).split(4))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = CALLS[name](model, data)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    for result in at_once(lambda: CALLS[name](model, data)):
        assert same(result, alone)
    torch.set_num_threads(threads)
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_shuffled_data_of_two_threads_leave_the_random_generators_as_they_were(switching_often):
    model, x = net(), torch.randn(32, 8, 6, 6)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    results = at_once(lambda: decomp.calibrate(model, DataLoader(x, 4, shuffle=True), **QUIET)["0"].inputs)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_last_thread_to_end_restores_the_train_flags():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    first, second = evaluating(model), evaluating(model)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        one.submit(first.__exit__, None, None, None).result()
        assert not model[1].training, "the second one still evaluates"
        other.submit(second.__exit__, None, None, None).result()
    assert model[1].training


def test_a_model_is_copied_without_the_flags_and_hooks_of_other_threads():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).train()
    theirs = evaluating(model), hooked([(model[0], print)], [(model[0], print), (model[1], print)])
    with ThreadPoolExecutor(1) as other:
        for block in theirs:
            other.submit(block.__enter__).result()
        small = decomp.svd(model, ranks=4)
        assert all(module.training for module in small.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
        for block in reversed(theirs):
            other.submit(block.__exit__, None, None, None).result()
    assert all(module.training for module in model.modules())


@all_or_nothing()
def interrupted_with_the_lock():
    LOCK.acquire()
    raise KeyboardInterrupt


def test_a_call_that_ends_between_taking_a_lock_and_its_block_gives_the_lock_back():
    with pytest.raises(KeyboardInterrupt):
        interrupted_with_the_lock()
    with LOCK:
        assert locks_held() == {LOCK: 1}
        with pytest.raises(KeyboardInterrupt):
            interrupted_with_the_lock()
        assert locks_held() == {LOCK: 1}, "the one from before the call"
    assert not locks_held()
    with ThreadPoolExecutor(1) as other:
        assert other.submit(LOCK.acquire, timeout=1).result()
        other.submit(LOCK.release).result()

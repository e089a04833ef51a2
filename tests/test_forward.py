"""Hooks are there for one block and one thread; what a failing call has changed is taken back."""

from threading import Thread

import pytest
import torch
from torch import nn

from decomp.network import restoring
from decomp.network.forward import Unfused, hooked
from decomp.network.restoring import all_or_nothing, on_failure


def hooks_of(*modules):
    return [hook for module in modules for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


class Refusing(nn.Linear):
    def register_forward_hook(self, *args, **kwargs):
        raise RuntimeError("no hooks here")


def test_nothing_stays_where_registering_fails_half_way():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2), Refusing(2, 2), nn.Linear(2, 2)]
    pairs = [(layer, lambda *given: None) for layer in layers]
    with pytest.raises(RuntimeError, match="no hooks here"), hooked(pairs, pairs):
        raise AssertionError("the block must not run")
    assert not hooks_of(*layers)


def test_nothing_stays_where_the_block_fails():
    layer = nn.Linear(2, 2)
    registered = []

    def broken(*given):
        registered.extend(hooks_of(layer))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), hooked([(layer, broken)], [(layer, broken)]):
        layer(torch.ones(1, 2))
    assert len(registered) == 2
    assert not hooks_of(layer)


def test_hooks_get_arguments_by_name_and_may_replace_the_output():
    seen = []
    layer = nn.Linear(2, 2)
    with hooked(
        [(layer, lambda module, args, kwargs: seen.append((args, sorted(kwargs))))],
        [(layer, lambda module, args, kwargs, output: torch.zeros_like(output))],
    ):
        assert torch.equal(layer(input=torch.ones(1, 2)), torch.zeros(1, 2))
    assert seen == [((), ["input"])]


def test_calls_of_another_thread_are_not_seen():
    seen = []
    layer = nn.Linear(2, 2)
    with hooked([(layer, lambda *given: seen.append(given))], [(layer, lambda *given: given[3] * torch.nan)]):
        outputs = []
        other = Thread(target=lambda: outputs.append(layer(torch.ones(1, 2))))
        other.start()
        other.join()
    assert not seen
    assert bool(torch.isfinite(outputs[0]).all())


def test_modes_that_an_interrupt_leaves_behind_are_taken_back():
    @all_or_nothing()
    def call():
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled("cpu", True)
        Unfused().__enter__()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call()
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.overrides._get_current_function_mode_stack() == []


def test_an_undo_that_is_interrupted_is_begun_again():
    state, attempts = {"first": 1, "second": 1}, 0

    def undo_second():
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise KeyboardInterrupt
        state["second"] = 1

    @all_or_nothing()
    def call():
        on_failure(lambda: state.update(first=1))
        on_failure(undo_second)
        state.update(first=2, second=2)
        raise OSError

    with pytest.raises(KeyboardInterrupt):
        call()
    assert state == {"first": 1, "second": 1}


def test_what_an_inner_call_completed_stays():
    state = {"inner": 1, "outer": 1}

    @all_or_nothing()
    def inner():
        on_failure(lambda: state.update(inner=1))
        state.update(inner=2)

    @all_or_nothing()
    def outer():
        on_failure(lambda: state.update(outer=1))
        inner()
        state.update(outer=2)
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        outer()
    assert state == {"inner": 2, "outer": 1}


def test_a_call_whose_guard_was_interrupted_is_forgotten():
    """Its undos must not be kept, nor those of later calls be lost."""
    lost, undone = all_or_nothing(), []
    lost.__enter__()
    on_failure(lambda: undone.append("lost"))
    del lost  # as where an interrupt comes before the guard is left: what it knew is undone
    assert undone == ["lost"]

    @all_or_nothing()
    def call():
        on_failure(lambda: undone.append("call"))
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        call()
    assert undone == ["lost", "call"]
    assert restoring._innermost() is None

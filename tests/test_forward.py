"""Hooks are there for one block and one thread."""

from threading import Thread

import pytest
import torch
from torch import nn

from decomp.network.forward import hooked


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

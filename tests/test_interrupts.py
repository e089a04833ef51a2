"""Every public call, interrupted at random instants: models and process are then as before the call.

An instant is a bytecode of this library; a trace function raises there, once per call. Not covered are instants
inside of torch and of the standard library, in the middle of the bytecodes of ``register_forward_hook`` or
``contextlib`` for example, and a second exception after the first. An interrupt after the last change, when a call
is about to return, leaves the new state as a whole.
"""

import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from test_state_left_behind import CALLS, QUIET, World
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import decomp
from decomp.data import suspended
from decomp.data.suspended import HeldExamples
from decomp.explorer.state import Exploration
from decomp.losses import Distillation
from decomp.network.restoring import locks_held

FOLDERS = (Path(decomp.__file__).parent, Path(decomp.layers.__file__).parent)
OURS = {str(path) for folder in FOLDERS for path in folder.rglob("*.py")}
ERRORS = (KeyboardInterrupt, OSError, MemoryError)


def explored(world):
    if not hasattr(world, "exploration"):
        world.exploration = Exploration(world.model, world.x[:1], timed=False, **QUIET)
        world.exploration.choose_ranks("3", (4,))
    return world.exploration


IN_PLACE = {
    "tucker in place": lambda w: decomp.tucker(w.model, ranks=4, inplace=True),
    "tucker from data in place": lambda w: decomp.tucker(w.model, ranks=4, data=w.data, inplace=True, **QUIET),
    "compress in place": lambda w: decomp.compress(w.model, w.x[:1], macs=0.5, inplace=True, **QUIET),
    "apply in place": lambda w: w.plan.apply(w.model, inplace=True),
    "build in place": lambda w: w.plan.build(w.model, inplace=True),
    "densify in place": lambda w: decomp.densify(w.small, inplace=True),
    "fold_batch_norm in place": lambda w: decomp.fold_batch_norm(w.model, w.x, inplace=True),
}
EXPLORING = {
    "budget of an exploration": lambda w: explored(w).choose_budget("macs", 0.5),
    "ranks of an exploration": lambda w: explored(w).choose_ranks("0", (5, 5)),
    "method of an exploration": lambda w: explored(w).choose_method("0", "svd_spatial"),
    "evaluation of an exploration": lambda w: explored(w).evaluate(),
}
DISTILLED = {"a step of a distillation": lambda w: Distillation(w.model, hints={"0": 1.0})(w.small, w.x)}
EVERY = CALLS | IN_PLACE | EXPLORING | DISTILLED


class Instants:
    """Counts the bytecodes of the library in a block; raises an error at one of them."""

    def __init__(self, at=None, error=None):
        self.at, self.error, self.count, self.places = at, error, 0, {}

    def __enter__(self):
        self.outer = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *raised):
        sys.settrace(self.outer)

    def _enter(self, frame, event, arg):
        if frame.f_code.co_filename not in OURS:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame, event, arg):
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                raise self.error("the end")  # which ends the tracing
            if self.at is None:
                self.places.setdefault((frame.f_code, frame.f_lasti), self.count)
        return self._step


def process():
    return {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state(legacy=True)[1:]),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "function modes": torch.overrides._get_current_function_mode_stack(),
        "dispatch modes": _get_current_dispatch_mode_stack(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": threading.active_count(),
        "torch threads": torch.get_num_threads(),
        "locks": locks_held(),
    }


def structure(model):
    """All of a model but the values of its tensors."""
    return {
        name: {
            "id": id(module),
            "training": module.training,
            "momentum": getattr(module, "momentum", None),
            "children": {key: id(child) for key, child in module._modules.items()},
            "attributes": set(vars(module)),
            "hooks": {key: dict(hooks) for key, hooks in vars(module).items() if "_hooks" in key and hooks},
            "parameters": {
                key: (id(p), p.requires_grad, id(p.grad)) for key, p in module._parameters.items() if p is not None
            },
        }
        for name, module in model.named_modules()
    }


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in some.items())


def world_of(name, train):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    world = World("a loader")
    if train:
        world.model.train()
        world.small.train()
    for model in (world.model, world.small):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        list(model.parameters())[-1].requires_grad_(False)
    if name in EXPLORING:
        explored(world)
    return world


def choices(world):
    exploration = getattr(world, "exploration", None)
    if exploration is None:
        return None
    shown = {name: exploration.shown_ranks(name) for name in exploration.layers}
    methods = {name: candidate.method.name for name, candidate in exploration.layers.items()}
    return str(exploration.plan), set(exploration.held), shown, methods, len(exploration.tried)


def interrupted(name, count):
    """Interrupt a call at so many instants, half of them the first visits of bytecodes."""
    chance = random.Random(name)
    train = chance.random() < 0.5
    world = world_of(name, train)
    instants = Instants()
    with instants:
        EVERY[name](world)
    new = [values(model) for model in (world.model, world.small)]
    first = sorted(instants.places.values())
    for number in range(count):
        at = chance.choice(first) if number % 2 else chance.randint(1, instants.count)
        error = chance.choice(ERRORS)
        world = world_of(name, train)
        models = (world.model, world.small)
        before = process()
        old = [(structure(model), values(model)) for model in models]
        chosen = choices(world)
        unraisable, hook = [], sys.unraisablehook
        sys.unraisablehook = unraisable.append
        raised = None
        try:
            with Instants(at, error):
                EVERY[name](world)
        except BaseException as ended:
            raised = ended
        finally:
            sys.unraisablehook = hook
        where = f"{name}, {error.__name__} at {at} of {instants.count}, train={train}: {place_of(raised)}"
        after = process()
        assert {key: after[key] for key in after if after[key] != before[key]} == {}, where
        for model, (parts, tensors), made in zip(models, old, new, strict=True):
            now = structure(model)
            changed = {key for key in now.keys() | parts.keys() if now.get(key) != parts.get(key)}
            if equal(values(model), tensors) and not changed:
                continue
            assert equal(values(model), made), f"{where}: neither old nor new, {sorted(changed)}"
            assert name not in CALLS or name in TRAINING, where
            assert not any(part["hooks"] for part in now.values()), where
            assert {part["training"] for part in now.values()} == {train}, where
        if raised is not None and chosen is not None:
            assert choices(world) == chosen, where


TRAINING = ("repair", "repair after ReLU", "finetune_layerwise", "finetune")


def place_of(raised):
    """Where an exception came from, for the message of a test that fails."""
    if raised is None:
        return "not raised"
    trace = raised.__traceback__
    places = []
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename in OURS:
            places.append(f"{Path(code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(raised).__name__} {' > '.join(places[-4:])}"


@pytest.mark.parametrize("name", EVERY)
def test_whatever_ends_a_call_leaves_all_as_it_was(name, seconds_of_macs):
    interrupted(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_twenty_instants_of_each_call(name, seconds_of_macs):
    interrupted(name, 20)


def test_passes_that_are_held_end_wherever_their_end_is_interrupted(seconds_of_macs):
    def decompose():
        decomp.tucker(world.model, ranks=4, layers=["0"], data=world.data, **QUIET)

    world = world_of("held passes", train=False)
    with Instants() as instants:
        decompose()
    ends = (HeldExamples.__exit__, HeldExamples._close, suspended._end)
    for code in (end.__code__ for end in ends):
        places = sorted(at for (each, _), at in instants.places.items() if each is code)
        for at in (places[0], places[len(places) // 2]):
            before = threading.active_count()
            # The traceback, which is kept as a notebook keeps it, keeps the passes.
            with pytest.raises(KeyboardInterrupt) as raised, Instants(at, KeyboardInterrupt):
                decompose()
            assert threading.active_count() == before, place_of(raised.value)

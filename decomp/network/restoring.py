"""Changes to the user's models and process that are taken back, whatever ends the call that made them.

Every change is announced before it is made, by :func:`on_failure` or :func:`temporarily`, with a function that
takes it back. :func:`all_or_nothing` around a call runs these functions if the call ends by any exception.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import RLock, get_ident, local
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Hook = Callable[..., Any]

Undo = Callable[[], None]
"""Takes a change back. It may run twice, and also where only a part of the change was made."""

_locks: list["Lock"] = []  # of the library


class Lock:
    """A reentrant lock that knows how often its owner has taken it."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._depth = 0

    @property
    def depth(self) -> int:
        """How often this thread has taken the lock."""
        # An interrupt may have come before the first one was counted.
        return max(1, self._depth) if self._lock._is_owned() else 0  # type: ignore[attr-defined]

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As that of ``threading.RLock``."""
        taken = self._lock.acquire(blocking, timeout)
        if taken:
            self._depth += 1
        return taken

    def release(self) -> None:
        """As that of ``threading.RLock``."""
        depth = self.depth
        if depth:
            self._depth = depth - 1
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


def lock() -> Lock:
    """A reentrant lock, which a call that fails gives back.

    ``with`` may be interrupted after it has taken a lock, and before its block begins, whose end would release it.
    """
    made = Lock()
    _locks.append(made)
    return made


def locks_held() -> dict[Lock, int]:
    """The locks of the library that this thread has, with how often it has taken them."""
    return {each: each.depth for each in _locks if each.depth}


LOCK = lock()
"""Held while train flags or hooks of a module change, and while a model is copied with them."""

_thread = local()


class _Call:
    """What a call has changed so far."""

    def __init__(self) -> None:
        self.undos: list[Undo] = []

    def undo(self) -> None:
        for undo in reversed(self.undos):
            undo()


def _innermost() -> _Call | None:
    """The innermost call of this thread that is still running."""
    calls: list[ref[_Call]] = _thread.__dict__.setdefault("calls", [])
    while calls:
        call = calls[-1]()
        if call is not None:
            return call
        calls.pop()  # it ended, and was interrupted before it was taken off the list
    return None


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """Take back all changes of the block if it ends by an exception, ``KeyboardInterrupt`` included.

    A second exception while changes are taken back, as by an impatient Ctrl-C, starts that over once. Used as a
    decorator, ``@all_or_nothing()``, of every public call. What a block inside it has completed stays.

    >>> state = [1]
    >>> with all_or_nothing():
    ...     on_failure(lambda: state.__setitem__(0, 1))
    ...     state[0] = 2
    ...     raise OSError("the disk is full")
    Traceback (most recent call last):
    OSError: the disk is full
    >>> state
    [1]
    """
    _innermost()
    call, calls = _Call(), _thread.calls
    call.undos += [_releasing_locks(), _restoring_modes()]
    place = len(calls)
    try:
        calls.append(ref(call))
        yield
    except BaseException:
        try:
            call.undo()
        except BaseException:
            call.undo()
            raise
        raise
    finally:
        del calls[place:]


def _releasing_locks() -> Undo:
    """A function that releases what this thread has taken of the locks since."""
    before = locks_held()

    def release() -> None:
        for each in _locks:
            while each.depth > before.get(each, 0):
                each.release()

    return release


def _restoring_modes() -> Undo:
    """A function that sets the modes of this thread again: gradients, autocast, modes of functions and dispatch.

    The blocks that set them restore them, unless an interrupt comes between the last bytecode of a block and its
    end.
    """
    gradients = torch.is_grad_enabled()
    kinds = [kind for kind in ("cpu", "cuda") if torch.amp.is_autocast_available(kind)]
    autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
    stacks: list[Any] = [_get_current_function_mode_stack, _get_current_dispatch_mode_stack]
    depths = [len(stack()) for stack in stacks]

    def restore() -> None:
        for stack, depth in zip(stacks, depths, strict=True):
            while len(stack()) > depth:
                stack()[-1].__exit__(None, None, None)
        for kind, (enabled, dtype) in autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_grad_enabled(gradients)

    return restore


def on_failure(undo: Undo) -> None:
    """Announce a change that is about to be made; ``undo`` takes it back if the running call fails."""
    call = _innermost()
    if call is not None:
        call.undos.append(undo)


@contextmanager
def temporarily(undo: Undo) -> Iterator[None]:
    """Run the block, and ``undo`` after it; where that is interrupted, the failing call repeats it."""
    on_failure(undo)
    try:
        yield
    finally:
        undo()
        call = _innermost()
        if call is not None:
            call.undos[:] = [each for each in call.undos if each is not undo]


def restoring_values(*modules: nn.Module) -> Undo:
    """A function that gives all parameters and buffers of modules their present values and gradients again."""
    saved: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            saved[id(tensor)] = (tensor, tensor.detach().clone(), tensor.grad if tensor.is_leaf else None)

    @torch.no_grad()
    def restore() -> None:
        for tensor, value, grad in saved.values():
            if not torch.equal(tensor, value):
                tensor.copy_(value)
            if tensor.is_leaf:
                tensor.grad = grad

    return restore


class _Evaluated:
    """A module in eval mode: its train flag from before, and those found by each block that wants it so."""

    def __init__(self, module: nn.Module, holder: object, thread: int) -> None:
        self.module, self.training = module, module.training
        self.holders: dict[object, tuple[int, bool]] = {holder: (thread, module.training)}


_evaluated: dict[int, _Evaluated] = {}  # by id; an entry keeps its module alive, and is there for a block alone


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run the block in eval mode, so that BatchNorm statistics do not change; then restore all train flags.

    Where several threads evaluate a model at the same time, the last one to end restores its flags.
    """
    thread, holder = get_ident(), object()
    modules = list({id(module): module for model in models for module in model.modules()}.values())

    def release() -> None:
        with LOCK:
            for module in modules:
                entry = _evaluated.get(id(module))
                if entry is None or holder not in entry.holders:
                    continue
                others = [other for each, (other, _) in entry.holders.items() if each is not holder]
                if not others:
                    module.training = entry.training
                    del _evaluated[id(module)]
                    continue
                if all(other == thread for other in others):
                    module.training = entry.holders[holder][1]
                del entry.holders[holder]

    with temporarily(release):
        with LOCK:
            for module in modules:
                entry = _evaluated.get(id(module))
                if entry is None:
                    _evaluated[id(module)] = _Evaluated(module, holder, thread)
                else:
                    entry.holders[holder] = (thread, module.training)
                module.training = False  # not eval(): a model may override it and change its weights there
        yield


def training_of(module: nn.Module) -> bool:
    """The train flag of a module, as it is without the blocks of other threads that evaluate it now."""
    with LOCK:
        entry = _evaluated.get(id(module))
        if entry is None or any(thread == get_ident() for thread, _ in entry.holders.values()):
            return module.training
        return entry.training


@contextmanager
def training_as_now(*modules: nn.Module) -> Iterator[None]:
    """Run a block that changes train flags and the momentum of BatchNorm; then restore them."""
    flags = [(module, module.training, getattr(module, "momentum", None)) for module in modules]

    def restore() -> None:
        for module, training, momentum in flags:
            module.training = training
            if hasattr(module, "momentum"):
                vars(module)["momentum"] = momentum

    with temporarily(restore):
        yield


@contextmanager
def hooked(
    before: Iterable[tuple[nn.Module, Hook]] = (),
    after: Iterable[tuple[nn.Module, Hook]] = (),
    *,
    in_all_threads: bool = False,
) -> Iterator[None]:
    """Run the block with forward hooks on modules; they are removed after it, also on an exception.

    The hooks run only for calls in this thread, unless ``in_all_threads``: others may run the same modules at the
    same time. A hook that has just been removed may still be called, without the keyword arguments.

    Args:
        before: modules with a hook (module, args, kwargs) that runs before their forward.
        after: modules with a hook (module, args, kwargs, output) that runs after it; if it returns a value other
            than None, that replaces the output.
    """
    own_before = [(module, OwnHook(hook, in_all_threads=in_all_threads)) for module, hook in before]
    own_after = [(module, OwnHook(hook, in_all_threads=in_all_threads)) for module, hook in after]

    def remove() -> None:
        with LOCK:
            for module, hook in own_before:
                _remove(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, hook)
            for module, hook in own_after:
                _remove(module._forward_hooks, module._forward_hooks_with_kwargs, hook)

    with temporarily(remove):
        with LOCK:
            for module, hook in own_before:
                module.register_forward_pre_hook(hook, with_kwargs=True)
            for module, hook in own_after:
                module.register_forward_hook(hook, with_kwargs=True)
        yield


def remove_own_hooks(model: nn.Module) -> None:
    """Remove the hooks of other threads' calls from a copy of a model that they run."""
    for module in model.modules():
        _remove(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        _remove(module._forward_hooks, module._forward_hooks_with_kwargs)


def _remove(hooks: dict[int, Any], with_kwargs: dict[int, bool], hook: "OwnHook | None" = None) -> None:
    """Remove a hook of ours, or all of them, by itself and not by its handle, which an interrupt may have lost."""
    for key, each in list(hooks.items()):
        if each is hook or (hook is None and isinstance(each, OwnHook)):
            with_kwargs.pop(key, None)
            del hooks[key]  # last: as long as it is there, this can be begun again


class OwnHook:
    """A hook of ours on a module of the user's, which does nothing when another thread calls the module."""

    def __init__(self, hook: Hook, *, in_all_threads: bool = False) -> None:
        self._hook, self._thread = hook, None if in_all_threads else get_ident()

    def __call__(self, *given: Any) -> Any:
        return self._hook(*given) if self._thread in (None, get_ident()) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnHook":
        return self

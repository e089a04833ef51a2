"""How a batch is fed to a model, and what it is called with on the way."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run the block in eval mode and give every module its own train flag back: BatchNorm must not move."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def call(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with a batch: a tensor is one argument, a tuple or list positional ones, a mapping keywords.

    Raises:
        TypeError: the batch is none of these, or has more elements than the model takes.
    """
    positional, keywords = arguments(batch)
    try:
        inspect.signature(model.forward).bind(*positional, **keywords)
    except TypeError as error:
        raise TypeError(
            f"{type(model).__name__} cannot be called with a batch of {_describe(batch)}: {error}; "
            "for batches of (inputs, labels) write inputs=lambda batch: batch[0]"
        ) from None
    return model(*positional, **keywords)


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split a batch into positional and keyword arguments."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise TypeError(f"a batch must be a tensor, a tuple, a list or a mapping, not {type(batch).__name__}")


def to_device_of(model: nn.Module, batch: Any) -> Any:
    """Move the tensors of a batch to the device of the model's first parameter."""
    parameter = next(model.parameters(), None)
    return batch if parameter is None else _moved(batch, parameter.device)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_moved(value, device) for value in batch]
    return batch


def _describe(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"one tensor {tuple(batch.shape)}"
    names = list(batch) if isinstance(batch, Mapping) else [type(value).__name__ for value in batch]
    return f"{len(names)} elements ({', '.join(map(str, names[:6]))})"


class Unfused(TorchFunctionMode):
    """Makes torch's attention and encoder layers call their parts, in this block and thread.

    Their fused path, taken in eval mode without gradients, calls no submodule, so that hooks see nothing, and
    flop counters count nothing. It is not taken where a torch function mode is active.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@dataclass
class Observation:
    """One forward pass: per module the input shape of each call and the MACs, in the order of execution.

    Modules that the batch never reaches are left out. ``total_macs`` counts the whole model.
    """

    shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    total_macs: int = 0


def observe(model: nn.Module, batch: Any, modules: Mapping[str, nn.Module]) -> Observation:
    """Run one batch in eval mode without gradients and note what it does to ``modules``."""
    seen = Observation()

    def shape(name: str, received: Any) -> None:
        seen.shapes.setdefault(name, []).append(tuple(getattr(received, "shape", ())))

    with FlopCounterMode(display=False) as counter, Unfused():
        macs = meter(model, batch, modules, lambda: counter.get_total_flops() / 2, shape)
    seen.macs = {name: int(value) for name, value in macs.items()}
    seen.total_macs = int(counter.get_total_flops()) // 2
    return seen


def meter(
    model: nn.Module,
    batch: Any,
    modules: Mapping[str, nn.Module],
    read: Callable[[], float],
    look: Callable[[str, Any], None] = lambda name, received: None,
) -> dict[str, float]:
    """How far ``read()`` moves while each module runs in one pass; ``look`` sees the first input of a call."""
    spent: dict[str, float] = {}
    begun: dict[str, float] = {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            look(name, positional[0] if positional else next(iter(keywords.values()), None))
            begun[name] = read()

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, received: Any, result: Any) -> None:
            spent[name] = spent.get(name, 0.0) + read() - begun[name]

        return hook

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        with evaluating(model), torch.no_grad():
            call(model, to_device_of(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return spent

"""Calling a model with a batch: arguments, devices, outputs; eval mode and hooks are those of ``restoring``."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from typing_extensions import TypeAliasType

from decomp.network.restoring import evaluating as evaluating
from decomp.network.restoring import hooked as hooked

Batch = TypeAliasType("Batch", Tensor | Sequence[Any] | Mapping[str, Any])
"""The arguments of a model: a tensor is one argument, a tuple or list positional ones, a mapping keywords."""

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def norms_with_running_stats(model: nn.Module) -> dict[str, Any]:
    """The BatchNorm layers with running statistics, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None}


def norm_scale(variance: Tensor, eps: float, gamma: Tensor | None) -> Tensor:
    """The scale of each channel in a BatchNorm in eval mode: gamma / sqrt(var + eps), in float64."""
    scale = (variance.detach().to(torch.float64) + eps).rsqrt()
    return scale if gamma is None else scale * gamma.detach()


def differentiable_in_eval(model: nn.Module) -> AbstractContextManager[Any]:
    """Keep cuDNN away from a model with recurrent layers: it has no backward pass of these in eval mode."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    return torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()


@contextmanager
def with_values() -> Iterator[None]:
    """Run the block with the CPU as the default device where that is "meta", whose tensors hold no values."""
    with torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext():
        yield


class SizesDiffer(ValueError):
    """Two models give outputs of different sizes for the same batch."""


def differences(model: nn.Module, outputs: list[Tensor], expected: list[Tensor]) -> list[Tensor]:
    """The differences of the tensors in two outputs of a model and of one like it for the same batch.

    Raises:
        SizesDiffer: they are not as many, or have different shapes.
    """
    if len(outputs) != len(expected):
        raise SizesDiffer(
            f"{type(model).__name__} gives {len(outputs)} tensors, where {len(expected)} are expected for the "
            "same batch: there is no error of the output"
        )
    return [difference(model, *pair) for pair in zip(outputs, expected, strict=True)]


def difference(model: nn.Module, output: Tensor, expected: Tensor) -> Tensor:
    """``output - expected``, two outputs of a model and of one like it for the same batch.

    Raises:
        SizesDiffer: they have different shapes.
    """
    if output.shape != expected.shape:
        sizes = f"{tuple(output.shape)} and {tuple(expected.shape)}"
        raise SizesDiffer(
            f"{type(model).__name__} gives outputs of different sizes for the same batch, {sizes}: the size is "
            "random or depends on the weights, so that there is no error of the output. Where the call has "
            "evaluate= or loss=, write a function that compares what has a fixed size; else wrap the model in a "
            "module that returns it"
        )
    return output - expected


def call(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with a batch: a tensor is one argument, a tuple or list positional ones, a mapping keywords.

    Raises:
        TypeError: the batch is none of these, or does not fit the signature of the model.
    """
    positional, keywords = arguments(batch)
    try:
        inspect.signature(model.forward).bind(*positional, **keywords)
    except TypeError as error:
        raise TypeError(
            f"{type(model).__name__} cannot be called with a batch of {describe(batch)}: {error}; "
            "for batches of (inputs, labels) write inputs=lambda batch: batch[0]"
        ) from None
    return model(*positional, **keywords)


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split a batch into positional and keyword arguments; a named tuple is one argument."""
    if isinstance(batch, Tensor) or hasattr(batch, "_fields"):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    raise TypeError(f"a batch must be a tensor, a tuple, a list or a mapping, not {type(batch).__name__}")


def floating(result: Any) -> list[Tensor]:
    """The floating-point tensors in the output of a module: a tensor, nested containers, a dataclass."""
    if isinstance(result, Tensor):
        values: Any = result
    elif callable(getattr(result, "values", None)):
        values = list(result.values())
    else:
        values = vars(result) if is_dataclass(result) else result
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def flat_output(result: Any) -> Tensor:
    """The floating-point tensors in the output of a model, concatenated to one vector in float32."""
    return torch.cat([tensor.float().flatten() for tensor in floating(result)])


def to_device_of(model: nn.Module, batch: Any) -> Any:
    """Move the tensors of a batch to the device of the model's first parameter."""
    parameter = next(model.parameters(), None)
    return batch if parameter is None else moved(batch, parameter.device)


def moved(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch to a device."""
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def describe(batch: Any) -> str:
    """A short description of a batch for error messages: its type and shapes."""
    if isinstance(batch, Tensor):
        return f"one tensor {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        parts = [f"{name}: {_kind(value)}" for name, value in batch.items()]
    elif isinstance(batch, tuple | list):
        parts = [_kind(value) for value in batch]
    else:
        return f"one {type(batch).__name__}"
    return f"{len(parts)} elements ({', '.join(parts[:6])})"


def _kind(value: Any) -> str:
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


class Unfused(TorchFunctionMode):
    """Disables the fused path of torch's attention and encoder layers, in this block and thread.

    The fused path, used in eval mode without gradients, calls no submodule: hooks do not run, and flop counters
    count nothing. torch does not use it while a torch function mode is active.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))

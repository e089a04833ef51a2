"""The normalization and activation that follow each layer, traced in one forward pass of any model."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from decomp.network.forward import call, evaluating, floating, hooked, norms_with_running_stats, to_device_of

_NORMALIZATIONS = {
    getattr(functional, name)
    for name in ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm")
}
_ACTIVATIONS = {
    getattr(home, name)
    for home in (functional, torch, Tensor)
    for name in (
        *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "elu", "elu_", "selu", "celu"),
        *("gelu", "silu", "mish", "hardswish", "hardsigmoid", "hardtanh", "hardtanh_", "softplus", "softsign"),
        *("sigmoid", "sigmoid_", "tanh", "tanh_", "threshold", "threshold_", "logsigmoid", "tanhshrink"),
    )
    if hasattr(home, name)
}


@dataclass(frozen=True)
class Step:
    """A torch function applied to a tensor, with its other arguments."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, tensor: Tensor) -> Tensor:
        """Apply the function to a clone, so that in-place functions do not change the tensor."""
        result: Tensor = self.func(tensor.clone(), *self.args, **self.kwargs)
        return result

    def arguments(self) -> dict[str, Any]:
        """The arguments of a function written in Python, by name, without the tensor."""
        bound = inspect.signature(self.func).bind(None, *self.args, **self.kwargs)
        bound.apply_defaults()
        return dict(list(bound.arguments.items())[1:])


@dataclass(frozen=True)
class Tail:
    """The functions applied to the output of a layer: a normalization, activations, or neither.

    ``calls`` is how often the layer was called in the traced pass.
    """

    steps: tuple[Step, ...] = ()
    calls: int = 1

    def __call__(self, tensor: Tensor) -> Tensor:
        for step in self.steps:
            tensor = step(tensor)
        return tensor


def tails(model: nn.Module, batch: Any, layers: Mapping[str, nn.Module]) -> dict[str, Tail]:
    """Return the functions that are applied to the output of each layer.

    A tail ends where a tensor has a second consumer, so that the rest of the network depends only on the output of
    the tail. It is empty for a layer that is called several times, or does not return a single tensor. Layers that
    are not called are left out. The model runs in eval mode, without gradients.
    """
    watch = _Watch()
    hooks = [(module, watch.begin(name)) for name, module in layers.items()]
    with hooked(after=hooks), evaluating(model), torch.no_grad(), watch:
        watch.end(call(model, to_device_of(model, batch)))
    return {
        name: Tail(tuple(Step(*step) for step in path.steps), path.calls) for name, path in watch.paths.items()
    }


def following_norms(model: nn.Module, batch: Any, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return, by layer, the name of the BatchNorm with running statistics that is the only consumer of its output.

    Both are called once, and axis 1, which the BatchNorm scales, holds the output channels of the layer.
    """
    norms = norms_with_running_stats(model)
    axes: dict[str, list[int]] = {name: [] for name in norms}

    def count(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            axes[name].append((*given, *keywords.values())[0].dim())

        return hook

    with hooked(before=[(norm, count(name)) for name, norm in norms.items()]):
        tail_of = tails(model, batch, layers)
    named = {id(norm.running_mean): name for name, norm in norms.items()}
    following = {}
    for name, tail in tail_of.items():
        if tail.steps and tail.steps[0].func is functional.batch_norm:
            norm = named.get(id(tail.steps[0].arguments()["running_mean"]), "")
            if axes.get(norm) == [len(getattr(layers[name], "kernel_size", ())) + 2]:
                following[name] = norm
    return following


class _Path:
    """The output of a layer and the steps after it: ``steps[i]`` maps ``tensors[i]`` to ``tensors[i + 1]``."""

    def __init__(self, output: Any) -> None:
        self.closed = not isinstance(output, Tensor)
        self.tensors = [] if self.closed else [output]
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.calls = 1

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        # An in-place activation returns its argument, which then stands at two positions: the later one is right.
        latest = {id(tensor): place for place, tensor in enumerate(self.tensors)}
        given = (*args, *kwargs.values())
        used = [place for place in latest.values() if _among(self.tensors[place], given)]
        if not used or not (_holds_tensor(result) or func is Tensor.__setitem__):
            return
        position = min(used)
        is_last = position == len(self.tensors) - 1
        if is_last and not self.closed and args and args[0] is self.tensors[-1] and self._extends(func):
            self.steps.append((func, args[1:], kwargs))
            self.tensors.append(result)
        else:
            del self.steps[position:], self.tensors[position + 1 :]
            self.closed = True

    def end(self, leaves: Iterable[Any]) -> None:
        """Cut the path at tensors that the model returns: the caller is another consumer of them."""
        latest = {id(tensor): place for place, tensor in enumerate(self.tensors)}
        given = [place for place in latest.values() if _among(self.tensors[place], leaves)]
        if given:
            del self.steps[min(given) :], self.tensors[min(given) + 1 :]

    def called_again(self) -> None:
        """Close the path: another call may be followed by other functions."""
        self.calls += 1
        self.steps.clear()
        del self.tensors[1:]
        self.closed = True

    def _extends(self, func: Any) -> bool:
        if func in _NORMALIZATIONS:
            return not self.steps
        return func in _ACTIVATIONS and all(step[0] in _NORMALIZATIONS for step in self.steps)


class _Watch(TorchFunctionMode):
    """Follows the outputs of layers through every torch function that is called with them."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: dict[str, _Path] = {}

    def begin(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if name in self.paths:
                self.paths[name].called_again()
            else:
                self.paths[name] = _Path(output)

        return hook

    def end(self, result: Any) -> None:
        """Cut all paths at the tensors that the model returns."""
        leaves = floating(result)
        for path in self.paths.values():
            path.end(leaves)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for path in self.paths.values():
            path.record(func, args, kwargs, result)
        return result


def _among(tensor: Tensor, values: Iterable[Any]) -> bool:
    return any(value is tensor or (isinstance(value, tuple | list) and _among(tensor, value)) for value in values)


def _holds_tensor(result: Any) -> bool:
    return isinstance(result, Tensor) or (isinstance(result, tuple | list) and any(map(_holds_tensor, result)))

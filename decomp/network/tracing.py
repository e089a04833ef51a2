"""What follows each layer, traced in one forward pass of any model: normalization, activation, skip connection."""

import inspect
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from decomp.network.forward import (
    call,
    evaluating,
    floating,
    hooked,
    norm_scale,
    norms_with_running_stats,
    to_device_of,
)

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
_SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, operator.add}
_IDENTITIES_IN_EVAL = {
    getattr(functional, name)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
}
LEAST_SCALE = 0.25  # of a channel that makes up for its skip connection, relative to the root mean square


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
class Skip:
    """A skip connection: a tensor that is added to the output of a layer, or to its BatchNorm's.

    It is an input or the output of a ``module`` that was called before the layer ended. ``place`` says which: the
    position or the name of an argument, None for the output. ``scale`` is that of the channels in the BatchNorm.
    """

    module: str
    place: int | str | None
    scale: Tensor | None = None

    def watch(self, model: nn.Module, keep: Callable[[Any], None]) -> tuple[list[Any], list[Any]]:
        """Hooks, before and after the module, that ``keep`` the tensor in every pass of a model."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            keep({**dict(enumerate(args)), **kwargs}.get(self.place))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            keep(output)

        module = dict(model.named_modules()).get(self.module)
        if module is None:  # the networks differ there: nothing is kept, and nothing corrected
            return [], []
        return ([], [(module, after)]) if self.place is None else ([(module, before)], [])

    def corrected(self, output: Tensor, dense: Any, small: Any) -> Tensor:
        """The output that a layer needs for the sum that the dense network has.

        y + (r - r^) / s, with r and r^ what is added in the dense and in the compressed network, and s the scale
        of the BatchNorm. Channels that it scales to next to nothing keep y.

        Source: He et al. 2017 (Channel pruning), section 3.3, for residual blocks.
        """
        if not isinstance(dense, Tensor) or not isinstance(small, Tensor):
            return output
        if not output.shape == dense.shape == small.shape:
            return output
        missing = dense - small
        if self.scale is not None:
            least = LEAST_SCALE * self.scale.square().mean().sqrt()
            divided = self.scale.abs() > least
            inverse = torch.where(divided, 1 / torch.where(divided, self.scale, 1.0), 0.0)
            missing = missing * inverse.to(missing).reshape(-1, *(1,) * (missing.dim() - 2))
        return output + missing


@dataclass(frozen=True)
class Tail:
    """The functions applied to the output of a layer: a normalization, activations, or neither.

    ``calls`` is how often the layer was called in the traced pass; ``skip`` is what is added to its output, or to
    that of its BatchNorm.
    """

    steps: tuple[Step, ...] = ()
    calls: int = 1
    skip: Skip | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        for step in self.steps:
            tensor = step(tensor)
        return tensor


def tails(model: nn.Module, batch: Any, layers: Mapping[str, nn.Module]) -> dict[str, Tail]:
    """Return the functions that are applied to the output of each layer, and what is added to it.

    A tail ends where a tensor has a second consumer, so that the rest of the network depends only on the output of
    the tail. It is empty for a layer that is called several times, or does not return a single tensor. Layers that
    are not called are left out. The model runs in eval mode, without gradients.
    """
    watch = _Watch()
    inside = {id(part) for layer in layers.values() for part in layer.modules()}
    others = [
        (name, module)
        for name, module in model.named_modules()
        if id(module) not in inside and not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
    ]
    before = [(module, watch.given(name)) for name, module in others]
    after = [(module, watch.returned(name)) for name, module in others]
    after += [(module, watch.begin(name)) for name, module in layers.items()]
    with hooked(before, after), evaluating(model), torch.no_grad(), watch:
        watch.end(call(model, to_device_of(model, batch)))
    return {
        name: Tail(tuple(Step(*step) for step in path.steps), path.calls, watch.skip_of(path))
        for name, path in watch.paths.items()
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

    def __init__(self, output: Any, begun: int) -> None:
        self.closed = not isinstance(output, Tensor)
        self.tensors = [] if self.closed else [output]
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self.calls = 1
        self._begun = begun  # how many inputs and outputs of modules were seen before
        self.added: list[Skip] = []

    def record(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, origins: "_Origins"
    ) -> None:
        """Take note of a function that was called, if it was called with one of the tensors."""
        if func in _IDENTITIES_IN_EVAL and args and result is args[0]:
            return
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
            self.added = []
            if is_last and not self.closed and func in _SUMS and len(args) == 2 and not kwargs:
                other = args[1] if args[0] is self.tensors[-1] else args[0]
                self.added = self._skips(other, origins.of(other, self._begun, changes=int(result is other)))
            del self.steps[position:], self.tensors[position + 1 :]
            if self.added and result is self.tensors[-1]:
                del self.tensors[-1]  # it is the sum now, which may be used as often as it likes
            self.closed = True

    def _skips(self, other: Any, found: list[Skip]) -> list[Skip]:
        """What is added to the last tensor, the output of the layer or of its BatchNorm, as far as it can be."""
        if not found or other is self.tensors[-1] or other.shape != self.tensors[-1].shape:
            return []
        steps = [Step(*step) for step in self.steps]
        if not steps:
            return found
        given = steps[0].arguments() if steps[0].func is functional.batch_norm else {}
        if len(steps) > 1 or given.get("training", True) or given["running_var"] is None:
            return []
        scale = norm_scale(given["running_var"], given["eps"], given["weight"])
        return [replace(skip, scale=scale) for skip in found]

    def end(self, leaves: Iterable[Any]) -> None:
        """Cut the path at tensors that the model returns: the caller is another consumer of them."""
        latest = {id(tensor): place for place, tensor in enumerate(self.tensors)}
        given = [place for place in latest.values() if _among(self.tensors[place], leaves)]
        if given:
            del self.steps[min(given) :], self.tensors[min(given) + 1 :]
            self.added = []

    def called_again(self) -> None:
        """Close the path: another call may be followed by other functions."""
        self.calls += 1
        self.added = []
        self.steps.clear()
        del self.tensors[1:]
        self.closed = True

    def _extends(self, func: Any) -> bool:
        if func in _NORMALIZATIONS:
            return not self.steps
        return func in _ACTIVATIONS and all(step[0] in _NORMALIZATIONS for step in self.steps)


class _Origins:
    """Which modules each tensor was given to, or came from; tensors that were changed since are unknown."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Any, int, list[tuple[int, Skip]]]] = {}
        self.calls: Counter[str] = Counter()
        self.count = 0

    def add(self, value: Any, module: str, place: int | str | None) -> None:
        """Take note of an input or an output of a module."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_inference():
            return  # an inference tensor does not know whether it was changed
        self.count += 1
        if not self.of(value, self.count):
            self._found[id(value)] = weakref.ref(value), value._version, []
        self._found[id(value)][2].append((self.count, Skip(module, place)))

    def of(self, value: Any, begun: int, changes: int = 0) -> list[Skip]:
        """Where a tensor was seen, as far as that is among the first ``begun`` ones, before so many changes."""
        reference, version, places = self._found.get(id(value), (None, 0, []))
        if reference is None or reference() is not value or version + changes != value._version:
            return []
        return [skip for number, skip in places if number <= begun]


class _Watch(TorchFunctionMode):
    """Follows the outputs of layers through every torch function that is called with them."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: dict[str, _Path] = {}
        self._origins = _Origins()

    def given(self, name: str) -> Any:
        """A hook that takes note of the inputs of a module."""

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._origins.calls[name] += 1
            for place, value in (*enumerate(args), *kwargs.items()):
                self._origins.add(value, name, place)

        return hook

    def returned(self, name: str) -> Any:
        """A hook that takes note of the output of a module."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._origins.add(output, name, None)

        return hook

    def skip_of(self, path: "_Path") -> Skip | None:
        """What is added to the output of a layer, if a pass has it once."""
        nearest_first = reversed(path.added)  # what a batch changes on its way is changed before the last module
        return next((skip for skip in nearest_first if self._origins.calls[skip.module] == 1), None)

    def begin(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if name in self.paths:
                self.paths[name].called_again()
            else:
                self.paths[name] = _Path(output, self._origins.count)

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
            path.record(func, args, kwargs, result, self._origins)
        return result


def _among(tensor: Tensor, values: Iterable[Any]) -> bool:
    return any(value is tensor or (isinstance(value, tuple | list) and _among(tensor, value)) for value in values)


def _holds_tensor(result: Any) -> bool:
    return isinstance(result, Tensor) or (isinstance(result, tuple | list) and any(map(_holds_tensor, result)))

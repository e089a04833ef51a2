"""What flows through one layer or block: inputs in the compressed network, targets from the dense one."""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from decomp.data.batches import Batches, Part, naming_batch
from decomp.data.windows import Window
from decomp.network.forward import Unfused, call, floating, to_device_of
from decomp.network.tracing import Tail, tails


@dataclass(frozen=True)
class Example:
    """One call: with what, in the compressed network, and what the dense network gives for it, behind the tail.

    ``batch`` is the number of the batch that it is of.
    """

    batch: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: list[Tensor]

    @property
    def received(self) -> Tensor:
        """What a layer with one input gets."""
        received: Tensor = (*self.args, *self.kwargs.values())[0]
        return received

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        leaves = tree_leaves((self.args, self.kwargs, self.targets))
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))

    def run(self, module: nn.Module, tail: Tail) -> list[Tensor]:
        """What a module gives when it is called so, behind its tail; what the example holds is not changed."""
        wide = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

        def widened(leaf: Any) -> Any:
            # Inputs of half precision for a copy that is trained in float32.
            narrow = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.itemsize < wide.itemsize
            return leaf.to(wide) if narrow else leaf

        args, kwargs = tree_map(widened, _own((self.args, self.kwargs)))
        results = floating(module(*args, **kwargs))
        return [tail(given.to(target.dtype)) for given, target in zip(results, self.targets, strict=True)]


class RoutedDifferently(Exception):
    """The two networks send other inputs to the same layer, so that its outputs cannot be compared."""


class Activations:
    """What a layer, or a block, is called with in the compressed network, and what the dense one makes of it.

    A layer that is called several times in a pass gives an example for each call. A pass ends as soon as the layer
    was called as often as in the pass in which its tail was seen.
    """

    def __init__(
        self,
        small: nn.Module,
        dense: nn.Module,
        layer: nn.Module,
        twin: nn.Module,
        tail: Tail,
        batches: Batches,
        cache_bytes: int,
    ) -> None:
        self._small, self._dense, self._layer, self._twin = small, dense, layer, twin
        self._tail, self._batches, self._cache_bytes = tail, batches, cache_bytes

    def windows(
        self, start: int = 0, part: Part | None = None, share: float = 1.0, most: float = math.inf
    ) -> Iterator[Window[Example]]:
        """Go through the data once, in windows that fit a share of the cache.

        Args:
            start: the batch to begin with.
            part: which batches are looked at; the others are passed over.
            share: of the cache.
            most: examples that are needed; a window that holds as many is not filled further.

        Raises:
            RoutedDifferently: inputs and targets of a batch do not belong together.
        """
        window: list[Example] = []
        begin, size, whole = start, 0, start == 0
        for index, batch in self._batches.numbered(start, part):
            with naming_batch(index, batch):
                examples = self._examples(index, batch)
            nbytes = sum(example.nbytes for example in examples)
            if window and size + nbytes > share * self._cache_bytes:
                yield Window(begin, window)
                begin, size, whole, window = index, 0, False, []
            window += examples
            size += nbytes
            if len(window) >= most:
                yield Window(begin, window)
                begin, size, whole, window = index + 1, 0, False, []
        if window:
            yield Window(begin, window, whole)

    @torch.no_grad()
    def _examples(self, index: int, batch: Any) -> list[Example]:
        ours = _calls(self._small, self._layer, batch, self._tail.calls)
        theirs = _calls(self._dense, self._twin, batch, self._tail.calls)
        shapes = ([[each.shape for each in made.results] for made in calls] for calls in (ours, theirs))
        if next(shapes) != next(shapes):
            raise RoutedDifferently
        return [
            Example(index, our.args, our.kwargs, [self._tail(result) for result in their.results])
            for our, their in zip(ours, theirs, strict=True)
            if any(result.numel() for result in their.results)
        ]


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]


class _Enough(BaseException):
    """Nothing behind the layer has to run. No ``Exception``, which the forward of a model may catch."""


def _calls(model: nn.Module, layer: nn.Module, batch: Any, count: int) -> list[_Call]:
    """Run ``model`` until ``layer`` was called ``count`` times, and return these calls."""
    begun: list[tuple[Any, Any]] = []
    seen: list[_Call] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        begun.append(_own((args, kwargs)))

    def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        seen.append(_Call(*begun.pop(), [tensor.detach().clone() for tensor in floating(result)]))
        if len(seen) == count:
            raise _Enough

    handles = [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    ]
    batch = to_device_of(model, batch)
    kind = next((tensor.device.type for tensor in tree_leaves(batch) if isinstance(tensor, Tensor)), "cpu")
    try:
        # Steps may be in mixed precision; what they are made towards is not, whichever window it is in.
        with Unfused(), torch.autocast(kind, enabled=False):
            call(model, batch)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _own(arguments: Any) -> Any:
    """A copy that nobody else changes: of tensors, and of what a model hands from layer to layer (a cache)."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone()
        try:
            return copy.deepcopy(leaf)
        except (TypeError, RuntimeError):  # a lock, a generator: there is but one
            return leaf

    return tree_map(copied, arguments)


def reached_tails(model: nn.Module, batches: Batches, layers: Mapping[str, nn.Module]) -> dict[str, Tail]:
    """Tails in the order of execution, from as many batches as it takes to reach every layer.

    Raises:
        ValueError: the data is empty.
    """
    found: dict[str, Tail] = {}
    empty = True
    for index, batch in batches.numbered():
        empty = False
        with naming_batch(index, batch):
            found |= tails(model, batch, {name: layer for name, layer in layers.items() if name not in found})
        if len(found) == len(layers):
            break
    if empty:
        raise ValueError("data is empty: at least one batch is needed")
    return found

"""Training examples of one layer or block, in windows that fit into memory.

Inputs are those that the layer gets in the compressed network, targets are outputs of the dense one.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from decomp.data.batches import Batches, Part, copied, naming_batch
from decomp.layers import routes_rows
from decomp.network.forward import Unfused, call, floating, hooked, to_device_of
from decomp.network.tracing import Tail, tails

Item = TypeVar("Item")


@dataclass(frozen=True)
class Window(Generic[Item]):
    """Examples that are in memory at once: of the batches from ``start`` on, or the ``whole`` of the data."""

    start: int
    items: list[Item]
    whole: bool = False


Windows = Callable[[int], Iterator[Window[Item]]]


@dataclass(frozen=True)
class Example:
    """One call of a layer: its arguments in the compressed network, and its targets from the dense one.

    The targets are the outputs of the dense layer after its tail. ``batch`` is the number of the batch, and
    ``mask`` (batch, length) is False at padding; None where there is none.
    """

    batch: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: list[Tensor]
    mask: Tensor | None = None

    @property
    def received(self) -> Tensor:
        """The input of a layer that has one."""
        received: Tensor = (*self.args, *self.kwargs.values())[0]
        return received

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        leaves = tree_leaves((self.args, self.kwargs, self.targets))
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))

    def run(self, module: nn.Module, tail: Tail) -> list[Tensor]:
        """The outputs of a module for these arguments, after its tail; the example itself is not changed."""
        wide = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

        def widened(leaf: Any) -> Any:
            # Inputs of half precision for a copy that is trained in float32.
            narrow = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.itemsize < wide.itemsize
            return leaf.to(wide) if narrow else leaf

        args, kwargs = tree_map(widened, copied((self.args, self.kwargs)))
        results = floating(module(*args, **kwargs))
        return [tail(given.to(target.dtype)) for given, target in zip(results, self.targets, strict=True)]


class RoutedDifferently(Exception):
    """The two networks send other inputs to the same layer, so that its outputs cannot be compared."""


class Activations:
    """The examples of one layer or block, made batch by batch from a pass of each network.

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
            part: which batches to take, by their number; all by default.
            share: the share of the cache that a window may fill.
            most: examples that are needed; a window that holds as many is not filled further.

        Raises:
            RoutedDifferently: inputs and targets of a batch do not belong together.
        """
        window: list[Example] = []
        begin, size, whole = start, 0, start == 0
        for index, batch, mask in self._batches.masked(start, part):
            with naming_batch(index, batch):
                examples = [replace(each, mask=mask) for each in self._examples(index, batch)]
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
        ours = _calls(self._small, self._layer, batch, self._tail)
        theirs = _calls(self._dense, self._twin, batch, self._tail)
        shapes = ([[each.shape for each in made.results] for made in calls] for calls in (ours, theirs))
        if next(shapes) != next(shapes):
            raise RoutedDifferently
        pairs = list(zip(ours, theirs, strict=True))
        if routes_rows(self._layer):
            pairs = [routed_alike(*pair) for pair in pairs]
        return [
            Example(index, our.args, our.kwargs, targets(self._tail, our, their))
            for our, their in pairs
            if any(result.numel() for result in their.results)
        ]


@dataclass(frozen=True)
class Call:
    """One call of a layer: what it was given, the tensors that it returned, and what will be added to them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]
    skip: Any = None


def targets(tail: Tail, our: Call, their: Call) -> list[Tensor]:
    """The outputs that the dense layer has after its tail, corrected by what is added to them."""
    results = their.results
    if tail.skip is not None:
        results = [tail.skip.corrected(result, their.skip, our.skip) for result in results]
    return [tail(result) for result in results]


def routed_alike(our: Call, their: Call) -> tuple[Call, Call]:
    """The rows that both networks send to the same expert, which the second argument gives for each."""
    same = our.args[1] == their.args[1]

    def kept(call: Call) -> Call:
        rows, experts, *rest = call.args
        return Call((rows[same], experts[same], *rest), call.kwargs, [result[same] for result in call.results])

    return kept(our), kept(their)


class _LastCall(BaseException):
    """Ends a pass after the last call of the layer. No ``Exception``, which the forward of a model may catch."""


def _calls(model: nn.Module, layer: nn.Module, batch: Any, tail: Tail) -> list[Call]:
    """Run ``model`` until ``layer`` was called as often as its tail says, and return these calls."""
    begun: list[tuple[Any, Any]] = []
    ended: list[Call] = []
    added: list[Any] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        begun.append(copied((args, kwargs)))

    def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        skip = added[-1].detach().clone() if added and isinstance(added[-1], Tensor) else None
        ended.append(Call(*begun.pop(), [tensor.detach().clone() for tensor in floating(result)], skip))
        if len(ended) == tail.calls:
            raise _LastCall

    earlier, later = ([], []) if tail.skip is None else tail.skip.watch(model, added.append)
    hooks = [*earlier, (layer, before)], [*later, (layer, after)]
    batch = copied(to_device_of(model, batch))  # the other network gets it as well
    kind = next((tensor.device.type for tensor in tree_leaves(batch) if isinstance(tensor, Tensor)), "cpu")
    try:
        # Steps may be taken in mixed precision; targets never are, in whichever window they lie.
        with hooked(*hooks), Unfused(), torch.autocast(kind, enabled=False):
            call(model, batch)
    except _LastCall:
        pass
    return ended


def reached_tails(model: nn.Module, batches: Batches, layers: Mapping[str, nn.Module]) -> dict[str, Tail]:
    """Tails of layers in the order of execution, from as many batches as it takes to reach every layer.

    Raises:
        ValueError: the data is empty.
    """
    reached: dict[str, Tail] = {}
    empty = True
    for index, batch in batches.numbered():
        empty = False
        with naming_batch(index, batch):
            reached |= tails(model, batch, {name: layer for name, layer in layers.items() if name not in reached})
        if len(reached) == len(layers):
            break
    if empty:
        raise ValueError("data is empty: at least one batch is needed")
    return reached


class ExampleStream(Generic[Item]):
    """Examples without end, pass after pass, from a position that can be saved.

    Data that fits into one window stays in memory.

    >>> windows = lambda start: (Window(i, [10 * i, 10 * i + 1]) for i in range(start, 3))
    >>> stream = ExampleStream(windows)
    >>> [next(stream) for _ in range(7)], stream.position
    ([0, 1, 10, 11, 20, 21, 0], (0, 1))
    >>> stream.seek((2, 1)); next(stream), next(stream)
    (21, 0)
    """

    def __init__(self, windows: Windows[Item]) -> None:
        self._windows = windows
        self._later: Iterator[Window[Item]] = iter(())
        self._window: Window[Item] = Window(0, [])
        self._taken = 0

    @property
    def position(self) -> tuple[int, int]:
        """The first batch of the current window, and how many of its examples were taken."""
        return self._window.start, self._taken

    def seek(self, position: tuple[int, int]) -> None:
        """Go to a position that was read before."""
        start, taken = position
        if not self._window.items or self._window.start != start:
            self._later = self._windows(start)
            self._window = next(self._later, Window(start, []))
        self._taken = taken

    def begin(self) -> bool:
        """Bring the first window into memory; False where there is none."""
        self.seek((0, 0))
        return bool(self._window.items)

    def __next__(self) -> Item:
        if self._taken >= len(self._window.items):
            self._advance()
        self._taken += 1
        return self._window.items[self._taken - 1]

    def _advance(self) -> None:
        self._taken = 0
        if self._window.whole:
            return
        self._window = Window(0, [])  # the old window has to be gone before the next one is made
        following = next(self._later, None)
        if following is None:
            self._later = self._windows(0)
            following = next(self._later, None)
        if following is None:
            raise ValueError("data came out empty on a later pass: give what can be gone through again")
        self._window = following


class ExampleCache(Generic[Item]):
    """The examples of one pass, window by window; kept in memory where one window holds them all."""

    def __init__(self, windows: Windows[Item]) -> None:
        self._windows = windows
        self._kept: list[Item] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._kept is not None:
            yield from self._kept
            return
        for window in self._windows(0):
            if window.whole:
                self._kept = window.items
            yield from window.items
            del window  # gone before the next one is made

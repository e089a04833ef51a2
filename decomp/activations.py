"""What flows through one layer: inputs in the compressed network, targets from the dense one."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from decomp.following import Tail, follow
from decomp.forward import Unfused, call, to_device_of

Pair = tuple[Tensor, Tensor]


class Batches:
    """The user's data, as what the model is called with."""

    def __init__(self, data: Iterable[Any], inputs: Callable[[Any], Any] | None) -> None:
        if isinstance(data, Tensor) or not isinstance(data, Iterable):
            raise TypeError(
                f"data must be an iterable of batches, not {type(data).__name__}: write [batch] for one"
            )
        if isinstance(data, Iterator):
            raise TypeError(
                "data can be gone through only once, every layer needs a pass: give a DataLoader or a list"
            )
        self._data = data
        self._inputs = inputs or (lambda batch: batch)

    def __iter__(self) -> Iterator[Any]:
        return map(self._inputs, self._data)


class _Reached(Exception):
    """Ends a forward pass at the layer that it was run for."""


class RoutedDifferently(Exception):
    """The two networks send other inputs to the same layer, so that its outputs cannot be compared."""


class Activations:
    """Inputs of one layer in the compressed network, and what the dense network makes of its outputs.

    A layer that is called several times in a pass gives a pair for each call.
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

    def windows(self) -> Iterator[tuple[list[Pair], bool]]:
        """Go through the data once in windows that fit the cache; the flag says that one window held it all.

        Raises:
            RoutedDifferently: inputs and targets of a batch do not belong together.
        """
        window: list[Pair] = []
        size, whole = 0, True
        for batch in self._batches:
            pairs = self._pairs(batch)
            pair_bytes = sum(tensor.numel() * tensor.element_size() for pair in pairs for tensor in pair)
            if window and size + pair_bytes > self._cache_bytes:
                whole = False
                yield window, False
                window, size = [], 0
            window += pairs
            size += pair_bytes
        if window:
            yield window, whole

    @torch.no_grad()
    def _pairs(self, batch: Any) -> list[Pair]:
        received = _watched(self._small, self._layer, batch, output=False)
        targets = _watched(self._dense, self._twin, batch, output=True)
        alike = len(received) == len(targets)
        if not alike or any(x.shape[:1] != y.shape[:1] for x, y in zip(received, targets, strict=True)):
            raise RoutedDifferently
        return [(x, follow(y, self._tail)) for x, y in zip(received, targets, strict=True) if x.numel()]


def _watched(model: nn.Module, layer: nn.Module, batch: Any, *, output: bool) -> list[Tensor]:
    """Run ``model`` and return the input of each call of ``layer``, or the output."""
    seen: list[Tensor] = []

    def before(module: nn.Module, positional: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        seen.append((positional[0] if positional else next(iter(keywords.values()))).detach().clone())

    def after(module: nn.Module, received: Any, result: Tensor) -> None:
        seen.append(result.detach().clone())

    hook = (
        layer.register_forward_hook(after) if output else layer.register_forward_pre_hook(before, with_kwargs=True)
    )
    try:
        with Unfused():
            call(model, to_device_of(model, batch))
    finally:
        hook.remove()
    return seen

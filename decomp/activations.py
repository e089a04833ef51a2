"""What flows through one layer: inputs in the compressed network, targets from the dense one."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from decomp.batches import Batches, Part, naming_batch
from decomp.following import Tail, follow, tails
from decomp.forward import Unfused, call, to_device_of
from decomp.streams import Window

Pair = tuple[Tensor, Tensor]


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

    def windows(self, start: int = 0, part: Part | None = None, share: float = 1.0) -> Iterator[Window[Pair]]:
        """Go through the data once, in windows that fit a share of the cache.

        Args:
            start: the batch to begin with.
            part: which batches are looked at; the others are passed over.
            share: of the cache.

        Raises:
            RoutedDifferently: inputs and targets of a batch do not belong together.
        """
        window: list[Pair] = []
        begin, size, whole = start, 0, start == 0
        for index, batch in self._batches.numbered(start, part):
            with naming_batch(index, batch):
                pairs = self._pairs(batch)
            pair_bytes = sum(tensor.numel() * tensor.element_size() for pair in pairs for tensor in pair)
            if window and size + pair_bytes > share * self._cache_bytes:
                yield Window(begin, window)
                begin, size, whole, window = index, 0, False, []
            window += pairs
            size += pair_bytes
        if window:
            yield Window(begin, window, whole)

    @torch.no_grad()
    def _pairs(self, batch: Any) -> list[Pair]:
        received = _watched(self._small, self._layer, batch, output=False)
        targets = _watched(self._dense, self._twin, batch, output=True)
        alike = len(received) == len(targets)
        unbatched = len(getattr(self._twin, "kernel_size", ())) + 1
        together = zip(received, targets, strict=alike)
        if not alike or any(x.shape[:1] != y.shape[:1] and x.dim() != unbatched for x, y in together):
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

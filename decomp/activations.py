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
        if iter(data) is data:
            raise TypeError(
                "data can be gone through only once, every layer needs a pass: give a DataLoader or a list"
            )
        self._data = data
        self._inputs = inputs or (lambda batch: batch)

    def first(self) -> Any:
        for batch in self:
            return batch
        raise ValueError("data is empty: at least one batch is needed")

    def __iter__(self) -> Iterator[Any]:
        return map(self._inputs, self._data)


class _Reached(Exception):
    """Ends a forward pass at the layer that it was run for."""


class Activations:
    """Inputs of one layer in the compressed network, and what the dense network makes of its outputs."""

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
        """Go through the data once in windows that fit the cache; the flag says that one window held it all."""
        window: list[Pair] = []
        size, whole = 0, True
        for batch in self._batches:
            pair = self._pair(batch)
            pair_bytes = sum(tensor.numel() * tensor.element_size() for tensor in pair)
            if window and size + pair_bytes > self._cache_bytes:
                whole = False
                yield window, False
                window, size = [], 0
            window.append(pair)
            size += pair_bytes
        yield window, whole

    @torch.no_grad()
    def _pair(self, batch: Any) -> Pair:
        received = _stop_at(self._small, self._layer, batch, output=False)
        target = _stop_at(self._dense, self._twin, batch, output=True)
        return received, follow(target, self._tail)


def _stop_at(model: nn.Module, layer: nn.Module, batch: Any, *, output: bool) -> Tensor:
    """Run ``model`` up to the first call of ``layer`` and return that call's input, or its output."""
    seen: list[Tensor] = []

    def before(module: nn.Module, positional: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        seen.append(positional[0] if positional else next(iter(keywords.values())))
        raise _Reached

    def after(module: nn.Module, received: Any, result: Tensor) -> None:
        seen.append(result)
        raise _Reached

    hook = (
        layer.register_forward_hook(after) if output else layer.register_forward_pre_hook(before, with_kwargs=True)
    )
    try:
        with Unfused():
            call(model, to_device_of(model, batch))
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0].detach().clone()

"""An immutable mapping from the names of layers to items."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

Item = TypeVar("Item")


class ByLayer(Mapping[str, Item]):
    """One item per layer, in a fixed order; immutable."""

    def __init__(self, layers: Mapping[str, Item]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, name: str) -> Item:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

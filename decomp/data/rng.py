"""Random numbers: the state of the generators, and data that draws from random numbers of its own."""

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch


def random_state(data: Any = None) -> dict[str, Any]:
    """The states of torch's, Python's and numpy's generators, and of the ``generator`` of a DataLoader."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),  # type: ignore[union-attr]
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }
    generator = getattr(data, "generator", None)
    if isinstance(generator, torch.Generator):
        state["generator"] = generator.get_state()
    return state


def set_random_state(state: dict[str, Any], data: Any = None) -> None:
    """Put the generators where :func:`random_state` found them."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "generator" in state:
        data.generator.set_state(state["generator"])


class OwnRandomness:
    """Data whose passes neither see nor move the random numbers of the program around them.

    A pass is then settled by the state that it begins with, whatever is drawn between its batches, and can be
    gone through again up to any batch. With ``again`` every pass begins with ``state``, so that even a DataLoader
    that shuffles keeps one order; without, each begins where the one before ended.
    """

    def __init__(self, data: Iterable[Any], state: dict[str, Any], *, again: bool) -> None:
        self._data, self._first, self._again = data, state, again
        self.next_pass = state
        self.this_pass = state

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        self.this_pass = state = self._first if self._again else self.next_pass
        iterator: Iterator[Any] | None = None
        while True:
            outside = random_state(self._data)
            set_random_state(state, self._data)
            try:
                iterator = iter(self._data) if iterator is None else iterator
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.next_pass = state = random_state(self._data)
                set_random_state(outside, self._data)
            yield batch

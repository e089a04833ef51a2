"""The user's data, batch by batch: checked, and numbered, so that what is wrong with one is said by its number."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decomp.data.rng import OwnRandomness, random_state
from decomp.network.forward import describe

Part = Callable[[int], bool]

HELD_OUT_EVERY = 4

_NO_TENSOR = (str, bytes, int, float, complex, np.ndarray, np.generic, type(None))
_FORMS = "a batch must be a tensor, a tuple, a list or a mapping of tensors"


def require_passes(data: Any) -> None:
    """Refuse data that cannot be gone through several times.

    Raises:
        TypeError: the data is one tensor, no iterable, or an iterator, which has one pass only.
    """
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, not {type(data).__name__}: write [batch] for one")
    if isinstance(data, Iterator):
        raise TypeError(
            "data can be gone through only once, and several passes are needed: give a DataLoader or a list"
        )


def held_out(index: int) -> bool:
    """Whether a closed form is chosen on this batch, and not fitted to it: every fourth.

    >>> [index for index in range(10) if held_out(index)]
    [3, 7]
    """
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


class Batches:
    """The user's data, as what ``inputs`` makes of each batch; every pass is checked.

    >>> batches = Batches([(torch.ones(2, 3), "labels")], lambda batch: batch[0])
    >>> [(index, tuple(batch.shape)) for index, batch in batches.numbered()]
    [(0, (2, 3))]
    """

    def __init__(self, data: Iterable[Any], inputs: Callable[[Any], Any] | None = None) -> None:
        require_passes(data)
        self._data = data
        self._inputs = inputs or (lambda batch: batch)
        self._count = 0

    @classmethod
    def alike(cls, data: Iterable[Any], inputs: Callable[[Any], Any] | None) -> "Batches":
        """Batches whose every pass is alike, shuffled data included, so that what is held out stays so."""
        require_passes(data)
        return cls(OwnRandomness(data, random_state(data), again=True), inputs)

    def __iter__(self) -> Iterator[Any]:
        return (batch for _, batch in self.numbered())

    def count(self) -> int:
        """How many batches a pass has: what ``len`` says, or else counted in one pass."""
        try:
            return len(self._data)  # type: ignore[arg-type]
        except TypeError:
            list(self.numbered(part=lambda index: False))
            return self._count

    def numbered(self, start: int = 0, part: Part | None = None) -> Iterator[tuple[int, Any]]:
        """Go through the batches from number ``start`` on, or through those of them that ``part`` says yes to.

        Raises:
            TypeError: a batch holds no tensor.
            ValueError: a batch is empty, or holds NaN or infinity; or a pass is shorter than the one before.
        """
        index = -1
        for index, batch in enumerate(self._data):
            self._count = max(self._count, index + 1)
            if index >= start and (part is None or part(index)):
                with naming_batch(index, batch):
                    given = self._inputs(batch)
                _check(index, given)
                yield index, given
        if index + 1 < self._count:
            ended = f"ended before batch {index + 1}" if index >= 0 else "came out empty"
            raise ValueError(
                f"data {ended} on a later pass, and gave {self._count} batches before: "
                "give what can be gone through again, a DataLoader or a list"
            )


@contextmanager
def naming_batch(index: int, batch: Any) -> Iterator[None]:
    """Add the number of the batch, and what it is, to whatever goes wrong in the block."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in batch {index} of data: {describe(batch)}")
        raise


def _check(index: int, batch: Any) -> None:
    leaves = list(_leaves(batch))
    if all(isinstance(leaf, _NO_TENSOR) for leaf in leaves):
        hint = ": write torch.from_numpy" if any(isinstance(leaf, np.ndarray) for leaf in leaves) else ""
        raise TypeError(f"batch {index} holds no tensor, it is {describe(batch)}: {_FORMS}{hint}")
    for tensor in leaves:
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_nested:
            continue
        if tensor.shape[:1] == (0,):
            raise ValueError(f"batch {index} is empty, a tensor {tuple(tensor.shape)}: leave such batches out")
        if not _sound(tensor):
            raise ValueError(
                f"batch {index} holds NaN or infinity, in a tensor {tuple(tensor.shape)}: "
                "leave such batches out, or mend them with torch.nan_to_num"
            )


def _sound(tensor: Tensor) -> bool:
    """Finite; or a mask that is added to scores, of zeros and minus infinity alone."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or bool(torch.isfinite(tensor).all()):
        return True
    return bool(((tensor == 0) | (tensor == -torch.inf)).all())


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, tuple | list):
        for value in batch:
            yield from _leaves(value)
    else:
        yield batch

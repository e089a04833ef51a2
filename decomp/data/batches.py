"""The user's data: numbered and checked batches, which of them are held out, and passes whose order repeats."""

import copy
import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import TypeAliasType

from decomp._util.io import digest
from decomp.network.forward import describe
from decomp.network.restoring import lock, temporarily

Part = Callable[[int], bool]
Mask = TypeAliasType("Mask", str | Callable[[Any], Tensor | None] | None)
"""A key of the batches, or a function of a batch, that gives a tensor (batch, length) which is 0 at padding."""

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

_NO_TENSOR = (str, bytes, int, float, complex, np.ndarray, np.generic, type(None))
_HOLDERS = ("sampler", "batch_sampler", "dataset", "loader", "dataloader")  # of whatever class they are
_FORMS = "a batch must be a tensor, a tuple, a list or a mapping of tensors"


def require_passes(data: Any, *, one_pass: bool = False) -> None:
    """Refuse data that cannot be gone through several times, or with ``one_pass`` not even once.

    Raises:
        TypeError: the data is one tensor, no iterable, or an iterator, which has one pass only.
    """
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, not {type(data).__name__}: write [batch] for one")
    if isinstance(data, Iterator) and not one_pass:
        raise TypeError(
            "data can be gone through only once, and several passes are needed: give a DataLoader or a list"
        )


class Batches:
    """The user's data, passed through ``inputs`` batch by batch; every pass is checked.

    >>> batches = Batches([(torch.ones(2, 3), "labels")], lambda batch: batch[0])
    >>> [(index, tuple(batch.shape)) for index, batch in batches.numbered()]
    [(0, (2, 3))]
    """

    def __init__(
        self,
        data: Iterable[Any],
        inputs: Callable[[Any], Any] | None = None,
        mask: Mask = None,
        *,
        one_pass: bool = False,
        keep_bytes: int = 0,
    ) -> None:
        require_passes(data, one_pass=one_pass)
        if not (mask is None or isinstance(mask, str) or callable(mask)):
            raise TypeError(f"mask={mask!r}: write a key of the batches, a function of a batch, or None")
        self._data = data
        self._inputs = inputs or (lambda batch: batch)
        self._mask = mask
        self._seen = 0  # the most batches of a pass so far
        self._total: int | None = None  # batches of a whole pass
        self._is_ordered = isinstance(data, list | tuple) or getattr(data, "same_order", False)
        self._room = keep_bytes
        self._kept: dict[int, tuple[Any, Tensor | None]] = {}

    @classmethod
    def in_fixed_order(
        cls,
        data: Iterable[Any],
        inputs: Callable[[Any], Any] | None,
        mask: Mask = None,
        *,
        one_pass: bool = False,
        keep_bytes: int = 0,
    ) -> "Batches":
        """Batches in the same order in every pass, shuffled data too, so that what is held out stays held out.

        What a part of the data gave is kept in memory for later passes, up to ``keep_bytes``.
        """
        require_passes(data, one_pass=one_pass)
        ordered = OwnRandomness(data, random_state(data), same_order=True)
        return cls(ordered, inputs, mask, one_pass=one_pass, keep_bytes=keep_bytes)

    @property
    def length(self) -> int | None:
        """How many batches a pass has, as ``len`` says; None where that is not known."""
        try:
            return len(self._data)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None

    def __iter__(self) -> Iterator[Any]:
        return (batch for _, batch in self.numbered())

    def count(self) -> int:
        """How many batches a pass has: what ``len`` says, or else counted in one pass."""
        if self._total is None and self.length is None:
            list(self.numbered(part=lambda index: False))
        return (self.length or 0) if self._total is None else self._total

    def fit_split(self) -> "FitSplit":
        """How the rows of these batches are split for closed forms; see :class:`FitSplit`.

        Batches that occur several times in a list are known as one, so that what is held out is fitted to nowhere.
        """
        count, numbers = self._different()
        return FitSplit(count, numbers)

    def batch_split(self) -> "BatchSplit":
        """How the batches are split for closed forms; those that occur several times are known as one."""
        count, numbers = self._different()
        return BatchSplit.for_closed_form(*((count, numbers) if count and count > 1 else (self.count(), None)))

    def _different(self) -> tuple[int | None, tuple[int, ...] | None]:
        """How many different batches there are, if that is known, and their numbers if some occur again."""
        given = getattr(self._data, "given", self._data)
        if not isinstance(given, list | tuple):
            return self.length, None
        first: dict[str, int] = {}
        numbers = tuple(first.setdefault(_digest(batch), len(first)) for batch in given)
        return len(first), numbers if len(first) < len(numbers) else None

    def numbered(self, start: int = 0, part: Part | None = None) -> Iterator[tuple[int, Any]]:
        """Go through the batches from number ``start`` on, with ``part`` only those whose number it accepts."""
        return ((index, batch) for index, batch, _ in self.masked(start, part))

    def masked(self, start: int = 0, part: Part | None = None) -> Iterator[tuple[int, Any, Tensor | None]]:
        """As :meth:`numbered`, each batch with its mask, True at what counts; None where all of it does.

        Where all passes have one order, and their length was seen, batches after the last one that ``part``
        accepts are not fetched. Elsewhere each pass goes on to its end: the next one may depend on it.

        Raises:
            TypeError: a batch holds no tensor.
            ValueError: a batch is empty, or holds NaN or infinity; or a pass is shorter than the one before.
        """
        last = math.inf
        if part is not None and self._total is not None and self._is_ordered:
            wanted = [index for index in range(start, self._total) if part(index)]
            last = max((index for index in wanted if index not in self._kept), default=-1)
            if last < 0:
                yield from ((index, *self._kept[index]) for index in wanted)
                return
        index = -1
        for index, batch in enumerate(self._data):
            self._seen = max(self._seen, index + 1)
            if index >= start and (part is None or part(index)):
                with naming_batch(index, batch):
                    given = self._inputs(batch)
                _check(index, given)
                with naming_batch(index, batch):
                    mask = _mask_of(self._mask, batch, given)
                if part is not None:
                    self._keep(index, given, mask)
                yield index, given, mask
            if index >= last:
                yield from ((later, *self._kept[later]) for later in wanted if later > last)
                return
        if index + 1 < self._seen:
            ended = f"ended before batch {index + 1}" if index >= 0 else "came out empty"
            raise ValueError(
                f"data {ended} on a later pass, and gave {self._seen} batches before: "
                "give what can be gone through again, a DataLoader or a list"
            )
        self._total = index + 1

    def _keep(self, index: int, given: Any, mask: Tensor | None) -> None:
        size = size_of((given, mask))
        if index not in self._kept and size <= self._room:
            self._kept[index] = copied(given), mask  # a loader may fill the same tensors again
            self._room -= size


def copied(arguments: Any) -> Any:
    """A copy of arguments that a model cannot change later, also of objects such as a key-value cache."""

    def copy_of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone()
        try:
            return copy.deepcopy(leaf)
        except (TypeError, RuntimeError):  # a lock, a generator: no copy can be made
            return leaf

    return tree_map(copy_of, arguments)


def size_of(batch: Any) -> int:
    """Bytes of the tensors of a batch."""
    leaves = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def rows_of(batch: Any) -> int:
    """The length of the first axis, if all tensors of a batch have the same; else 1: it cannot be divided.

    >>> rows_of((torch.zeros(8, 3), {"mask": torch.ones(8)})), rows_of((torch.zeros(8, 3), torch.ones(2)))
    (8, 1)
    """
    sizes = {leaf.shape[:1] for leaf in tree_leaves(_plain(batch)) if isinstance(leaf, Tensor)}
    return sizes.pop()[0] if len(sizes) == 1 and () not in sizes else 1


def some_rows(batch: Any, part: slice) -> Any:
    """Some rows of a batch whose tensors all have the same first axis."""
    return tree_map_only(Tensor, lambda tensor: tensor[part], _plain(batch))


def _plain(batch: Any) -> Any:
    """A mapping as a dict: torch looks into no others, such as what a tokenizer returns."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def unpadded(tensor: Tensor, mask: Tensor | None, dims: int = 3) -> Tensor:
    """The positions (batch, length, ...) of a tensor at which the mask is True, as (positions, ...).

    A tensor of fewer than ``dims`` dimensions, or whose first two are not those of the mask, is returned as it is.
    """
    if mask is None or tensor.dim() < dims or tensor.shape[:2] != mask.shape:
        return tensor
    return tensor[mask.to(tensor.device)]


def _mask_of(mask: Mask, batch: Any, inputs: Any) -> Tensor | None:
    """The mask of a batch, or None: a bool tensor (batch, length) that is False at padding."""
    if callable(mask):
        found = mask(batch)
        if not (found is None or (isinstance(found, Tensor) and found.dim() == 2)):
            shape = f" {tuple(found.shape)}" if isinstance(found, Tensor) else ""
            raise TypeError(
                f"mask= gave a {type(found).__name__}{shape}: write a function that returns a tensor "
                "(batch, length) which is 0 at padding, or None"
            )
    else:
        holders = [each for each in (inputs, batch) if mask is not None and isinstance(each, Mapping)]
        found = next((each[mask] for each in holders if mask in each), None)
        if not isinstance(found, Tensor) or found.dim() != 2:
            return None
    if found is None:
        return None
    # A float mask that is added to scores is 0 at what counts, and negative at padding.
    is_added = found.is_floating_point() and bool((found < 0).any())
    counts = found == 0 if is_added else found != 0
    return None if bool(counts.all()) else counts


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
        if not _is_finite(tensor):
            raise ValueError(
                f"batch {index} holds NaN or infinity, in a tensor {tuple(tensor.shape)}: "
                "leave such batches out, or mend them with torch.nan_to_num"
            )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite, or the tensor is a mask to add to scores: zeros and minus infinity alone."""
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


def _digest(batch: Any) -> str:
    """A digest that tells batches apart: of their tensors, and of what else they hold as text."""
    parts: list[Any] = []
    for leaf in _leaves(batch):
        plain = isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested
        parts += [f"{tuple(leaf.shape)} {leaf.dtype}", leaf] if plain else [repr(leaf)]
    return digest(parts)


@dataclass(frozen=True)
class BatchSplit:
    """Which batches a process fits or trains on, and which are held out to measure on.

    Process ``rank`` of ``size`` takes every ``size``-th batch; of these, counted from 0, the numbers ``first``,
    ``first + every``, ... are held out. ``every=None`` holds none out. ``numbers`` are those of the batches where
    some occur again; then they count in place of their places.

    >>> [index for index in range(10) if CLOSED_FORM_SPLIT.held_out(index)]
    [3, 7]
    """

    every: int | None
    first: int = 0
    rank: int = 0
    size: int = 1
    numbers: tuple[int, ...] | None = None

    @classmethod
    def of_share(cls, share: float, rank: int = 0, size: int = 1) -> "BatchSplit":
        """Hold out a share of the batches of each process: every k-th from number k // 2 on, k = round(1 / share).

        >>> split = BatchSplit.of_share(0.2)
        >>> [index for index in range(10) if split.held_out(index)]
        [2, 7]

        Raises:
            ValueError: the share is not from 0 to 0.5.
        """
        if not 0 <= share <= 0.5:
            raise ValueError(f"held_out={share}: write a share of the batches from 0 to 0.5")
        every = max(2, round(1 / share)) if share else None
        return cls(every, (every or 0) // 2, rank, size)

    @classmethod
    def for_closed_form(cls, count: int, numbers: tuple[int, ...] | None = None) -> "BatchSplit":
        """Hold out every fourth of ``count`` batches, of two or three the last, and none of one.

        >>> [[i for i in range(count) if BatchSplit.for_closed_form(count).held_out(i)] for count in (1, 2, 3, 8)]
        [[], [1], [2], [3, 7]]
        """
        if count >= (CLOSED_FORM_SPLIT.every or 0):
            return replace(CLOSED_FORM_SPLIT, numbers=numbers)
        return cls(every=count, first=count - 1, numbers=numbers) if count > 1 else cls(None)

    def own(self, index: int) -> bool:
        """Whether this process takes the batch."""
        return index % self.size == self.rank

    def held_out(self, index: int) -> bool:
        """Whether this process measures on the batch, and never fits or trains on it."""
        number = index if self.numbers is None else self.numbers[index]
        return self.every is not None and self.own(index) and number // self.size % self.every == self.first

    def train(self, index: int) -> bool:
        """Whether this process fits or trains on the batch."""
        return self.own(index) and not self.held_out(index)

    def fitted_rows(self, batch: int, rows: int, samples: int) -> int:
        """How many of the rows of a batch are fitted to, the first ones: all or none."""
        return rows if self.train(batch) else 0


CLOSED_FORM_SPLIT = BatchSplit(every=4, first=3)
"""The split of the batches for what is fitted in closed form, where there are four or more."""


@dataclass(frozen=True)
class FitSplit:
    """Which rows (samples, tokens, positions) a layer is fitted to in closed form, and which it is judged on.

    Of four different batches or more, every fourth is held out. Of fewer, and where ``count`` is not known, the
    last quarter of the rows of each batch is. ``numbers`` are those of the batches where some of them occur again.

    >>> FitSplit(8).fitted(2, rows=12), FitSplit(8).fitted(3, rows=12), FitSplit(1).fitted(0, rows=12)
    (12, 0, 9)
    """

    count: int | None
    numbers: tuple[int, ...] | None = None

    @property
    def by_rows(self) -> bool:
        """Whether rows of every batch are held out, in place of batches."""
        return self.count is None or self.count < (CLOSED_FORM_SPLIT.every or 0)

    def spread(self, batches: int) -> list[int]:
        """The numbers of so many batches in an order whose every beginning is spread over the data.

        Of each beginning about a fourth is held out, where batches are.

        >>> FitSplit(16).spread(16)
        [0, 9, 3, 4, 13, 6, 11, 1, 10, 5, 7, 14, 8, 2, 15, 12]
        """
        held_out = [index for index in range(batches) if self._is_held_out(index)]
        fitted = [index for index in range(batches) if not self._is_held_out(index)]
        places: dict[int, float] = {}
        for numbers in (fitted, held_out):
            # Multiples of the golden ratio, modulo 1, are spread evenly however many there are of them.
            among = sorted(range(len(numbers)), key=lambda place: place * GOLDEN_RATIO % 1)
            places |= {number: (place + 0.5) / len(numbers) for number, place in zip(numbers, among, strict=True)}
        return sorted(places, key=lambda number: places[number])

    def dividing(self, order: Sequence[int], least: int) -> int:
        """How many of the first batches in an order, at least so many, have rows to fit to and held-out ones.

        All of them if there are no such.

        >>> [FitSplit(8).dividing(range(8), least) for least in (2, 6, 9)]
        [4, 6, 8]
        """
        held_out = accumulate((self._is_held_out(number) for number in order), initial=0)
        counts = (n for n, out in enumerate(held_out) if n >= least and (self.by_rows or 0 < out < n))
        return next(counts, len(order))

    def divides(self, batches: Collection[int]) -> bool:
        """Whether some rows of these batches are held out, and some are not."""
        return self.by_rows or 0 < sum(map(self._is_held_out, batches)) < len(batches)

    def _is_held_out(self, batch: int) -> bool:
        number = batch if self.numbers is None else self.numbers[batch]
        return not self.by_rows and CLOSED_FORM_SPLIT.held_out(number)

    def fitted(self, batch: int, rows: int) -> int:
        """How many of the rows of a batch, the first ones, are fitted to; the others are held out."""
        if self.by_rows:
            return rows - math.ceil(rows / 4) if rows > 1 else rows
        return 0 if self._is_held_out(batch) else rows

    def fitted_rows(self, batch: int, rows: int, samples: int) -> int:
        """As :meth:`fitted`, for rows that are the positions of so many samples, which are not divided."""
        if samples < 2 or rows % samples:
            return self.fitted(batch, rows)
        return self.fitted(batch, samples) * (rows // samples)


_RANDOM = lock()
"""Held while a batch is fetched with random numbers of its own: the global generators belong to all threads."""

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def random_state(data: Any = None) -> dict[str, Any]:
    """The states of torch's, Python's and NumPy's global generators, and of those that the data keep.

    The latter are the attributes of a DataLoader, and of its samplers and datasets, that are generators of torch,
    Python or NumPy; they are known by their place, ``"sampler.generator"`` for example.
    """
    with _RANDOM:
        return {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": _as_plain(np.random.get_state(legacy=True)),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "data": {place: _state_of(generator) for place, generator in _generators(data).items()},
        }


def set_random_state(state: dict[str, Any], data: Any = None) -> None:
    """Restore what :func:`random_state` returned."""
    with _RANDOM:
        torch.set_rng_state(state["torch"])
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])
        for place, generator in _generators(data).items():
            if place in state["data"]:
                _set_state_of(generator, state["data"][place])


def _generators(data: Any) -> dict[str, Generator]:
    """The generators that the data keep, each once, by the names of the attributes that lead to them."""
    found: dict[str, Generator] = {}
    waiting, seen = [("", data)], {id(data)}
    for place, holder in waiting:
        for name, value in getattr(holder, "__dict__", {}).items():
            if id(value) in seen:
                continue
            if isinstance(value, Generator) and not isinstance(value, random.SystemRandom):
                found[f"{place}{name}"] = value
            elif not (isinstance(value, Sampler | Dataset | DataLoader) or name in _HOLDERS):
                continue
            else:
                waiting.append((f"{place}{name}.", value))
            seen.add(id(value))
    return found


def _state_of(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _as_plain(generator.get_state(legacy=True))
    return _as_plain(generator.bit_generator.state)


def _set_state_of(generator: Generator, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _as_plain(state: Any) -> Any:
    """A state of NumPy with lists in place of its arrays, as a checkpoint can hold it."""
    return tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, np.ndarray | np.generic) else leaf, state)


class OwnRandomness:
    """Data whose passes neither read nor advance the random generators of the program around them.

    A pass is determined by the generator state that it begins with, whatever is drawn between its batches, and can
    be repeated up to any batch. With ``same_order`` every pass begins with ``state``, so that even a shuffling
    DataLoader keeps one order; without, each begins where the one before ended.
    """

    def __init__(self, data: Iterable[Any], state: dict[str, Any], *, same_order: bool) -> None:
        self.given, self._first, self.same_order = data, state, same_order
        self.next_pass = state
        self.this_pass = state

    def __len__(self) -> int:
        return len(self.given)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        self.this_pass = state = self._first if self.same_order else self.next_pass
        iterator: Iterator[Any] | None = None
        while True:
            with _RANDOM:
                outside = random_state(self.given)
                with temporarily(partial(set_random_state, outside, self.given)):
                    set_random_state(state, self.given)
                    try:
                        iterator = iter(self.given) if iterator is None else iterator
                        batch = next(iterator)
                    except StopIteration:
                        return
                    finally:
                        self.next_pass = state = random_state(self.given)
            yield batch

"""Forward passes that are held at each layer: one pass of every batch serves all layers, however many."""

import contextvars
import heapq
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from threading import Semaphore, Thread, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from decomp.data.activations import Activations, Call, Example, RoutedDifferently, Window, routed_alike, targets
from decomp.data.batches import Batches, Part, copied, naming_batch, size_of
from decomp.layers import routes_rows
from decomp.network.forward import Unfused, call, floating, to_device_of
from decomp.network.restoring import hooked, temporarily
from decomp.network.tracing import Skip, Tail

Needed = Callable[[Iterable[Example], int], int]
"""How many batches a layer needs, from the examples of the first few, and the number of these batches."""

SECONDS_TO_WAIT = 60.0  # and twenty times what a pass takes: no pass that runs needs as long
PASSES_TO_WAIT = 20


class OutOfOrder(Exception):
    """A pass does not reach the layers in the expected order, each once: it cannot be held at them."""


class _Abandoned(BaseException):
    """Ends a pass that is not needed further. No ``Exception``, which the forward of a model may catch."""


@dataclass
class Arrival:
    """A call of a layer at which a pass is held: its name, its arguments, and its output if it has run."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    skip: Any = None  # what will be added to the output


class SuspendedPass:
    """A forward pass in a thread of its own, which runs only while :meth:`advance` waits for it."""

    def __init__(self, gates: "Gates", batch: Any) -> None:
        self._gates, self._batch = gates, batch
        self._turn, self._reply = Semaphore(0), Semaphore(0)
        self._arrival: Arrival | None = None
        self._error: BaseException | None = None
        self._is_abandoned = False
        self.output: Any = None
        self.finished = False
        self.skips: dict[str, Any] = {}
        context = contextvars.copy_context()
        self._thread = Thread(target=context.run, args=(self._run,), daemon=True, name="decomp-pass")

    def advance(self, timeout: float | None = None) -> Arrival | None:
        """Run on to the next call of a layer at which it is held; None at the end of the pass.

        Raises:
            TimeoutError: it got nowhere in so many seconds, because another pass that is held has a lock.
        """
        if self.finished:
            return None
        self._arrival = None
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        if not self._reply.acquire(timeout=timeout):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._arrival

    def abandon(self) -> None:
        """Let the pass end where it is."""
        self._is_abandoned = True
        self._turn.release()

    def join(self) -> None:
        """Wait for the end of the thread."""
        if self._thread.ident is not None:
            self._thread.join()
        self.finished, self._arrival = True, None

    def hold(self, arrival: Arrival) -> None:
        """Called in the thread of the pass: wait at a layer."""
        self._arrival = arrival
        del arrival
        self._reply.release()
        self._turn.acquire()
        if self._is_abandoned:
            raise _Abandoned

    def _run(self) -> None:
        try:
            self._gates.passes[get_ident()] = self
            model = self._gates.model
            batch = copied(to_device_of(model, self._batch))  # the other network gets it as well
            kind = next((leaf.device.type for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), "cpu")
            with ExitStack() as stack:
                # All of these belong to a thread, which begins without them.
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
                stack.enter_context(self._gates.device)
                stack.enter_context(Unfused())
                stack.enter_context(torch.autocast(kind, enabled=False))
                self.output = call(model, batch)
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._gates.passes.pop(get_ident(), None)
            self.finished, self._batch = True, None
            self._reply.release()


@dataclass
class Gates:
    """Hooks that hold the passes of a model at the calls of its layers, before or ``after`` they have run.

    ``skips`` are what is added to outputs of layers, ``replaced`` the layers that passes are no longer held at,
    with the modules whose output they give instead.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    after: bool
    skips: Mapping[str, Skip] = field(default_factory=dict)
    passes: dict[int, SuspendedPass] = field(default_factory=dict)
    replaced: dict[str, nn.Module | None] = field(default_factory=dict)
    device: Any = field(default_factory=nullcontext)

    @contextmanager
    def installed(self) -> Iterator["Gates"]:
        """Run the block with the hooks; passes that are still held then are abandoned."""
        started: list[SuspendedPass] = []
        self._started = started
        if torch.get_default_device().type != "cpu":
            self.device = torch.get_default_device()
        before = [(layer, self._before(name)) for name, layer in self.layers.items()]
        after = [(layer, self._after(name)) for name, layer in self.layers.items()]
        for name, skip in self.skips.items():
            earlier, later = skip.watch(self.model, partial(self._keep, name))
            before, after = [*earlier, *before], [*later, *after]
        with hooked(before, after, in_all_threads=True), temporarily(partial(_end, started)):
            yield self

    def begin(self, batch: Any) -> SuspendedPass:
        """A pass over a batch, which has not started to run."""
        begun = SuspendedPass(self, batch)
        self._started.append(begun)
        return begun

    def forget_finished(self) -> None:
        """Let go of the passes that have ended."""
        self._started[:] = [each for each in self._started if not each.finished]

    def _keep(self, name: str, value: Any) -> None:
        """Keep what will be added to the output of a layer, until the pass is held there."""
        here = self.passes.get(get_ident())
        if here is not None and name not in self.replaced:
            here.skips[name] = value

    def _before(self, name: str) -> Any:
        def hook(*given: Any) -> None:
            here = self.passes.get(get_ident())
            if here is not None and not self.after and name not in self.replaced:
                _, args, kwargs = given
                here.hold(Arrival(name, args, kwargs, skip=here.skips.pop(name, None)))

        return hook

    def _after(self, name: str) -> Any:
        def hook(*given: Any) -> Any:
            here = self.passes.get(get_ident())
            if here is None:
                return None
            _, args, kwargs, output = given
            if self.after and name not in self.replaced:
                here.hold(Arrival(name, args, kwargs, output, here.skips.pop(name, None)))
            instead = self.replaced.get(name)
            return None if instead is None else instead(*args, **kwargs)

        return hook


def _end(passes: Sequence[SuspendedPass]) -> None:
    """Abandon all passes first: one may wait for a lock that another has."""
    for each in passes:
        each.abandon()
    for each in passes:
        each.join()


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations of this thread have returned, as long as they live.

    Parameters and buffers of the model are left out: operations return views of them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        state = (*model.parameters(), *model.buffers())
        self._own = [tensor.untyped_storage() for tensor in state]
        self._known = {id(storage) for storage in self._own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                key, size = id(storage), storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.bytes += size
                    weakref.finalize(storage, self._forget, key, size)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


@torch.no_grad()
def held_bytes(model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches) -> dict[str, float] | None:
    """The bytes that a pass holds at the call of each layer, per byte of its batch; None if passes cannot be held.

    They cannot be held where a pass does not call each layer once, in the order of ``layers``, or where two passes
    that take turns do not end as each of them alone: where the model keeps what a pass computes in itself, or
    draws random numbers, or a pass waits for a lock that the other has. This is tried with the first two batches.
    """
    first = list(islice(iter(batches), 2))
    expected, seconds = [], 0.0
    live, found = _LiveBytes(model), dict[str, int]()
    order: list[str] = []

    def count(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            order.append(name)
            found.setdefault(name, live.bytes)  # by the first batch: of the others nothing is counted

        return hook

    with hooked(after=[(layer, count(name)) for name, layer in layers.items()]):
        for number, batch in enumerate(first):
            start = time.perf_counter()
            kind = model_device(model)
            with Unfused(), torch.autocast(kind, enabled=False), live if number == 0 else nullcontext():
                expected.append([each.clone() for each in floating(call(model, to_device_of(model, batch)))])
            seconds = time.perf_counter() - start
            if order != list(layers):
                return None
            order.clear()
    timeout = SECONDS_TO_WAIT + PASSES_TO_WAIT * seconds
    with Gates(model, layers, after=True).installed() as gates:
        passes = [gates.begin(batch) for batch in first]
        try:
            for expected_name in [*layers, None]:
                for each in passes:
                    arrival = each.advance(timeout)
                    if (None if arrival is None else arrival.name) != expected_name:
                        return None
        except Exception:  # also a TimeoutError; what is wrong with the model itself was raised above
            return None
        outputs = [floating(each.output) for each in passes]
    for ours, right in zip(outputs, expected, strict=True):
        if len(ours) != len(right) or not all(map(_alike, ours, right)):
            return None
    size = max(1, size_of(first[0]))
    return {name: nbytes / size for name, nbytes in found.items()}


def model_device(model: nn.Module) -> str:
    """The type of the device of the model's first parameter."""
    parameter = next(model.parameters(), None)
    return "cpu" if parameter is None else parameter.device.type


def _alike(found: Tensor, right: Tensor) -> bool:
    return found.shape == right.shape and torch.allclose(found, right, rtol=1e-4, atol=1e-6, equal_nan=True)


class HeldExamples:
    """The examples of one layer after the other, in the order of execution, from one pass of each batch.

    The passes over some batches are held at each layer until it is :meth:`replace`d: as many as the layer needs,
    and as fit into ``cache_bytes`` there. Where a layer has no room for some of them, these are given up; where a
    later one has room for more, they begin there. Batches that do not fit take a pass for each layer that needs
    them, as do all where passes cannot be held. A layer that is called several times gets passes of its own,
    after which new ones are held. To be used in a ``with`` block, whose end abandons the passes.

    Args:
        small: the compressed network, whose layers are replaced one after the other.
        dense: the dense one.
        pairs: the layers that will be replaced in ``small``, and those of ``dense``, by name.
        order: the same names in the order of execution, with the tails of the layers.
        batches: the data.
        cache_bytes: memory for what is held.
        part: which batches are needed, by their number; all by default.
        preferred: the numbers of the batches in the order in which layers take them; as they come by default.
    """

    def __init__(
        self,
        small: nn.Module,
        dense: nn.Module,
        pairs: Mapping[str, tuple[nn.Module, nn.Module]],
        order: Mapping[str, Tail],
        batches: Batches,
        cache_bytes: int,
        part: Part | None = None,
        preferred: Sequence[int] | None = None,
    ) -> None:
        self._small, self._dense, self._pairs, self._order = small, dense, pairs, order
        self._batches, self._cache_bytes, self._part = batches, cache_bytes, part
        self._given = preferred
        self._waiting = {name: None for name, tail in order.items() if tail.calls == 1}
        self._bytes: Mapping[str, float] | None = None
        self._held: list[_Held] = []  # as preferred
        self._next_size: int | None = None  # of the first batch that had no room, where that is known
        self._whole_size: int | None = None  # of all batches, where that is known
        self._gates: tuple[Gates, ...] = ()
        self._open = ExitStack()

    def __enter__(self) -> "HeldExamples":
        if self._waiting:
            dense_layers = {name: self._pairs[name][1] for name in self._waiting}
            self._bytes = held_bytes(self._dense, dense_layers, self._batches)
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def of(self, name: str, least: int, needed: Needed) -> "LayerExamples":
        """The examples of a layer, which can be gone through several times.

        Args:
            name: the layer.
            least: how many batches are taken at least.
            needed: how many are enough, from the examples of some of them.
        """
        numbers = self._preferred[:least]
        held = self._hold(name, numbers, self._arrive(name))
        examples = self._examples(name, held, numbers)
        for _ in range(2):  # the first few say roughly how many are enough, these say it better
            try:
                numbers = self._preferred[: needed(examples, len(numbers))]
            except RoutedDifferently:
                return examples  # whoever goes through them is told
            if len(numbers) <= len(examples.numbers):
                break
            held = self._hold(name, numbers, held)
            examples = self._examples(name, held, numbers, examples)
            if len(numbers) == len(self._preferred):
                break
        return examples.of(numbers)

    def activations(self, name: str) -> "Activations | HeldActivations":
        """The examples of a layer in windows: held ones if those of all batches are held, else from passes."""
        if self._bytes is not None and name in self._waiting and self._whole_fits(name):
            examples = self._hold(name, self._preferred, self._arrive(name))
            if {each.index for each in self._held}.issuperset(self._preferred):
                return HeldActivations(examples)
        self._give_up(0)
        return self._rest(name, self._cache_bytes)

    def replace(self, name: str, layer: nn.Module | None, small: nn.Module) -> None:
        """Go on with another module in place of the layer, None for itself; ``small`` is the network it is in."""
        self._small = small
        self._waiting.pop(name, None)
        for gates, instead in zip(self._gates, (layer, None), strict=False):
            gates.replaced[name] = instead

    @cached_property
    def _preferred(self) -> Sequence[int]:
        """The numbers of the batches that are needed, in the order in which they are taken."""
        if self._given is not None:
            return self._given
        return [index for index in range(self._batches.count()) if self._part is None or self._part(index)]

    @cached_property
    def _places(self) -> Mapping[int, int]:
        return {number: place for place, number in enumerate(self._preferred)}

    def _rest(self, name: str, cache_bytes: int) -> Activations:
        tail = self._order[name]
        return Activations(self._small, self._dense, *self._pairs[name], tail, self._batches, cache_bytes)

    def _examples(
        self, name: str, held: list[Example], numbers: Sequence[int], earlier: "LayerExamples | None" = None
    ) -> "LayerExamples":
        """The examples of these batches: of those that are held or in memory, and from passes over the others."""
        left = int(max(0, self._room_left(name) - (0 if earlier is None else earlier.kept_bytes)))
        batches = {each.index for each in self._held}
        return LayerExamples(held, batches, self._rest(name, left), left, numbers, earlier)

    def _room(self, name: str, size: int) -> float:
        """The bytes that the two passes of a batch of this size hold at a layer."""
        return 2 * size * (self._bytes or {}).get(name, 0.0)

    def _room_left(self, name: str) -> float:
        """The bytes that are left for passes beside those that are held; negative where there are too many."""
        return self._cache_bytes - sum(self._room(name, each.size) for each in self._held)

    def _whole_fits(self, name: str) -> bool:
        """Whether the passes of all batches that are needed can be held at a layer."""
        if self._whole_size is None:
            self._whole_size = sum(size_of(batch) for _, batch in self._batches.numbered(part=self._part))
        return self._room(name, self._whole_size) <= self._cache_bytes

    def _arrive(self, name: str) -> list[Example]:
        """The examples of the batches that are held, whose passes go on to the layer."""
        if self._bytes is None or name not in self._waiting:
            self._close()  # passes that are held cannot go past a layer that is called several times
            return []
        while self._held and self._room_left(name) < 0:
            self._give_up(len(self._held) - 1)
        try:
            return [example for each in self._held for example in self._at(each, name)]
        except OutOfOrder:
            self._no_longer()
            return []

    def _hold(self, name: str, numbers: Sequence[int], examples: list[Example]) -> list[Example]:
        """Hold those of these batches that fit at a layer, too; return the examples of all that are held."""
        missing = set(numbers) - {each.index for each in self._held}
        room = self._room_left(name)
        no_room = self._next_size is not None and self._room(name, self._next_size) > room
        if self._bytes is None or name not in self._waiting or not missing or no_room:
            return examples
        if not self._gates:
            layers = [{name: self._pairs[name][place] for name in self._waiting} for place in (0, 1)]
            skips = {name: tail.skip for name in self._waiting if (tail := self._order[name]).skip is not None}
            self._gates = (
                self._open.enter_context(Gates(self._small, layers[0], False, skips).installed()),
                self._open.enter_context(Gates(self._dense, layers[1], True, skips).installed()),
            )
        self._next_size, examples = None, list(examples)
        for index, batch, mask in self._batches.masked(part=missing.__contains__):
            size = size_of(batch)
            room -= self._room(name, size)
            if room < 0:
                self._next_size = size
                break
            small, dense = (gates.begin(batch) for gates in self._gates)
            self._held.append(_Held(index, batch, mask, (small, dense), size))
            try:
                examples += self._at(self._held[-1], name)
            except OutOfOrder:
                self._no_longer()
                return []
        self._held.sort(key=lambda each: self._places[each.index])
        return examples

    def _at(self, each: "_Held", name: str) -> list[Example]:
        """The example of a batch, if it has any, whose passes go on to the layer."""
        with naming_batch(each.index, each.batch):
            ours, theirs = (held.advance() for held in each.passes)
        if ours is None or theirs is None or ours.name != name or theirs.name != name:
            raise OutOfOrder
        shapes = ([leaf.shape for leaf in floating((a.args, a.kwargs))] for a in (ours, theirs))
        if next(shapes) != next(shapes):
            raise OutOfOrder  # the passes of their own say what it means
        our = Call(ours.args, ours.kwargs, [], ours.skip)
        their = Call(theirs.args, theirs.kwargs, floating(theirs.output), theirs.skip)
        if routes_rows(self._pairs[name][0]):
            our, their = routed_alike(our, their)
        wanted = targets(self._order[name], our, their)
        if not any(target.numel() for target in wanted):
            return []
        return [Example(each.index, our.args, our.kwargs, wanted, each.mask)]

    def _give_up(self, place: int) -> None:
        """Abandon the passes from this place on: there is no room for them."""
        given_up, self._held = self._held[place:], self._held[:place]
        if given_up:
            self._next_size = given_up[0].size
            _end([each for held in given_up for each in held.passes])
            for gates in self._gates:
                gates.forget_finished()

    def _no_longer(self) -> None:
        """Take passes of their own from here on."""
        self._close()
        self._bytes = None

    def _close(self) -> None:
        self._held, self._gates, self._next_size = [], (), None
        self._open.close()


@dataclass
class _Held:
    index: int
    batch: Any
    mask: Tensor | None
    passes: tuple[SuspendedPass, SuspendedPass]
    size: int


class HeldActivations:
    """The examples of held passes, as one window of each part of the data; see :class:`Activations`."""

    def __init__(self, examples: list[Example]) -> None:
        self._examples = sorted(examples, key=_batch_of)

    def windows(
        self, start: int = 0, part: Part | None = None, share: float = 1.0, most: float = math.inf
    ) -> Iterator[Window[Example]]:
        """The examples of the batches from ``start`` on; all are in memory, whatever the other arguments are."""
        items = [each for each in self._examples if each.batch >= start and (part is None or part(each.batch))]
        if items:
            yield Window(start, items, start == 0)


class LayerExamples:
    """The examples of some batches, in their order; those that are not held stay in memory if they fit.

    Args:
        held: the examples of held passes.
        held_batches: the numbers of the batches whose passes are held, whether they gave examples or not.
        rest: makes the examples of the others.
        cache_bytes: memory for these.
        numbers: those of the batches whose examples are wanted.
        earlier: examples of the same layer, of which those in memory are used again.
    """

    def __init__(
        self,
        held: Sequence[Example],
        held_batches: set[int],
        rest: Activations,
        cache_bytes: int,
        numbers: Iterable[int],
        earlier: "LayerExamples | None" = None,
    ) -> None:
        self.numbers = tuple(sorted(numbers))
        #: The numbers of the batches that gave any, as far as they were gone through.
        self.reached: set[int] = set()
        self._held, self._held_batches, self._rest, self._cache_bytes = held, held_batches, rest, cache_bytes
        self._kept: list[Example] = []
        self._made: set[int] = set()  # the batches that gave those that are kept, or none
        if earlier is not None:
            self._made = earlier._made - held_batches
            self._kept = [each for each in earlier._kept if each.batch in self._made]

    @property
    def kept_bytes(self) -> int:
        """Memory of the examples that are in memory and not held."""
        return sum(each.nbytes for each in self._kept)

    def of(self, numbers: Iterable[int]) -> "LayerExamples":
        """The examples of some of these batches."""
        return LayerExamples(self._held, self._held_batches, self._rest, self._cache_bytes, numbers, self)

    def __iter__(self) -> Iterator[Example]:
        wanted = set(self.numbers)
        there = sorted((each for each in (*self._held, *self._kept) if each.batch in wanted), key=_batch_of)
        missing = wanted - self._held_batches - self._made
        for example in heapq.merge(there, self._from_passes(missing) if missing else (), key=_batch_of):
            self.reached.add(example.batch)
            yield example

    def _from_passes(self, missing: set[int]) -> Iterator[Example]:
        kept: list[Example] = []
        size = 0
        for window in self._rest.windows(part=missing.__contains__):
            for example in window.items:
                size += example.nbytes
                if size <= self._cache_bytes:
                    kept.append(example)
                yield example
            del window
        if size <= self._cache_bytes:
            self._kept, self._made = [*self._kept, *kept], self._made | missing
            self._cache_bytes -= size


def _batch_of(example: Example) -> int:
    return example.batch

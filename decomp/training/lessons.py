"""How one factorized layer, or a block of them, learns from what it stands for in the dense network."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from decomp.data.activations import Activations, Example, RoutedDifferently
from decomp.data.batches import Part
from decomp.data.rng import random_state, set_random_state
from decomp.data.windows import Endless, Examples, Split
from decomp.network.tracing import Tail
from decomp.training.checkpoint import Checkpoint
from decomp.training.distributed import Team
from decomp.training.loop import Descent, Halt, Recipe

HELD_OUT_SHARE_OF_CACHE = 0.25
ROUTED = "routed differently: not trained"


@dataclass(frozen=True)
class LayerReport:
    """Relative error of one layer's output, after its normalization and activation, before and after training."""

    error_before: float
    error_after: float
    steps: int
    seconds: float
    note: str = ""


class Lesson:
    """One layer or block, what flows through it, and the steps by which it is trained.

    Args:
        layer: a factorized layer, or a module that holds some.
        trained: the names of its parameters that are trained.
        flow: its inputs and targets.
        tail: what follows it in the compressed network.
        recipe: how it is trained.
        split: on which batches.
        team: with which processes.
    """

    def __init__(
        self,
        layer: nn.Module,
        trained: set[str],
        flow: Activations,
        tail: Tail,
        recipe: Recipe,
        split: Split,
        team: Team,
    ) -> None:
        self._layer, self._trained, self._flow, self._tail = layer, trained, flow, tail
        self._recipe, self._split, self._team = recipe, split, team

    def teach(self, name: str, store: Checkpoint, advance: Callable[[int, float], None]) -> LayerReport:
        """Train a copy of the layer, and take it over where its error is lower on what was held out.

        Args:
            name: of the layer, in checkpoints.
            store: where an earlier run may have come to, and what this one keeps.
            advance: moves the progress bar, by steps with their loss.
        """
        start = time.perf_counter()
        try:
            report = self._teach(name, store, advance)
        except RoutedDifferently:
            report = LayerReport(math.nan, math.nan, 0, 0.0, ROUTED)
        advance(self._recipe.steps - report.steps, math.nan)
        return replace(report, seconds=time.perf_counter() - start)

    def result(self) -> dict[str, Tensor]:
        """What the layer is now."""
        return dict(self._layer.state_dict())

    def take(self, result: dict[str, Tensor]) -> None:
        """Make the layer what it was when :meth:`result` was read."""
        self._layer.load_state_dict(result)

    def _teach(self, name: str, store: Checkpoint, advance: Callable[[int, float], None]) -> LayerReport:
        stream, held, before = self._examples()
        if stream is None:
            return LayerReport(before, before, 0, 0.0, "the data of some processes never reaches it: not trained")
        if not self._trained:
            return LayerReport(before, before, 0, 0.0, "frozen: not trained")
        student = copy.deepcopy(self._layer)
        if next(self._layer.parameters()).dtype.itemsize < 4:
            student.float()  # half precision is too coarse for the steps of an optimizer
        tensors = {**dict(student.named_parameters()), **dict(student.named_buffers())}
        descent = Descent(tensors, self._trained, self._recipe, self._team)
        descent.best_error = before
        self._descend(name, student, descent, stream, held, store, advance)
        trained = copy.deepcopy(self._layer)
        trained.load_state_dict(student.state_dict())
        after = self._error(trained, held) or 0.0
        if not after < before:
            note = f"{descent.note or 'no gain'}: its factors were kept"
            return LayerReport(before, before, descent.done, 0.0, note)
        self._layer.load_state_dict(trained.state_dict())
        return LayerReport(before, after, descent.done, 0.0, descent.note)

    def _examples(self) -> tuple[Endless[Example] | None, Examples[Example], float]:
        """What is trained on, what is measured on, and the error on that.

        A layer that is not reached by both parts of the data is trained and measured on all of it.
        """
        parts: list[tuple[Part, Part]] = [
            (self._split.train, self._split.held),
            (self._split.own, self._split.own),
        ]
        for train, hold in parts:
            windows = partial(self._flow.windows, part=hold, share=HELD_OUT_SHARE_OF_CACHE)
            held = Examples[Example](windows)
            error = self._error(self._layer, held)
            if error is None:
                continue
            most = self._recipe.steps * self._team.accumulation  # the others are never trained on
            windows = partial(self._flow.windows, part=train, share=1 - HELD_OUT_SHARE_OF_CACHE, most=most)
            stream = Endless[Example](windows)
            if self._agreed(stream.begin):
                return stream, held, error
        return None, held, math.nan

    def _agreed(self, begin: Callable[[], bool]) -> bool:
        """Whether every process has something to train on."""
        routed = 0
        try:
            begun = int(begin())
        except RoutedDifferently:
            begun, routed = 0, 1
        begun_by, routed_by = self._team.totals(begun, routed)
        if routed_by:
            raise RoutedDifferently
        return begun_by == self._team.size

    def _descend(
        self,
        name: str,
        student: nn.Module,
        descent: Descent,
        stream: Endless[Example],
        held: Examples[Example],
        store: Checkpoint,
        advance: Callable[[int, float], None],
    ) -> None:
        reached = store.load("current")
        if reached is not None and reached["layer"] == name:
            here = reached["processes"][self._team.rank]
            descent.set_state(reached["descent"])
            stream.seek(here["place"])
            set_random_state(here["random"])
            advance(descent.done, math.nan)

        def keep() -> None:
            if store.kept:
                here = {"place": stream.place, "random": random_state()}
                processes = self._team.gather(here)
                store.save("current", {"layer": name, "descent": descent.state(), "processes": processes})

        def loss() -> Tensor:
            try:
                example = next(stream)
            except RoutedDifferently:
                raise Halt(ROUTED) from None
            lost, energy = self._squares(student, example)
            relative: Tensor = lost / energy.clamp(min=torch.finfo(torch.float32).tiny)
            return relative

        def measure() -> float:
            try:
                return self._error(student, held) or 0.0
            except RoutedDifferently:
                return math.nan

        descent.run(loss, measure, keep, lambda value: advance(1, value))

    @torch.no_grad()
    def _error(self, layer: nn.Module, held: Examples[Example]) -> float | None:
        """sqrt(sum ||phi(f(x)) - phi(y)||^2 / sum ||phi(y)||^2) over all processes; None without data."""
        lost = energy = 0.0
        count = routed = 0
        try:
            for example in held:
                squares = self._squares(layer, example)
                lost, energy = lost + float(squares[0]), energy + float(squares[1])
                count += 1
        except RoutedDifferently:
            routed = 1
        lost, energy, count_of_all, routed_by = self._team.totals(lost, energy, count, routed)
        if routed_by:
            raise RoutedDifferently
        if not count_of_all:
            return None
        return math.sqrt(lost / energy) if energy else math.sqrt(lost)

    def _squares(self, layer: nn.Module, example: Example) -> tuple[Tensor, Tensor]:
        """||phi(f(x)) - phi(y)||^2 and ||phi(y)||^2 over all outputs."""
        results = example.run(layer, self._tail)
        pairs = [(ours.float(), theirs.float()) for ours, theirs in zip(results, example.targets, strict=True)]
        lost = torch.stack([(ours - theirs).square().sum() for ours, theirs in pairs]).sum()
        return lost, torch.stack([theirs.square().sum() for _, theirs in pairs]).sum()

"""Fine-tuning layer by layer: every factorized layer learns to give what the dense layer gave."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decomp._util import tables
from decomp._util.by_layer import ByLayer
from decomp._util.naming import naming
from decomp._util.progress import bar
from decomp.data.activations import Activations, Example, RoutedDifferently, reached_tails
from decomp.data.batches import Batches, Part, require_passes
from decomp.data.rng import OwnRandomness, random_state, set_random_state
from decomp.data.windows import Endless, Examples, Split
from decomp.network.forward import evaluating
from decomp.network.pairing import blocks_of, pairs_of
from decomp.network.tracing import Tail
from decomp.training.checkpoint import Checkpoint, identify
from decomp.training.distributed import Team, team
from decomp.training.loop import (
    Descent,
    Halt,
    MakeOptimizer,
    MakeSchedule,
    Recipe,
    Trained,
    adam,
    cosine,
    trained_parameters,
)

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


UNREACHED = LayerReport(math.nan, math.nan, 0, 0.0, "the data never reaches it")


class FinetuneReport(ByLayer[LayerReport]):
    """What fine-tuning did to each layer, in the order of execution; printed, a table."""

    def __str__(self) -> str:
        rows = [
            (name, f"{r.error_before:.3f} => {r.error_after:.3f}", str(r.steps), f"{r.seconds:.1f}", r.note)
            for name, r in self.items()
        ]
        return tables.render("", ("layer", ">error of the output", ">steps", ">seconds", "note"), rows)


def finetune_layerwise(
    small: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    *,
    steps: int = 300,
    lr: float = 2e-3,
    inputs: Callable[[Any], Any] | None = None,
    cache_bytes: int = 2**30,
    progress: bool | None = None,
    layers: str | Sequence[str] | None = None,
    blocks: str | Sequence[str] | None = None,
    train: Trained = None,
    optimizer: MakeOptimizer = adam,
    schedule: MakeSchedule = cosine,
    held_out: float = 0.2,
    patience: int | None = 5,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    accelerator: Any = None,
) -> FinetuneReport:
    """Train each factorized layer of ``small``, in place, to reproduce what the layer gave in ``dense``.

    Layer by layer in the order of execution: minimize ||phi(f(x)) - phi(y)||^2 / ||phi(y)||^2 over the factors of
    f, with x the input that the layer gets in the partly compressed network, y the output of the dense layer in
    the dense network, and phi the normalization and activation that follow the layer, where there are any. No
    labels are needed. A copy of the layer is trained, and its best state taken over if its error fell; errors are
    measured on batches that are held out from training. A NaN ends the layer at its best state before. A pass of a
    network ends, by an exception, where the layer was called as often as in the first batch that reached it.

    Runs on Hugging Face accelerate. Started in several processes, each takes its share of the batches, gradients
    are averaged, and all end with the same model. With ``checkpoint``, a run that was killed and is started again
    with the same arguments goes on where it was, and ends with the same weights as if it had not been.

    Args:
        small: what :func:`decomp.tucker` returned.
        dense: the model it was made from, in which nothing is changed.
        data: an iterable of batches that can be gone through again (a DataLoader, a list). A tensor is one
            argument of the model, a tuple or list positional ones, a mapping keywords. Every pass is made in the
            same order, also where it is shuffled.
        steps: gradient steps per layer, at most.
        lr: learning rate at the start.
        inputs: what the model is called with, from a batch: ``lambda batch: batch[0]`` where labels come with it.
        cache_bytes: inputs and targets of a layer that are held in memory at once.
        progress: show a progress bar; by default where there is a terminal.
        layers: which factorized layers, by globs on their names; by default all.
        blocks: modules that are trained whole, by globs on their names: ``"encoder.layer.*"``, ``"layer?.?"``. A
            block learns to give what it gave in the dense network, all of its parameters at once but those that
            the model uses elsewhere as well; layers outside of blocks are trained one by one. Fewer passes, and a
            target that counts what the parts do together.
        train: which parameters, by globs on their names or a predicate (name, parameter): ``"*.expand.*"``. Frozen
            ones never.
        optimizer: a function of parameters and learning rate; by default Adam.
        schedule: a function of the optimizer and the steps; by default a cosine down to a hundredth.
        held_out: share of the batches to measure on; 0 measures on the batches that are trained on.
        patience: a layer ends early after this many twentieths of its steps without a gain; None: never.
        checkpoint: a folder, which all processes see.
        checkpoint_every: steps between two checkpoints; there is one after every layer as well.
        accelerator: an ``accelerate.Accelerator``, for mixed precision, accumulated gradients or another device.

    Raises:
        ValueError: there is nothing to train, ``dense`` does not match ``small``, a batch is empty or not finite,
            or the checkpoint is that of another run.
        TypeError: the data can be gone through only once, or a batch does not fit the model.
        ImportError: accelerate is not installed.

    >>> import decomp
    >>> dense = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    >>> small = decomp.tucker(dense, ranks=4)
    >>> report = decomp.finetune_layerwise(small, dense, [torch.randn(16, 32) for _ in range(5)], steps=20)
    >>> list(report), report["0"].error_after <= report["0"].error_before
    (['0', '2'], True)

    Source: FitNets (Romero et al. 2015), equation 3, per layer; asymmetric inputs after Zhang et al. 2016, 3.3.
    """
    require_passes(data)
    pairs = blocks_of(small, dense, pairs_of(small, dense, layers), blocks)
    chosen = trained_parameters(small, train)
    recipe = Recipe(steps, lr, optimizer, schedule, patience, checkpoint_every)
    with team(accelerator, small, dense) as together, torch.inference_mode(False):
        together.spread(small)
        settings = {"held_out": held_out, "cache_bytes": cache_bytes, "train": sorted(chosen)}
        identity = _identity(small, dense, settings | {"layers": list(pairs)}, recipe, together)
        store = Checkpoint(checkpoint, identity, writes=together.rank == 0)
        batches = Batches(OwnRandomness(data, _first_state(store, data, together), again=True), inputs)
        lesson = partial(Lesson, recipe=recipe, split=Split(held_out, together.rank, together.size), team=together)
        flow = partial(Activations, small, dense, batches=batches, cache_bytes=cache_bytes)
        tails = [
            reached_tails(model, batches, {name: pair[which] for name, pair in pairs.items()})
            for which, model in enumerate((small, dense))
        ]
        lessons = {
            name: lesson(pairs[name][0], _own(small, chosen, name), flow(*pairs[name], tail=tails[1][name]), tail)
            for name, tail in tails[0].items()
            if name in tails[1]
        }
        with evaluating(small, dense):
            reports = _taught(lessons, store, steps, progress if together.rank == 0 else False)
    return FinetuneReport(reports | {name: UNREACHED for name in pairs if name not in reports})


def _own(small: nn.Module, chosen: set[str], module: str) -> set[str]:
    """Of the chosen parameters those that a module alone holds, by their names there."""
    start = f"{module}." if module else ""
    every = small.named_parameters(remove_duplicate=False)
    outside = {id(parameter) for name, parameter in every if not name.startswith(start)}
    inside = {name: p for name, p in small.named_parameters() if name in chosen and name.startswith(start)}
    return {name.removeprefix(start) for name, p in inside.items() if id(p) not in outside}


def _taught(
    lessons: Mapping[str, Lesson], store: Checkpoint, steps: int, progress: bool | None
) -> dict[str, LayerReport]:
    """Teach layer by layer; where an earlier run has done so, take what it kept."""
    reports = {}
    with bar(progress, "fine-tune", total=steps * len(lessons)) as steps_bar:
        for place, (name, lesson) in enumerate(lessons.items()):

            def advance(steps: int, loss: float, name: str = name) -> None:
                steps_bar.set_postfix(layer=name, loss=f"{loss:.3g}", refresh=False)
                steps_bar.update(steps)

            file = f"layer-{place:03d}"
            done = store.load(file)
            with naming(name):
                if done is None:
                    reports[name] = lesson.teach(name, store, advance)
                    store.save(file, {"layer": lesson.result(), "report": asdict(reports[name])})
                else:
                    reports[name] = LayerReport(**done["report"])
                    lesson.take(done["layer"])
                    advance(steps, math.nan)
    return reports


def _first_state(store: Checkpoint, data: Any, together: Team) -> dict[str, Any]:
    """The random numbers that the data begins with, on every process and in a run that goes on."""
    kept = store.load("data")
    together.wait()  # nobody writes before everybody has looked
    if kept is None:
        kept = together.gather(random_state(data))[0]
        store.save("data", kept)
    state: dict[str, Any] = kept
    return state


def _identity(
    small: nn.Module,
    dense: nn.Module,
    settings: Mapping[str, Any],
    recipe: Recipe,
    together: Team,
) -> dict[str, Any]:
    return {
        "call": "finetune_layerwise",
        **identify(small=small, dense=dense),
        **settings,
        **recipe.identity(),
        **together.identity(),
    }

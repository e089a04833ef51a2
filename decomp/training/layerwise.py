"""Fine-tuning layer by layer: each factorized layer is trained to reproduce the output of its dense layer."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decomp._util import tables
from decomp._util.by_layer import ByLayer
from decomp._util.naming import naming
from decomp._util.progress import bar
from decomp.data.activations import (
    Activations,
    Example,
    ExampleCache,
    ExampleStream,
    RoutedDifferently,
    reached_tails,
)
from decomp.data.batches import (
    Batches,
    BatchSplit,
    Mask,
    OwnRandomness,
    Part,
    random_state,
    require_passes,
    set_random_state,
    unpadded,
)
from decomp.data.suspended import HeldActivations, HeldExamples
from decomp.network.forward import evaluating
from decomp.network.pairing import blocks_of, factorized_names, pairs_of
from decomp.network.restoring import all_or_nothing, on_failure, restoring_values, temporarily
from decomp.network.selection import Selector
from decomp.network.tracing import Tail
from decomp.network.unpacking import unpacked
from decomp.training.checkpoint import Checkpoint, identify
from decomp.training.distributed import ProcessGroup, process_group
from decomp.training.loop import (
    MakeOptimizer,
    MakeSchedule,
    ParameterSelector,
    TrainingLoop,
    TrainingSettings,
    TrainingStopped,
    adam,
    cosine,
    trained_parameters,
)

HELD_OUT_SHARE_OF_CACHE = 0.25
LEARNING_RATES = (2e-3, 5e-4, 8e-3)  # the first is taken where they are as good as each other
TRIAL_SHARE = 0.1
ROUTED_DIFFERENTLY = "routed differently: not trained"


@dataclass(frozen=True)
class LayerReport:
    """Relative error of one layer's output, after its normalization and activation, before and after training.

    It is that against the output of the dense layer; where a skip connection is added to it, against what the sum
    of the dense network needs.
    """

    error_before: float
    error_after: float
    steps: int
    seconds: float
    note: str = ""


UNREACHED = LayerReport(math.nan, math.nan, 0, 0.0, "the data never reaches it")


class FinetuneReport(tables.Tabular, ByLayer[LayerReport]):
    """What fine-tuning did to each layer, in the order of execution; printed, a table."""

    def records(self) -> list[dict[str, Any]]:
        """Return the report of every layer as a dictionary of plain values."""
        return [{"layer": name} | asdict(report) for name, report in self.items()]

    def _table(self) -> tables.Table:
        columns = (
            tables.Column("layer", "name"),
            *(tables.Column(title, measured=True) for title in ("error of the output", "steps", "seconds")),
            tables.Column("note", "remark"),
        )
        rows = [
            (
                name,
                tables.fall(report.error_before, report.error_after),
                tables.Cell(str(report.steps), value=report.steps),
                tables.Cell(f"{report.seconds:.1f}", value=report.seconds),
                report.note,
            )
            for name, report in self.items()
        ]
        return tables.Table(columns, rows)


@all_or_nothing()
def finetune_layerwise(
    small: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    *,
    steps: int = 300,
    lr: float | None = None,
    inputs: Callable[[Any], Any] | None = None,
    cache_bytes: int = 2**30,
    progress: bool | None = None,
    layers: Selector = None,
    blocks: str | Sequence[str] | None = None,
    train: ParameterSelector = None,
    optimizer: MakeOptimizer = adam,
    schedule: MakeSchedule = cosine,
    held_out: float = 0.2,
    patience: int | None = 5,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    accelerator: Any = None,
    mask: Mask = "attention_mask",
) -> FinetuneReport:
    """Train each factorized layer of ``small``, in place, to reproduce what the layer gave in ``dense``.

    Layer by layer in the order of execution: minimize ||phi(f(x)) - phi(y)||^2 / ||phi(y)||^2 over the factors
    of f, with x the input that the layer gets in the partly compressed network, y the output of the dense layer
    in the dense network, and phi the normalization and activation that follow the layer, where there are any. No
    labels are needed. A copy of the layer is trained, and its best state copied back if its error fell; errors
    are measured on batches that are held out from training, in between on the first few of these. A NaN ends the
    layer at its best state before. A pass of a network ends, by an exception, where the layer was called as
    often as in the first batch that reached it.

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
        lr: learning rate at the start. By default each layer takes the best of 5e-4, 2e-3 and 8e-3: that whose
            error is the least on the held-out batches after a tenth of the steps, on a cosine of their own. The
            trials come on top of ``steps``, and the rates are meant for Adam: write ``lr`` for another optimizer.
        inputs: what the model is called with, from a batch: ``lambda batch: batch[0]`` where labels come with it.
        cache_bytes: memory for inputs and targets. Where that is enough for what one pass of every batch through
            both networks holds at a layer, these passes serve all layers, each held until its layer is trained;
            else each layer takes passes of its own.
        progress: show a progress bar; by default where there is a terminal.
        layers: which factorized layers, by globs on their names, by types (``nn.Linear``, or ``SVDLinear``) or
            predicates of the name and the dense layer; by default all.
        blocks: modules that are trained whole, by globs on their names: ``"encoder.layer.*"``, ``"layer?.?"``. A
            block is trained to reproduce its output in the dense network, all of its parameters at once but those
            that the model uses elsewhere as well; layers outside of blocks are trained one by one. Blocks take
            fewer passes, and the layers of a block can make up for each other's errors. "auto" means the outermost
            modules of a class that occurs several times: residual blocks, the layers of a transformer.
        train: which parameters, by globs on their names or a predicate (name, parameter): ``"*.expand.*"``. Frozen
            ones never.
        optimizer: a function of parameters and learning rate; by default Adam.
        schedule: a function of the optimizer and the steps; by default a cosine down to a hundredth.
        held_out: share of the batches to measure on; 0 measures on the batches that are trained on.
        patience: a layer ends early after this many twentieths of its steps without a gain; None: never.
        checkpoint: a folder, which all processes see.
        checkpoint_every: steps between two checkpoints; there is one after every layer as well.
        accelerator: an ``accelerate.Accelerator``, for mixed precision, accumulated gradients or another device.
        mask: what is padding and does not count; see :func:`decomp.calibrate`.

    Raises:
        ValueError: there is nothing to train, ``dense`` does not match ``small``, a batch is empty or not finite,
            or the checkpoint is that of another run.
        TypeError: the data can be gone through only once, or a batch does not fit the model.
        ImportError: accelerate is not installed.

    >>> import decomp
    >>> dense = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    >>> small = decomp.tucker(dense, ranks=4)
    >>> data = [torch.randn(16, 32) for _ in range(5)]
    >>> report = decomp.finetune_layerwise(small, dense, data, steps=20)
    >>> list(report), report["0"].error_after <= report["0"].error_before
    (['0', '2'], True)

    Source: FitNets (Romero et al. 2015), equation 3, per layer; asymmetric inputs after Zhang et al. 2016, 3.3.
    """
    require_passes(data)
    dense = unpacked(dense, factorized_names(small))
    pairs = blocks_of(small, dense, pairs_of(small, dense, layers), blocks)
    selected = trained_parameters(small, train)
    rates = LEARNING_RATES if lr is None else (lr,)
    settings = TrainingSettings(steps, rates[0], optimizer, schedule, patience, checkpoint_every)
    with process_group(accelerator, small, dense) as group, torch.inference_mode(False):
        group.broadcast(small)
        split = BatchSplit.of_share(held_out, group.rank, group.size)
        saved = None
        if checkpoint is not None:
            identity = {
                "call": "finetune_layerwise",
                "layers": list(pairs),
                "train": sorted(selected),
                "held_out": held_out,
                "cache_bytes": cache_bytes,
                **identify(small=small, dense=dense),
                **settings.identity(),
                "lr": lr,
                **group.identity(),
            }
            saved = Checkpoint(checkpoint, identity, writes=group.rank == 0)
        state = _first_random_state(saved, data, group)
        batches = Batches(OwnRandomness(data, state, same_order=True), inputs, mask)
        tails, dense_tails = (
            reached_tails(model, batches, {name: pair[which] for name, pair in pairs.items()})
            for which, model in enumerate((small, dense))
        )
        reached = {name: dense_tails[name] for name in tails if name in dense_tails}
        most = steps * group.accumulation_steps
        part = _NeededBatches(split, most)
        # Passes are held for several layers of one process: otherwise there is nothing to share.
        orders = reached if group.size == 1 and len(reached) > 1 else {}
        outside = random_state()  # a checkpoint to resume from sets it
        with (
            evaluating(small, dense),
            temporarily(lambda: set_random_state(outside)),
            HeldExamples(small, dense, pairs, orders, batches, cache_bytes, part) as held,
        ):
            trainers = {}
            for name, tail in reached.items():
                layer, parameters = pairs[name][0], _parameters_within(small, name, selected)
                plain = Activations(small, dense, *pairs[name], tail, batches, cache_bytes)
                examples = partial(held.activations, name) if orders else partial(_same, plain)
                trainers[name] = LayerTrainer(
                    layer, parameters, examples, tails[name], settings, rates, split, group
                )
            done = partial(_pass_on, held, small)
            reports = _train_layers(trainers, saved, steps, progress if group.rank == 0 else False, done)
    return FinetuneReport(reports | {name: UNREACHED for name in pairs if name not in reports})


@dataclass
class _NeededBatches:
    """Which batches are measured or trained on: of the latter the first ``most``."""

    split: BatchSplit
    most: int
    #: How many of the first batches are trained on.
    _trained: list[int] = field(default_factory=lambda: [0], init=False)

    def __call__(self, index: int) -> bool:
        """Whether the batch of this number is needed."""
        while len(self._trained) <= index:
            self._trained.append(self._trained[-1] + self.split.train(len(self._trained) - 1))
        return self.split.held_out(index) or (self.split.train(index) and self._trained[index] < self.most)


def _same(activations: Activations) -> Activations:
    return activations


def _pass_on(held: HeldExamples, small: nn.Module, name: str) -> None:
    held.replace(name, None, small)


def _first_random_state(saved: Checkpoint | None, data: Any, group: ProcessGroup) -> dict[str, Any]:
    """The state of the random generators that passes begin with: of the first process, or of the run resumed."""
    state = None if saved is None else saved.load("data")
    group.barrier()  # no process writes before all have read
    if state is None:
        state = group.gather(random_state(data))[0]
        if saved is not None:
            saved.save("data", state)
    first: dict[str, Any] = state
    return first


def _parameters_within(small: nn.Module, module: str, selected: set[str]) -> set[str]:
    """Which of the selected parameters no other module shares, by their names inside of ``module``."""
    start = f"{module}." if module else ""
    every = small.named_parameters(remove_duplicate=False)
    outside = {id(parameter) for name, parameter in every if not name.startswith(start)}
    inside = {name: p for name, p in small.named_parameters() if name in selected and name.startswith(start)}
    return {name.removeprefix(start) for name, p in inside.items() if id(p) not in outside}


def _train_layers(
    trainers: Mapping[str, "LayerTrainer"],
    saved: Checkpoint | None,
    steps: int,
    progress: bool | None,
    done: Callable[[str], None],
) -> dict[str, LayerReport]:
    """Train layer by layer; a layer that an earlier run has finished is loaded from its checkpoint."""
    reports = {}
    files = [f"layer-{place:03d}" for place in range(len(trainers))]
    if saved is not None:
        saved.require_sound(["current", *files])
    with bar(progress, "fine-tune", total=steps * len(trainers)) as steps_bar:
        for file, (name, trainer) in zip(files, trainers.items(), strict=True):

            def advance(steps: int, loss: float, name: str = name) -> None:
                steps_bar.set_postfix(layer=name, loss=f"{loss:.3g}", refresh=False)
                steps_bar.update(steps)

            finished = None if saved is None else saved.load(file)
            with naming(name):
                if finished is not None:
                    reports[name] = LayerReport(**finished["report"])
                    on_failure(restoring_values(trainer.layer))
                    trainer.layer.load_state_dict(finished["layer"])
                    advance(steps, math.nan)
                    done(name)
                    continue
                reports[name] = trainer.train(name, saved, advance)
                if saved is not None:
                    layer = dict(trainer.layer.state_dict())
                    saved.save(file, {"layer": layer, "report": asdict(reports[name])})
            done(name)
    return reports


@dataclass(frozen=True)
class _Judged:
    """The first of the held-out examples, by which the states of a layer are compared while it is trained.

    There are as many as take a sixth of the time of the steps between two evaluations, and at least two: a step
    runs a layer forwards and backwards, which takes three times as long as an evaluation on an example.
    """

    examples: ExampleCache[Example]
    most: int

    def __iter__(self) -> Iterator[Example]:
        return islice(iter(self.examples), self.most)


def _save_nothing() -> None:
    """For a trial, which is repeated where a run is resumed."""


def _show_nothing(loss: float) -> None:
    """For a trial, whose steps the progress bar does not count."""


class LayerTrainer:
    """Trains one layer or block of the compressed network.

    Args:
        layer: a factorized layer, or a module that holds some.
        trained: the names of its parameters that are trained.
        activations: returns its inputs and targets, when its turn has come.
        tail: the functions that follow it in the compressed network.
        settings: steps, optimizer, schedule, early stopping; the learning rate is one of ``rates``.
        rates: learning rates to choose from.
        split: the batches that it is trained on, and those held out.
        group: the processes that train together.
    """

    def __init__(
        self,
        layer: nn.Module,
        trained: set[str],
        activations: Callable[[], Activations | HeldActivations],
        tail: Tail,
        settings: TrainingSettings,
        rates: Sequence[float],
        split: BatchSplit,
        group: ProcessGroup,
    ) -> None:
        self.layer = layer
        self._trained, self._make_activations, self._tail = trained, activations, tail
        self._settings, self._rates, self._split, self._group = settings, rates, split, group

    def train(self, name: str, saved: Checkpoint | None, advance: Callable[[int, float], None]) -> LayerReport:
        """Train a copy of the layer, and copy its state back if the error on the held-out batches fell.

        Args:
            name: of the layer, in checkpoints.
            saved: the checkpoint to resume from and to write.
            advance: moves the progress bar by a number of steps, with their loss.
        """
        start = time.perf_counter()
        try:
            report = self._train(name, saved, advance)
        except RoutedDifferently:
            report = LayerReport(math.nan, math.nan, 0, 0.0, ROUTED_DIFFERENTLY)
        advance(self._settings.steps - report.steps, math.nan)
        return replace(report, seconds=time.perf_counter() - start)

    def _train(self, name: str, saved: Checkpoint | None, advance: Callable[[int, float], None]) -> LayerReport:
        stream, held_out, before = self._examples(self._make_activations())
        if stream is None:
            return LayerReport(before, before, 0, 0.0, "the data of some processes never reaches it: not trained")
        if not self._trained:
            return LayerReport(before, before, 0, 0.0, "frozen: not trained")
        # As many in all processes together as one process would take.
        judged = _Judged(held_out, math.ceil(max(2, self._settings.interval // 2) / self._group.size))
        error = self._error(self.layer, judged) or 0.0
        current = None if saved is None else saved.load("current")
        if current is not None and current["layer"] != name:
            current = None
        rate = self._best_rate(stream, held_out) if current is None else current["rate"]
        student, loop = self._student(replace(self._settings, lr=rate))
        loop.best_error = error
        if current is not None:
            own = current["processes"][self._group.rank]
            loop.set_state(current["loop"])
            stream.seek(own["position"])
            set_random_state(own["random"])
            advance(loop.steps_done, math.nan)

        def save() -> None:
            if saved is not None:
                own = {"position": stream.position, "random": random_state()}
                processes = self._group.gather(own)
                saved.save("current", {"layer": name, "rate": rate, "loop": loop.state(), "processes": processes})

        loss, evaluate = partial(self._loss, student, stream), partial(self._error_or_nan, student, judged)
        loop.run(loss, evaluate, save, lambda value: advance(1, value))
        trained = copy.deepcopy(self.layer)
        trained.load_state_dict(student.state_dict())
        after = self._error(trained, held_out) or 0.0
        if not after < before:
            note = f"{loop.note or 'no gain'}: its factors were kept"
            return LayerReport(before, before, loop.steps_done, 0.0, note)
        on_failure(restoring_values(self.layer))
        self.layer.load_state_dict(trained.state_dict())
        return LayerReport(before, after, loop.steps_done, 0.0, loop.note)

    def _student(self, settings: TrainingSettings) -> tuple[nn.Module, TrainingLoop]:
        """A copy of the layer, and the loop that trains it."""
        student = copy.deepcopy(self.layer)
        if next(self.layer.parameters()).dtype.itemsize < 4:
            student.float()  # half precision is too coarse for the steps of an optimizer
        tensors = {**dict(student.named_parameters()), **dict(student.named_buffers())}
        return student, TrainingLoop(tensors, self._trained, settings, self._group)

    def _best_rate(self, stream: ExampleStream[Example], held_out: Iterable[Example]) -> float:
        """The learning rate whose error on the held-out examples is the least after a tenth of the steps."""
        steps = math.ceil(TRIAL_SHARE * self._settings.steps)
        if len(self._rates) == 1 or not steps:
            return self._rates[0]
        errors: dict[float, float] = {}
        for rate in self._rates:
            student, loop = self._student(replace(self._settings, lr=rate, steps=steps, patience=None))
            loop.run(partial(self._loss, student, stream), None, _save_nothing, _show_nothing)
            errors[rate] = math.inf if loop.note else self._error_or_nan(student, held_out)
            stream.seek((0, 0))
        return min(self._rates, key=lambda rate: errors[rate] if math.isfinite(errors[rate]) else math.inf)

    def _loss(self, student: nn.Module, stream: ExampleStream[Example]) -> Tensor:
        """The relative squared error of the next example."""
        try:
            example = next(stream)
        except RoutedDifferently:
            raise TrainingStopped(ROUTED_DIFFERENTLY) from None
        lost, energy = self._squares(student, example)
        relative: Tensor = lost / energy.clamp(min=torch.finfo(torch.float32).tiny)
        return relative

    def _error_or_nan(self, student: nn.Module, examples: Iterable[Example]) -> float:
        """The error on examples; NaN where the two networks route them differently."""
        try:
            return self._error(student, examples) or 0.0
        except RoutedDifferently:
            return math.nan

    def _examples(
        self, activations: Activations | HeldActivations
    ) -> tuple[ExampleStream[Example] | None, ExampleCache[Example], float]:
        """The examples to train on, those to measure on, and the error of the layer on the latter.

        A layer that is not reached by both parts of the data is trained and measured on all of it.
        """
        parts: list[tuple[Part, Part]] = [
            (self._split.train, self._split.held_out),
            (self._split.own, self._split.own),
        ]
        for train, measure in parts:
            windows = partial(activations.windows, part=measure, share=HELD_OUT_SHARE_OF_CACHE)
            held_out = ExampleCache[Example](windows)
            error = self._error(self.layer, held_out)
            if error is None:
                continue
            most = self._settings.steps * self._group.accumulation_steps  # no step would read more
            windows = partial(activations.windows, part=train, share=1 - HELD_OUT_SHARE_OF_CACHE, most=most)
            stream = ExampleStream[Example](windows)
            if self._all_begin(stream):
                return stream, held_out, error
        return None, held_out, math.nan

    def _all_begin(self, stream: ExampleStream[Example]) -> bool:
        """Whether every process has an example to train on."""
        routed = 0
        try:
            begun = int(stream.begin())
        except RoutedDifferently:
            begun, routed = 0, 1
        all_begun, all_routed = self._group.totals(begun, routed)
        if all_routed:
            raise RoutedDifferently
        return all_begun == self._group.size

    @torch.no_grad()
    def _error(self, layer: nn.Module, examples: Iterable[Example]) -> float | None:
        """sqrt(sum ||phi(f(x)) - phi(y)||^2 / sum ||phi(y)||^2) over all processes; None without examples."""
        lost = energy = 0.0
        count = routed = 0
        try:
            for example in examples:
                squares = self._squares(layer, example)
                lost, energy = lost + float(squares[0]), energy + float(squares[1])
                count += 1
        except RoutedDifferently:
            routed = 1
        lost, energy, all_count, all_routed = self._group.totals(lost, energy, count, routed)
        if all_routed:
            raise RoutedDifferently
        if not all_count:
            return None
        return math.sqrt(lost / energy) if energy else math.sqrt(lost)

    def _squares(self, layer: nn.Module, example: Example) -> tuple[Tensor, Tensor]:
        """||phi(f(x)) - phi(y)||^2 and ||phi(y)||^2 over all outputs."""
        outputs = example.run(layer, self._tail)
        # Axes of a convolution are positions of an image, however long they are.
        mask = None if hasattr(self.layer, "kernel_size") else example.mask
        pairs = [
            (unpadded(output, mask).float(), unpadded(target, mask).float())
            for output, target in zip(outputs, example.targets, strict=True)
        ]
        lost = torch.stack([(output - target).square().sum() for output, target in pairs]).sum()
        return lost, torch.stack([target.square().sum() for _, target in pairs]).sum()

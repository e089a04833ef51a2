"""Fine-tuning of the whole network, end to end: with the loss of the task, a teacher, or both."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decomp._util.progress import bar
from decomp.data.activations import ExampleStream, Window
from decomp.data.batches import (
    Batches,
    BatchSplit,
    OwnRandomness,
    naming_batch,
    random_state,
    require_passes,
    set_random_state,
)
from decomp.network.forward import evaluating, moved
from decomp.network.restoring import all_or_nothing, on_failure, restoring_values, temporarily, training_as_now
from decomp.training.checkpoint import Checkpoint, identify, name_of
from decomp.training.distributed import ProcessGroup, process_group
from decomp.training.loop import (
    MakeOptimizer,
    MakeSchedule,
    ParameterSelector,
    TrainingLoop,
    TrainingSettings,
    adam,
    cosine,
    trained_parameters,
)
from decomp.training.losses import Distillation, Loss, cross_entropy


@dataclass(frozen=True)
class TuningReport:
    """What end-to-end fine-tuning did.

    The loss before and after is that of the batches to validate on, or, without any, the mean over the first and
    over the last twentieth of the steps. ``losses`` are the means over every twentieth.
    """

    loss_before: float
    loss_after: float
    steps: int
    seconds: float
    note: str
    losses: tuple[float, ...]

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        change = f"loss {self.loss_before:.4g} => {self.loss_after:.4g}"
        return f"{change} in {self.steps} steps, {self.seconds:.1f} s{note}"


@all_or_nothing()
def finetune(
    small: nn.Module,
    data: Iterable[Any],
    loss: Loss | None = None,
    *,
    teacher: nn.Module | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    lr: float = 3e-4,
    inputs: Callable[[Any], Any] | None = None,
    train: ParameterSelector = None,
    optimizer: MakeOptimizer = adam,
    schedule: MakeSchedule = cosine,
    validate: Iterable[Any] | None = None,
    patience: int | None = 5,
    frozen_norm: float = 0.0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    accelerator: Any = None,
    progress: bool | None = None,
) -> TuningReport:
    """Train the whole of ``small``, in place, with the loss of the task, a teacher, or both.

    Minimizes ``loss(model, batch)`` plus, with ``teacher``, T^2 KL between the softened outputs (T = 4). With
    neither it is cross-entropy on batches of (inputs, labels). Frozen parameters stay frozen. The model is
    evaluated after every twentieth of the steps; a NaN takes it back to its state of the last evaluation, and the
    report says so. Processes and checkpoints are as for :func:`decomp.finetune_layerwise`; shuffled data has a new
    order in every epoch.

    Args:
        small: the model, factorized or not.
        data: an iterable of batches that can be gone through again.
        loss: a function (model, batch) -> scalar tensor, of the batch as it comes, on the device of the model; one
            of :mod:`decomp.losses`, or your own. A checkpoint knows it by its name.
        teacher: the dense model.
        steps: steps of the optimizer, in place of ``epochs``.
        epochs: passes through the data; 3 where neither is given.
        lr: learning rate at the start.
        inputs: with ``teacher``, what both are called with, from a batch: ``lambda batch: batch[0]`` where labels
            come with it.
        train: which parameters, by globs on their names or a predicate (name, parameter).
        optimizer: a function of parameters and learning rate; by default Adam.
        schedule: a function of the optimizer and the steps; by default a cosine down to a hundredth.
        validate: batches that the model is evaluated on, with the same loss: its best state is kept. Without them,
            the latest.
        patience: with ``validate``: end after this many twentieths of the steps without a gain; None: never.
        frozen_norm: the share of the steps, from the first on, in which BatchNorm keeps its statistics.
        checkpoint: a folder, which all processes see.
        checkpoint_every: steps between two checkpoints.
        accelerator: an ``accelerate.Accelerator``, for mixed precision, accumulated gradients or another device.
        progress: show a progress bar; by default where there is a terminal.

    Raises:
        ValueError: an argument or a batch is not sound, or the checkpoint is that of another run.
        TypeError: the data can be gone through only once, or the loss gave no scalar.
        ImportError: accelerate is not installed.

    >>> import decomp
    >>> dense = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> small = decomp.tucker(dense, ranks=4)
    >>> data = [torch.randn(16, 32) for _ in range(5)]
    >>> report = decomp.finetune(small, data, teacher=dense, steps=40, lr=1e-2)
    >>> report.loss_after < report.loss_before
    True

    Source: Hinton, Vinyals and Dean 2015.
    """
    _check_arguments(small, teacher, steps, epochs, frozen_norm)
    for passes in (data, data if validate is None else validate):
        require_passes(passes)
    selected = trained_parameters(small, train)
    if not selected:
        raise ValueError("small has nothing to train: every parameter is frozen, or train= leaves all of them out")
    objective = _objective(loss, teacher, inputs)
    with process_group(accelerator, small, teacher) as group, torch.inference_mode(False):
        group.broadcast(small)
        steps = steps if steps is not None else _steps_of(3 if epochs is None else epochs, data, group)
        settings = TrainingSettings(steps, lr, optimizer, schedule, patience, checkpoint_every)
        saved = None
        if checkpoint is not None:
            of_loss = loss.identity() if isinstance(loss, Distillation) else name_of(loss)
            identity = {
                "call": "finetune",
                "train": sorted(selected),
                "loss": of_loss,
                "validate": validate is not None,
                "frozen_norm": frozen_norm,
                **identify(small=small, teacher=teacher),
                **settings.identity(),
                **group.identity(),
            }
            saved = Checkpoint(checkpoint, identity, writes=group.rank == 0)
        on_failure(restoring_values(small))
        tensors = {**dict(small.named_parameters()), **dict(small.named_buffers())}
        loop = TrainingLoop(tensors, selected, settings, group)
        run = EndToEndRun(small, objective, data, validate, loop, group, round(frozen_norm * steps))
        outside = random_state()  # dropout draws in the steps
        with (
            bar(progress if group.rank == 0 else False, "fine-tune", total=steps) as steps_bar,
            evaluating(small),
            temporarily(lambda: set_random_state(outside)),
        ):
            return run.train(saved, steps_bar)


def _check_arguments(
    small: nn.Module, teacher: nn.Module | None, steps: int | None, epochs: int | None, frozen_norm: float
) -> None:
    if steps is not None and epochs is not None:
        raise ValueError(f"steps={steps} and epochs={epochs}: give one of them")
    if teacher is small:
        raise ValueError("teacher is small itself: give the dense model that small was made from")
    if not 0 <= frozen_norm <= 1:
        raise ValueError(f"frozen_norm={frozen_norm}: write a share of the steps from 0 to 1")
    too_coarse = {p.dtype for p in small.parameters() if p.requires_grad and p.dtype.itemsize < 4}
    if too_coarse:
        raise ValueError(
            f"small has parameters in {too_coarse.pop()}, too coarse for the steps of an optimizer: write "
            "small.float() and accelerator=accelerate.Accelerator(mixed_precision='bf16')"
        )


def _objective(loss: Loss | None, teacher: nn.Module | None, inputs: Callable[[Any], Any] | None) -> Loss:
    if teacher is None:
        return loss or cross_entropy
    distillation = Distillation(teacher, inputs=inputs)
    if loss is None:
        return distillation
    task: Loss = loss
    return lambda model, batch: task(model, batch) + distillation(model, batch)


def _steps_of(epochs: int, data: Iterable[Any], group: ProcessGroup) -> int:
    """The steps of some epochs: a process has its share of the batches, and a step takes several of them."""
    batches = Batches.in_fixed_order(data, None).count()
    return epochs * math.ceil(batches / (group.size * group.accumulation_steps))


class EndToEndRun:
    """One run of end-to-end fine-tuning, which can be resumed from a checkpoint.

    Args:
        small: the model, in eval mode.
        objective: the loss that is minimized.
        data: the batches to train on.
        validate: the batches to evaluate on, if any.
        loop: the training loop over the parameters of the model.
        group: the processes that train together.
        frozen_norm_steps: BatchNorm keeps its statistics in the first steps, so many of them.
    """

    def __init__(
        self,
        small: nn.Module,
        objective: Loss,
        data: Iterable[Any],
        validate: Iterable[Any] | None,
        loop: TrainingLoop,
        group: ProcessGroup,
        frozen_norm_steps: int,
    ) -> None:
        self._small, self._objective, self._loop, self._group = small, objective, loop, group
        self._frozen_norm_steps = frozen_norm_steps
        self._split = BatchSplit(None, rank=group.rank, size=group.size)
        self._validate = None if validate is None else Batches.in_fixed_order(validate, None)
        self._source = OwnRandomness(data, group.gather(random_state(data))[0], same_order=False)
        self._batches = Batches(self._source)
        self._stream = ExampleStream[tuple[int, Any]](self._windows)

    def train(self, saved: Checkpoint | None, steps_bar: Any) -> TuningReport:
        """Train to the end, from the checkpoint if there is one."""
        start = time.perf_counter()
        before = self._begin(saved)
        steps_bar.update(self._loop.steps_done)

        def save() -> None:
            if saved is not None:
                own = {"position": self._stream.position, "pass": self._source.this_pass, "random": random_state()}
                state = {"before": before, "loop": self._loop.state()}
                saved.save("current", {**state, "processes": self._group.gather(own)})

        def on_step(loss: float) -> None:
            steps_bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
            steps_bar.update()

        self._loop.run(self._loss, self._evaluate if self._validate else None, save, on_step)
        losses = self._loop.losses
        first = before if self._validate else (losses[0] if losses else math.nan)
        best = self._loop.best_error if losses else first
        seconds = time.perf_counter() - start
        return TuningReport(first, best, self._loop.steps_done, seconds, self._loop.note, tuple(losses))

    def _begin(self, saved: Checkpoint | None) -> float:
        """Begin with the first batch, or where the checkpoint stands; return the loss before training."""
        current = None if saved is None else saved.load("current")
        self._group.barrier()  # no process writes before all have read
        if current is None:
            if not self._stream.begin():
                raise ValueError(f"data has no batch for process {self._group.rank} of {self._group.size}")
            before = self._evaluate() if self._validate else math.inf
            self._loop.best_error = before
            return before
        own = current["processes"][self._group.rank]
        self._loop.set_state(current["loop"])
        self._source.next_pass = own["pass"]
        self._stream.seek(own["position"])
        set_random_state(own["random"])
        return float(current["before"])

    def _windows(self, start: int) -> Iterator[Window[tuple[int, Any]]]:
        for index, batch in self._batches.numbered(start, self._split.own):
            yield Window(index, [(index, batch)])

    def _loss(self) -> Tensor:
        index, batch = next(self._stream)
        norms_frozen = self._loop.steps_done < self._frozen_norm_steps
        with naming_batch(index, batch), _in_train_mode(self._small, norms_frozen=norms_frozen):
            value = self._objective(self._small, moved(batch, self._group.device))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"loss gave {value!r:.60}: a loss is a function (model, batch) -> scalar tensor")
        if not value.requires_grad:
            raise ValueError("the loss does not depend on any parameter that is trained")
        return value.reshape(())

    @torch.no_grad()
    def _evaluate(self) -> float:
        """The mean loss of the batches to validate on, over all processes."""
        total = count = 0.0
        assert self._validate is not None
        for index, batch in self._validate.numbered(part=self._split.own):
            with naming_batch(index, batch):
                total += float(self._objective(self._small, moved(batch, self._group.device)))
            count += 1
        total, count = self._group.totals(total, count)
        if not count:
            raise ValueError("validate is empty: at least one batch is needed")
        return total / count


@contextmanager
def _in_train_mode(model: nn.Module, *, norms_frozen: bool) -> Iterator[None]:
    """Run the block in train mode, except for BatchNorm where it is frozen."""
    with training_as_now(*model.modules()):
        for module in model.modules():
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            module.training = not (is_norm and norms_frozen)
        yield

"""Fine-tuning of the whole network, end to end: the task's loss, a teacher, or both."""

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
from decomp.data.batches import Batches, naming_batch, require_passes
from decomp.data.rng import OwnRandomness, random_state, set_random_state
from decomp.data.windows import Endless, Split, Window
from decomp.network.forward import evaluating, moved
from decomp.training.checkpoint import Checkpoint, identify, name_of
from decomp.training.distributed import Team, team
from decomp.training.loop import (
    Descent,
    MakeOptimizer,
    MakeSchedule,
    Recipe,
    Trained,
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


class Course:
    """One run of end-to-end fine-tuning, which can be left and taken up again.

    Args:
        small: the model, in eval mode.
        objective: the loss.
        data: what it is trained on.
        validate: what it is judged by, if anything.
        descent: the steps.
        together: the processes.
        norm_steps: so many steps BatchNorm keeps its statistics.
    """

    def __init__(
        self,
        small: nn.Module,
        objective: Loss,
        data: Iterable[Any],
        validate: Iterable[Any] | None,
        descent: Descent,
        together: Team,
        norm_steps: int,
    ) -> None:
        self._small, self._objective, self._descent, self._team = small, objective, descent, together
        self._norm_steps = norm_steps
        self._split = Split(0, together.rank, together.size)
        self._validate = None if validate is None else Batches(validate)
        self._source = OwnRandomness(data, together.gather(random_state(data))[0], again=False)
        self._batches = Batches(self._source)
        self._stream = Endless[tuple[int, Any]](self._windows)

    def run(self, store: Checkpoint, steps_bar: Any) -> TuningReport:
        """Train to the end, from where an earlier run came to."""
        start = time.perf_counter()
        before = self._resume(store)
        steps_bar.update(self._descent.done)

        def keep() -> None:
            if store.kept:
                here = {"place": self._stream.place, "pass": self._source.this_pass, "random": random_state()}
                state = {"before": before, "descent": self._descent.state()}
                store.save("current", {**state, "processes": self._team.gather(here)})

        def report(value: float) -> None:
            steps_bar.set_postfix(loss=f"{value:.3g}", refresh=False)
            steps_bar.update()

        self._descent.run(self._loss, self._measure if self._validate else None, keep, report)
        losses = self._descent.losses
        first = before if self._validate else (losses[0] if losses else math.nan)
        best = self._descent.best_error if losses else first
        seconds = time.perf_counter() - start
        return TuningReport(first, best, self._descent.done, seconds, self._descent.note, tuple(losses))

    def _resume(self, store: Checkpoint) -> float:
        """The loss before training; the descent and the data are where they were left."""
        reached = store.load("current")
        self._team.wait()  # nobody writes before everybody has looked
        if reached is None:
            if not self._stream.begin():
                raise ValueError(f"data has no batch for process {self._team.rank} of {self._team.size}")
            before = self._measure() if self._validate else math.inf
            self._descent.best_error = before
            return before
        here = reached["processes"][self._team.rank]
        self._descent.set_state(reached["descent"])
        self._source.next_pass = here["pass"]
        self._stream.seek(here["place"])
        set_random_state(here["random"])
        return float(reached["before"])

    def _windows(self, start: int) -> Iterator[Window[tuple[int, Any]]]:
        for index, batch in self._batches.numbered(start, self._split.own):
            yield Window(index, [(index, batch)])

    def _loss(self) -> Tensor:
        index, batch = next(self._stream)
        with naming_batch(index, batch), _teaching(self._small, self._descent.done < self._norm_steps):
            value = self._objective(self._small, moved(batch, self._team.device))
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise TypeError(f"loss gave {value!r:.60}: a loss is a function (model, batch) -> scalar tensor")
        if not value.requires_grad:
            raise ValueError("the loss does not depend on any parameter that is trained")
        return value.reshape(())

    @torch.no_grad()
    def _measure(self) -> float:
        total = count = 0.0
        assert self._validate is not None
        for index, batch in self._validate.numbered(part=self._split.own):
            with naming_batch(index, batch):
                total += float(self._objective(self._small, moved(batch, self._team.device)))
            count += 1
        total, count = self._team.totals(total, count)
        if not count:
            raise ValueError("validate is empty: at least one batch is needed")
        return total / count


@contextmanager
def _teaching(model: nn.Module, norms_frozen: bool) -> Iterator[None]:
    """Run the block in train mode, BatchNorm apart where it is frozen."""
    with evaluating(model):
        for module in model.modules():
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            module.training = not (is_norm and norms_frozen)
        yield


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
    train: Trained = None,
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
    neither it is cross-entropy on batches of (inputs, labels). Frozen parameters stay frozen. After a NaN the
    model is what it was when it was last judged, after every twentieth of the steps, and the report says so.
    Processes and checkpoints are as for :func:`decomp.finetune_layerwise`; shuffled data has a new order in every
    epoch.

    Args:
        small: the model, factorized or not.
        data: an iterable of batches that can be gone through again.
        loss: a function (model, batch) -> scalar tensor, of the batch as it comes, on the device of the model; one
            of :mod:`decomp.losses`, or your own. It is remembered by its name where there is a checkpoint.
        teacher: the dense model.
        steps: steps of the optimizer; or else
        epochs: passes through the data; 3 where neither is given.
        lr: learning rate at the start.
        inputs: with ``teacher``, what both are called with, from a batch: ``lambda batch: batch[0]`` where labels
            come with it.
        train: which parameters, by globs on their names or a predicate (name, parameter).
        optimizer: a function of parameters and learning rate; by default Adam.
        schedule: a function of the optimizer and the steps; by default a cosine down to a hundredth.
        validate: batches that the model is judged by, with the same loss: its best state is kept. Without them,
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
    >>> report = decomp.finetune(small, [torch.randn(16, 32) for _ in range(5)], teacher=dense, steps=40, lr=1e-2)
    >>> report.loss_after < report.loss_before
    True

    Source: Hinton, Vinyals and Dean 2015.
    """
    _check(small, teacher, steps, epochs, frozen_norm)
    for passes in (data, data if validate is None else validate):
        require_passes(passes)
    chosen = _chosen(small, train)
    objective = _objective(loss, teacher, inputs)
    with team(accelerator, small, teacher) as together, torch.inference_mode(False):
        together.spread(small)
        steps = steps if steps is not None else _steps(3 if epochs is None else epochs, data, together)
        recipe = Recipe(steps, lr, optimizer, schedule, patience, checkpoint_every)
        options = {"frozen_norm": frozen_norm, "loss": _described(loss), "validate": validate is not None}
        models = identify(small=small, teacher=teacher)
        identity = {"call": "finetune", "train": sorted(chosen), **options, **models, **recipe.identity()}
        identity |= together.identity()
        store = Checkpoint(checkpoint, identity, writes=together.rank == 0)
        tensors = {**dict(small.named_parameters()), **dict(small.named_buffers())}
        descent = Descent(tensors, chosen, recipe, together)
        course = Course(small, objective, data, validate, descent, together, round(frozen_norm * steps))
        shown = progress if together.rank == 0 else False
        with bar(shown, "fine-tune", total=steps) as steps_bar, evaluating(small):
            return course.run(store, steps_bar)


def _objective(loss: Loss | None, teacher: nn.Module | None, inputs: Callable[[Any], Any] | None) -> Loss:
    if teacher is None:
        return loss or cross_entropy
    taught = Distillation(teacher, inputs=inputs)
    if loss is None:
        return taught
    task: Loss = loss
    return lambda model, batch: task(model, batch) + taught(model, batch)


def _chosen(small: nn.Module, train: Trained) -> set[str]:
    chosen = trained_parameters(small, train)
    if not chosen:
        raise ValueError("small has nothing to train: every parameter is frozen, or train= leaves all of them out")
    return chosen


def _described(loss: Loss | None) -> Any:
    return loss.identity() if isinstance(loss, Distillation) else name_of(loss)


def _steps(epochs: int, data: Iterable[Any], together: Team) -> int:
    """The steps of some epochs: a process has its share of the batches, and a step takes several of them."""
    batches = Batches(data).count()
    return epochs * math.ceil(batches / (together.size * together.accumulation))


def _check(
    small: nn.Module, teacher: nn.Module | None, steps: int | None, epochs: int | None, frozen_norm: float
) -> None:
    if steps is not None and epochs is not None:
        raise ValueError(f"steps={steps} and epochs={epochs}: give one of them")
    if teacher is small:
        raise ValueError("teacher is small itself: give the dense model that small was made from")
    if not 0 <= frozen_norm <= 1:
        raise ValueError(f"frozen_norm={frozen_norm}: write a share of the steps from 0 to 1")
    coarse = {p.dtype for p in small.parameters() if p.requires_grad and p.dtype.itemsize < 4}
    if coarse:
        raise ValueError(
            f"small has parameters in {coarse.pop()}, too coarse for the steps of an optimizer: write "
            "small.float() and accelerator=accelerate.Accelerator(mixed_precision='bf16')"
        )

"""A whole network in training: the model, the data and the descent between them."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decomp.data.batches import Batches, naming_batch
from decomp.data.rng import OwnRandomness, random_state, set_random_state
from decomp.data.windows import Endless, Split, Window
from decomp.network.forward import evaluating, moved
from decomp.training.checkpoint import Checkpoint
from decomp.training.distributed import Team
from decomp.training.loop import Descent
from decomp.training.losses import Loss


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

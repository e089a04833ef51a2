"""The training loop: gradient steps with early stopping, a way back from NaN, and a state to resume from."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from decomp._util.naming import matches, some
from decomp.training.checkpoint import name_of
from decomp.training.distributed import ProcessGroup

EVALUATIONS = 20
FINAL_LEARNING_RATE_SHARE = 0.01

MakeOptimizer = Callable[[list[nn.Parameter], float], Optimizer]
MakeSchedule = Callable[[Optimizer, int], LRScheduler]
ParameterSelector: TypeAlias = "str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None"


def adam(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    """Adam with torch's defaults: the default of ``optimizer=``."""
    return torch.optim.Adam(parameters, lr)


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """A cosine from the learning rate down to a hundredth of it: the default of ``schedule=``."""
    rate = optimizer.param_groups[0]["lr"]
    return CosineAnnealingLR(optimizer, max(1, steps), rate * FINAL_LEARNING_RATE_SHARE)


@dataclass(frozen=True)
class TrainingSettings:
    """Steps, learning rate, optimizer, schedule and early stopping of one training loop.

    The loop evaluates after every twentieth of the steps; ``patience`` evaluations without a gain end it.
    """

    steps: int
    lr: float
    optimizer: MakeOptimizer
    schedule: MakeSchedule
    patience: int | None
    checkpoint_every: int

    def __post_init__(self) -> None:
        if self.steps < 0 or self.lr <= 0:
            raise ValueError(f"steps={self.steps}, lr={self.lr}: steps must be 0 or more, lr more than 0")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience={self.patience}: write 1 or more, or None to never stop early")
        if self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every={self.checkpoint_every}: write 1 or more steps")

    @property
    def interval(self) -> int:
        """Steps between two evaluations."""
        return max(1, math.ceil(self.steps / EVALUATIONS))

    def identity(self) -> dict[str, Any]:
        """The settings that a run must share with the checkpoint it resumes from."""
        functions = {"optimizer": name_of(self.optimizer), "schedule": name_of(self.schedule)}
        return {"steps": self.steps, "lr": self.lr, "patience": self.patience, **functions}


def trained_parameters(model: nn.Module, train: ParameterSelector) -> set[str]:
    """Names of the parameters that ``train`` selects, frozen ones left out.

    Raises:
        ValueError: a glob matches no parameter.
    """
    parameters = dict(model.named_parameters())
    free = {name for name, parameter in parameters.items() if parameter.requires_grad}
    if train is None:
        return free
    if callable(train):
        return {name for name in free if train(name, parameters[name])}
    globs = [train] if isinstance(train, str) else list(train)
    for glob in globs:
        if not any(matches(name, glob) for name in parameters):
            raise ValueError(f"train={glob!r} matches no parameter; parameters are {some(list(parameters))}")
    return {name for name in free if any(matches(name, glob) for glob in globs)}


class TrainingStopped(Exception):
    """Raised by a loss where training cannot go on; the message becomes the note of the report."""


class TrainingLoop:
    """Gradient steps on the parameters of a model, which ends in its best state, or in the latest finite one.

    Args:
        tensors: the parameters, and the buffers that belong to a state.
        trained: the names of the parameters that are trained.
        settings: steps, learning rate, optimizer, schedule, early stopping.
        group: the processes that train together.
    """

    # Attributes that a checkpoint holds, beside tensors and the states of optimizer and schedule.
    _SAVED = ("steps_done", "note", "best_error", "losses", "_recent_losses", "_evaluations_without_gain")

    def __init__(
        self, tensors: Mapping[str, Tensor], trained: set[str], settings: TrainingSettings, group: ProcessGroup
    ) -> None:
        self._tensors = dict(tensors)
        self._parameters: list[Any] = [tensor for name, tensor in tensors.items() if name in trained]
        self._settings, self._group = settings, group
        self._optimizer = settings.optimizer(self._parameters, settings.lr)
        self._schedule = settings.schedule(self._optimizer, settings.steps)
        self._best = self._snapshot()
        self._evaluations_without_gain = 0
        self._recent_losses: list[float] = []
        self.best_error = math.inf
        self.steps_done = 0
        self.note = ""
        self.losses: list[float] = []

    def run(
        self,
        loss: Callable[[], Tensor],
        evaluate: Callable[[], float] | None,
        save: Callable[[], None],
        on_step: Callable[[float], None],
    ) -> None:
        """Take the steps that are left and restore the best state.

        Args:
            loss: returns the loss of the next batch.
            evaluate: returns the error that states are compared by, the same on all processes; without it the
                latest state counts as the best.
            save: called after every ``checkpoint_every`` steps and at the end.
            on_step: called with the loss of each step.
        """
        try:
            while self.steps_done < self._settings.steps and not self.note:
                value = self._step(loss)
                if not math.isfinite(value):
                    self.note = self.note or f"NaN in step {self.steps_done + 1}: back to the last good state"
                    break
                self.steps_done += 1
                self._recent_losses.append(value)
                on_step(value)
                if self.steps_done % self._settings.interval == 0 or self.steps_done == self._settings.steps:
                    self._evaluate(evaluate)
                if self.steps_done % self._settings.checkpoint_every == 0:
                    save()
            self._restore(self._best)
            save()
        finally:
            self._optimizer.zero_grad()

    def _step(self, loss: Callable[[], Tensor]) -> float:
        """Take one step on all processes and return their mean loss; where that is not finite, take none."""
        group = self._group
        self._optimizer.zero_grad()
        total = 0.0
        try:
            for _ in range(group.accumulation_steps):
                with torch.enable_grad(), group.autocast():
                    value = loss()
                total += float(value.detach()) / group.accumulation_steps
                if not math.isfinite(total):
                    break
                group.backward(value, self._parameters)
        except TrainingStopped as stop:
            self.note, total = str(stop), math.nan
        mean = group.totals(total)[0] / group.size
        if math.isfinite(mean):
            for parameter in self._parameters:
                if parameter.grad is None and group.size > 1:
                    parameter.grad = torch.zeros_like(parameter)
            group.average([parameter.grad for parameter in self._parameters if parameter.grad is not None])
            group.step(self._optimizer)
            self._schedule.step()
        return mean

    def _evaluate(self, evaluate: Callable[[], float] | None) -> None:
        self._average_buffers()
        self.losses.append(sum(self._recent_losses) / len(self._recent_losses))
        self._recent_losses.clear()
        error = self.losses[-1] if evaluate is None else evaluate()
        if self._overflowed() or not math.isfinite(error):
            self.note = f"NaN in step {self.steps_done}: back to the last good state"
        elif evaluate is None or error < self.best_error:
            self.best_error, self._best, self._evaluations_without_gain = error, self._snapshot(), 0
        else:
            self._evaluations_without_gain += 1
            patience_ended = self._evaluations_without_gain == self._settings.patience
            if patience_ended and self.steps_done < self._settings.steps:
                steps = self._evaluations_without_gain * self._settings.interval
                self.note = f"stopped early: no gain in {steps} steps"

    def _overflowed(self) -> bool:
        """Whether a parameter or a running statistic is no longer finite; masks may hold infinities all along."""
        return any(
            not bool(torch.isfinite(tensor).all()) and bool(torch.isfinite(self._best[name]).all())
            for name, tensor in self._tensors.items()
        )

    def _average_buffers(self) -> None:
        """Running statistics have seen other batches on each process: take their means."""
        trained = {id(tensor) for tensor in self._parameters}
        buffers = [t for t in self._tensors.values() if id(t) not in trained and not isinstance(t, nn.Parameter)]
        self._group.average([tensor for tensor in buffers if tensor.is_floating_point()])

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def _restore(self, snapshot: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors.items():
            tensor.copy_(snapshot[name])

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, except the position in the data and the random generators."""
        return {
            **{name: getattr(self, name) for name in self._SAVED},
            "tensors": self._tensors,
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._group.scaler_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        for name in self._SAVED:
            setattr(self, name, state[name])
        self._restore(state["tensors"])
        for name, tensor in self._best.items():
            tensor.copy_(state["best"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self._optimizer.state.items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    # In the memory format of the parameter, so that the same kernels run on it.
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self._schedule.load_state_dict(state["schedule"])
        self._group.set_scaler_state(state["scaler"])

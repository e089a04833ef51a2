"""Gradient steps that stop early, survive NaN, and go on from a checkpoint bit by bit as if never stopped."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from decomp.training.checkpoint import name_of
from decomp.training.distributed import Team

EVALUATIONS = 20
FINAL_LEARNING_RATE_SHARE = 0.01
_COUNTS = ("done", "note", "best_error", "losses", "_recent", "_stale")  # of a descent

MakeOptimizer = Callable[[list[nn.Parameter], float], Optimizer]
MakeSchedule = Callable[[Optimizer, int], LRScheduler]
Trained: TypeAlias = "str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None"


def adam(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    """Adam as torch has it: the default ``optimizer=``, and an example of one."""
    return torch.optim.Adam(parameters, lr)


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """A cosine from the learning rate down to a hundredth of it: the default ``schedule=``."""
    rate = optimizer.param_groups[0]["lr"]
    return CosineAnnealingLR(optimizer, max(1, steps), rate * FINAL_LEARNING_RATE_SHARE)


@dataclass(frozen=True)
class Recipe:
    """How long and by what steps a thing is trained.

    It is judged after every twentieth of the steps; ``patience`` such judgements without a gain end it.
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
        """Steps between two judgements."""
        return max(1, math.ceil(self.steps / EVALUATIONS))

    def identity(self) -> dict[str, Any]:
        """The recipe as a checkpoint remembers it."""
        how = {"optimizer": name_of(self.optimizer), "schedule": name_of(self.schedule)}
        return {"steps": self.steps, "lr": self.lr, "patience": self.patience, **how}


class Halt(Exception):
    """Raised in a loss where training cannot go on; the message is the note in the report."""


def trained_parameters(model: nn.Module, train: Trained) -> set[str]:
    """Names of the parameters to train: those that are not frozen, of these what ``train`` matches.

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
        if not any(fnmatchcase(name, glob) for name in parameters):
            known = ", ".join(map(repr, list(parameters)[:6]))
            raise ValueError(f"train={glob!r} matches no parameter; parameters are {known}, ...")
    return {name for name in free if any(fnmatchcase(name, glob) for glob in globs)}


class Descent:
    """Gradient steps on ``parameters``; what is kept is the best state that was seen, or the latest sound one.

    Args:
        tensors: everything that makes a state: the parameters, and buffers that move along.
        parameters: the names of those that are trained.
        recipe: how.
        team: the processes that train together.
    """

    def __init__(self, tensors: Mapping[str, Tensor], parameters: set[str], recipe: Recipe, team: Team) -> None:
        self._tensors = dict(tensors)
        self._parameters: list[Any] = [tensor for name, tensor in tensors.items() if name in parameters]
        self._recipe, self._team = recipe, team
        self._optimizer = recipe.optimizer(self._parameters, recipe.lr)
        self._schedule = recipe.schedule(self._optimizer, recipe.steps)
        self._best = self._copy()
        self._stale = 0
        self._recent: list[float] = []
        self.best_error = math.inf
        self.done = 0
        self.note = ""
        self.losses: list[float] = []

    def run(
        self,
        loss: Callable[[], Tensor],
        measure: Callable[[], float] | None,
        keep: Callable[[], None],
        report: Callable[[float], None],
    ) -> None:
        """Take the steps that are left and put the best state in place.

        Args:
            loss: the loss of the next batch.
            measure: an error to judge by, the same on all processes; without it the latest state counts as best.
            keep: called after every ``checkpoint_every`` steps and at the end.
            report: called with the loss of each step.
        """
        while self.done < self._recipe.steps and not self.note:
            value = self._step(loss)
            if not math.isfinite(value):
                self.note = self.note or f"NaN in step {self.done + 1}: back to the last good state"
                break
            self.done += 1
            self._recent.append(value)
            report(value)
            if self.done % self._recipe.interval == 0 or self.done == self._recipe.steps:
                self._judge(measure)
            if self.done % self._recipe.checkpoint_every == 0:
                keep()
        self._put(self._best)
        self._optimizer.zero_grad()
        keep()

    def _step(self, loss: Callable[[], Tensor]) -> float:
        """One step on all processes; their mean loss, not finite where any of them failed, and then no step."""
        team = self._team
        self._optimizer.zero_grad()
        total = 0.0
        try:
            for _ in range(team.accumulation):
                with torch.enable_grad(), team.autocast():
                    value = loss()
                total += float(value.detach()) / team.accumulation
                if not math.isfinite(total):
                    break
                team.backward(value, self._parameters)
        except Halt as halt:
            self.note, total = str(halt), math.nan
        mean = team.totals(total)[0] / team.size
        if math.isfinite(mean):
            for parameter in self._parameters:
                if parameter.grad is None and team.size > 1:
                    parameter.grad = torch.zeros_like(parameter)
            team.average([parameter.grad for parameter in self._parameters if parameter.grad is not None])
            team.step(self._optimizer)
            self._schedule.step()
        return mean

    def _judge(self, measure: Callable[[], float] | None) -> None:
        self._level()
        self.losses.append(sum(self._recent) / len(self._recent))
        self._recent.clear()
        error = self.losses[-1] if measure is None else measure()
        sound = all(bool(torch.isfinite(tensor).all()) for tensor in self._parameters)
        if not sound or not math.isfinite(error):
            self.note = f"NaN in step {self.done}: back to the last good state"
        elif measure is None or error < self.best_error:
            self.best_error, self._best, self._stale = error, self._copy(), 0
        else:
            self._stale += 1
            if self._stale == self._recipe.patience and self.done < self._recipe.steps:
                self.note = f"stopped early: no gain in {self._stale * self._recipe.interval} steps"

    def _level(self) -> None:
        """Running statistics have seen other batches on each process: take their means."""
        trained = {id(tensor) for tensor in self._parameters}
        moving = [t for t in self._tensors.values() if id(t) not in trained and not isinstance(t, nn.Parameter)]
        self._team.average([tensor for tensor in moving if tensor.is_floating_point()])

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def _put(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, but the place in the data and the random numbers."""
        return {
            **{name: getattr(self, name) for name in _COUNTS},
            "tensors": self._tensors,
            "best": self._best,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._team.scaler_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go where :meth:`state` was read."""
        for name in _COUNTS:
            setattr(self, name, state[name])
        self._put(state["tensors"])
        for name, tensor in self._best.items():
            tensor.copy_(state["best"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self._optimizer.state.items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    # In the memory format of the parameter, so that the same kernels run on it.
                    moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self._schedule.load_state_dict(state["schedule"])
        self._team.set_scaler_state(state["scaler"])

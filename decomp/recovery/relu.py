"""Least squares for what is left of an output after its ReLU: targets that move with the layer, fit by fit."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from decomp.data.activations import Example
from decomp.data.batches import CLOSED_FORM_SPLIT
from decomp.network.forward import slope_of_norm
from decomp.network.tracing import Tail
from decomp.recovery.least_squares import Refit, State

SCHEDULE = (0.01,) * 5 + (1.0,) * 5

_RELUS = {functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


@dataclass(frozen=True)
class Rectifier:
    """r(y) = min(max(scale y + shift, 0), top) per output channel: a ReLU or ReLU6, behind a BatchNorm or not."""

    top: float
    scale: Tensor | None = None
    shift: Tensor | None = None

    def reads(self, output: Tensor, axes: int) -> bool:
        """Whether what is scaled, axis 1, are the channels of a layer with so many spatial axes."""
        return self.scale is None or output.dim() == axes + 2

    def __call__(self, y: Tensor) -> Tensor:
        """Of rows (groups, n, T)."""
        return self._normed(y).clamp(0, self.top)

    def aim(self, y: Tensor, goal: Tensor, weight: float) -> Tensor:
        """What the outputs y should be for r of them to come closer to the goal, and not far from y."""
        scale = torch.ones_like(y[:, :1]) if self.scale is None else self.scale.reshape(len(y), 1, -1)
        normed = self._normed(y)
        step = nearest(normed, goal, weight, self.top) - normed
        return y + torch.where(scale == 0, 0.0, step / torch.where(scale == 0, 1.0, scale))

    def _normed(self, y: Tensor) -> Tensor:
        if self.scale is None or self.shift is None:
            return y
        return y * self.scale.reshape(len(y), 1, -1) + self.shift.reshape(len(y), 1, -1)


def nearest(y: Tensor, goal: Tensor, weight: float, top: float = math.inf) -> Tensor:
    """The z that minimizes (goal - min(max(z, 0), top))^2 + weight (z - y)^2, element by element.

    One candidate on each piece of the function: min(0, y), the mean of the two clamped to [0, top], max(top, y).

    >>> nearest(torch.tensor([-1.0, -1.0]), torch.tensor([0.2, 3.0]), 1.0)
    tensor([-1.,  1.])
    """
    candidates = [y.clamp(max=0), ((weight * y + goal) / (weight + 1)).clamp(0, top)]
    if math.isfinite(top):
        candidates.append(y.clamp(min=top))
    choices = torch.stack(candidates)
    costs = (goal - choices.clamp(0, top)).square() + weight * (choices - y).square()
    return choices.gather(0, costs.argmin(0, keepdim=True))[0]


def rectifier(tail: Tail, tail_of_dense: Tail) -> Rectifier | None:
    """Read a tail that is a ReLU, directly or behind a BatchNorm in eval mode; None for any other.

    The dense layer must be followed by the same ReLU.
    """
    top = _top(tail)
    if top is None or top != _top(tail_of_dense):
        return None
    if len(tail.steps) == 1:
        return Rectifier(top)
    norm = tail.steps[0]
    if len(tail.steps) > 2 or norm.func is not functional.batch_norm:
        return None
    given = norm.arguments()
    if given["training"] or given["running_mean"] is None:
        return None
    scale = slope_of_norm(given["running_var"], given["eps"], given["weight"])
    beta = 0.0 if given["bias"] is None else given["bias"].detach().to(torch.float64)
    return Rectifier(top, scale, beta - given["running_mean"].detach().to(torch.float64) * scale)


def _top(tail: Tail) -> float | None:
    """Where the ReLU at the end of a tail ends itself; None where there is no ReLU."""
    func = tail.steps[-1].func if tail.steps else None
    if func in _RELUS:
        return math.inf
    if func is functional.relu6:
        return 6.0
    if func is functional.hardtanh:
        given = tail.steps[-1].arguments()
        return float(given["max_val"]) if given["min_val"] == 0 else None
    return None


class Rectified:
    """The refit of one layer for what its ReLU gives.

    Args:
        refit: of the layer, with the moments of its inputs.
        examples: its inputs and the outputs of the dense layer, as often as asked for.
        after: the ReLU behind the layer, and the BatchNorm in between.
        tail: what follows the dense layer.
    """

    def __init__(self, refit: Refit, examples: Iterable[Example], after: Rectifier, tail: Tail) -> None:
        self._refit, self._examples, self._after, self._tail = refit, examples, after, tail

    def apply(self, old: State) -> tuple[float, float]:
        """Go on from the linear solution, leave the best state in the layer; its error and that of the old one."""
        before, _ = self._pass(old, None)
        best, best_state, state = before, old, self._refit.state
        for weight in (*SCHEDULE, None):
            error, solved = self._pass(state, weight)
            if error < best:
                best, best_state = error, state
            state = solved
        self._refit.put(best_state)
        return before, best

    def error(self) -> float:
        """Relative error after the ReLU, as the layer is, on the batches held out (on all where none was)."""
        return self._pass(self._refit.state, None)[0]

    def _pass(self, state: State, weight: float | None) -> tuple[float, State]:
        """Measure a state; with a weight, solve for the targets that it leads to as well."""
        equations = self._refit.equations.aimless()
        matrix, bias = state
        lost = energy = 0.0
        for example in self._examples:
            held = CLOSED_FORM_SPLIT.held_out(example.batch)
            measured = held or not self._refit.holds_out
            if not measured and weight is None:
                continue
            for z, goal in self._refit.rows(example.received, self._tail(example.targets[0])):
                y = z @ matrix.mT if bias is None else z @ matrix.mT + bias[:, None]
                if measured:
                    lost += float((self._after(y) - goal).square().sum())
                    energy += float(goal.square().sum())
                if not held and weight is not None:
                    equations.aim(z, self._after.aim(y, goal, weight))
        error = math.sqrt(lost / energy) if energy else math.sqrt(lost)
        if weight is None:
            return error, state
        # Pulled towards the state that the targets were made for, not towards the old factor.
        return error, equations.solve(matrix, self._refit.ridge, centred=bias is not None)

"""Least squares for the output after the ReLU (Zhang et al. 2016, section 3.2): alternating targets and fits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from decomp.data.activations import Example
from decomp.network.forward import norm_scale
from decomp.network.tracing import Tail
from decomp.recovery.least_squares import NormalEquations, Refit, State

SCHEDULE = (0.01,) * 5 + (1.0,) * 5

_RELUS = {functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


@dataclass(frozen=True)
class Rectifier:
    """r(y) = min(max(scale y + shift, 0), top) per output channel: a ReLU or ReLU6, also after a BatchNorm."""

    top: float
    scale: Tensor | None = None
    shift: Tensor | None = None

    def applies_to(self, output: Tensor, axes: int) -> bool:
        """Whether axis 1, which the BatchNorm scales, holds the channels of a layer with so many spatial axes."""
        return self.scale is None or output.dim() == axes + 2

    def __call__(self, y: Tensor) -> Tensor:
        """Apply r to rows (groups, n, T)."""
        return self._normed(y).clamp(0, self.top)

    def targets(self, y: Tensor, goal: Tensor, weight: float) -> Tensor:
        """The outputs t that minimize (goal - r(t))^2 + weight (s t - s y)^2 element by element, s the scale."""
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
    """The rectifier that a tail computes: a ReLU, alone or after a BatchNorm in eval mode; None for others.

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
    options = norm.arguments()
    if options["training"] or options["running_mean"] is None:
        return None
    scale = norm_scale(options["running_var"], options["eps"], options["weight"])
    beta = 0.0 if options["bias"] is None else options["bias"].detach().to(torch.float64)
    return Rectifier(top, scale, beta - options["running_mean"].detach().to(torch.float64) * scale)


def _top(tail: Tail) -> float | None:
    """The upper bound of the ReLU at the end of a tail, inf for a plain one; None if the tail ends otherwise."""
    func = tail.steps[-1].func if tail.steps else None
    if func in _RELUS:
        return math.inf
    if func is functional.relu6:
        return 6.0
    if func is functional.hardtanh:
        options = tail.steps[-1].arguments()
        return float(options["max_val"]) if options["min_val"] == 0 else None
    return None


class ReluRefit:
    """Refit of one layer that minimizes the error after its ReLU.

    Args:
        refit: the linear refit of the layer, which holds the normal equations of its inputs: it is not wide.
        examples: inputs of the layer and outputs of the dense one; iterated over once per pass.
        relu: the ReLU after the layer, with the BatchNorm in between.
        tail: the functions after the dense layer, which compute the goal.
    """

    def __init__(self, refit: Refit, examples: Iterable[Example], relu: Rectifier, tail: Tail) -> None:
        self._refit, self._examples, self._relu, self._tail = refit, examples, relu, tail

    def apply(self, old: State) -> tuple[float, float]:
        """Refit from the linear solution and set the best state; return the errors of ``old`` and of the best."""
        before, _ = self._pass(old, None)
        best, best_state, state = before, old, self._refit.state
        for weight in (*SCHEDULE, None):
            error, next_state = self._pass(state, weight)
            if error < best:
                best, best_state = error, state
            state = next_state
        self._refit.set_state(best_state)
        return before, best

    def error(self) -> float:
        """Relative error after the ReLU, on held-out batches, or on all if there are none."""
        return self._pass(self._refit.state, None)[0]

    def _pass(self, state: State, weight: float | None) -> tuple[float, State]:
        """The error of a state after the ReLU; with a weight, also the next state, fitted to its targets."""
        equations = cast(NormalEquations, self._refit.equations).without_targets()
        matrix, bias = state
        squared_error = energy = 0.0
        for example in self._examples:
            goals = self._tail(example.targets[0])
            for z, goal, count, held_out in self._refit.rows(example.received, goals, example.batch, example.mask):
                measured = held_out or not self._refit.has_held_out
                if not measured and weight is None:
                    continue
                y = z @ matrix.mT if bias is None else z @ matrix.mT + bias[:, None]
                if measured:
                    squared_error += count * float((self._relu(y) - goal).square().sum())
                    energy += count * float(goal.square().sum())
                if not held_out and weight is not None:
                    equations.add_targets(z, self._relu.targets(y, goal, weight), count)
        error = math.sqrt(squared_error / energy) if energy else math.sqrt(squared_error)
        if weight is None:
            return error, state
        # The ridge is towards the state that the targets were computed for, not towards the original factor.
        return error, next(equations.solutions(matrix, (self._refit.ridge,), centred=bias is not None))

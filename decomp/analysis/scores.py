"""How good a compressed model is: by the user's function, or by the error of its output."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isnan, sqrt
from typing import Any

import torch
from torch import nn

from decomp.data.batches import Batches
from decomp.network.forward import Unfused, call, evaluating, flat_output, to_device_of
from decomp.planning.choice import Change

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Totals:
    """Costs of the whole model before and after, and the predicted relative error.

    ``error`` is that of the output, first order, where data tell how much a layer counts for it; else the root
    mean square over the layers of the errors of their outputs, where there are statistics, or of their weights.
    """

    params: Change
    macs: Change
    seconds: Change | None
    error: float

    def share(self, kind: str) -> float:
        """What is left of "params", "macs" or "seconds", as a share."""
        change = getattr(self, kind)
        return float(change.after / change.before)


class Judge:
    """Scores models: with ``evaluate``, else ||f'(x) - f(x)|| / ||f(x)|| of the output over batches of ``data``.

    Without ``data`` as well, the batch is ``example_inputs``.
    """

    def __init__(
        self,
        dense: nn.Module,
        example_inputs: Any,
        evaluate: Evaluate | None = None,
        data: Iterable[Any] | None = None,
        inputs: Callable[[Any], Any] | None = None,
    ) -> None:
        if evaluate is not None and not callable(evaluate):
            raise TypeError(
                f"evaluate={evaluate!r} is not a function: write one that takes a model and returns its score"
            )
        if data is None and inputs is not None:
            raise ValueError(
                "inputs= says what the model is called with from a batch of data=: give data= as well"
            )
        self._dense, self._evaluate = dense, evaluate
        self._batches: Iterable[Any] = [example_inputs] if data is None else Batches(data, inputs)
        self.name = "output error" if evaluate is None else "score"

    @property
    def is_error(self) -> bool:
        """Whether less is better, and 0 is what the dense model has."""
        return self._evaluate is None

    def __call__(self, model: nn.Module) -> float:
        """Score one model.

        Raises:
            TypeError: ``evaluate`` returned something else than a number.
        """
        if self._evaluate is None:
            return 0.0 if model is self._dense else self._output_error(model)
        score = self._evaluate(model)
        try:
            number = float(score)
        except (TypeError, ValueError):
            raise TypeError(
                f"evaluate returned {score!r}: it must return one number, the accuracy for example"
            ) from None
        if isnan(number):
            raise ValueError("evaluate returned NaN: it must return a number that can be compared")
        return number

    @torch.no_grad()
    def _output_error(self, model: nn.Module) -> float:
        lost = energy = 0.0
        with evaluating(model, self._dense), Unfused():
            for batch in self._batches:
                batch = to_device_of(self._dense, batch)
                expected = flat_output(call(self._dense, batch))
                lost += float((flat_output(call(model, batch)) - expected).square().sum())
                energy += float(expected.square().sum())
        if energy == 0:
            raise ValueError(
                "the output of the dense model is zero on all of data, or data is empty: an error relative to it "
                "means nothing; give other batches, or evaluate="
            )
        return sqrt(lost / energy)

"""How good a compressed model is: by the user's function, or by the error of its output."""

from collections.abc import Callable, Iterable
from math import isnan, sqrt
from typing import Any

import torch
from torch import nn

from decomp.data.batches import Batches
from decomp.network.forward import Unfused, call, difference, evaluating, flat_output, to_device_of

Evaluate = Callable[[nn.Module], float]
NO_NAMES = ("evaluate", "score", "scorer", "f", "fn")


class Scorer:
    """Scores models: by ``evaluate``, else by the error of the output.

    The error is ||f'(x) - f(x)|| / ||f(x)||, with f the dense model and x over all batches of ``data``.

    Args:
        dense: the model that others are compared with.
        example_inputs: the batch that the output error is measured on where there is no ``data``.
        evaluate: a function of a model that returns its score; higher is better.
        data: batches that the output error is measured on.
        inputs: what the model is called with, from a batch of ``data``.

    Raises:
        TypeError: ``evaluate`` is not a function.
        ValueError: ``inputs`` is given without ``data``.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> double = nn.Linear(2, 2, bias=False)
    >>> double.load_state_dict({"weight": 2 * model.weight})
    <All keys matched successfully>
    >>> scorer = Scorer(model, torch.ones(1, 2))
    >>> scorer.name, scorer(model), scorer(double)
    ('output error', 0.0, 1.0)
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
        self._batches: Iterable[Any] = [example_inputs] if data is None else Batches.in_fixed_order(data, inputs)
        self.name = "output error" if evaluate is None else "score"
        self.label = self.name if evaluate is None else _name_of(evaluate)

    @property
    def is_error(self) -> bool:
        """Whether lower is better; the dense model then has 0."""
        return self._evaluate is None

    def __call__(self, model: nn.Module) -> float:
        """Score one model.

        Args:
            model: the dense model, or one that takes the same batches.

        Raises:
            TypeError: ``evaluate`` returned something else than a number.
            ValueError: ``evaluate`` returned NaN, or the output of the dense model is zero.
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
        squared_error = energy = 0.0
        with evaluating(model, self._dense), Unfused():
            for batch in self._batches:
                batch = to_device_of(self._dense, batch)
                expected = flat_output(call(self._dense, batch))
                output = flat_output(call(model, batch))
                squared_error += float(difference(model, output, expected).square().sum())
                energy += float(expected.square().sum())
        if energy == 0:
            raise ValueError(
                "the dense model outputs zero on all of data, or data is empty, so there is no relative error of "
                "the output: give other batches, or evaluate="
            )
        return sqrt(squared_error / energy)


def _name_of(evaluate: Evaluate) -> str:
    """What a figure calls the score: the name of the function, where it says more than that it evaluates.

    >>> def top_1_accuracy(model): ...
    >>> _name_of(top_1_accuracy), _name_of(lambda model: 1.0)
    ('top 1 accuracy', 'score')
    """
    name = getattr(evaluate, "__name__", "")
    return name.replace("_", " ").strip() if name.isidentifier() and name not in NO_NAMES else "score"

"""Gradients by the outputs of layers: what an error inside of the network does to its output or to a loss."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from decomp.network.forward import call, flat_output, floating


class Slope:
    """A scalar whose gradient by a layer's output says what an error there does.

    Of a loss it is the loss itself. Of several values f it is v^T f for a random v of unit variance, a new one for
    each batch: E[J^T v v^T J] = J^T J, and ||J dy||^2 is how much f changes. ``energy`` is the sum of ||f||^2, and
    1 for a loss.
    """

    def __init__(self, loss: Callable[[nn.Module, Any], Tensor] | Literal["output"]) -> None:
        if not callable(loss) and loss != "output":
            raise ValueError(f'loss={loss!r}: write "output", or a function of the model and a batch')
        self._loss = loss
        self._generator = torch.Generator().manual_seed(0)
        self._energy = 0.0

    @property
    def energy(self) -> float:
        """What the gradients are relative to."""
        return self._energy or 1.0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        value = self._loss(model, batch) if callable(self._loss) else self._output(model, batch)
        if not isinstance(value, Tensor):
            raise TypeError(f"loss must give a tensor, not {type(value).__name__}")
        if value.numel() == 1:
            return value.reshape(())
        self._energy += float(value.detach().float().square().sum())
        directions = torch.randn(value.shape, generator=self._generator).to(value)
        return (value * directions).sum()

    def _output(self, model: nn.Module, batch: Any) -> Tensor:
        result = call(model, batch)
        if not floating(result):
            raise ValueError("loss='output': the model gives no tensor of floats: write a function, or loss=None")
        return flat_output(result)


def tracked(output: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a layer as a tensor to take a gradient by, and the copy of it that the network goes on with.

    There is a gradient where the layer is frozen as well; a function in place that follows changes only the copy.
    """
    kept = output if output.requires_grad else output.detach().requires_grad_()
    return kept, kept.clone()

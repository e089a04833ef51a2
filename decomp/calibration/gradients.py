"""Gradients by layer outputs: the sensitivity of the network's output, or of a loss, to errors there."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from decomp.network.forward import call, flat_output, floating


class SensitivityScalar:
    """A scalar to backpropagate: its gradient g by a layer's output y measures the effect of an error dy there.

    For a loss it is the loss itself. For a tensor f, with J = df/dy, it is v^T f, v standard normal and drawn anew
    for each batch: g = J^T v, and E[g g^T] = J^T J, so that E(g^T dy)^2 = ||J dy||^2 is the squared change of f.
    """

    def __init__(self, loss: Callable[[nn.Module, Any], Tensor] | Literal["output"]) -> None:
        if not callable(loss) and loss != "output":
            raise ValueError(f'loss={loss!r}: write "output", or a function of the model and a batch')
        self._loss = loss
        self._generator = torch.Generator().manual_seed(0)
        self._energy = 0.0

    @property
    def energy(self) -> float:
        """The sum of ||f||^2, by which squared gradients are divided to get a relative change; 1 for a loss."""
        return self._energy or 1.0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        value = self._loss(model, batch) if callable(self._loss) else self._output(model, batch)
        if not isinstance(value, Tensor):
            raise TypeError(f"loss= must return a tensor, not {type(value).__name__}")
        if value.numel() == 1:
            return value.reshape(())
        self._energy += float(value.detach().float().square().sum())
        directions = torch.randn(value.shape, generator=self._generator, device="cpu").to(value)
        return (value * directions).sum()

    def _output(self, model: nn.Module, batch: Any) -> Tensor:
        result = call(model, batch)
        if not floating(result):
            raise ValueError("loss='output': the model returns no float tensor: write a function, or loss=None")
        return flat_output(result)


def tracked(output: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a layer as a tensor to differentiate by, and a clone of it that replaces it in the network.

    The first requires a gradient even if the layer is frozen; in-place functions after the layer change only the
    clone.
    """
    differentiable = output if output.requires_grad else output.detach().requires_grad_()
    return differentiable, differentiable.clone()

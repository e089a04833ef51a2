"""Gradients by layer outputs: the sensitivity of the network's output, or of a loss, to errors there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from decomp.data.levels import leveled
from decomp.network.forward import call, flat_output, floating


class NoGradient(ValueError):
    """What is to be differentiated does not depend on the outputs of the layers, or is no float tensor."""


class SensitivityScalar:
    """A scalar to backpropagate: its gradient g by a layer's output y measures the effect of an error dy there.

    For a loss it is the loss itself. For a tensor f, with J = df/dy, it is v^T f, v standard normal and drawn anew
    for each batch: g = J^T v, and E[g g^T] = J^T J, so that E(g^T dy)^2 = ||J dy||^2 is the squared change of f.

    Args:
        loss: a function of the model and a batch, or "output".
        level: bring the network's output to one level (:func:`leveled`).
    """

    def __init__(
        self, loss: Callable[[nn.Module, Any], Tensor] | Literal["output"], *, level: bool = False
    ) -> None:
        if not callable(loss) and loss != "output":
            raise ValueError(f'loss={loss!r}: write "output", or a function of the model and a batch')
        self._loss, self._level = loss, level
        self._generator = torch.Generator().manual_seed(0)
        self._energy = 0.0

    @property
    def energy(self) -> float:
        """The sum of ||f||^2, by which squared gradients are divided to get a relative change; 1 for a loss."""
        return self._energy or 1.0

    @property
    def takes_whole_batches(self) -> bool:
        """Whether it is called with batches of the data, labels included, and not with what the model takes."""
        return callable(self._loss)

    def __call__(self, model: nn.Module, batch: Any, mask: Tensor | None = None) -> Tensor:
        value = self._loss(model, batch) if callable(self._loss) else self._output(model, batch, mask)
        if not isinstance(value, Tensor):
            raise TypeError(f"loss= must return a tensor, not {type(value).__name__}")
        if value.numel() == 1:
            return value.reshape(())
        self._energy += float(value.detach().float().square().sum())
        directions = torch.randn(value.shape, generator=self._generator, device="cpu").to(value)
        return (value * directions).sum()

    def _output(self, model: nn.Module, batch: Any, mask: Tensor | None) -> Tensor:
        result = call(model, batch)
        if not floating(result):
            raise NoGradient("loss='output': the model returns no float tensor: write a function, or loss=None")
        return leveled(result, result, mask) if self._level else flat_output(result)


class SavesTooMuch(Exception):
    """A pass saves more for its gradients than it may."""


@contextmanager
def saving_at_most(most_bytes: int, model: nn.Module) -> Iterator[None]:
    """Run passes of a model with gradients, which end as soon as they have saved more than so many bytes.

    Raises:
        SavesTooMuch: they have; the parameters of the model do not count.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            saved += storage.nbytes()
        if saved > most_bytes:
            raise SavesTooMuch
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield


def tracked(output: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a layer as a tensor to differentiate by, and a clone of it that replaces it in the network.

    The first requires a gradient even if the layer is frozen; in-place functions after the layer change only the
    clone.
    """
    differentiable = output if output.requires_grad else output.detach().requires_grad_()
    return differentiable, differentiable.clone()

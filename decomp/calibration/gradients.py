"""Gradients by layer outputs: the sensitivity of the network's output, or of a loss, to errors there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from decomp.data.batches import unpadded
from decomp.network.forward import call, flat_output, floating

FILLED = 1e6  # times the median: a larger value is what a mask fills in
SAMPLE = 100_000  # values that the median is of
LOWEST_LEVEL = 1e-5  # of the largest: below it a channel is taken as silent, and not amplified further


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


def leveled(result: Any, reference: Any, mask: Tensor | None = None) -> Tensor:
    """The floating-point tensors of an output as one vector in which each of them, and its channels, count alike.

    A tensor is divided by the root mean square that each of its channels has in the same tensor of ``reference``,
    an output for the same batch, and by the norm that is then left there: boxes in pixels would otherwise count a
    million times what scores do. The channels are the last axis of what is padded, else the shortest one but the
    first, of three axes or more. Padding is left out, and what masks fill in: infinity, and values that are a
    million times the median.

    >>> boxes_and_scores = torch.cat([300 * torch.ones(1, 4, 50), torch.ones(1, 8, 50)], dim=1)
    >>> leveled(boxes_and_scores, boxes_and_scores).square().reshape(12, 50).sum(1).mul(12).round()
    tensor([1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1.])
    """
    pairs = zip(floating(result), floating(reference), strict=True)
    parts = [_leveled(tensor, expected.detach(), mask) for tensor, expected in pairs]
    return torch.cat(parts) if parts else torch.zeros(0)


def _leveled(tensor: Tensor, expected: Tensor, mask: Tensor | None) -> Tensor:
    has_channels = expected.dim() > 2
    tensor, kept = (unpadded(each.float(), mask) for each in (tensor, expected))
    some = kept.flatten()[:: max(1, kept.numel() // SAMPLE)].abs()
    usual = some[(some > 0) & some.isfinite()]
    highest = FILLED * float(usual.median()) if usual.numel() else torch.finfo(torch.float32).max
    filled = ~(kept.abs() <= highest)
    tensor, kept = tensor.masked_fill(filled, 0.0), kept.masked_fill(filled, 0.0)
    if has_channels and kept.numel():
        is_padded = kept.dim() < expected.dim()
        axis = kept.dim() - 1 if is_padded else 1 + min(range(kept.dim() - 1), key=lambda i: kept.shape[1 + i])
        others = [other for other in range(kept.dim()) if other != axis]
        level = kept.square().mean(others, keepdim=True).sqrt()
        level = level.clamp(min=LOWEST_LEVEL * float(level.max()))
        level = level.where(level > 0, 1.0)
        tensor, kept = tensor / level, kept / level
    norm = float(kept.norm())
    return tensor.flatten() / (norm or 1.0)


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

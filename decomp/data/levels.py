"""Errors of a network's outputs as numbers that can be added up: brought to one level, or to their variation."""

from typing import Any

import torch
from torch import Tensor

from decomp.data.batches import unpadded
from decomp.network.forward import floating

FILLED = 1e6  # times the median, which counts as 1 at least: a larger value is what a mask fills in
SAMPLE = 100_000  # values that the median is of
LOWEST_LEVEL = 1e-5  # of the largest: below it a channel is taken as silent, and not amplified further
ROWS = 8  # of two axes, for a mean of each column
LEAST_VARIATION = 0.01  # of an output about its mean, as a share of its norm: below it it is taken as constant


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
    tensor, kept, others = _without_filling(tensor, expected, mask)
    if len(others) < kept.dim():
        level = kept.square().mean(others, keepdim=True).sqrt()
        level = level.clamp(min=LOWEST_LEVEL * float(level.max()))
        level = level.where(level > 0, 1.0)
        tensor, kept = tensor / level, kept / level
    norm = float(kept.norm())
    return tensor.flatten() / (norm or 1.0)


def share_of_variation(errors: list[Tensor], reference: Any, mask: Tensor | None = None) -> float:
    """Squared errors of an output, as a share of how it varies: ||dy||^2 / ||y - m||^2, the mean over its tensors.

    m is the mean of each channel, and the variation at least 1 % of the norm of y. Channels, padding and what
    masks fill in are those of :func:`leveled`; of 8 rows or more of two axes the columns are channels as
    well. Values of different scales in one tensor count as they are, for channels that are silent on a batch say
    nothing. A tensor with one value to a channel, such as a loss, does not count.

    >>> round(share_of_variation([0.1 * torch.ones(2)], torch.tensor([4.0, 6.0])), 4)
    0.01
    """
    shares = []
    for each, expected in zip(errors, floating(reference), strict=True):
        error, kept, others = _without_filling(each, expected.detach(), mask)
        if kept.dim() == 2 and len(others) == 2 and len(kept) >= ROWS:
            others = [0]
        mean = kept.mean(others, keepdim=True)
        if kept.numel() > mean.numel():
            variation = float((kept - mean).norm())
            norm = max(variation, LEAST_VARIATION * float(kept.norm()))
            shares.append(float(error.norm()) ** 2 / (norm**2 or 1.0))
    return sum(shares) / max(1, len(shares))


def _without_filling(tensor: Tensor, expected: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, list[int]]:
    """Both without padding, and with zeros for what masks fill in; and the axes that are not that of channels."""
    has_channels = expected.dim() > 2
    tensor, kept = (unpadded(each.float(), mask) for each in (tensor, expected))
    some = kept.flatten()[:: max(1, kept.numel() // SAMPLE)].abs()
    usual = some[(some > 0) & some.isfinite()]
    highest = FILLED * max(1.0, float(usual.median())) if usual.numel() else torch.finfo(torch.float32).max
    filled = ~(kept.abs() <= highest) | (tensor.detach().abs() > highest)
    others = list(range(kept.dim()))
    if has_channels and kept.numel():
        is_padded = kept.dim() < expected.dim()
        others.remove(
            kept.dim() - 1 if is_padded else 1 + min(range(kept.dim() - 1), key=lambda i: kept.shape[1 + i])
        )
    return tensor.masked_fill(filled, 0.0), kept.masked_fill(filled, 0.0), others

"""Errors that name the layer they come from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Add the name of the layer to whatever goes wrong in the block."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in layer {name!r}")
        raise


def require_finite(name: str, module: nn.Module) -> None:
    """Refuse a weight with NaN or infinite entries.

    Raises:
        ValueError: names the layer and how many entries.
    """
    weight = cast(Tensor, module.weight).detach()
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ValueError(
            f"layer {name!r}: {bad} of {weight.numel()} weights are NaN or infinite; mend the weights, "
            f"or leave the layer alone with exclude={name!r}"
        )

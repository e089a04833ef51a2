"""Applying a plan, and fine-tuning what comes out of it in the same call."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from decomp.calibration import Statistics
from decomp.finetuning import finetune_layerwise
from decomp.planning import Scope
from decomp.plans import Plan

REPORT = "decomp_finetuning"  # the attribute of a model that carries the report of its fine-tuning


def apply_plan(
    model: nn.Module, decided: Plan, scope: Scope, *, finetune: bool | Mapping[str, Any], inplace: bool
) -> nn.Module:
    """Swap the factorized layers in; with ``finetune`` train them layer by layer against ``model``.

    Raises:
        ValueError: there are no batches to fine-tune with, or no dense model left to learn from.
    """
    wanted = finetune is not False
    if wanted and (scope.data is None or isinstance(scope.data, Statistics)):
        raise ValueError("finetune= needs batches: give data=, an iterable of what the model is called with")
    if wanted and inplace:
        raise ValueError(
            "finetune= learns from the dense model, which inplace=True changes: leave one of them out"
        )
    small = decided.apply(model, inplace=inplace, progress=scope.progress)
    if wanted:
        settings = dict(finetune) if isinstance(finetune, Mapping) else {}
        given = {"inputs": scope.inputs, "progress": scope.progress} | settings
        setattr(small, REPORT, finetune_layerwise(small, model, scope.data, **given))
    return small

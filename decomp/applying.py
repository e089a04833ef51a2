"""Applying a plan, and fine-tuning what comes out of it in the same call."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from decomp.calibration import Statistics
from decomp.finetuning import finetune_layerwise
from decomp.methods import default_options
from decomp.planning import Scope, make_plan
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


def decompose(
    model: nn.Module,
    method: str,
    options: Mapping[str, Any],
    ranks: Any,
    scope: Scope,
    finetune: bool | Mapping[str, Any],
    inplace: bool,
) -> nn.Module:
    """Plan by a method and its options, unless ``ranks`` is a plan already, and apply."""
    if isinstance(ranks, Plan):
        if replace(scope, progress=None, data=None, inputs=None) != Scope():
            raise ValueError(
                "a Plan says itself which layers it is about: leave layers=, exclude= and example_inputs= out"
            )
        if scope.data is not None and finetune is False:
            raise ValueError("a Plan says itself what it was made from: give data= to decomp.plan")
        defaults = default_options(method)
        changed = {name: value for name, value in options.items() if value != defaults[name]}
        if changed:
            raise ValueError(f"a Plan says itself which methods it uses: leave {next(iter(changed))}= out")
        decided = ranks
    else:
        decided = make_plan(model, method, options, ranks, scope)
    return apply_plan(model, decided, scope, finetune=finetune, inplace=inplace)

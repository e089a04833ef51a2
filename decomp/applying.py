"""Applying a plan, and fine-tuning what comes out of it in the same call."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from decomp.calibration.calibrate import Statistics
from decomp.methods import default_options
from decomp.planning.plan import Plan
from decomp.planning.planner import Scope, make_plan
from decomp.recovery.sequential import apply_asymmetric
from decomp.training.layerwise import FinetuneReport, finetune_layerwise
from decomp.training.lessons import LayerReport

REPORT = "decomp_finetuning"  # the attribute of a model that carries the report of its fine-tuning


def apply_plan(
    model: nn.Module,
    decided: Plan,
    scope: Scope,
    *,
    finetune: bool | Mapping[str, Any],
    inplace: bool,
    asymmetric: bool = False,
) -> nn.Module:
    """Swap the factorized layers in; with ``finetune`` train them layer by layer against ``model``.

    Raises:
        ValueError: there are no batches to learn from, or no dense model left to do so.
    """
    wanted = {"finetune": finetune is not False, "asymmetric": asymmetric}
    for option in (name for name, given in wanted.items() if given):
        if scope.data is None or isinstance(scope.data, Statistics):
            raise ValueError(
                f"{option}= needs batches: give data=, an iterable of what the model is called with (and what "
                "calibrate made of them to decomp.plan, whose plan goes in as ranks=)"
            )
        if inplace:
            raise ValueError(
                f"{option}= learns from the dense model, which inplace=True changes: leave one of them out"
            )
    settings = dict(finetune) if isinstance(finetune, Mapping) else {}
    given = {"inputs": scope.inputs, "progress": scope.progress} | settings
    if asymmetric:
        return _layer_after_layer(model, decided, scope, given if wanted["finetune"] else None)
    small = decided.apply(model, inplace=inplace, progress=scope.progress)
    if wanted["finetune"]:
        setattr(small, REPORT, finetune_layerwise(small, model, scope.data, **given))
    return small


def _layer_after_layer(
    model: nn.Module, decided: Plan, scope: Scope, settings: Mapping[str, Any] | None
) -> nn.Module:
    """Decompose each layer for what reaches it by then; with settings fine-tune it before the next one."""
    reports: dict[str, LayerReport] = {}
    for refused in {"blocks", "checkpoint", "layers"} & set(settings or ()):
        raise ValueError(
            f"finetune={{{refused!r}: ...}} does not go with asymmetric=True, which trains every layer as soon as "
            "it is decomposed: call decomp.finetune_layerwise afterwards"
        )

    def teach(small: nn.Module, name: str) -> None:
        reports.update(finetune_layerwise(small, model, scope.data, layers=name, **settings or {}))

    small = apply_asymmetric(
        model,
        decided,
        scope.data,
        inputs=scope.inputs,
        teach=None if settings is None else teach,
        progress=scope.progress,
    )
    if settings is not None:
        setattr(small, REPORT, FinetuneReport(reports))
    return small


def decompose(
    model: nn.Module,
    method: str,
    options: Mapping[str, Any],
    ranks: Any,
    scope: Scope,
    finetune: bool | Mapping[str, Any],
    inplace: bool,
    asymmetric: bool,
) -> nn.Module:
    """Plan by a method and its options, unless ``ranks`` is a plan already, and apply."""
    if isinstance(ranks, Plan):
        if replace(scope, progress=None, data=None, inputs=None) != Scope():
            raise ValueError(
                "a Plan says itself which layers it is about: leave layers=, exclude= and example_inputs= out"
            )
        if scope.data is not None and finetune is False and not asymmetric:
            raise ValueError("a Plan says itself what it was made from: give data= to decomp.plan")
        defaults = default_options(method)
        changed = {name: value for name, value in options.items() if value != defaults[name]}
        if changed:
            raise ValueError(f"a Plan says itself which methods it uses: leave {next(iter(changed))}= out")
        decided = ranks
    else:
        decided = make_plan(model, method, options, ranks, scope)
    return apply_plan(model, decided, scope, finetune=finetune, inplace=inplace, asymmetric=asymmetric)

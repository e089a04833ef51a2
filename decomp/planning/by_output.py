"""Budgets by what the network's output feels, where data are batches, unless held-out batches say otherwise."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import exp, isfinite, log, sqrt
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from decomp._util.warn import warn
from decomp.calibration.calibrate import Statistics, gather
from decomp.calibration.gradients import NoGradient, SensitivityScalar
from decomp.data.batches import Batches, copied, rows_of, some_rows
from decomp.data.levels import leveled
from decomp.network.forward import SizesDiffer, Unfused, call, differences, evaluating, floating, to_device_of
from decomp.planning.arguments import Scope
from decomp.planning.candidate import Candidate
from decomp.planning.plan import Plan

MASK = "attention_mask"
MOST_BATCHES = 8
MOST_BYTES = 2**31  # for what a backward pass needs of the forward pass


def statistics_by_output(model: nn.Module, scope: Scope) -> Statistics | None:
    """The statistics of batches, with the sensitivity of the network's output to each layer.

    None where that cannot be measured: the data are no batches, or can be gone through only once, in which case a
    failure could not be made up for; or the output cannot be differentiated, or not in the memory that there is.
    """
    data = scope["data"]
    if data is None or isinstance(data, Statistics | Iterator):
        return None
    chosen: Any = {name: scope[name] for name in ("inputs", "layers", "exclude", "progress")}
    chosen |= {"positions": "auto", "held_out": True, "mask": MASK}
    scalar = SensitivityScalar("output", level=True)
    try:
        found = gather(model, data, scalar, most_bytes=MOST_BYTES, **chosen)
    except NoGradient as error:
        if isinstance(error.__cause__, RuntimeError):
            warn(
                f"the sensitivity of the output cannot be measured ({str(error).strip()[:200]}): the budget "
                'counts all layers alike; objective="product" does so without trying'
            )
        return None
    importances = [each.importance for each in found.values() if each.importance is not None]
    return found if all(map(isfinite, importances)) and any(importances) else None


def with_tempered_importances(
    candidates: Mapping[str, list[Candidate]],
) -> dict[str, list[Candidate]] | None:
    """The candidates with importances halfway to the average, geometrically; None if one of them is unknown.

    Sensitivities are of first order, and of the norm of the output, in which what a user scores may be a small
    part: a layer of little importance is not to be given up for them.
    """
    known = [first.importance for first, *_ in candidates.values()]
    if any(importance is None for importance in known):
        return None
    logs = [log(max(importance or 0.0, 1e-30)) for importance in known]
    average = exp(mean(logs))
    return {
        name: [replace(candidate, importance=sqrt((candidate.importance or 0.0) * average)) for candidate in each]
        for name, each in candidates.items()
    }


def nearer(by_output: Plan, alike: Plan, model: nn.Module, scope: Scope) -> Plan:
    """Of two plans the one whose model has the output nearer to that of the dense one, on rows that were held out.

    These are the held-out batches, at most eight, or the last quarter of the rows of fewer than four batches. It
    is ``alike`` where there are none, where outputs have sizes that depend on weights, or where memory is short.
    """
    if all(by_output[name].ranks == alike[name].ranks for name in by_output):
        return by_output
    judged = _held_out(scope)
    if not judged:
        return alike
    try:
        errors = [_error(plan.apply(model, progress=False), model, judged) for plan in (by_output, alike)]
    except (SizesDiffer, torch.OutOfMemoryError):
        return alike
    return by_output if errors[0] <= errors[1] else alike  # not a number: the latter


def _held_out(scope: Scope) -> list[tuple[Any, Tensor | None]]:
    """The batches to judge on, or the rows of them, each with its mask."""
    data: Any = scope["data"]
    batches = Batches.in_fixed_order(data, scope["inputs"], MASK)
    split = batches.fit_split()

    def is_judged(index: int) -> bool:
        return split.by_rows or not split.fitted(index, rows=1)

    judged = []
    for index, batch, mask in islice(batches.masked(part=is_judged), MOST_BATCHES):
        rows = rows_of(batch)
        fitted = split.fitted(index, rows)
        if not fitted:
            judged.append((batch, mask))
        elif fitted < rows:
            held_out = slice(fitted, None)
            judged.append((some_rows(batch, held_out), None if mask is None else mask[held_out]))
    return judged


def with_mask(example: Any) -> list[tuple[Any, Tensor | None]]:
    """Example inputs as a batch to judge on."""
    return [(batch, mask) for _, batch, mask in Batches.in_fixed_order([example], None, MASK).masked()]


@torch.no_grad()
def output_errors(
    small: nn.Module,
    dense: nn.Module,
    judged: Sequence[tuple[Any, Tensor | None]],
    measure: Callable[[list[Tensor], Any, Tensor | None], float],
) -> list[float]:
    """What ``measure`` makes of each batch: of the errors of its output, the output of the dense model, the mask.

    Raises:
        SizesDiffer: the outputs have sizes that depend on weights, or are nested or sparse.
    """
    found = []
    with evaluating(small, dense), Unfused():
        for batch, mask in judged:
            batch = to_device_of(dense, batch)
            expected, output = (floating(call(each, copied(batch))) for each in (dense, small))
            if any(each.is_nested or each.layout != torch.strided for each in (*expected, *output)):
                raise SizesDiffer(f"{type(dense).__name__} gives nested or sparse tensors")
            found.append(measure(differences(small, output, expected), expected, mask))
    return found


def _error(small: nn.Module, dense: nn.Module, judged: Sequence[tuple[Any, Tensor | None]]) -> float:
    """The sum over the batches of the squared errors of the output, brought to one level."""

    def squared(errors: list[Tensor], expected: Any, mask: Tensor | None) -> float:
        return float(leveled(errors, expected, mask).square().sum())

    return sum(output_errors(small, dense, judged, squared))

"""Ranks of rules, where the network's output stays near that of the dense one; else a budget chooses them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from decomp._util.warn import warn
from decomp.data.batches import random_state, set_random_state
from decomp.data.levels import share_of_variation
from decomp.network.forward import SizesDiffer
from decomp.network.restoring import temporarily
from decomp.planning.budget import Budget, spend
from decomp.planning.by_output import output_errors
from decomp.planning.candidate import Candidate
from decomp.planning.choice import Choice
from decomp.planning.plan import Plan
from decomp.ranks import Fixed, Rule, SpectralRule

MOST_ERROR = 0.5
"""The largest relative error of the output about its mean.

Of 28 plans by rules, pure ones included, for seven networks (two convolutional pitch trackers, a conformer, a
sentence encoder, digits after 3, 10 and 40 epochs), on real inputs, those below it kept 84 % of the dense score or
more, and those above it 3 to 73 %, but for one (0.54, and 98 %).
"""

REPEATS = 1e-3
"""The largest error between two passes of the dense model for which the network is taken to repeat itself."""

STEPS = 3
"""How often the budgets between the MACs of the rules and those of the dense model are halved."""


def near_in_output(
    plan: Plan,
    rules: Mapping[str, Rule | Fixed | None],
    model: nn.Module,
    judged: Sequence[tuple[Any, Tensor | None]],
) -> Plan:
    """The plan of rules, or one in its place whose network has an output nearer to the dense one's.

    What layers lose does not say what the network loses: residual branches forgive much, plain chains and deep
    networks little. So the two networks are run. Where the output is off by more than ``MOST_ERROR``, the layers
    that the rules decided are decided together: a budget of the MACs that the rules asked for is spent by what
    the layers keep, and, where that is not enough, a larger one, the smallest found by bisection.

    Layers under rules that are ``pure``, with ranks of the user, or without spectra stay as they are.

    Args:
        plan: what the rules chose, with its candidates and MACs.
        rules: what chose the ranks of each analysed layer.
        model: the user's model.
        judged: batches, each with its mask.

    Returns:
        The plan as it was where outputs cannot be compared: they vary with the weights in size, or between two
        passes of the dense model, or the model cannot be copied, or memory is short; and where the layers that
        stay as they are leave the output too far off by themselves.
    """
    free = {name: plan.candidates[name][0] for name, rule in rules.items() if _is_free(rule)}
    free = {name: candidate for name, candidate in free.items() if candidate.spectra}
    if not judged or plan.macs is None or not _replaces(plan, free):
        return plan

    def error_of(small: nn.Module) -> float:
        return sqrt(fmean(output_errors(small, model, judged, share_of_variation)))

    def error_under(plan: Plan) -> float:
        try:
            small = plan.apply(model, progress=False)
        except TypeError as error:  # it cannot be copied
            raise SizesDiffer(str(error)) from None
        return error_of(small)

    state = random_state()
    with temporarily(_restoring_buffers(model)), temporarily(lambda: set_random_state(state)):
        try:
            error = error_under(plan)
            if error <= MOST_ERROR or error_of(model) > REPEATS:
                return plan
            others = plan.choosing({name: (each, each.choose((), "")) for name, each in free.items()})
            kept = {name for name in others.replaced if not others[name].was_factorized}
            if kept and not error_under(others) <= MOST_ERROR:
                return plan
            return _nearer(plan, free, rules, error, error_under)
        except (SizesDiffer, torch.OutOfMemoryError):
            return plan


def _is_free(rule: Rule | Fixed | None) -> bool:
    return isinstance(rule, SpectralRule) and not rule.pure


def _replaces(plan: Plan, names: Iterable[str]) -> bool:
    return any(plan[name].ranks for name in names)


def _restoring_buffers(model: nn.Module) -> Callable[[], None]:
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    @torch.no_grad()
    def restore() -> None:
        for buffer, value in saved:
            if not torch.equal(buffer, value):
                buffer.copy_(value)

    return restore


def _nearer(
    plan: Plan,
    free: Mapping[str, Candidate],
    rules: Mapping[str, Rule | Fixed | None],
    error: float,
    error_under: Callable[[Plan], float],
) -> Plan:
    """The plan under the smallest budget of MACs that is found whose error is at most ``MOST_ERROR``."""
    total, asked = plan.macs or (0.0, 0.0)
    fixed = {name: choice for name, choice in plan.items() if name not in free}
    most = total - sum(choice.saved("macs") for choice in fixed.values())  # with all others dense
    request = replace(plan.request, objective="product")

    def under(share: float) -> Plan:
        """The plan under the MACs that the rules asked for, and this share of what they save."""
        budget = Budget("macs", round(asked + share * (most - asked)))
        spent = spend({name: [each] for name, each in free.items()}, budget, total, fixed, request)
        chosen = {
            name: (free[name], _noted(plan[name], candidate.choose(ranks, ""), rules[name], error))
            for name, (candidate, ranks) in spent.items()
        }
        return plan.choosing(chosen)

    low, high, far, near = 0.0, 1.0, plan, None
    share = low
    for _ in range(1 + STEPS):
        tried = under(share)
        if not _replaces(tried, free) or error_under(tried) <= MOST_ERROR:
            high, near = share, tried
        else:
            low, far = share, tried
        if high == 0:
            break
        share = (low + high) / 2
    if near is not None and _replaces(near, free):
        return near
    warn(
        f"with the ranks of the rules the output is off by {error:.2f} of its variation, and at every budget that "
        f"was tried by more than {MOST_ERROR}: the model may hardly work before it is fine-tuned. compress() with "
        "data= keeps more of it"
    )
    return far


def _noted(before: Choice, after: Choice, rule: Rule | Fixed | None, error: float) -> Choice:
    """The new choice of a layer, with the rule's ranks and why they are not taken."""
    if before.ranks == after.ranks:
        return before
    if not before.ranks:
        return replace(after, note="; ".join(filter(None, ("by a budget for all layers", after.note))))
    rank = " x ".join(map(str, before.ranks))
    why = f"with rank {rank} of {type(rule).__name__} here, the network's output is off by {error:.2f}"
    if not after.ranks:
        return replace(after, reason=f"at risk: {why}", at_risk=True)
    return replace(after, note="; ".join(filter(None, (why, after.note))))

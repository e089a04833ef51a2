"""What a rank rule may not do: layers whose factors would cost the network more than they save get higher ranks.

A rule that looks at one layer at a time is right as a formula and can still destroy a network: of a narrow layer
few singular values stand above the noise, whatever the layer does, and its factors save next to nothing.

The bounds were chosen on a text detector (CRAFT, 27 layers) and the digit classifier. On the detector (48 pages,
two seeds, dense F1 0.985) the means are 0.991 for vbmf and 0.980 for energy(0.9), and 0.000 without the bounds.
With layers at risk left dense they were 0.991, 0.982, 0.989 for energy(0.8), 0.981 for energy(0.95) and 0.946 for
gavish_donoho; at 3 times the mean vbmf gave 0.990 and energy(0.9) 0.965, and with a negligible loss of 0.05
energy(0.95) gave 0.924.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decomp.methods import Ranks
from decomp.planning.candidate import Candidate, Grid
from decomp.planning.choice import Choice
from decomp.ranks import Fixed, Rule, SpectralRule

MOST_TIMES_THE_MEAN = 2.5
"""A layer may lose this many times more energy, for what it saves, than all layers that are replaced."""

NEGLIGIBLE_LOSS = 0.02
"""A layer that loses no more of its energy than this is never at risk."""

LEAST_ENERGY = 0.78
"""The mean share of their energy that all analysed layers keep at least; a dense one keeps 1."""

USELESS_BELOW = 0.6
"""Where the layers that rules replace keep less than this on average, the network hardly worked."""


def safeguard(
    choices: Mapping[str, Choice],
    rules: Mapping[str, Rule | Fixed | None],
    candidates: Mapping[str, Candidate],
    **limits: Any,
) -> dict[str, Choice]:
    """Raise the ranks of layers that are at risk under the rule that chose them, and mark those of pure rules.

    With e the relative error of a layer, s_p and s_m the shares of all parameters and MACs that its factors save,
    and over the layers i that are replaced, layer l is at risk while

        e_l^2 / sqrt(s_p s_m)_l > 2.5 sum_i e_i^2 / sum_i sqrt(s_p s_m)_i    or    1 - sum_i e_i^2 / n < 0.78,

    for n analysed layers, and e_l^2 > 0.02. The layer with the largest ratio on the left is taken out first.
    Errors are those of outputs where there are data.

    A layer that was taken out gets those ranks that save the most, of all that lose less than the rule's and whose
    ratio is at most that of the layers that are left, sum_i e_i^2 / sum_i sqrt(s_p s_m)_i. Where there are none it
    stays dense.

    Args:
        choices: the decisions of the rules, by the names of the layers.
        rules: what chose the ranks of each analysed layer.
        candidates: the analysed layers, for other ranks. Layers without one, or without spectra, stay dense
            where they are at risk.
        limits: ``multiple_of`` and ``min_gain`` of other ranks.

    Returns:
        The choices that change.
    """
    spectral: dict[str, SpectralRule] = {
        name: rule for name, rule in rules.items() if isinstance(rule, SpectralRule) and choices[name].ranks
    }
    chosen = {name: choices[name] for name in spectral}
    losses = {name: _lost(choice) for name, choice in chosen.items()}
    saved = _Saved([choices[name] for name in rules])
    savings = {name: saved.by(choice) for name, choice in chosen.items()}
    replaced, changed = dict(chosen), {}
    by_ratio = sorted(chosen, key=lambda name: losses[name] / savings[name], reverse=True)
    for name in (name for name in by_ratio if losses[name] > NEGLIGIBLE_LOSS):
        loss, saving = (sum(each[name] for name in replaced) for each in (losses, savings))
        ratio = losses[name] / savings[name]
        if ratio <= MOST_TIMES_THE_MEAN * loss / saving and 1 - loss / len(rules) >= LEAST_ENERGY:
            break
        choice = replaced.pop(name)
        changed[name] = replace(choice, at_risk=True) if spectral[name].pure else _dense(choice, spectral[name])
    loss, saving = (sum(each[name] for name in replaced) for each in (losses, savings))
    most = loss / saving if saving else 0.0
    for name in [name for name, each in changed.items() if not each.ranks and name in candidates]:
        candidate, rule = candidates[name], type(spectral[name]).__name__
        if not candidate.spectra:
            continue  # errors at other ranks are estimates, each of a fit
        ranks = saved.most_saving(chosen[name], candidate.limited_grid(**limits), most)
        raised = candidate.choose(ranks, changed[name].reason)
        if ranks and 1 - (loss + _lost(raised)) / len(rules) >= LEAST_ENERGY:
            loss += _lost(raised)
            note = f"raised from rank {_written(chosen[name].ranks)} of {rule}, at risk there"
            changed[name] = replace(raised, note="; ".join(filter(None, (note, raised.note))))
    left = {name: choice for name, choice in chosen.items() if name not in changed or changed[name].ranks}
    # What is left under rules that are not pure keeps the bounds: a warning of it would be about what they allow.
    pure = {name: choice for name, choice in left.items() if spectral[name].pure}
    if pure and energy_kept(left) < USELESS_BELOW:
        changed |= {name: replace(choice, at_risk=True) for name, choice in pure.items()}
    return changed


def energy_kept(choices: Mapping[str, Choice]) -> float:
    """The mean of 1 - e^2 over the layers that are replaced; 1 if there are none."""
    losses = [_lost(choice) for choice in choices.values() if choice.ranks]
    return 1 - sum(losses) / len(losses) if losses else 1.0


def _lost(choice: Choice) -> float:
    error = choice.error if choice.output_error is None else choice.output_error
    return min(error, 1.0) ** 2


class _Saved:
    """The geometric mean of the shares of all parameters and MACs that the factors of a layer save.

    Where sizes of inputs are not known, MACs are shares of each layer's own: all layers then count alike.
    """

    def __init__(self, analysed: Sequence[Choice]) -> None:
        totals = {kind: sum(choice.costs[kind].before for choice in analysed) for kind in ("params", "macs")}
        self._totals = {kind: total for kind, total in totals.items() if total}

    def by(self, choice: Choice) -> float:
        """What the ranks of a choice save."""
        return float(self._mean({kind: np.array(choice.saved(kind)) for kind in self._totals}))

    def most_saving(self, choice: Choice, grid: Grid, most: float) -> Ranks:
        """The ranks of a layer that save the most, of those that lose less and at most so much for what
        they save; none where no ranks do."""
        saved = {kind: (1 - grid.share(kind)).clip(min=0) * choice.costs[kind].before for kind in self._totals}
        savings = np.where(grid.pays, self._mean(saved), 0.0)
        # Of a flat spectrum the ratio is least at rank 1: higher ranks are those that lose less.
        savings[(grid.error**2 > most * savings) | (grid.error**2 >= _lost(choice))] = 0.0
        best = int(savings.argmax()) if len(savings) else 0
        return tuple(grid.ranks[best].tolist()) if savings[best : best + 1].any() else ()

    def _mean(self, saved: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        shares = [saved[kind] / total for kind, total in self._totals.items()]
        return np.sqrt(shares[0] * shares[-1]).clip(min=1e-300)


def _written(ranks: Ranks) -> str:
    return " x ".join(map(str, ranks))


def _dense(choice: Choice, rule: SpectralRule) -> Choice:
    kept = 100 * (1 - _lost(choice))
    at = f"rank {_written(choice.ranks)} of {type(rule).__name__}"
    reason = f"at risk: {at} keeps {kept:.0f} % of its energy (pure=True replaces it)"
    return replace(choice.as_dense(reason), at_risk=True)

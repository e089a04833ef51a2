"""Figures of what is decided and measured: spectra with their cuts, costs and errors per layer, trade-offs.

Each function returns a matplotlib figure: Jupyter shows it, ``figure.savefig("name.png")`` writes it. They need
matplotlib: ``pip install 'decomp[notebook]'``.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from decomp._util import tables
from decomp.linalg import Spectrum
from decomp.planning.plan import Plan
from decomp.ranks.spectral import evbmf_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pair = tuple[float, float]
Line = Sequence[tuple[float, float]]
INCH_PER_BAR, MOST_INCHES = 0.3, 30.0


def _figures() -> Any:
    try:
        from decomp.analysis import figures
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError("figures need matplotlib: pip install 'decomp[notebook]'") from error
    return figures


def _picture(width: float, height: float, columns: int = 1) -> "tuple[Figure, list[Any]]":
    made: tuple[Figure, list[Any]] = _figures().picture(width, height, columns)
    return made


def spectrum(plan: Plan, layer: str, energy: float = 0.9) -> "Figure":
    """Draw the singular values of a layer, one panel per rank, with the rank that the plan chose.

    Beside it the threshold of vbmf, and the rank that keeps a share ``energy`` of the squared singular values.

    Raises:
        ValueError: the plan knows no spectra of that layer.
    """
    candidates = plan.candidates.get(layer, ())
    if not candidates or not candidates[0].spectra:
        known = [name for name, found in plan.candidates.items() if found[0].spectra]
        raise ValueError(
            f"layer={layer!r}: the plan knows no spectrum of it, only of {', '.join(known[:8]) or 'none'}"
            + ("" if known else "; make one that does with decomp.plan(model, ranks=plan)")
        )
    candidate, choice = candidates[0], plan[layer]
    modes = candidate.method.rank_names
    figure, axes = _picture(4.6 * len(modes), 3.4, len(modes))
    ranks = choice.ranks or (None,) * len(modes)
    for ax, found, mode, rank in zip(axes, candidate.spectra, modes, ranks, strict=True):
        _cuts(ax, found, rank, energy)
        ax.set(xlabel=f"component of {mode}", ylabel="singular value" if ax is axes[0] else "")
    figure.suptitle(f"{layer}: {choice.method}" + (f" {choice.ranks}" if choice.ranks else f" ({choice.reason})"))
    return figure


def _cuts(ax: Any, found: Spectrum, rank: int | None, share: float) -> None:
    """One spectrum on a logarithmic axis: what is kept, the threshold of vbmf, the rank of an energy."""
    colors = _figures()
    values = found.values.max(0)
    places = np.arange(1, len(values) + 1)
    kept = places <= (rank or len(values))
    floor = 1e-6 * float(values[0]) or 1.0
    values = np.maximum(values, floor)
    if not kept.all():
        ax.semilogy(places[~kept], values[~kept], "o", color="0.6", markersize=3.5, label="cut off")
    ax.semilogy(places[kept], values[kept], "o", color=colors.AFTER, markersize=3.5, label=f"kept: {kept.sum()}")
    noise = _noise(found)
    if 0 < noise < len(values):
        level = float(np.sqrt(values[noise - 1] * values[noise]))
        ax.axhline(level, color=colors.MARK, linestyle="--", linewidth=1.2, label=f"vbmf threshold, {noise} above")
    energies = (found.values**2).cumsum(-1)  # of each group; a rule takes the largest rank
    at = max(int(np.searchsorted(energy, share * energy[-1])) for energy in np.atleast_2d(energies)) + 1
    ax.axvline(at, color="0.3", linestyle=":", linewidth=1.2, label=f"{share:.0%} of the energy in {at}")
    ax.legend(fontsize=8, framealpha=0.8)


def costs(plan: Plan) -> "Figure":
    """Draw the parameters and MACs of every layer of a plan, before and after."""
    absolute = plan.macs is not None
    rows = {name: (choice.params, choice.macs) for name, choice in plan.items()}
    labels = ("parameters", "MACs" if absolute else "MACs (share, large input)")
    return before_and_after(labels, rows, f"{plan!r}".strip("<>"))


def errors(plan: Plan) -> "Figure":
    """Draw the relative error that a plan makes in the weight of every layer that it replaces.

    Raises:
        ValueError: the plan replaces no layer.
    """
    found = {name: choice for name, choice in plan.items() if choice.ranks}
    if not found:
        raise ValueError("the plan replaces no layer: there is no error to draw")
    figures = _figures()
    figure, (ax,) = _picture(6.5, _height(len(found)))
    bars = ax.barh(range(len(found)), [choice.error for choice in found.values()], color=figures.AFTER)
    ax.bar_label(bars, [" x ".join(map(str, c.ranks)) for c in found.values()], padding=3, fontsize=8)
    _name_bars(ax, list(found))
    ax.set_xlabel("relative error of the weight, and the ranks")
    ax.margins(x=0.2)
    return figure


def before_and_after(labels: Sequence[str], rows: Mapping[str, Sequence[Pair]], title: str = "") -> "Figure":
    """Draw bars of costs before and after: one panel per label, one pair of bars per row."""
    figures = _figures()
    figure, axes = _picture(1.5 + 4 * len(labels), _height(len(rows)), len(labels))
    places = np.arange(len(rows))
    for column, (ax, label) in enumerate(zip(axes, labels, strict=True)):
        before, after = (np.array([pairs[column][side] for pairs in rows.values()], float) for side in (0, 1))
        ax.barh(places, before, 0.8, color=figures.BEFORE, label="before")
        ax.barh(places, after, 0.45, color=figures.AFTER, label="after")
        _name_bars(ax, list(rows) if column == 0 else [""] * len(rows))
        ax.set_xlabel(label)
        ax.locator_params(axis="x", nbins=5)
        ax.xaxis.set_major_formatter(lambda value, _: _tick(value))
    axes[-1].legend(loc="lower right", fontsize=8)
    figure.suptitle(title)
    return figure


def tradeoffs(
    lines: Mapping[str, Line], labels: tuple[str, str], dense: tuple[float, float], title: str = ""
) -> "Figure":
    """Draw a line of (cost, score) per method and rule, and the dense model as a black square."""
    figures = _figures()
    figure, (ax,) = _picture(7, 4.5)
    for place, (name, line) in enumerate(lines.items()):
        color = figures.LINE_COLORS[place % len(figures.LINE_COLORS)]
        costs, scores = zip(*sorted(line), strict=True)
        marker, size = ("o-", 6) if len(line) > 1 else ("*", 14)
        ax.plot(costs, scores, marker, color=color, markersize=size, label=name)
    ax.plot(*dense, "s", color="black", label="dense")
    ax.axhline(dense[1], color="black", linewidth=0.8, alpha=0.4)
    ax.set(xlabel=labels[0], ylabel=labels[1], title=title)
    ax.set_xlim(left=0)
    ax.legend(fontsize=9)
    return figure


def _noise(found: Spectrum) -> int:
    return max(evbmf_rank(values, found.rows, found.columns) for values in found.values)


def _tick(value: float) -> str:
    """A count as short as a tick needs it: 5 M, not 5.00 M."""
    number, _, unit = tables.number(value).partition(" ")
    return f"{float(number):g} {unit}".strip() if value >= 10 else f"{value:g}"


def _height(bars: int) -> float:
    return min(1.4 + INCH_PER_BAR * bars, MOST_INCHES)


def _name_bars(ax: Any, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), [name or "" for name in names], fontsize=8)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")

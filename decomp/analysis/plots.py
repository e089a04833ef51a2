"""Figures of what is decided and measured: spectra with their cuts, costs and errors per layer, trade-offs.

Each function returns a matplotlib figure: Jupyter shows it, ``figure.savefig("name.png")`` writes it. They need
matplotlib (``pip install 'decomp[notebook]'``), which is imported when the first figure is drawn.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from decomp._util import tables
from decomp.linalg import Spectrum
from decomp.planning.plan import Plan
from decomp.ranks.spectral import evbmf_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE, AFTER, MARK = "0.75", "tab:blue", "tab:orange"
LINE_COLORS = (
    "tab:blue",
    "tab:orange",
    "tab:green",
    "tab:red",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:olive",
)
INCHES_PER_BAR, MAX_INCHES = 0.3, 30.0
DOTS_PER_INCH = 110

Pair = tuple[float, float]


def spectrum(plan: Plan, layer: str, energy: float = 0.9) -> "Figure":
    """Draw the singular values of a layer, one panel per rank, with the rank that the plan chose.

    Two lines compare it with rank rules: the noise threshold of vbmf, and the rank that keeps a share ``energy``
    of the squared singular values.

    Args:
        plan: a plan that was made with :func:`decomp.plan`, not read from JSON, which holds no spectra.
        layer: the qualified name of the layer.
        energy: the share that the second line marks, in (0, 1].

    Raises:
        ValueError: the plan holds no spectrum of that layer.
        ImportError: matplotlib is not installed.

    Source of the threshold: Nakajima, Sugiyama, Babacan, Tomioka 2013 (JMLR 14), global analytic EVBMF.

    >>> import decomp
    >>> from torch import nn
    >>> figure = spectrum(decomp.plan(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=(16, 8)), "0")
    >>> [axes.get_xlabel() for axes in figure.axes]
    ['component of out', 'component of in']
    """
    candidates = plan.candidates.get(layer, ())
    if not candidates or not candidates[0].spectra:
        drawable = [name for name, (first, *_) in plan.candidates.items() if first.spectra]
        raise ValueError(
            f"layer={layer!r}: the plan knows no spectrum of it, only of {', '.join(drawable[:8]) or 'none'}"
            + ("" if drawable else "; make one that does with decomp.plan(model, ranks=plan)")
        )
    candidate, choice = candidates[0], plan[layer]
    modes = candidate.method.rank_names[: len(candidate.limits)]
    figure, axes = _figure(4.6 * len(modes), 3.4, len(modes))
    ranks = choice.ranks or (None,) * len(modes)
    for ax, unfolding, mode, rank in zip(axes, candidate.spectra, modes, ranks, strict=True):
        _draw_spectrum(ax, unfolding, rank, energy)
        ax.set(xlabel=f"component of {mode}", ylabel="singular value" if ax is axes[0] else "")
    figure.suptitle(f"{layer}: {choice.method}" + (f" {choice.ranks}" if choice.ranks else f" ({choice.reason})"))
    return figure


def costs(plan: Plan) -> "Figure":
    """Draw the parameters and MACs of every layer of a plan, before and after.

    Args:
        plan: any plan. One that was made without ``example_inputs=`` has no MACs; it shows the share that is left
            of them in the limit of large inputs.

    Raises:
        ImportError: matplotlib is not installed.

    >>> import decomp
    >>> from torch import nn
    >>> figure = costs(decomp.plan(nn.Sequential(nn.Linear(64, 64)), ranks=8))
    >>> [(axes.get_xlabel(), [float(bar.get_width()) for bar in axes.patches]) for axes in figure.axes]
    [('parameters', [4160.0, 1088.0]), ('MACs (share, large input)', [1.0, 0.25])]
    """
    rows = {name: (choice.params, choice.macs) for name, choice in plan.items()}
    macs = "MACs (share, large input)" if plan.macs is None else "MACs"
    return before_and_after(("parameters", macs), rows, repr(plan).strip("<>"))


def errors(plan: Plan) -> "Figure":
    """Draw the relative error ||W - W'|| / ||W|| of every weight that a plan replaces, labelled with its ranks.

    Args:
        plan: a plan that replaces at least one layer.

    Raises:
        ValueError: the plan replaces no layer.
        ImportError: matplotlib is not installed.

    >>> import decomp
    >>> from torch import nn
    >>> decided = decomp.plan(nn.Sequential(nn.Linear(64, 64)), ranks=8)
    >>> float(errors(decided).axes[0].patches[0].get_width()) == decided["0"].error
    True
    """
    replaced = {name: choice for name, choice in plan.items() if choice.ranks}
    if not replaced:
        raise ValueError("the plan replaces no layer: there is no error to draw")
    figure, (ax,) = _figure(6.5, _height(len(replaced)))
    bars = ax.barh(range(len(replaced)), [choice.error for choice in replaced.values()], color=AFTER)
    ax.bar_label(bars, [" x ".join(map(str, c.ranks)) for c in replaced.values()], padding=3, fontsize=8)
    _name_bars(ax, list(replaced))
    ax.set_xlabel("relative error of the weight; labels: ranks")
    ax.margins(x=0.2)
    return figure


def before_and_after(labels: Sequence[str], rows: Mapping[str, Sequence[Pair]], title: str = "") -> "Figure":
    """Draw bars of costs before and after: one panel per label, one pair of bars per row.

    Args:
        labels: what each panel shows.
        rows: by the name of the row, one (before, after) per label.
        title: the title of the figure.

    Raises:
        ImportError: matplotlib is not installed.

    >>> figure = before_and_after(("parameters",), {"conv1": [(100, 25)], "conv2": [(200, 40)]})
    >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
    [100.0, 200.0, 25.0, 40.0]
    """
    figure, axes = _figure(1.5 + 4 * len(labels), _height(len(rows)), len(labels))
    positions = np.arange(len(rows))
    for column, (ax, label) in enumerate(zip(axes, labels, strict=True)):
        before, after = (np.array([pairs[column][side] for pairs in rows.values()], float) for side in (0, 1))
        ax.barh(positions, before, 0.8, color=BEFORE, label="before")
        ax.barh(positions, after, 0.45, color=AFTER, label="after")
        _name_bars(ax, list(rows) if column == 0 else [""] * len(rows))
        ax.set_xlabel(label)
        ax.locator_params(axis="x", nbins=5)
        ax.xaxis.set_major_formatter(lambda value, _: _tick(value))
    axes[-1].legend(loc="lower right", fontsize=8)
    figure.suptitle(title)
    return figure


def tradeoffs(
    lines: Mapping[str, Sequence[Pair]], labels: tuple[str, str], dense: Pair, title: str = ""
) -> "Figure":
    """Draw a line of (cost, score) per method and rule, and the dense model as a black square.

    Args:
        lines: the points by the name of the line; a line of one point is a star.
        labels: of the x axis and the y axis.
        dense: (cost, score) of the dense model.
        title: the title of the figure.

    Raises:
        ImportError: matplotlib is not installed.

    >>> figure = tradeoffs({"svd": [(50, 0.9), (25, 0.7)]}, ("MACs (%)", "accuracy"), (100, 0.95))
    >>> [line.get_label() for line in figure.axes[0].get_lines()[:2]]
    ['svd', 'dense']
    """
    figure, (ax,) = _figure(7, 4.5)
    for index, (name, points) in enumerate(lines.items()):
        color = LINE_COLORS[index % len(LINE_COLORS)]
        x, y = zip(*sorted(points), strict=True)
        marker, size = ("o-", 6) if len(points) > 1 else ("*", 14)
        ax.plot(x, y, marker, color=color, markersize=size, label=name)
    ax.plot(*dense, "s", color="black", label="dense")
    ax.axhline(dense[1], color="black", linewidth=0.8, alpha=0.4)
    ax.set(xlabel=labels[0], ylabel=labels[1], title=title)
    ax.set_xlim(left=0)
    ax.legend(fontsize=9)
    return figure


@cache
def _figure_class() -> "type[Figure]":
    """A figure that Jupyter shows as the value of a cell; without pyplot it needs no backend and no closing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError("figures need matplotlib: pip install 'decomp[notebook]'") from error

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            buffer = BytesIO()
            self.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
            return buffer.getvalue()

    return NotebookFigure


def _figure(width: float, height: float, columns: int = 1) -> "tuple[Figure, list[Any]]":
    """A white figure and its axes from left to right; sizes are in inches."""
    figure = _figure_class()(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, columns, squeeze=False)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
    return figure, list(axes[0])


def _draw_spectrum(ax: Any, unfolding: Spectrum, rank: int | None, share: float) -> None:
    """One spectrum on a logarithmic axis: what is kept, the threshold of vbmf, the rank of an energy."""
    values = unfolding.values.max(0)
    components = np.arange(1, len(values) + 1)
    kept = components <= (rank or len(values))
    floor = 1e-6 * float(values[0]) or 1.0
    values = np.maximum(values, floor)
    if not kept.all():
        ax.semilogy(components[~kept], values[~kept], "o", color="0.6", markersize=3.5, label="cut off")
    ax.semilogy(components[kept], values[kept], "o", color=AFTER, markersize=3.5, label=f"kept: {kept.sum()}")
    # Of several groups a rule takes the largest rank.
    signal = max(evbmf_rank(group, unfolding.rows, unfolding.columns) for group in unfolding.values)
    if 0 < signal < len(values):
        level = float(np.sqrt(values[signal - 1] * values[signal]))
        ax.axhline(level, color=MARK, linestyle="--", linewidth=1.2, label=f"vbmf threshold: {signal} above it")
    energies = (unfolding.values**2).cumsum(-1)
    smallest = max(int(np.searchsorted(energy, share * energy[-1])) for energy in np.atleast_2d(energies)) + 1
    label = f"{share:.0%} of the energy: the first {smallest}"
    ax.axvline(smallest, color="0.3", linestyle=":", linewidth=1.2, label=label)
    ax.legend(fontsize=8, framealpha=0.8)


def _tick(value: float) -> str:
    """A count as short as a tick needs it: 5 M, not 5.00 M."""
    number, _, unit = tables.number(value).partition(" ")
    return f"{float(number):g} {unit}".strip() if value >= 10 else f"{value:g}"


def _height(bars: int) -> float:
    return min(1.4 + INCHES_PER_BAR * bars, MAX_INCHES)


def _name_bars(ax: Any, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")

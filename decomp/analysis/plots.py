"""Figures of what is decided and measured: spectra with their cuts, costs and errors per layer, trade-offs.

Each function returns a matplotlib figure: Jupyter shows it, ``figure.savefig("name.png")`` writes it. Text and
lines have the colours of the style in use, ``plt.style.use("dark_background")`` for example. They need matplotlib
(``pip install 'decomp[notebook]'``), which is imported when the first figure is drawn.
"""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from decomp._util import tables
from decomp.analysis.drawing import (
    MUTED,
    WIDTH,
    colours,
    figure_class,
    height_of,
    label_points,
    name_rows,
    new_figure,
    say_on_hover,
    style,
    use_unit,
)
from decomp.linalg import Spectrum
from decomp.planning.cost import COSTS
from decomp.planning.plan import Plan
from decomp.ranks.spectral import evbmf_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGETS = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1)
ROOM_FOR_VALUES = 1.8  # of the longest bar: the values stand to the right of the bars

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
    >>> decided = decomp.plan(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=(16, 8))
    >>> figure = spectrum(decided, "0")
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
    figure, axes = new_figure(min(4.3 * len(modes), WIDTH), 4, columns=len(modes))
    ranks = choice.ranks or (None,) * len(modes)
    for ax, unfolding, mode, rank in zip(axes[0], candidate.spectra, modes, ranks, strict=True):
        _draw_spectrum(ax, unfolding, rank, energy)
        ax.set(xlabel=f"component of {mode}", ylabel="singular value" if ax is axes[0][0] else "")
    decision = f"{choice.method} {choice.ranks}" if choice.ranks else f"{choice.method} ({choice.reason})"
    figure.suptitle(textwrap.fill(f"{layer}: {decision}", 45 * len(modes)), fontsize=10)
    return figure


def costs(plan: Plan) -> "Figure":
    """Draw the parameters and MACs of every layer of a plan, before and after, and those of the whole model.

    Args:
        plan: any plan. One that was made without ``example_inputs=`` has no MACs; it shows the share that is left
            of them in the limit of large inputs.

    Raises:
        ImportError: matplotlib is not installed.

    >>> import decomp
    >>> from torch import nn
    >>> figure = costs(decomp.plan(nn.Sequential(nn.Linear(64, 64)), ranks=8))
    >>> for axes in figure.axes[:2]:
    ...     print(axes.get_xlabel(), [float(bar.get_width()) for bar in axes.patches])
    parameters (thousands) [4160.0, 1088.0]
    MACs (share, large input) [1.0, 0.25]
    """
    rows = {name: (choice.params, choice.macs) for name, choice in plan.items()}
    macs = "MACs (share, large input)" if plan.macs is None else "MACs"
    dense = [name for name, choice in plan.items() if not choice.ranks]
    title = f"Plan: {len(rows) - len(dense)} of {len(rows)} layers replaced"
    return before_and_after(("parameters", macs), rows, title, whole=(plan.params, plan.macs), dense=dense)


def errors(plan: Plan) -> "Figure":
    """Draw the relative error ||W - W'|| / ||W|| of every weight that a plan replaces, the largest at the top.

    The ranks stand beside the bars.

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
    replaced = sorted(((n, c) for n, c in plan.items() if c.ranks), key=lambda row: -row[1].error)
    if not replaced:
        raise ValueError("the plan replaces no layer: there is no error to draw")
    figure, ((ax,),) = new_figure(6.5, height_of(len(replaced)))
    bars = ax.barh(range(len(replaced)), [choice.error for _, choice in replaced], 0.6, color=colours()[0])
    labels = [f"{choice.error:.3f}  ranks {' x '.join(map(str, choice.ranks))}" for _, choice in replaced]
    for bar, (name, _), label in zip(bars, replaced, labels, strict=True):
        say_on_hover(bar, f"{name}: error {label}")
    ax.bar_label(bars, labels, padding=3, fontsize=8)
    name_rows(ax, [name or "(the model)" for name, _ in replaced])
    ax.set_xlim(0, ROOM_FOR_VALUES * max(choice.error for _, choice in replaced) or 1)
    ax.set_xlabel("relative error of the weight")
    largest = replaced[0][1].error
    ax.set_xticks([tick for tick in ax.get_xticks() if tick <= max(1.0, largest)])  # what is beyond is text
    return figure


def sensitivity(
    plan: Plan,
    budgets: Sequence[float] = BUDGETS,
    cost: str = "params",
    weights: Mapping[str, float] | None = None,
) -> "Figure":
    """Draw a map of what hurts: the error of each layer if it alone keeps a share of its own cost.

    A cell holds sqrt(s_l) e_l(b) with e_l(b) the least relative error of layer l among the ranks within the share
    b, and s_l how much its square adds to that of the network's output, where that is known; else s_l = 1.

    Args:
        plan: a plan that was made with :func:`decomp.plan`, not read from JSON, which holds no errors.
        budgets: the shares, each in (0, 1).
        cost: what they are shares of: "params", "macs", "bytes" or, in a plan with ``seconds=``, "seconds".
        weights: s_l by layer, from :func:`decomp.sensitivity`; by default those of a plan that was made with
            ``data=decomp.calibrate(model, data, loss="output")``.

    Raises:
        ValueError: the plan holds no errors, a budget is no share, or the cost is unknown.
        ImportError: matplotlib is not installed.

    >>> import decomp
    >>> from torch import nn
    >>> decided = decomp.plan(nn.Sequential(nn.Linear(64, 64)), ranks=8)
    >>> figure = sensitivity(decided, budgets=(0.5, 0.25))
    >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
    ['50%', '25%']
    """
    if not plan.candidates:
        raise ValueError("the plan holds no errors of other ranks; make one with decomp.plan(model, ranks=plan)")
    if cost not in COSTS:
        raise ValueError(f"cost={cost!r}: write one of {', '.join(map(repr, COSTS))}")
    if not budgets or not all(0 < share < 1 for share in budgets):
        raise ValueError(
            f"budgets={budgets!r}: write shares of each layer's cost in (0, 1), (0.5, 0.25) for example"
        )
    layers = {name: first for name, (first, *_) in plan.candidates.items()}
    known = (
        weights
        if weights is not None
        else {n: c.importance for n, c in layers.items() if c.importance is not None}
    )
    weighted = set(known) >= set(layers)
    if weights is not None and not weighted:
        missing = next(name for name in layers if name not in weights)
        raise ValueError(f"weights: there is none for layer {missing!r}; decomp.sensitivity gives one per layer")
    grid = np.full((len(layers), len(budgets)), np.nan)
    for row, (name, candidate) in enumerate(layers.items()):
        _, kept, squared = candidate.front(cost, 1)
        scale = sqrt(known[name]) if weighted else 1.0
        for column, share in enumerate(budgets):
            within = squared[kept <= share * candidate.dense_cost(cost)]
            grid[row, column] = scale * sqrt(max(within.min(), 0.0)) if len(within) else np.nan
    what = "error of the network's output" if weighted else "relative error of the layer"
    return _draw_map(grid, list(layers), budgets, what, f"what each layer keeps of its own {COSTS[cost].label}")


def _draw_map(grid: Any, names: Sequence[str], budgets: Sequence[float], what: str, label: str) -> "Figure":
    figure, ((ax,),) = new_figure(min(3.2 + 0.75 * len(budgets), WIDTH), height_of(len(names)) + 0.4)
    from matplotlib.colors import PowerNorm

    largest = float(np.nanmax(grid)) if np.isfinite(grid).any() else 1.0
    # Errors of layers differ by orders of magnitude: by their roots the small ones are told apart as well.
    image = ax.imshow(grid, aspect="auto", cmap="viridis", norm=PowerNorm(0.5, 0.0, largest or 1.0))
    ax.set_xticks(range(len(budgets)), [f"{share:.0%}" for share in budgets])
    name_rows(ax, [name or "(the model)" for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(visible=False)
    for (row, column), value in np.ndenumerate(grid):
        known = bool(np.isfinite(value))
        on_dark = known and value < 0.4 * largest
        color = ("white" if on_dark else "black") if known else style("text.color")
        text = (f"{value:.2f}" if value >= 0.1 else f"{value:.3f}") if known else "-"
        ax.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    ax.set(xlabel=f"{label}\n(-: no ranks are that cheap)")
    bar = figure.colorbar(image, ax=ax, label=what)
    bar.outline.set_visible(False)
    return figure


def before_and_after(
    labels: Sequence[str],
    rows: Mapping[str, Sequence[Pair]],
    title: str = "",
    *,
    whole: Sequence[Pair | None] | None = None,
    dense: Collection[str] = (),
) -> "Figure":
    """Draw bars of costs before and after: one panel per label, one pair of bars per row.

    Args:
        labels: what each panel shows; one without a unit in brackets is a count.
        rows: by the name of the row, one (before, after) per label.
        title: the title of the figure.
        whole: (before, after) of the whole model, per label, below the rows and on a scale of its own; None for
            what is not known.
        dense: the rows that were not replaced; they are drawn hollow.

    Raises:
        ImportError: matplotlib is not installed.

    >>> rows = {"conv1": [(100, 25)], "conv2": [(200, 40)]}
    >>> figure = before_and_after(("parameters",), rows)
    >>> [float(bar.get_width()) for bar in figure.axes[0].patches]
    [100.0, 200.0, 25.0, 40.0]
    """
    figure_class()  # says how to get matplotlib where it is missing
    from matplotlib.patches import Patch

    count, parts = len(rows), 1 if whole is None else 2
    width = min(2.2 + 3.2 * len(labels), WIDTH)
    ratios = {} if whole is None else {"height_ratios": [count, 1.2]}
    figure, axes = new_figure(width, height_of(count + 2), parts, len(labels), **ratios)
    for column, label in enumerate(labels):
        pairs = [row[column] for row in rows.values()]
        _draw_pairs(axes[0][column], label, dict(zip(rows, pairs, strict=True)), dense)
        use_unit(axes[0][column].xaxis, label, max((max(pair) for pair in pairs), default=0.0))
        name_rows(axes[0][column], [name or "(the model)" for name in rows] if column == 0 else [""] * count)
        if whole is not None:
            total = whole[column]
            _draw_pairs(axes[1][column], label, {} if total is None else {"whole model": total})
            name_rows(axes[1][column], ["whole model" if column == 0 else ""])
            axes[1][column].set(xticks=[])
    handles = [
        Patch(color=MUTED, alpha=0.45, label="dense model"),
        Patch(color=colours()[0], label="compressed: replaced layers"),
    ]
    if dense:
        handles.append(Patch(facecolor="none", edgecolor=MUTED, label="layers that stay dense"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_pairs(ax: Any, label: str, pairs: Mapping[str, Pair], dense: Collection[str] = ()) -> None:
    """Pairs of bars, what is left of each in words behind them; those that are dense are hollow."""
    before, after = (np.array([pair[side] for pair in pairs.values()], float) for side in (0, 1))
    wide = ax.barh(range(len(pairs)), before, 0.78, color=MUTED, alpha=0.45)
    narrow = ax.barh(range(len(pairs)), after, 0.4, color=colours()[0])
    longest = max([*before, *after], default=0.0) or 1.0
    for index, (name, (full, left)) in enumerate(pairs.items()):
        hollow = name in dense
        if hollow:
            wide[index].set(facecolor="none", edgecolor=MUTED, alpha=1)
            narrow[index].set(facecolor="none")
        text = _value(full) + (", dense" if hollow else f" => {_value(left)}")
        text += f" ({left / full:.0%})" if full and not hollow else ""
        ax.text(max(full, left) + 0.02 * longest, index, text, va="center", fontsize=7)
        for bar in (wide[index], narrow[index]):
            say_on_hover(bar, f"{name}: {label} {text}")
    ax.set_xlim(0, ROOM_FOR_VALUES * longest)


def _value(value: float) -> str:
    """A count with a prefix, or a small number with three digits."""
    return tables.number(value) if value >= 1000 or value == int(value) else f"{value:.3g}"


class Marks(NamedTuple):
    """What a trade-off draws besides its lines.

    Args:
        names: by line, a label per point.
        less_is_better: whether a lower score is a better one.
        tolerance: the score that is still good enough, and what the legend calls it.
        best: the cheapest point that is good enough, and what the legend calls it.
        legend: the title of the legend.
    """

    names: Mapping[str, Sequence[str]] = {}
    less_is_better: bool = False
    tolerance: tuple[float, str] | None = None
    best: tuple[Pair, str] | None = None
    legend: str = ""


def tradeoffs(
    lines: Mapping[str, Sequence[Pair]],
    labels: tuple[str, str],
    dense: Pair,
    title: str = "",
    marks: Marks | None = None,
) -> "Figure":
    """Draw a line of (cost, score) per method and rule, the dense model as a square, and the Pareto front.

    The front joins the points than which no cheaper point is as good.

    Args:
        lines: the points by the name of the line; a line of one point is a star.
        labels: of the x axis and the y axis.
        dense: (cost, score) of the dense model.
        title: the title of the figure.
        marks: labels of points, the tolerance and the best point.

    Raises:
        ImportError: matplotlib is not installed.

    >>> lines, dense = {"svd": [(50, 0.9), (25, 0.7)]}, (100, 0.95)
    >>> figure = tradeoffs(lines, ("MACs (%)", "accuracy"), dense)
    >>> figure.axes[0].get_legend_handles_labels()[1]
    ['Pareto front', 'svd', 'dense']
    """
    marks = marks or Marks()
    figure, ((ax,),) = new_figure(7.5, 5)
    front = pareto_front([*(point for points in lines.values() for point in points), dense], marks.less_is_better)
    ax.plot(*zip(*front, strict=True), color=MUTED, linewidth=6, alpha=0.35, label="Pareto front")
    palette, points, names, colors = colours(), [dense], ["dense"], [style("text.color")]
    for index, (name, found) in enumerate(lines.items()):
        color = palette[index % len(palette)]
        marker, size = ("o-", 6) if len(found) > 1 else ("*", 14)
        ax.plot(*zip(*sorted(found), strict=True), marker, color=color, markersize=size, label=name)
        points += found
        names += marks.names.get(name, [""] * len(found))
        colors += [color] * len(found)
    ax.plot(*dense, "s", color=style("text.color"), label="dense")
    if marks.tolerance is not None:
        level, name = marks.tolerance
        ax.axhline(level, color=style("text.color"), linestyle="--", linewidth=0.9, alpha=0.7, label=name)
    if marks.best is not None:
        point, name = marks.best
        options = {"markersize": 15, "markerfacecolor": "none", "markeredgewidth": 1.6, "linestyle": "none"}
        ax.plot(*point, "o", markeredgecolor=style("text.color"), label=name, **options)
    ax.set(xlabel=labels[0], ylabel=labels[1], title=title)
    ax.set_xlim(0, 1.06 * max(x for x, _ in points))
    ax.margins(y=0.18)
    where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, -0.14), "ncols": 2, "frameon": False}
    ax.legend(**where, fontsize=8, title=marks.legend or None, title_fontsize=8)
    shown = [i for i, name in enumerate(names) if name]
    label_points(ax, [points[i] for i in shown], [names[i] for i in shown], [colors[i] for i in shown])
    return figure


def pareto_front(points: Sequence[Pair], less_is_better: bool = False) -> list[Pair]:
    """Return the points that are better than all points that cost less, by rising cost.

    Args:
        points: (cost, score).
        less_is_better: whether a lower score is a better one.

    >>> pareto_front([(0.2, 0.1), (0.5, 0.3), (0.8, 0.05), (0.5, 0.2)])
    [(0.2, 0.1), (0.5, 0.3)]
    """
    sign, best, front = -1.0 if less_is_better else 1.0, -np.inf, []
    for cost, score in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if sign * score > best:
            best = sign * score
            front.append((cost, score))
    return front


def _draw_spectrum(ax: Any, unfolding: Spectrum, rank: int | None, share: float) -> None:
    """One spectrum on a logarithmic axis: what is kept, the threshold of vbmf, the rank of an energy."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    values = unfolding.values.max(0)
    components = np.arange(1, len(values) + 1)
    kept = components <= (rank or len(values))
    floor = 1e-6 * float(values[0]) or 1.0
    values = np.maximum(values, floor)
    palette = colours()
    for part, color, label in ((~kept, MUTED, "cut off"), (kept, palette[0], f"kept: {kept.sum()}")):
        if part.any():
            (points,) = ax.semilogy(components[part], values[part], "o", color=color, markersize=3.5, label=label)
            shown = zip(components[part], values[part], strict=True)
            say_on_hover(points, *(f"component {place}: {value:.4g}" for place, value in shown))
    # Of several groups a rule takes the largest rank.
    signal = max(evbmf_rank(group, unfolding.rows, unfolding.columns) for group in unfolding.values)
    if 0 < signal < len(values):
        level = float(np.sqrt(values[signal - 1] * values[signal]))
        label = f"vbmf threshold: {signal} above it"
        ax.axhline(level, color=palette[1 % len(palette)], linestyle="--", linewidth=1.4, label=label)
    energies = (unfolding.values**2).cumsum(-1)
    smallest = max(int(np.searchsorted(energy, share * energy[-1])) for energy in np.atleast_2d(energies)) + 1
    label = f"{share:.0%} of the energy: the first {smallest}"
    ax.axvline(smallest, color=style("text.color"), linestyle=":", linewidth=1.2, label=label)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    # Decades alone are too few where the values span less than two.
    decades = float(np.log10(values[0] / values[-1]))
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.18), fontsize=8, frameon=False)

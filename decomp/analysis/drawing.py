"""What figures share: their size and colours, the placing of labels, and axes in units that can be read.

Colours of text, lines and backgrounds are those of matplotlib's ``rcParams`` when the figure is made, so that
``plt.style.use("dark_background")`` and a style of the user's apply.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

import numpy as np

from decomp._util import tables
from decomp._util.optional import needing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 110
WIDTH = 8.6  # inches: at 110 dots what a notebook shows in a window of 1366 pixels
INCHES_PER_ROW, MAX_INCHES = 0.26, 40.0
LONGEST_NAME = 30
MARGIN = 0.007  # between a label and what it must not cover, as a share of the axes
NEAREST = 0.015  # of a label to its point
FARTHEST = 0.3
CANDIDATES = 2000  # places that are tried for each label
MUTED = "0.55"  # legible on white and on black
UNITS = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


@cache
def figure_class() -> "type[Figure]":
    """A figure that Jupyter shows as the value of a cell; without pyplot it needs no backend and no closing.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with needing("matplotlib", "figures need matplotlib: pip install 'decomp[notebook]'"):
        from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            buffer = BytesIO()
            self.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
            return buffer.getvalue()

    return NotebookFigure


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> "tuple[Figure, Any]":
    """Make a figure with a grid of axes, in the colours of the style in use.

    Args:
        width: in inches.
        height: in inches.
        rows: of axes.
        columns: of axes.
        grid: further arguments of ``Figure.subplots``.
    """
    figure = figure_class()(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(visible=True, alpha=0.25)
        ax.set_axisbelow(True)
    return figure, axes


def style(name: str) -> Any:
    """A setting of the style in use, "text.color" for example."""
    from matplotlib import rcParams

    return cast(Any, rcParams)[name]


def colours() -> list[Any]:
    """The colours of lines in the style in use."""
    return list(style("axes.prop_cycle").by_key().get("color", ["tab:blue"]))


def label_points(
    ax: Any, points: Sequence[tuple[float, float]], labels: Sequence[str], colors: Sequence[Any], size: float = 8
) -> None:
    """Write a label beside each point where it covers neither points nor lines nor other labels.

    textalloc places them; where it is not installed they stand above and below their points in turn.

    Args:
        ax: the axes, with everything else drawn and their limits set.
        points: where the labels belong.
        labels: one per point.
        colors: one per point.
        size: of the text.
    """
    colors = [_readable(color) for color in colors]
    try:
        from textalloc import allocate
    except ModuleNotFoundError as error:
        if error.name != "textalloc":
            raise
        for index, (point, label, color) in enumerate(zip(points, labels, colors, strict=True)):
            offset = (5, 5) if index % 2 == 0 else (5, -11)
            ax.annotate(label, point, offset, textcoords="offset points", fontsize=size, color=color)
        return
    from matplotlib.patheffects import withStroke

    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())  # lines to the labels change no limits
    ax.figure.draw_without_rendering()  # the axes then have the place that they will have
    x, y = zip(*points, strict=True)
    lines = _drawn_lines(ax)
    allocate(
        ax,
        x,
        y,
        list(labels),
        x_scatter=x,
        y_scatter=y,
        x_lines=[line[:, 0] for line in lines],
        y_lines=[line[:, 1] for line in lines],
        textsize=size,
        textcolor=colors,
        linecolor=MUTED,
        linewidth=0.6,
        margin=MARGIN,
        min_distance=NEAREST,
        max_distance=FARTHEST,
        nbr_candidates=CANDIDATES,
        avoid_label_lines_overlap=True,
        # An edge in the colour of the background: a line that a label has to cross does not make it illegible.
        path_effects=[withStroke(linewidth=2.5, foreground=style("axes.facecolor"))],
    )


def _drawn_lines(ax: Any) -> list[Any]:
    """The lines that are drawn in an axes, as points (n, 2) in its coordinates: also those that span it."""
    found = []
    for line in ax.lines:
        if line.get_linestyle() != "None":
            places = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
            found.append(ax.transData.inverted().transform(places[np.isfinite(places).all(1)]))
    return found


def _readable(color: Any) -> Any:
    """A colour of a line, moved towards that of text: orange letters on white can hardly be read."""
    from matplotlib.colors import to_rgb

    pairs = zip(to_rgb(color), to_rgb(style("text.color")), strict=True)
    return tuple(0.5 * (line + text) for line, text in pairs)


SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
OF_THE_PAGE = "#fedcba"  # stands for the colour of the page's text until the SVG is written
TEXTS_AND_LINES = (
    "text.color",
    "axes.labelcolor",
    "axes.titlecolor",
    "axes.edgecolor",
    "xtick.color",
    "ytick.color",
)


def say_on_hover(artist: Any, *texts: str) -> None:
    """What the SVG of a figure shows under the mouse: one text for a bar, one per marker for a line of markers."""
    artist.decomp_hover = texts


@contextmanager
def colours_of_the_page() -> Iterator[None]:
    """Figures of the block have the text and lines of the page that :func:`svg` puts them on, and no ground."""
    from matplotlib import rc_context, rcdefaults

    own: Any = dict.fromkeys(TEXTS_AND_LINES, OF_THE_PAGE)
    with rc_context():
        rcdefaults()  # a style of the user's is for other pages
        with rc_context(own | {"axes.facecolor": "none", "figure.facecolor": "none"}):
            yield


def svg(figure: "Figure", name: str, what: str) -> str:
    """A figure that was drawn within :func:`colours_of_the_page`, as SVG for a page, with its texts for the mouse.

    Args:
        figure: it is drawn once more.
        name: tells its parts from those of other figures on the page.
        what: what it shows, for those who do not see it.
    """
    from matplotlib import rc_context

    artists = [artist for artist in figure.findobj() if hasattr(artist, "decomp_hover")]
    texts = {f"{name}-{place}": cast(Any, artist).decomp_hover for place, artist in enumerate(artists)}
    for key, artist in zip(texts, artists, strict=True):
        artist.set_gid(key)
    buffer = BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue())
    for part in root.iter():  # in HTML no part of an SVG has a namespace
        part.tag = part.tag.removeprefix(f"{{{SVG}}}")
        if (link := part.attrib.pop(f"{{{XLINK}}}href", None)) is not None:
            part.set("href", link)
    for metadata in root.findall("metadata"):
        root.remove(metadata)
    for group in root.iter("g"):
        markers = list(group.iter("use")) or [group]
        for part, text in zip(markers, texts.get(group.get("id", ""), ()), strict=False):
            ElementTree.SubElement(part, "title").text = text
    width = float(root.attrib.pop("width").removesuffix("pt")) / 72
    root.attrib.pop("height")
    root.attrib |= {"role": "img", "aria-label": what, "style": f"width: {width * DOTS_PER_INCH:.0f}px"}
    return ElementTree.tostring(root, encoding="unicode").replace(OF_THE_PAGE, "currentColor")


def use_unit(axis: Any, label: str, largest: float) -> None:
    """Name an axis with its unit, and write its ticks in it: "parameters (millions)" with ticks 0, 5, 10.

    Args:
        axis: the x or the y axis.
        label: what is counted; one that ends with a bracket names its unit already.
        largest: the largest value on the axis.
    """
    from matplotlib.ticker import MaxNLocator

    size, unit = next(((size, name) for size, name in UNITS if largest >= size), (1.0, ""))
    if label.endswith(")"):
        size, unit = 1.0, ""
    axis.set_label_text(f"{label} ({unit})" if unit else label)
    axis.set_major_locator(MaxNLocator(4))
    axis.set_major_formatter(lambda value, _: f"{value / size:g}")


def name_rows(ax: Any, names: Sequence[str]) -> None:
    """Write the names of rows beside horizontal bars, the first at the top; long ones shortened in the middle."""
    shown = tables.shortened(names, LONGEST_NAME) or list(names)
    ax.set_yticks(range(len(names)), shown, fontsize=8)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")


def height_of(rows: int) -> float:
    """The height in inches of a figure with so many rows."""
    return min(1.3 + INCHES_PER_ROW * rows, MAX_INCHES)

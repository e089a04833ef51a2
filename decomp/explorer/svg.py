"""Small drawings as SVG text, for the explorer: drawn in microseconds, in the colours of the page's theme."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

from decomp.analysis.plots import pareto_front
from decomp.linalg import Values

KEPT, MARK = "#4a90d9", "#e07b1a"  # legible on white and on black
MAX_BARS = 64
WIDTH, HEIGHT = 372, 186
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 24, 34

Point = tuple[float, float]


def spectrum(values: Values, kept: int, width: int = 120, height: int = 30) -> str:
    """Draw singular values as bars, the first ``kept`` of them in colour.

    Args:
        values: the singular values, descending.
        kept: the rank. It can exceed the number of singular values: an output rank of 32 for a 32 x 9 unfolding.
        width: of the drawing, in pixels.
        height: of the drawing, in pixels.

    >>> import numpy as np
    >>> drawing = spectrum(np.array([2.0, 1.0, 0.5]), 1)
    >>> drawing.count("stroke="), "1 of 3 components kept" in drawing
    (2, True)
    """
    count, largest = len(values), float(values[0]) or 1.0
    kept = min(kept, count)
    bars = min(count, MAX_BARS)
    shown = [round(i * (count - 1) / max(bars - 1, 1)) for i in range(bars)]
    step = width / bars
    paths = {KEPT: "", "currentColor": ""}
    for bar, component in enumerate(shown):
        bar_height = max(1.0, (height - 2) * float(values[component]) / largest)
        color = KEPT if component < kept else "currentColor"
        paths[color] += f"M{bar * step + step / 2:.1f} {height}v-{bar_height:.1f}"
    stroke = f'stroke-width="{max(step - 0.6, 0.8):.1f}"'
    drawn = "".join(
        f'<path d="{path}" stroke="{color}" {stroke} opacity="{1 if color == KEPT else 0.3}"/>'
        for color, path in paths.items()
    )
    label = f"spectrum: {kept} of {count} components kept"
    values_at = f"largest singular value {float(values[0]):.3g}, of component {max(kept, 1)} "
    values_at += f"{float(values[max(kept, 1) - 1]):.3g}"
    title = f'<title>{label}; {values_at}</title><path d="M0 0h{width}v{height}h-{width}z" fill="transparent"/>'
    return f'<svg width="{width}" height="{height}" role="img" aria-label="{label}">{title}{drawn}</svg>'


def chart(
    title: str,
    labels: tuple[str, str],
    curve: Sequence[Point] = (),
    points: Sequence[Point] = (),
    current: tuple[float, float | None] | None = None,
    baseline: float | None = None,
    less_is_better: bool = False,
) -> str:
    """Draw a curve, points, and where the current plan is, over the share of a cost from 0 to 100 %.

    The mouse over a point or the curve shows its values.

    Args:
        title: above the chart.
        labels: of the x axis and the y axis.
        curve: (share, height) of a line.
        points: (share, height) of dots; those that are better than all cheaper ones are joined: the Pareto front.
        current: share and, where it is known, height of the current plan.
        baseline: the height of the dense model.
        less_is_better: whether a lower point is a better one.

    >>> drawing = chart("Evaluated", ("MACs (% of dense)", "accuracy"), points=[(0.5, 0.9), (0.2, 0.7)])
    >>> drawing.count("<circle"), "50%, accuracy 0.9" in drawing
    (2, True)
    """
    known = [] if current is None or current[1] is None else [current[1]]
    dense = [] if baseline is None else [baseline]
    heights = [y for _, y in (*curve, *points)] + known + dense or [0.0, 1.0]
    low, high = min(heights), max(heights)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - margin if low else 0.0, high + margin

    def pixels(point: Point) -> Point:
        x = LEFT + (WIDTH - LEFT - RIGHT) * min(max(point[0], 0), 1.05)
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (point[1] - low) / (high - low)

    def says(point: Point, what: str = "") -> str:
        return f"<title>{escape(what)}{point[0]:.0%}, {escape(labels[1])} {point[1]:.4g}</title>"

    parts = [_frame(title, labels, low, high)]
    for line in (curve, pareto_front(points, less_is_better)):
        if len(line) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in map(pixels, line))
            parts.append(f'<path d="{path}" fill="none" stroke="{KEPT}" stroke-width="1.8" opacity="0.9"/>')
    for point in curve:  # wide enough for a mouse, and not seen
        x, y = pixels(point)
        hover = 'class="decomp-hover" stroke="transparent" stroke-width="14" stroke-linecap="round"'
        parts.append(f'<path d="M{x:.1f} {y:.1f}h0.1" {hover} pointer-events="all">{says(point)}</path>')
    for point in points:
        x, y = pixels(point)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{KEPT}">{says(point)}</circle>')
    if baseline is not None:
        x, y = pixels((1.0, baseline))
        says_dense = says((1.0, baseline), "dense: ")
        mark = f'<path d="M{x - 4:.1f} {y - 4:.1f}h8v8h-8z" fill="currentColor">{says_dense}</path>'
        above = y - 8 if y > TOP + 16 else y + 16
        parts.append(f'{mark}<text x="{x + 4:.1f}" y="{above:.1f}" text-anchor="end">dense</text>')
    if current is not None:
        x, _ = pixels((current[0], low))
        style = f'stroke="{MARK}" stroke-width="1.6" stroke-dasharray="4 3"'
        now = f"<title>this plan: {current[0]:.0%}</title>"
        parts.append(f'<path class="decomp-now" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" {style}>{now}</path>')
        if current[1] is not None:
            here = (current[0], current[1])
            x, y = pixels(here)
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{MARK}">{says(here, "this plan: ")}</circle>'
            )
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten between two values, about ``count`` of them.

    >>> ticks(0.81, 1.02), ticks(0.0, 37.0)
    ([0.85, 0.9, 0.95, 1.0], [0.0, 10.0, 20.0, 30.0])
    """
    power = 10.0 ** floor(log10((high - low) / count))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs((high - low) / size - count))
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def as_image(drawing: str) -> str:
    """A drawing as an ``<img>`` on white, for pages that take styles and drawings out of what they show."""
    paper = f'<svg xmlns="http://www.w3.org/2000/svg" color="#222222" style="background: #ffffff" {drawing[5:]}'
    data = b64encode(paper.encode()).decode()
    return f'<img src="data:image/svg+xml;base64,{data}" width="{WIDTH}" height="{HEIGHT}"/>'


def _frame(title: str, labels: tuple[str, str], low: float, high: float) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" fill="currentColor" font-size="11" font-family="sans-serif">',
        f'<text x="{LEFT}" y="14" font-weight="600">{escape(title)}</text>',
        f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="currentColor" opacity="0.6"/>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(labels[0])}</text>',
        f'<text transform="translate(11 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(labels[1])}</text>",
    ]
    grid = 'fill="none" stroke="currentColor" opacity="0.15"'
    for quarter in range(5):
        x = LEFT + (right - LEFT) * quarter / 4
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" {grid}/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{25 * quarter}</text>')
    for value in ticks(low, high):
        y = bottom - (bottom - TOP) * (value - low) / (high - low)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" {grid}/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    return "".join(parts)

"""Small drawings as SVG text, for the explorer: drawn in microseconds, in the colours of the page's theme."""

from collections.abc import Sequence
from html import escape

from decomp.linalg import Values

KEPT, MARK = "#4a90d9", "#e07b1a"  # legible on white and on black
MAX_BARS = 64
WIDTH, HEIGHT = 340, 210
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
    >>> drawing.count("<path"), "1 of 3 components kept" in drawing
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
    return f'<svg width="{width}" height="{height}" role="img" aria-label="{label}">{drawn}</svg>'


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

    Args:
        title: above the chart.
        labels: of the x axis and the y axis.
        curve: (share, height) of a line.
        points: (share, height) of dots; those that are better than all cheaper ones are joined.
        current: share and, where it is known, height of the current plan.
        baseline: the height of the dense model.
        less_is_better: whether a lower point is a better one.

    >>> drawing = chart("Evaluated", ("% of the MACs", "accuracy"), points=[(0.5, 0.9), (0.2, 0.7)])
    >>> drawing.count("<circle")
    2
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

    parts = [_frame(title, labels, low, high)]
    for line in (curve, _front(points, less_is_better)):
        if len(line) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in map(pixels, line))
            parts.append(f'<path d="{path}" fill="none" stroke="{KEPT}" stroke-width="1.6" opacity="0.8"/>')
    for x, y in map(pixels, points):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{KEPT}"/>')
    if baseline is not None:
        x, y = pixels((1.0, baseline))
        parts.append(f'<path d="M{x - 4:.1f} {y - 4:.1f}h8v8h-8z" fill="currentColor"/>')
    if current is not None:
        x, _ = pixels((current[0], low))
        style = f'stroke="{MARK}" stroke-dasharray="3 3"'
        parts.append(f'<path class="decomp-now" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" {style}/>')
        if current[1] is not None:
            x, y = pixels((current[0], current[1]))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{MARK}"/>')
    return "".join(parts) + "</svg>"


def _front(points: Sequence[Point], less_is_better: bool) -> list[Point]:
    """The points that are better than all points that cost less, by rising cost."""
    ordered = sorted(points)
    sign = -1 if less_is_better else 1
    return [p for i, p in enumerate(ordered) if all(sign * p[1] > sign * before[1] for before in ordered[:i])]


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
    for quarter in range(5):
        x = LEFT + (right - LEFT) * quarter / 4
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{25 * quarter}</text>')
    for y, value in ((bottom, low), ((TOP + bottom) / 2, (low + high) / 2), (TOP + 4, high)):
        parts.append(f'<text x="{LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{value:.2g}</text>')
    return "".join(parts)

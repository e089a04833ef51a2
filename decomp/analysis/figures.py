"""An empty matplotlib figure that Jupyter shows wherever it is the value of a cell; import it late."""

from io import BytesIO
from typing import Any

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


class Picture(Figure):
    """A figure without pyplot: nothing stays open, no backend is needed, ``savefig`` writes it."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def picture(width: float, height: float, columns: int = 1) -> tuple[Picture, list[Any]]:
    """Return a white figure, and its axes from left to right."""
    figure = Picture(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, columns, squeeze=False)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
    return figure, list(axes[0])

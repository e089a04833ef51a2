"""Tables and numbers as text."""

import random
from collections.abc import Sequence
from io import StringIO


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] = ()) -> str:
    """Render a table as plain text, never wrapped; columns whose name starts with ``>`` are right-aligned."""
    state = random.getstate()  # rich draws a random number while it is imported
    from rich import box  # imported late: only printing needs it
    from rich.console import Console
    from rich.table import Table

    random.setstate(state)
    table = Table(title=title or None, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        footer = total[index] if total else ""
        justify = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">"), footer, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.show_footer = bool(total)
    for row in rows:
        table.add_row(*row)
    text = StringIO()
    # Inside Jupyter a Console would display the table instead of writing it.
    console = Console(file=text, width=10_000, color_system=None, force_jupyter=False, markup=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def number(value: float) -> str:
    """Format a count with three digits and an SI prefix.

    >>> [number(value) for value in (7, 1234, 25_557_032, 4_089_184_256)]
    ['7', '1.23 k', '25.6 M', '4.09 G']
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:.0f}"


def milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds with three digits."""
    return f"{1e3 * seconds:#.3g}".rstrip(".") + " ms"

"""Tables and numbers as text: a table fits the width that it is printed at, and nothing in it is cut off."""

import random
import re
import shutil
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from decomp._util.optional import needing

WIDTH_OF_NO_TERMINAL = 120
LEAST_NAME = 16  # below this many characters a name gets a line of its own
MOST_FOOTNOTES = 12  # more distinct remarks are written under their rows
GAP, INDENT = "  ", "    "
NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: as it is shown.
        short: what is shown in its place where the table would be too wide; empty for no difference.
        value: what the column is sorted by; the text if None.
        share: of a whole, for a bar behind the text; None for no bar.
    """

    text: str = ""
    short: str = ""
    value: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: its heading.
        role: "name" for the first column, which identifies the row; "detail" for text about it; "value" for
            numbers, which are aligned on the right; "remark" for a sentence, which may stand below the row.
        measured: the values differ between equal layers: grouped rows show the least and the largest.
    """

    title: str
    role: Literal["name", "detail", "value", "remark"] = "value"
    measured: bool = False


Row = Sequence["str | Cell"]


@dataclass(frozen=True)
class Table:
    """A table as data; :meth:`text` writes it for a terminal.

    Args:
        columns: the first is the name of the row.
        rows: one cell per column.
        total: the last row, set apart; empty for none.
        notes: paragraphs below the table.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    total: Row = ()
    notes: Sequence[str] = field(default=())

    def text(self, width: int | None = None, *, grouped: bool = False) -> str:
        """Write the table so that no line is longer than ``width``.

        The first of these that fits is taken: all in one line; remarks as footnotes or under their rows; numbers
        in their short form; names shortened in the middle, as long as they stay distinct; names on lines of their
        own; a list of the cells of each row.

        Args:
            width: in characters; by default :func:`console_width`.
            grouped: write layers as one row that are numbered and alike in everything that is not measured.

        >>> columns = (Column("layer", "name"), Column("params"))
        >>> print(Table(columns, [("conv1", "1.2 k"), ("conv2", "1.2 k")]).text(20, grouped=True))
        layer         params
        ────────────────────
        conv{1-2} x2   1.2 k
        """
        width = max(console_width() if width is None else width, 12)
        table = self.grouped() if grouped else self
        # In a shortened name the layers that a row stands for could not be read.
        layouts = [layout for layout in LAYOUTS if not grouped or layout is not Table._shortened]
        lines = next(filter(None, (layout(table, width) for layout in layouts)), None) or table._listed(width)
        paragraphs = (
            [line for part in note.splitlines() for line in _wrapped(part, width, "")] for note in self.notes
        )
        return "\n\n".join("\n".join(block) for block in (lines, *paragraphs))

    def grouped(self) -> "Table":
        """The table with one row for all layers whose names differ in one number and whose cells are equal."""
        left, rows = dict(enumerate(self.rows)), []
        families: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for index, row in enumerate(self.rows):
            for key in self._families(row):
                families.setdefault(key, []).append(index)
        for index, row in enumerate(self.rows):
            if index in left:
                alike = ([i for i in families[key] if i in left] for key in self._families(row))
                group = max(alike, key=len, default=[index])
                rows.append(self._joined([left.pop(i) for i in group]) if len(group) > 1 else left.pop(index))
        return replace(self, rows=rows)

    def _families(self, row: Row) -> Iterator[tuple[str, tuple[str, ...]]]:
        """What the rows have in common that may be written as one with this: a family per number in the name."""
        name = _text(row[0])
        cells = zip(self.columns[1:], row[1:], strict=True)
        fixed = tuple(_text(cell) for column, cell in cells if not column.measured)
        for match in NUMBERS.finditer(name):
            yield f"{name[: match.start()]}\0{name[match.end() :]}", fixed

    def _joined(self, group: Sequence[Row]) -> Row:
        cells: list[str | Cell] = [f"{_joined_name([_text(row[0]) for row in group])} x{len(group)}"]
        for index, column in enumerate(self.columns[1:], 1):
            same = sorted((row[index] for row in group), key=_sort_key)
            first, last = (_texts([cell], short=True)[0] for cell in (same[0], same[-1]))
            if column.measured and first != last:
                unit = last.partition(" ")[2]
                first = first.removesuffix(f" {unit}") if unit else first
            cells.append(f"{first} to {last}" if column.measured and first != last else same[0])
        return cells

    def _inline(self, width: int) -> list[str] | None:
        table = self.without_empty_remarks()
        return table._aligned(width, [_texts(row) for row in table.rows], _texts(table.total))

    def _folded(self, width: int, short: bool = False) -> list[str] | None:
        """Remarks as footnotes, or under their rows where there are many."""
        table, remarks = self._without_remarks()
        rows = [_texts(row, short) for row in table.rows]
        return table._with_remarks(width, rows, _texts(table.total, short), remarks)

    def _compact(self, width: int) -> list[str] | None:
        return self._folded(width, short=True)

    def _shortened(self, width: int) -> list[str] | None:
        """Names shortened in the middle to what the other columns leave."""
        table, remarks = self._without_remarks()
        rows, total = [_texts(row, True) for row in table.rows], _texts(table.total, True)
        marked = remarks and len(_footnotes(remarks)) <= MOST_FOOTNOTES
        left = width - sum(table._widths(rows, total)[1:]) - len(GAP) * (len(table.columns) - 1)
        left -= len(GAP) + 4 if marked else 0  # the column of the footnotes
        names = shortened([row[0] for row in rows], left) if left >= LEAST_NAME else None
        if names is None or (total and _cells(total[0]) > left):
            return None
        rows = [(name, *row[1:]) for name, row in zip(names, rows, strict=True)]
        return table._with_remarks(width, rows, total, remarks)

    def _stacked(self, width: int) -> list[str] | None:
        """The name, and as many of the details as need be, on a line above the rest of each row."""
        table, remarks = self._without_remarks()
        texts = sum(column.role in ("name", "detail") for column in table.columns)
        rows, total = [_texts(row, True) for row in table.rows], _texts(table.total, True)
        under = [_wrapped(text, width, INDENT) if text else [] for text in remarks]
        for heads in range(1, min(texts, len(table.columns) - 1) + 1):
            inner = replace(table, columns=[Column("", "name"), *table.columns[heads:]])
            titles = GAP.join(column.title for column in table.columns[:heads])
            over = [_headed(row[:heads], width) for row in [*rows, total] if row]
            cut = [("", *row[heads:]) for row in rows]
            lines = inner._aligned(width, cut, ("", *total[heads:]) if total else (), over, under)
            if lines is not None:
                return [*_wrapped(titles, width, ""), *lines]
        return None

    def _listed(self, width: int) -> list[str]:
        """Every cell on a line of its own, for widths that no table fits."""
        lines: list[str] = []
        for row in [*self.rows, *([self.total] if self.total else [])]:
            lines += _wrapped(_text(row[0]), width, "")
            for column, cell in zip(self.columns[1:], row[1:], strict=True):
                if _text(cell):
                    lines += _wrapped(f"{column.title}: {_text(cell)}", width, GAP)
        return lines

    def without_empty_remarks(self) -> "Table":
        """The table, without the column of remarks if there are none."""
        table, remarks = self._without_remarks()
        return self if any(remarks) else table

    def _without_remarks(self) -> tuple["Table", list[str]]:
        """The table without its column of remarks, and the remark of each row, that of the total last."""
        places = [i for i, column in enumerate(self.columns) if column.role == "remark"]
        kept = [i for i in range(len(self.columns)) if i not in places]
        rows = [*self.rows, *([self.total] if self.total else [])]
        remarks = ["; ".join(filter(None, (_text(row[i]) for i in places))) for row in rows]
        cut = [[row[i] for i in kept] for row in rows]
        total = cut.pop() if self.total else ()
        return replace(self, columns=[self.columns[i] for i in kept], rows=cut, total=total), remarks

    def _with_remarks(
        self, width: int, rows: Sequence[Sequence[str]], total: Sequence[str], remarks: Sequence[str]
    ) -> list[str] | None:
        footnotes = _footnotes(remarks)
        if not footnotes:
            return self._aligned(width, rows, total)
        if len(footnotes) > MOST_FOOTNOTES:
            under = [_wrapped(text, width, INDENT) if text else [] for text in remarks]
            return self._aligned(width, rows, total, under=under)
        marks = [f"[{footnotes[text]}]" if text else "" for text in remarks]
        marked = replace(self, columns=[*self.columns, Column("note", "detail")])
        rows = [(*row, mark) for row, mark in zip(rows, marks, strict=False)]
        lines = marked._aligned(width, rows, (*total, marks[-1]) if total else ())
        if lines is None:
            return None
        notes = (_wrapped(f"[{mark}] {text}", width, "", INDENT) for text, mark in footnotes.items())
        return [*lines, "", *(line for note in notes for line in note)]

    def _widths(self, rows: Sequence[Sequence[str]], total: Sequence[str]) -> list[int]:
        grid = [[column.title for column in self.columns], *rows, *([total] if total else [])]
        return [max(_cells(row[i]) for row in grid) for i in range(len(self.columns))]

    def _aligned(
        self,
        width: int,
        rows: Sequence[Sequence[str]],
        total: Sequence[str],
        over: Sequence[Sequence[str]] = (),
        under: Sequence[Sequence[str]] = (),
    ) -> list[str] | None:
        """The lines of the table with these cells, and lines over and under each row; None if it is too wide.

        rich's tables know neither a cell that spans columns nor a line between two rows, so that the lines are
        put together here; rich measures the text.
        """
        widths = self._widths(rows, total)
        whole = sum(widths) + len(GAP) * (len(widths) - 1)
        if whole > width:
            return None

        def line(cells: Sequence[str]) -> str:
            padded = (
                " " * (size - _cells(cell)) + cell
                if column.role == "value"
                else cell + " " * (size - _cells(cell))
                for column, cell, size in zip(self.columns, cells, widths, strict=True)
            )
            return GAP.join(padded).rstrip()

        rule = "─" * whole
        lines = [line([column.title for column in self.columns]), rule]
        for index, cells in enumerate([*rows, *([total] if total else [])]):
            lines += [rule] if index == len(rows) else []
            lines += [*(over[index] if over else ()), line(cells), *(under[index] if under else ())]
        return lines


LAYOUTS: Sequence[Callable[[Table, int], list[str] | None]] = (
    Table._inline,
    Table._folded,
    Table._compact,
    Table._shortened,
    Table._stacked,
)


class Tabular(ABC):
    """What is printed as a table, shown by Jupyter as one, and read as data."""

    @abstractmethod
    def _table(self) -> Table:
        """The table that is shown."""

    @abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """Return the rows as data: a dictionary per row, with numbers as numbers and without the total."""

    def table(self, width: int | None = None, *, grouped: bool = False) -> str:
        """Return the table as text, in which no line is longer than ``width``; nothing is cut off.

        Args:
            width: in characters; by default the environment variable COLUMNS, else the width of the terminal,
                else 120.
            grouped: write layers as one row whose names differ in one number and that are alike in everything but
                errors and latencies, of which the least and the largest are shown.
        """
        return self._table().text(width, grouped=grouped)

    def to_pandas(self) -> Any:
        """Return :meth:`records` as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        with needing("pandas", "to_pandas() needs pandas: pip install pandas, or use records()"):
            from pandas import DataFrame
        return DataFrame.from_records(self.records())

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        from decomp._util.html_tables import html  # imported late: only notebooks need it

        return html(self._table())


def render(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Write a table of text; columns whose name starts with ``>`` hold numbers.

    >>> print(render("", ("network", ">accuracy"), [("dense", "99.7%"), ("small", "98.6%")]))
    network  accuracy
    ─────────────────
    dense       99.7%
    small       98.6%
    """
    heads = [Column(c.lstrip(">"), "value" if c.startswith(">") else "detail") for c in columns]
    text = Table([replace(heads[0], role="name"), *heads[1:]], rows).text(width)
    return f"{title}\n{text}" if title else text


def console_width() -> int:
    """The width to print at: the environment variable COLUMNS, else that of the terminal, else 120."""
    return shutil.get_terminal_size((WIDTH_OF_NO_TERMINAL, 24)).columns


def shortened(names: Sequence[str], width: int) -> list[str] | None:
    """Shorten names in the middle to at most ``width`` characters; None if they would not stay distinct.

    >>> shortened(["encoder.layer.10.attention.query", "encoder.layer.11.attention.query"], 24)
    ['enc…r.10.attention.query', 'enc…r.11.attention.query']
    """
    for kept_in_front in (3, 2, 1, 0):  # ends tell layers apart better than beginnings
        head = (width - 1) * kept_in_front // 6
        new = [n if len(n) <= width else f"{n[:head]}…{n[len(n) - (width - 1 - head) :]}" for n in names]
        if len(set(new)) == len(set(names)) and all(_cells(name) <= width for name in new):
            return new
    return None


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


def change(before: float, after: float, write: Callable[[float], str] = number) -> Cell:
    """A cell that shows a cost before and after, and what is left of it.

    >>> change(1000, 250)
    Cell(text='1.00 k => 250', short='250 (25%)', value=250, share=0.25)
    """
    share = after / before if before else None
    short = write(after) if share is None else f"{write(after)} ({share:.0%})"
    return Cell(f"{write(before)} => {write(after)}", short, after, share)


def fall(before: float, after: float) -> Cell:
    """A cell that shows an error before and after.

    >>> fall(0.4, 0.1).text
    '0.400 => 0.100'
    """
    return Cell(f"{before:.3f} => {after:.3f}", value=after, share=after)


def _text(cell: "str | Cell") -> str:
    return cell if isinstance(cell, str) else cell.text


def _texts(row: Row, short: bool = False) -> tuple[str, ...]:
    return tuple(c if isinstance(c, str) else (short and c.short) or c.text for c in row)


def _sort_key(cell: "str | Cell") -> tuple[float, str]:
    value = cell.value if isinstance(cell, Cell) else None
    return (0.0 if value is None else value, _text(cell))


def _joined_name(names: Sequence[str]) -> str:
    """The names of layers that differ in one number: layer.{0-2,5}.query."""
    numbers = [NUMBERS.findall(name) for name in names]
    place = next(i for i, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1)
    match = list(NUMBERS.finditer(names[0]))[place]
    runs: list[list[int]] = []
    for each in sorted(int(found[place]) for found in numbers):
        if runs and each == runs[-1][-1] + 1:
            runs[-1].append(each)
        else:
            runs.append([each])
    spans = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{names[0][: match.start()]}{{{spans}}}{names[0][match.end() :]}"


def _footnotes(remarks: Sequence[str]) -> dict[str, int]:
    """A number for each distinct remark, in the order of the rows."""
    return {text: i for i, text in enumerate(dict.fromkeys(filter(None, remarks)), 1)}


def _headed(cells: Sequence[str], width: int) -> list[str]:
    """The cells on one line, or on a line each where that is too long."""
    line = GAP.join(filter(None, cells))
    if _cells(line) <= width:
        return [line]
    return [line for i, cell in enumerate(filter(None, cells)) for line in _wrapped(cell, width, GAP * min(i, 1))]


def _wrapped(text: str, width: int, indent: str, later: str | None = None) -> list[str]:
    """Lines of at most ``width``; of text with characters that take two places, of half as many characters."""
    return textwrap.wrap(
        text,
        width if _cells(text) == len(text) else width // 2,
        initial_indent=indent,
        subsequent_indent=indent + GAP if later is None else later,
        break_on_hyphens=False,
    ) or [""]


@cache
def _measure() -> Callable[[str], int]:
    state = random.getstate()  # rich draws a random number while it is imported
    from rich.cells import cell_len  # imported late: only printing needs it

    random.setstate(state)
    return cell_len


def _cells(text: str) -> int:
    """The width of a text in a terminal, where some characters take two places."""
    return _measure()(text)

"""Rows of results in a file, which a benchmark that was killed reads again."""

import json
from pathlib import Path
from typing import Any


class Results:
    """Results, one JSON object a line, by what was measured.

    The last line of a run that was killed may be cut short: it is left where it is, and measured again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        written = path.read_text() if path.exists() else ""
        self._is_cut = bool(written) and not written.endswith("\n")
        self.rows: list[dict[str, Any]] = []
        for line in written.splitlines():
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue

    def all(self, **key: Any) -> list[dict[str, Any]]:
        """The rows with these values."""
        return [row for row in self.rows if all(row.get(part) == each for part, each in key.items())]

    def of(self, **key: Any) -> dict[str, Any] | None:
        """The first row with these values, if there is one."""
        return next(iter(self.all(**key)), None)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row to the file, and print it."""
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(("\n" if self._is_cut else "") + json.dumps(row) + "\n")
        self._is_cut = False
        print(*row.values(), sep="  ", flush=True)

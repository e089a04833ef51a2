"""The points of a trade-off: as data, on disk, as a table and as a figure."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decomp._util import tables
from decomp.planning.plan import Plan
from decomp.training.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "decomp-tradeoff-1"
COSTS = {"macs": "MACs", "params": "parameters", "seconds": "seconds"}


@dataclass(frozen=True)
class Point:
    """One model: what it costs and its score; ``note`` says why it could not be made, and then nothing else holds.

    ``seconds`` are measured, beside the dense model. ``score`` is what ``evaluate`` gave, or the output error.
    """

    line: str
    label: str
    params: int
    macs: int
    seconds: float
    score: float
    plan: Plan | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the point as JSON can hold it."""
        values = {key: value for key, value in vars(self).items() if key != "plan"}
        return values | {"plan": json.loads(self.plan.to_json()) if self.plan else None}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "Point":
        """Read a point back."""
        plan = entry["plan"]
        return cls(**{**entry, "plan": Plan.from_json(json.dumps(plan)) if plan else None})


@dataclass
class Store:
    """The points that are done, in memory and, with a path, in a file that is whole at any moment."""

    path: Path | None
    head: Mapping[str, Any]
    dense: Point | None = None
    points: dict[tuple[str, str], Point] = field(default_factory=dict)

    @classmethod
    def open(cls, path: "str | os.PathLike[str] | None", head: Mapping[str, Any]) -> "Store":
        """Read the points of an earlier call, where there is a file.

        Raises:
            ValueError: it is no such file, its points are about something else, or its folder is not there.
        """
        store = cls(None if path is None else Path(path), head)
        if store.path is not None and not store.path.parent.is_dir():
            raise ValueError(f"path={str(path)!r}: there is no folder {str(store.path.parent)!r}, make it before")
        if store.path is None or not store.path.exists():
            return store
        try:
            data = json.loads(store.path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, {FORMAT!r} is needed")
            found, theirs = [Point.from_dict(entry) for entry in data["points"]], data["head"]
            store.dense = Point.from_dict(data["dense"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"path={str(path)!r} holds no trade-off of decomp: {error}") from error
        different = [key for key in head if theirs.get(key, "") != head[key]]
        if different:
            raise ValueError(
                f"path={str(path)!r} holds points with another {' and '.join(different)}: write another path"
            )
        store.points = {(point.line, point.label): point for point in found}
        return store

    def add(self, point: Point) -> None:
        """Keep a point; the file is replaced in one step, so that a crash leaves the old one or the new one."""
        self.points[point.line, point.label] = point
        self.save()

    def save(self) -> None:
        """Write all points that there are."""
        if self.path is None or self.dense is None:
            return
        entries = [point.to_dict() for point in self.points.values()]
        data = {"format": FORMAT, "head": dict(self.head), "dense": self.dense.to_dict(), "points": entries}
        write_atomically(self.path, json.dumps(data).encode())


@dataclass(frozen=True)
class Tradeoff:
    """What :func:`decomp.tradeoff` measured: ``points``, and ``dense``, the model as it was.

    ``score_name`` is "score" or "output error"; of an error less is better. Budgets were shares of ``cost``.
    """

    points: Sequence[Point]
    dense: Point
    score_name: str
    is_error: bool
    cost: str = "macs"

    def share(self, point: Point, cost: str | None = None) -> float:
        """What is left of "macs", "params" or "seconds" at a point, as a share of the dense model's.

        Raises:
            ValueError: the dense model has none of that cost (embeddings alone have no MACs).
        """
        name = self._cost(cost)
        if not getattr(self.dense, name):
            raise ValueError(f"the dense model has no {COSTS[name]}: write another cost=")
        return float(getattr(point, name) / getattr(self.dense, name))

    def best(self, max_drop: float = 0.01, cost: str | None = None) -> Plan:
        """Return the plan of the cheapest point whose score is at most ``max_drop`` worse than the dense model's.

        Without ``evaluate=`` the output error is at most ``max_drop``. ``cost`` says what cheap means; by default
        what the budgets were about.

        Raises:
            ValueError: no point is that good; the message names the best one.
        """
        found = [(self.share(p, cost), self.drop(p), place) for place, p in enumerate(self.points) if p.plan]
        good = [each for each in found if each[1] <= max_drop]
        plan = self.points[min(good)[2]].plan if good else None
        if plan is None:
            least = f"the least is {min(each[1] for each in found):.4g}" if found else "no point could be made"
            raise ValueError(f"max_drop={max_drop!r}: no point is that good, {least}; measure milder budgets")
        return plan

    def drop(self, point: Point) -> float:
        """How much worse than the dense model a point is: the fall of the score, or the output error."""
        return point.score if self.is_error else self.dense.score - point.score

    def table(self) -> str:
        """Write the points as a table."""
        columns = ("method or rule", "point", ">params", ">MACs", ">latency", f">{self.score_name}", "note")
        total = ("dense", "", *self._cells(self.dense), "")
        rows = [(p.line, p.label, *(self._cells(p) if p.plan else ("",) * 4), p.note) for p in self.points]
        return tables.render("", columns, rows, total)

    def plot(self, cost: str | None = None) -> "Figure":
        """Draw the score over the share of a cost that is left, a line per method and per kind of rule."""
        from decomp.analysis import plots

        name = self._cost(cost)
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in self.points:
            if point.plan:
                lines.setdefault(point.line, []).append((100 * self.share(point, name), point.score))
        label = f"{COSTS[name]} (% of the dense model)"
        return plots.tradeoffs(lines, (label, self.score_name), (100.0, self.dense.score))

    def _cost(self, cost: str | None) -> str:
        if cost is not None and cost not in COSTS:
            raise ValueError(f"cost={cost!r}: write one of {', '.join(map(repr, COSTS))}")
        return cost or self.cost

    def _cells(self, point: Point) -> tuple[str, ...]:
        pairs = ((getattr(point, name), getattr(self.dense, name)) for name in ("params", "macs"))
        shares = (f"{count / dense:.0%}" if dense else tables.number(count) for count, dense in pairs)
        return (*shares, tables.milliseconds(point.seconds), f"{point.score:.4f}")

    def __str__(self) -> str:
        return self.table()

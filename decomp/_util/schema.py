"""Values read from JSON, checked one by one: errors name the field, what it holds and what it must hold."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from math import isfinite
from typing import Any

LARGEST_COUNT = 2**63 - 1
LONGEST_QUOTE = 40


@dataclass(frozen=True)
class Value:
    """A value of a JSON document, and the field that it stands in.

    >>> document = Value.parse('{"layers": {"conv1": {"macs": [9, "x"]}}}')
    >>> macs = document.record("layers")["layers"].entries()["conv1"].record("macs")["macs"]
    >>> [each.number(least=0) for each in macs.items(2)]
    Traceback (most recent call last):
    ...
    ValueError: layers.conv1.macs[1]: 'x' given, a finite number of at least 0 is needed
    """

    value: Any
    field: str = ""

    @classmethod
    def parse(cls, text: str | bytes) -> "Value":
        """Read a document.

        Raises:
            ValueError: it is no JSON, is nested too deep, or holds a field twice.
        """
        try:
            return cls(json.loads(text, object_pairs_hook=_object))
        except RecursionError:
            raise ValueError("it is nested too deep") from None
        except TypeError as error:
            raise ValueError(str(error)) from None

    @property
    def is_null(self) -> bool:
        """Whether the field is null."""
        return self.value is None

    def error(self, needed: str) -> ValueError:
        """The error that says what the field holds, and what is needed."""
        return ValueError(f"{self.field or 'the document'}: {_describe(self.value)} given, {needed} is needed")

    def entries(self) -> dict[str, "Value"]:
        """The values of an object with any fields."""
        if not isinstance(self.value, dict):
            raise self.error("an object {...}")
        return {name: Value(value, self._of(name)) for name, value in self.value.items()}

    def record(self, *names: str, optional: Collection[str] = ()) -> dict[str, "Value"]:
        """The values of an object with these fields, and no others except the optional ones."""
        found = self.entries()
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"{self._of(missing[0])}: this field is missing")
        unknown = [name for name in found if name not in names and name not in optional]
        if unknown:
            known = ", ".join([*names, *optional])
            raise ValueError(f"{self._of(_quote(unknown[0]))}: unknown field; there can be {known}")
        return found

    def items(self, length: int | None = None) -> list["Value"]:
        """The values of a list, of so many where ``length`` is given."""
        if not isinstance(self.value, list) or length not in (None, len(self.value)):
            raise self.error("a list [...]" if length is None else f"a list of {length}")
        return [Value(value, f"{self.field}[{index}]") for index, value in enumerate(self.value)]

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str):
            raise self.error("a string")
        return self.value

    def boolean(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            raise self.error("true or false")
        return self.value

    def one_of(self, allowed: Collection[str]) -> str:
        """A string out of some."""
        if self.text() not in allowed:
            raise self.error(f"one of {', '.join(map(repr, allowed))}")
        return self.text()

    def number(self, least: float | None = None, *, finite: bool = True) -> float:
        """A number, which stays an int where it is one."""
        value, bound = self.value, "" if least is None else f" of at least {least}"
        sound = isinstance(value, int | float) and not isinstance(value, bool)
        if sound and isinstance(value, int):
            sound = abs(value) <= LARGEST_COUNT
        if not sound or (finite and not isfinite(value)) or (least is not None and not value >= least):
            raise self.error(f"a {'finite ' if finite else ''}number{bound}")
        return value  # type: ignore[no-any-return]

    def integer(self, least: int | None = None) -> int:
        """An integer that fits into 64 bits."""
        value, bound = self.value, "" if least is None else f" of at least {least}"
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > LARGEST_COUNT:
            raise self.error(f"an integer{bound}")
        if least is not None and value < least:
            raise self.error(f"an integer{bound}")
        return value

    def _of(self, name: str) -> str:
        return f"{self.field}.{name}" if self.field else name


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {_quote(twice)!r} is there twice")
    return found


def _describe(value: Any) -> str:
    """A value in a few words; containers by their size, for they may be large, or nested deep."""
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return repr(_quote(value)) if isinstance(value, str) else _quote(json.dumps(value))


def _quote(text: str) -> str:
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."

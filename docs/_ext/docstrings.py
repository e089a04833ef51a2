"""Docstrings are plain text first: a lone * or | in a formula or a signature starts no markup on the site."""

import re
from typing import Any

LITERAL = re.compile(r"(``.*?``|`[^`]*`)")
MARKUP = re.compile(r"(?<![\\*\w])\*(?=\w)|\|")


def escaped(line: str) -> str:
    r"""A line of a docstring with what is no markup escaped, outside of literals and doctests.

    >>> escaped("||W|| of (T, *kernel), ``*a``"), escaped(">>> 2 *x")
    ('\\|\\|W\\|\\| of (T, \\*kernel), ``*a``', '>>> 2 *x')
    """
    if line.lstrip().startswith((">>>", "...")):
        return line
    parts = LITERAL.split(line)
    return "".join(part if place % 2 else MARKUP.sub(r"\\\g<0>", part) for place, part in enumerate(parts))


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = map(escaped, lines)


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}

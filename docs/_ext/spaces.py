"""Lines do not end within a size or a share: ``3 x 3`` and ``90 %`` keep together, in pages and docstrings."""

import re
from typing import Any

from docutils import nodes
from sphinx.transforms import SphinxTransform

WITHIN = re.compile(r"(?<=[\dk]) (x) (?=[\dk])|(?<=\d) (?=%)")


def kept_together(text: str) -> str:
    """The text with spaces that do not break within sizes and shares.

    >>> kept_together("a 7 x 7 kernel keeps 90 % of it").split(" ")
    ['a', '7\\xa0x\\xa07', 'kernel', 'keeps', '90\\xa0%', 'of', 'it']
    """
    return WITHIN.sub(lambda found: f"\xa0{found[1]}\xa0" if found[1] else "\xa0", text)


class KeepTogether(SphinxTransform):
    """Every text of a page but literals and formulas."""

    default_priority = 800

    def apply(self, **_: Any) -> None:
        verbatim = (nodes.literal, nodes.FixedTextElement, nodes.math, nodes.math_block, nodes.raw)
        for text in list(self.document.findall(nodes.Text)):
            if not isinstance(text.parent, verbatim) and WITHIN.search(text):
                text.parent.replace(text, nodes.Text(kept_together(text)))


def setup(app: Any) -> dict[str, Any]:
    app.add_transform(KeepTogether)
    return {"parallel_read_safe": True}

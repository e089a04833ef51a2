"""Formulas as MathML, which browsers draw by themselves: the pages request no script from elsewhere."""

from typing import Any

from docutils.nodes import SkipNode
from latex2mathml.converter import convert


def inline(self: Any, node: Any) -> None:
    self.body.append(convert(node.astext()))
    raise SkipNode


def block(self: Any, node: Any) -> None:
    self.body.append(f'<div class="decomp-formula">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app: Any) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}

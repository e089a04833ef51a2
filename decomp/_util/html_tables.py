"""Tables as HTML for notebooks and reports: scrolling, sortable, without any request to elsewhere."""

from collections.abc import Sequence
from hashlib import sha256
from html import escape
from math import isfinite

from decomp._util.tables import Cell, Column, Row, Table

# JupyterLab's colours, then those of VS Code, then those of a page that has neither. The class is written twice to
# outweigh JupyterLab's own rules for tables, whose columns are as wide as each other and cut off what is longer.
# A page sets --decomp-height, --decomp-pad, --decomp-remark and --decomp-wrap on what is around its tables.
STYLE = """
.decomp-table {
  --decomp-text: var(--jp-content-font-color1, var(--vscode-editor-foreground, #1b1b1b));
  --decomp-page: var(--jp-layout-color0, var(--vscode-editor-background, #ffffff));
  --decomp-line: var(--jp-border-color2, var(--vscode-widget-border, #c4c4c4));
  --decomp-bar: #4a90d9;
  color: var(--decomp-text); background: var(--decomp-page); font-size: 12px; max-width: 100%; margin: 4px 0;
}
@media (prefers-color-scheme: dark) {
  .decomp-table {
    --decomp-text: var(--jp-content-font-color1, var(--vscode-editor-foreground, #e4e4e4));
    --decomp-page: var(--jp-layout-color0, var(--vscode-editor-background, #161616));
    --decomp-line: var(--jp-border-color2, var(--vscode-widget-border, #4d4d4d));
  }
}
BOX .decomp-scroll {overflow: auto; max-height: var(--decomp-height, 32em); border: 1px solid var(--decomp-line)}
BOX table {border-collapse: separate; border-spacing: 0; margin: 0; width: 100%; color: inherit;
  background: var(--decomp-page); font-size: inherit; table-layout: auto}
BOX th, BOX td {padding: 3px var(--decomp-pad, 10px); text-align: left; white-space: nowrap; color: inherit;
  border: 0; border-bottom: 1px solid var(--decomp-line); vertical-align: top; max-width: none}
BOX .decomp-value {text-align: right; font-variant-numeric: tabular-nums}
BOX td[style] {background-repeat: no-repeat; background-size: 100% 3px; background-position: left bottom;
  background-image: linear-gradient(to right, var(--decomp-bar) var(--decomp-share), transparent 0)}
BOX td.decomp-remark {white-space: normal; min-width: var(--decomp-remark, 16em)}
BOX thead th, BOX table:not(:has(.decomp-remark)) td:not(.decomp-value) {white-space: var(--decomp-wrap, nowrap)}
BOX thead th {position: sticky; top: 0; z-index: 2; background: var(--decomp-page); font-weight: 600}
BOX tfoot td {position: sticky; bottom: 0; background: var(--decomp-page); font-weight: 600;
  border-top: 1px solid var(--decomp-line)}
BOX tbody td:first-child {font-family: var(--jp-code-font-family, monospace)}
BOX tbody tr:hover td {background-color: rgba(127, 127, 127, .14)}
BOX thead button {all: unset; cursor: pointer; font: inherit; color: inherit}
BOX thead button:focus-visible {outline: 2px solid #4a90d9; outline-offset: 2px}
BOX thead th[aria-sort=ascending] button::after {content: " \\25B2"}
BOX thead th[aria-sort=descending] button::after {content: " \\25BC"}
BOX p {margin: 6px 0; white-space: pre-wrap; max-width: 100em}
@media print {BOX .decomp-scroll {max-height: none; overflow: visible}}
""".replace("BOX", ".decomp-table.decomp-table")

# Runs where a page runs scripts; elsewhere the headings are plain text and the rows stay in their order.
SCRIPT = """
for (const box of document.querySelectorAll('[data-decomp="ID"]')) {
  if (box.dataset.ready) continue
  box.dataset.ready = 'yes'
  const body = box.querySelector('tbody'), heads = [...box.querySelectorAll('thead th')]
  const order = [...body.rows]
  const value = (row, i) => { const own = row.cells[i].dataset.value
    return own === undefined ? row.cells[i].textContent : Number(own) }
  heads.forEach((head, i) => {
    const button = document.createElement('button')
    button.type = 'button'
    button.textContent = head.textContent
    button.title = 'sort by this column'
    head.replaceChildren(button)
    button.onclick = () => {
      const now = head.getAttribute('aria-sort')
      const next = now === 'descending' ? 'ascending' : now === 'ascending' ? null : 'descending'
      heads.forEach(other => other.removeAttribute('aria-sort'))
      if (next) head.setAttribute('aria-sort', next)
      const sign = next === 'ascending' ? 1 : -1
      const compare = (a, b) => typeof a === 'number' && typeof b === 'number' ? a - b
        : String(a).localeCompare(String(b), undefined, {numeric: true})
      const rows = next ? [...order].sort((a, b) => {
        const x = value(a, i), y = value(b, i)
        if (x === '' || y === '') return (x === '') - (y === '')
        return sign * compare(x, y) }) : order
      body.append(...rows)
    }
  })
}
"""


def html(table: Table) -> str:
    """Write a table as HTML: a click on a heading sorts by it, down, up, and back to the order of the layers.

    >>> from decomp._util.tables import Column, Table
    >>> text = html(Table((Column("layer", "name"), Column("params")), [("<b>", Cell("10", value=10, share=0.5))]))
    >>> "&lt;b&gt;" in text, 'data-value="10"' in text, "--decomp-share: 50.0%" in text
    (True, True, True)
    """
    table = table.without_empty_remarks()
    heads = "".join(f'<th scope="col"{_class(column)}>{escape(column.title)}</th>' for column in table.columns)
    rows = "".join(_row(table.columns, row) for row in table.rows)
    total = f"<tfoot>{_row(table.columns, table.total)}</tfoot>" if table.total else ""
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    content = (
        f'<div class="decomp-scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody>{total}</table></div>{notes}"
    )
    name = sha256(content.encode()).hexdigest()[:16]  # the same table is the same text in every run
    script = SCRIPT.replace("ID", name)
    return (
        f'<div class="decomp-table" data-decomp="{name}"><style>{STYLE}</style>{content}</div>'
        f"<script>(() => {{{script}}})()</script>"
    )


def _row(columns: Sequence[Column], row: Row) -> str:
    cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in row]
    return f"<tr>{''.join(map(_cell, columns, cells))}</tr>"


def _cell(column: Column, cell: Cell) -> str:
    value = "" if cell.value is None or not isfinite(cell.value) else f' data-value="{cell.value:.12g}"'
    bar = ""
    if cell.share is not None and isfinite(cell.share):
        end = f"{100 * min(max(cell.share, 0.0), 1.0):.1f}%"
        bar = f' style="--decomp-share: {end}"'
    text = escape(cell.text)
    if column.role == "name":
        text = text.replace(".", ".<wbr>")  # where a name may go on in the next line
    return f"<td{_class(column)}{value}{bar}>{text}</td>"


def _class(column: Column) -> str:
    return f' class="decomp-{column.role}"' if column.role in ("value", "remark") else ""

"""A report for a colleague: one HTML file that needs nothing from elsewhere."""

import itertools
import os
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from decomp import api
from decomp._util.io import write_atomically
from decomp._util.tables import Tabular
from decomp._util.version import installed_version
from decomp.analysis import plots
from decomp.analysis.compare import Comparison, compare
from decomp.analysis.drawing import colours_of_the_page, svg
from decomp.analysis.scores import Evaluate
from decomp.planning.plan import PLAN, Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPECTRA_SHOWN = 6
STYLE = """
:root {color-scheme: light dark}
body {font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 24px auto; padding: 0 16px}
svg {display: block; max-width: 100%; height: auto; margin: 12px 0}
pre {padding: 8px 12px; border: 1px solid rgba(127, 127, 127, .5); overflow-x: auto}
h2 {margin-top: 1.6em; border-bottom: 1px solid rgba(127, 127, 127, .4)}
body {--decomp-height: 60em}
@media (max-width: 1100px) {body {--decomp-pad: 5px; --decomp-remark: 8em; --decomp-wrap: normal}}
@media (max-width: 960px) {body {--decomp-pad: 4px}}
"""
HOW_TO_LOAD = """import decomp

# where the compressed model was made:
decomp.save(small, "small.safetensors")

# where it is used: a {model} as it was before the compression, whose weights do not matter
dense = ...
small = decomp.load("small.safetensors", dense)
"""


def report(
    small: nn.Module,
    dense: nn.Module,
    example_inputs: Any,
    *,
    evaluate: Evaluate | None = None,
    path: str | os.PathLike[str] = "report.html",
) -> Path:
    """Write what was done to a model, and why, into one HTML file without external requests.

    It holds the summary, the decision and its reasons, the plan and the comparison as sortable tables, figures of
    costs, errors and spectra, and how to load the model, with the plan as a download.

    Args:
        small: the compressed model.
        dense: the model it was made from.
        example_inputs: a batch as the models are called with; see :func:`decomp.profile`.
        evaluate: a function of a model that returns its score, the accuracy for example.
        path: the file; it is replaced as a whole.

    Returns:
        The path of the file.

    Raises:
        ValueError: ``small`` carries no plan, or the two models are swapped.
        TypeError: one of the models cannot be called with ``example_inputs``.
        FileNotFoundError: the folder of ``path`` does not exist.
        ImportError: matplotlib is not installed.

    >>> import tempfile
    >>> dense, x = nn.Sequential(nn.Linear(64, 64)), torch.zeros(1, 64)
    >>> small = api.svd(dense, ranks=8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     text = report(small, dense, x, path=f"{folder}/report.html").read_text()
    ...     "not cheaper" in text, "SVDLinear (8,)" in text
    (False, True)
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path={str(path)!r}: there is no folder {str(target.parent)!r}; make it first")
    plan = getattr(small, PLAN, None)
    comparison = compare(small, dense, example_inputs, evaluate=evaluate)  # refuses models that are swapped
    if not isinstance(plan, Plan):
        raise ValueError(
            "small carries no plan (small.decomp_plan): give the model that a call of decomp returned"
        )
    with colours_of_the_page():
        sections = "\n".join(_sections(small, dense, plan, comparison))
    title = f"{type(dense).__name__}, compressed"
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{sections}</body></html>"
    )
    write_atomically(target, page.encode())
    return target


def _sections(small: nn.Module, dense: nn.Module, plan: Plan, comparison: Comparison) -> Iterator[str]:
    numbers = itertools.count(1)

    def image(figure: "Figure", what: str) -> str:
        return svg(figure, f"figure-{next(numbers)}", what)

    yield f"<p><b>{escape(comparison.summary).replace(chr(10), '<br>')}</b></p>"
    yield "<h2>What was done, and why</h2>" + "".join(f"<p>{escape(text)}</p>" for text in _decision(plan))
    yield f"<h2>Plan</h2>{_table(plan)}{image(plots.costs(plan), 'parameters and MACs of every layer')}"
    if any(choice.ranks for choice in plan.values()):
        yield image(plots.errors(plan), "errors of the replaced layers")
    yield f"<h2>Measured</h2>{_table(comparison)}{image(comparison.plot(), 'costs of both models')}"
    finetuning = getattr(small, api.REPORT, None)
    if isinstance(finetuning, Tabular):
        yield f"<h2>Fine-tuning</h2>{_table(finetuning)}"
    yield from _spectra(dense, plan, image)
    data = b64encode(plan.to_json().encode()).decode()
    link = f'<a download="plan.json" href="data:application/json;base64,{data}">plan.json</a>'
    code = escape(HOW_TO_LOAD.format(model=type(dense).__name__))
    yield f"<h2>How to load the model</h2><p>The plan: {link}</p><pre>{code}</pre>"
    yield f"<p>Written by decomp {escape(installed_version())} with PyTorch {escape(torch.__version__)}.</p>"


def _decision(plan: Plan) -> Iterator[str]:
    """Sentences about how the ranks were chosen, and why layers stay dense."""
    methods = Counter(choice.method for choice in plan.values() if choice.ranks)
    listed = ", ".join(f"{count} by {method}" for method, count in methods.most_common())
    yield f"{methods.total()} of {len(plan)} layers were replaced{listed and f': {listed}'}."
    request = plan.request
    if request.budget is None:
        yield "The ranks were chosen layer by layer; no budget of the whole network was given."
    else:
        yield f"The ranks were chosen together for the budget {request.budget.kind}={request.budget.value}."
    reasons = Counter(choice.reason for choice in plan.values() if not choice.ranks)
    for reason, count in reasons.most_common():
        yield f"{count} {'layer stays' if count == 1 else 'layers stay'} dense: {reason}."


def _spectra(dense: nn.Module, plan: Plan, image: Callable[["Figure", str], str]) -> Iterator[str]:
    """Figures of the spectra of the layers that save most; the plan of a model has none, so a new one is made."""
    saved = {name: choice.saved("params") for name, choice in plan.items() if choice.ranks}
    analysed = api.plan(dense, ranks=plan, progress=False)
    known = [name for name, (first, *_) in analysed.candidates.items() if first.spectra and name in saved]
    shown = sorted(known, key=lambda name: -saved[name])[:SPECTRA_SHOWN]
    if shown:
        yield f"<h2>Spectra of the layers that save most ({len(shown)} of {len(saved)})</h2>"
        for name in shown:
            yield image(plots.spectrum(analysed, name), f"spectrum of {name}")


def _table(table: Tabular) -> str:
    return table._repr_html_()

"""The rank explorer for Jupyter; its widgets are imported only when it is opened."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from decomp._util.optional import needing
from decomp.analysis.scores import Evaluate
from decomp.calibration.calibrate import Statistics
from decomp.explorer.state import Exploration
from decomp.network.restoring import all_or_nothing
from decomp.network.selection import Selector
from decomp.runtimes import Runtime

if TYPE_CHECKING:
    from decomp.explorer.widgets import Explorer


@all_or_nothing()
def explore(
    model: nn.Module,
    example_inputs: Any,
    evaluate: Evaluate | None = None,
    data: Iterable[Any] | None = None,
    *,
    inputs: Callable[[Any], Any] | None = None,
    statistics: Statistics | None = None,
    layers: Selector = None,
    exclude: Selector = (),
    timed: bool = True,
    runtime: str | Runtime | None = None,
    progress: bool | None = None,
) -> "Explorer":
    """Open an interactive explorer of ranks in Jupyter: sliders, spectra, costs and predicted error at once.

    Every layer is analysed once, here; after that moving a slider takes milliseconds. A layer whose own slider or
    method is changed is held: budgets and thresholds leave it alone until its box is cleared. The next cell reads
    the result from ``explorer.plan`` and ``explorer.model``.

    Args:
        model: any ``nn.Module``; it is never changed.
        example_inputs: a batch as the model is called with: MACs and latency are those of one pass on it.
        evaluate: a function of a model that returns its score, the accuracy for example, for the Evaluate button.
        data: batches as the model is called with. Without ``evaluate`` the output error on them is measured;
            without ``statistics`` the predicted error is that of the output, to first order
            (:func:`decomp.sensitivity`).
        inputs: what the model is called with, from a batch of ``data``.
        statistics: what :func:`decomp.calibrate` measured on data: factors, spectra and errors are then those of
            the layers' outputs. With its ``loss=`` the predicted error is that of the network's output, to first
            order, and budgets minimize it.
        layers: which layers; see :func:`decomp.tucker`.
        exclude: which of these stay dense.
        timed: measure every layer at a few ranks, for the estimate of the latency.
        runtime: where they are measured, a name of ``decomp.runtimes.RUNTIMES`` or a record; by default PyTorch
            eager. A runtime takes about a second for each rank of each kind of layer. Where it quantizes, the
            ranges are those of the example inputs.
        progress: show progress bars; by default where there is a terminal.

    Raises:
        ImportError: ipywidgets is not installed; the message says how to get it.
        TypeError: ``evaluate`` is not a function.
        ValueError: ``inputs`` is given without ``data``, ``layers`` or ``exclude`` matches nothing, or ``runtime``
            is not known.

    >>> import torch
    >>> model, x = nn.Sequential(nn.Linear(64, 64)), torch.zeros(1, 64)
    >>> explorer = explore(model, x, timed=False, progress=False)
    >>> explorer.set_ranks("0", (8,))
    >>> explorer.plan["0"].ranks, explorer.apply()[0].ranks
    ((8,), (8,))
    """
    with needing("ipywidgets", "decomp.explore needs ipywidgets: pip install 'decomp[notebook]'"):
        from decomp.explorer.widgets import Explorer
    return Explorer(
        Exploration(
            model,
            example_inputs,
            evaluate,
            data,
            inputs=inputs,
            statistics=statistics,
            layers=layers,
            exclude=exclude,
            timed=timed,
            runtime=runtime,
            progress=progress,
        )
    )

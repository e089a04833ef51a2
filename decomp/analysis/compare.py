"""A compressed model beside the dense one it was made from: costs per layer and in total, and scores."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from decomp._util import tables
from decomp.analysis import plots
from decomp.analysis.profile import COST_COLUMNS, WRITTEN, Profile, Usage, profile_in_turn
from decomp.analysis.scores import Evaluate
from decomp.data.batches import Batches
from decomp.layers import Factorized
from decomp.network import surgery
from decomp.network.flops import uncounted_note
from decomp.network.restoring import all_or_nothing
from decomp.planning.plan import PLAN
from decomp.runtimes import InRuntime, Ratio, Runtime, find, ratio, time_in_turn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RuntimeComparison:
    """Two models in one runtime; pairs are (small, dense).

    Args:
        runtime: its name.
        precision: "f32", "bf16" or "int8".
        seconds: medians of one pass, timed in turn.
        speedup: how many times faster the small model is, with a 95 % confidence interval.
        bytes: sizes of the models as the runtime keeps them; None where it does not say.
        scores: what ``evaluate`` returned for the models as they run there.
    """

    runtime: str
    precision: str
    seconds: tuple[float, float]
    speedup: Ratio
    bytes: tuple[int, int] | None
    scores: tuple[float, float] | None

    def __str__(self) -> str:
        small, dense = map(tables.milliseconds, self.seconds)
        text = f"{self.runtime}: {dense} => {small}, speed {self.speedup}"
        if self.bytes:
            text += f", {tables.number(self.bytes[1])} => {tables.number(self.bytes[0])} bytes"
        return text + (f", score {self.scores[1]:.4f} => {self.scores[0]:.4f}" if self.scores else "")


@dataclass(frozen=True)
class Comparison(tables.Tabular):
    """What :func:`decomp.compare` returns; printed, it is a table of the layers that differ.

    Args:
        small: the profile of the compressed model.
        dense: the profile of the model it was made from.
        scores: what ``evaluate`` returned for (small, dense).
        predicted_seconds: the latency that the plan of the small model predicted, if it was made with
            ``seconds=``.
        runtimes: both models in each of the runtimes that were asked for.
    """

    small: Profile
    dense: Profile
    scores: tuple[float, float] | None = None
    predicted_seconds: float | None = None
    runtimes: tuple[RuntimeComparison, ...] = ()

    def ratio(self, cost: str) -> float:
        """Return the cost of the dense model over that of the small one: 2.0 means half the cost.

        Args:
            cost: "params", "macs", "bytes" or "seconds".
        """
        return float(getattr(self.dense.total, cost) / getattr(self.small.total, cost))

    @property
    def summary(self) -> str:
        """The ratios of the whole models, and the scores, in two lines."""
        counts = (
            _how_many(getattr(self.dense.total, cost), getattr(self.small.total, cost), label)
            for cost, label in (("params", "params"), ("macs", "MACs"))
        )
        text = f"{', '.join(counts)}, speed x{self.ratio('seconds'):.2f}"
        if self.predicted_seconds is not None:
            seconds = tables.milliseconds(self.small.total.seconds)
            text += f" ({seconds}, predicted {tables.milliseconds(self.predicted_seconds)})"
        uncounted = {**self.dense.uncounted, **self.small.uncounted}
        text += f"; {uncounted_note(uncounted)}" if uncounted else ""
        return f"{text}\nscore {self.scores[1]:.4f} => {self.scores[0]:.4f}" if self.scores else text

    def plot(self) -> "Figure":
        """Draw parameters, MACs and milliseconds of the layers that differ and of the whole, dense and small.

        Raises:
            ValueError: no layer differs.
            ImportError: matplotlib is not installed.
        """
        changed = self._changed()
        if not changed:
            raise ValueError("no layer differs between the two models: there is nothing to draw")
        rows = {name: _pairs(dense, small) for name, (dense, small) in changed.items()}
        whole = _pairs(self.dense.total, self.small.total)
        return plots.before_and_after(("parameters", "MACs", "latency (ms)"), rows, self.summary, whole=whole)

    def _changed(self) -> Mapping[str, tuple[Usage, Usage]]:
        """(dense, small) of the layers that are of another type or other ranks."""
        both = ((name, dense, self.small.rows.get(name)) for name, dense in self.dense.rows.items())
        return {name: (dense, small) for name, dense, small in both if small and small.layer != dense.layer}

    def records(self) -> list[dict[str, Any]]:
        """Return the layers that differ as dictionaries of plain values."""
        return [
            {"layer": name, "dense": dense.layer, "small": small.layer}
            | {f"{c}_{when}": getattr(u, c) for c in WRITTEN for when, u in (("before", dense), ("after", small))}
            for name, (dense, small) in self._changed().items()
        ]

    def _table(self) -> tables.Table:
        names = (
            tables.Column("layer", "name"),
            tables.Column("dense", "detail"),
            tables.Column("small", "detail"),
        )
        rows: list[tables.Row] = [
            (name, dense.layer, small.layer, *_cells(dense, small))
            for name, (dense, small) in self._changed().items()
        ]
        total: tables.Row = ("whole model", "", "", *_cells(self.dense.total, self.small.total))
        return tables.Table((*names, *COST_COLUMNS), rows, total, (self.summary, *map(str, self.runtimes)))


@all_or_nothing()
def compare(
    small: nn.Module,
    dense: nn.Module,
    example_inputs: Any,
    *,
    evaluate: Evaluate | None = None,
    runtimes: Sequence[str | Runtime] = (),
    data: Iterable[Any] | None = None,
    inputs: Callable[[Any], Any] | None = None,
) -> Comparison:
    """Profile both models on the same batch, in turn; the printed table shows the layers that differ.

    Args:
        small: the compressed model.
        dense: the model it was made from.
        example_inputs: a batch as the models are called with; see :func:`decomp.profile`.
        evaluate: a function of a model that returns its score, the accuracy for example.
        runtimes: names of runtimes, or records (``decomp.runtimes``), in which both are also timed, in turn, and
            scored as they run there: ``["openvino", "openvino-int8"]``.
        data: batches on which quantizing runtimes choose the ranges of activations.
        inputs: what the model is called with, from a batch of ``data``.

    Raises:
        ValueError: the two models are swapped, a runtime is unknown, or one quantizes and there are no ``data``.
        ImportError: the package of a runtime is not installed.
        TypeError: one of the models cannot be called with ``example_inputs``.

    >>> import decomp, torch
    >>> dense = nn.Sequential(nn.Linear(64, 64))
    >>> small = decomp.svd(dense, ranks=8)
    >>> comparison = compare(small, dense, torch.zeros(1, 64))
    >>> comparison.small.rows["0"].layer, comparison.ratio("macs")
    ('SVDLinear (8,)', 4.0)
    """
    for model in (small, dense):
        surgery.check_model(model)
    factorized = [any(isinstance(module, Factorized) for module in model.modules()) for model in (small, dense)]
    if factorized == [False, True]:
        raise ValueError(
            "the factorized model was given second: the order is compare(small, dense, example_inputs)"
        )
    found = [find(runtime) for runtime in runtimes]
    batches = [] if data is None else list(Batches(data, inputs, one_pass=True))
    scores = (float(evaluate(small)), float(evaluate(dense))) if evaluate else None
    small_profile, dense_profile = profile_in_turn([small, dense], example_inputs)
    predicted = getattr(getattr(small, PLAN, None), "seconds", None)
    there = [_in_runtime(each, small, dense, example_inputs, batches, evaluate) for each in found]
    return Comparison(small_profile, dense_profile, scores, predicted and predicted.after, tuple(there))


def _in_runtime(
    runtime: Runtime,
    small: nn.Module,
    dense: nn.Module,
    example_inputs: Any,
    batches: Sequence[Any],
    evaluate: Evaluate | None,
) -> RuntimeComparison:
    """Time both models in a runtime, and score them as they run there."""
    models = [InRuntime(model, runtime, example_inputs, batches) for model in (small, dense)]
    ours, theirs = time_in_turn([partial(model.run, example_inputs) for model in models], seconds=1.0)
    sizes = [getattr(model.run, "bytes", None) for model in models]
    return RuntimeComparison(
        runtime.name,
        runtime.precision,
        (ours.seconds, theirs.seconds),
        ratio(theirs, ours),
        None if None in sizes else (int(sizes[0] or 0), int(sizes[1] or 0)),
        (float(evaluate(models[0])), float(evaluate(models[1]))) if evaluate else None,
    )


def _pairs(dense: Usage, small: Usage) -> list[tuple[float, float]]:
    """Parameters, MACs and milliseconds before and after."""
    milliseconds = (1e3 * dense.seconds, 1e3 * small.seconds)
    return [(dense.params, small.params), (dense.macs, small.macs), milliseconds]


def _cells(dense: Usage, small: Usage) -> tuple[tables.Cell, ...]:
    return tuple(
        tables.change(getattr(dense, cost), getattr(small, cost), write) for cost, write in WRITTEN.items()
    )


def _how_many(dense: int, small: int, label: str) -> str:
    """How many times fewer, or more, the small model has.

    >>> _how_many(8, 4, "MACs"), _how_many(4, 8, "MACs"), _how_many(4, 4, "params"), _how_many(0, 8, "MACs")
    ('2.00x fewer MACs', '2.00x more MACs', 'as many params', '0 => 8 MACs')
    """
    if dense == small:
        return f"as many {label}"
    if not dense or not small:
        return f"{tables.number(dense)} => {tables.number(small)} {label}"
    return f"{dense / small:.2f}x fewer {label}" if small < dense else f"{small / dense:.2f}x more {label}"

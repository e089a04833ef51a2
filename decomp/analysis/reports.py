"""What a model costs, measured: parameters, MACs, bytes and seconds, per layer and in total."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from decomp._util import tables
from decomp.layers import Factorized
from decomp.network import surgery
from decomp.network.flops import Observation, observe
from decomp.planning.choice import describe
from decomp.planning.cost import count_params
from decomp.planning.latency import latency, layer_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ELSEWHERE = "(elsewhere)"


@dataclass(frozen=True)
class Usage:
    """Cost of a layer or a model: parameters, multiply-adds of one forward pass, bytes of the state, seconds."""

    layer: str
    params: int
    macs: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """``rows`` by the name of the layer; what runs outside of any layer is the row "(elsewhere)"."""

    rows: Mapping[str, Usage]
    total: Usage

    def __str__(self) -> str:
        rows = [(name, *_cells(usage)) for name, usage in self.rows.items()]
        columns = ("layer", "type", ">params", ">MACs", ">bytes", ">latency")
        return tables.render("", columns, rows, ("whole model", *_cells(self.total)))


@dataclass(frozen=True)
class Comparison:
    """Two profiles side by side.

    ``scores`` holds what ``evaluate`` gave for (small, dense), ``predicted_seconds`` what the plan of the small
    model foretold, where it was made for a budget of seconds.
    """

    small: Profile
    dense: Profile
    scores: tuple[float, float] | None = None
    predicted_seconds: float | None = None

    def ratio(self, what: str) -> float:
        """How many times less of "params", "macs", "bytes" or "seconds" the small model takes."""
        return float(getattr(self.dense.total, what) / getattr(self.small.total, what))

    @property
    def summary(self) -> str:
        """The ratios in total, and the scores: two lines."""
        ratios = f"{self.ratio('params'):.2f}x fewer params, {self.ratio('macs'):.2f}x fewer MACs"
        text = f"{ratios}, speed x{self.ratio('seconds'):.2f}"
        if self.predicted_seconds is not None:
            seconds = tables.milliseconds(self.small.total.seconds)
            text += f" ({seconds}, predicted {tables.milliseconds(self.predicted_seconds)})"
        return f"{text}\nscore {self.scores[1]:.4f} => {self.scores[0]:.4f}" if self.scores else text

    def plot(self) -> "Figure":
        """Draw parameters, MACs and milliseconds of the layers that differ, dense and small.

        Raises:
            ValueError: no layer differs.
        """
        from decomp.analysis import plots

        changed = self._changed()
        if not changed:
            raise ValueError("no layer differs between the two models: there is nothing to draw")
        rows = {
            name: [(d.params, s.params), (d.macs, s.macs), (1e3 * d.seconds, 1e3 * s.seconds)]
            for name, (d, s) in changed.items()
        }
        return plots.before_and_after(("parameters", "MACs", "ms"), rows, self.summary)

    def _changed(self) -> dict[str, tuple[Usage, Usage]]:
        both = ((name, dense, self.small.rows.get(name)) for name, dense in self.dense.rows.items())
        return {name: (dense, small) for name, dense, small in both if small and small.layer != dense.layer}

    def __str__(self) -> str:
        rows = [
            (name, dense.layer, small.layer, *_pairs(dense, small))
            for name, (dense, small) in self._changed().items()
        ]
        columns = ("layer", "dense", "small", ">params", ">MACs", ">bytes", ">latency")
        total = ("whole model", "", "", *_pairs(self.dense.total, self.small.total))
        table = tables.render("", columns, rows, total)
        return f"{table}\n\n{self.summary}"


def profile(model: nn.Module, example_inputs: Any) -> Profile:
    """Count and measure what ``model`` costs on a batch, in eval mode, without gradients.

    MACs are counted by torch's flop counter (one multiply-add is 1). The latency of the model is the median of
    ``torch.utils.benchmark`` with all threads; that of a layer the median over a few passes that are watched, so
    that the layers need not add up to the model. A factorized layer is one row.

    Args:
        model: any ``nn.Module``.
        example_inputs: a batch as the model is called with: a tensor, a tuple of positional arguments, or a
            mapping of keywords.

    >>> import torch
    >>> print(profile(nn.Linear(64, 10), torch.zeros(1, 64)).total.macs)
    640
    """
    surgery.check_model(model)
    return _profiles([model], example_inputs)[0]


def compare(
    small: nn.Module,
    dense: nn.Module,
    example_inputs: Any,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> Comparison:
    """Profile both models on the same batch, in turn; the printed table shows the layers that differ.

    Args:
        small: the compressed model.
        dense: the model that it was made from.
        example_inputs: a batch as the models are called with.
        evaluate: a function of a model that gives its score, accuracy say.

    Raises:
        ValueError: the two are swapped.
    """
    for model in (small, dense):
        surgery.check_model(model)
    factorized = [any(isinstance(module, Factorized) for module in model.modules()) for model in (small, dense)]
    if factorized == [False, True]:
        raise ValueError(
            "the factorized model was given second: the order is compare(small, dense, example_inputs)"
        )
    scores = (float(evaluate(small)), float(evaluate(dense))) if evaluate else None
    profiles = _profiles([small, dense], example_inputs)
    seconds = getattr(getattr(small, "decomp_plan", None), "seconds", None)
    return Comparison(profiles[0], profiles[1], scores, seconds and seconds.after)


def _profiles(models: list[nn.Module], batch: Any) -> list[Profile]:
    # Counting comes first: it refuses a batch that does not fit with words that help.
    units = [dict(_units(model)) for model in models]
    seen = [observe(model, batch, parts) for model, parts in zip(models, units, strict=True)]
    seconds = latency(models, batch)
    return [_profile(*parts, batch) for parts in zip(models, units, seen, seconds, strict=True)]


def _profile(
    model: nn.Module, units: Mapping[str, nn.Module], seen: Observation, seconds: float, batch: Any
) -> Profile:
    times = layer_seconds(model, batch, units)
    rows = {
        name: Usage(_label(unit), count_params(unit), seen.macs.get(name, 0), _bytes(unit), times.get(name, 0.0))
        for name, unit in units.items()
    }
    total = Usage(type(model).__name__, count_params(model), seen.total_macs, _bytes(model), seconds)
    params = total.params - sum(row.params for row in rows.values())
    other = Usage("", max(params, 0), seen.total_macs - sum(seen.macs.values()), 0, 0.0)
    if other.params or other.macs:
        rows[ELSEWHERE] = other
    return Profile(rows, total)


def _units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that a table has rows for: factorized ones, attention, and every leaf with parameters."""
    whole = (Factorized, nn.MultiheadAttention)
    for name, module in surgery.walk(model, whole):
        if isinstance(module, whole) or (not list(module.children()) and list(module.parameters())):
            yield name, module


def _label(unit: nn.Module) -> str:
    return f"{type(unit).__name__} {unit.ranks}" if isinstance(unit, Factorized) else describe(unit)


def _bytes(module: nn.Module) -> int:
    state = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _cells(usage: Usage) -> tuple[str, ...]:
    counts = (tables.number(usage.params), tables.number(usage.macs), tables.number(usage.bytes))
    return (usage.layer, *counts, tables.milliseconds(usage.seconds) if usage.seconds else "")


def _pairs(dense: Usage, small: Usage) -> tuple[str, ...]:
    return tuple(f"{a} => {b}" for a, b in zip(_cells(dense)[1:], _cells(small)[1:], strict=True))

"""What one model costs, counted and measured: parameters, MACs, bytes and seconds, per layer and in total."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from decomp._util import tables
from decomp.layers import Factorized, Unpacked
from decomp.network import surgery
from decomp.network.flops import ForwardPass, observe, uncounted_note
from decomp.network.restoring import all_or_nothing
from decomp.planning.choice import describe
from decomp.planning.cost import bytes_of, count_params
from decomp.planning.latency import latency, layer_seconds

ELSEWHERE = "(elsewhere)"  # the row of what runs outside of any layer
WRITTEN = {
    "params": tables.number,
    "macs": tables.number,
    "bytes": tables.number,
    "seconds": tables.milliseconds,
}
COST_COLUMNS = (
    tables.Column("params"),
    tables.Column("MACs"),
    tables.Column("bytes"),
    tables.Column("latency", measured=True),
)


@dataclass(frozen=True)
class Usage:
    """Cost of a layer or a model.

    Args:
        layer: what it is, ``"Conv2d 64>128 3x3"`` or ``"TuckerConv (16, 8)"`` say.
        params: number of parameters.
        macs: multiply-adds of one forward pass.
        bytes: size of its parameters and buffers.
        seconds: latency of one forward pass.
    """

    layer: str
    params: int
    macs: int
    bytes: int
    seconds: float

    def cells(self, whole: "Usage | None" = None) -> tuple[tables.Cell, ...]:
        """Return the cells of a table: parameters, MACs, bytes and latency, each as a share of the whole model's.

        Args:
            whole: the whole model; None for cells without shares.

        >>> [cell.text for cell in Usage("Linear 64>10", 650, 640, 2600, 1.5e-5).cells()]
        ['650', '640', '2.60 k', '0.0150 ms']
        """

        def cell(cost: str) -> tables.Cell:
            value, of = getattr(self, cost), getattr(whole, cost, 0)
            untimed = cost == "seconds" and not value
            return tables.Cell(
                "" if untimed else WRITTEN[cost](value), value=value, share=value / of if of else None
            )

        return tuple(map(cell, WRITTEN))


@dataclass(frozen=True)
class Profile(tables.Tabular):
    """What :func:`decomp.profile` returns; printed, it is a table, and in Jupyter one that can be sorted.

    Args:
        rows: by the qualified name of the layer; what runs outside of any layer is the row "(elsewhere)".
        total: the whole model.
        uncounted: operators whose MACs are not known, with the number of their calls; the MACs leave them out.
    """

    rows: Mapping[str, Usage]
    total: Usage
    uncounted: Mapping[str, int] = field(default_factory=dict)

    def records(self) -> list[dict[str, Any]]:
        """Return the cost of every layer as a dictionary of plain values; ``rows`` has them by name."""
        return [
            {"layer": name, "type": usage.layer} | {cost: getattr(usage, cost) for cost in WRITTEN}
            for name, usage in self.rows.items()
        ]

    def _table(self) -> tables.Table:
        columns = (tables.Column("layer", "name"), tables.Column("type", "detail"), *COST_COLUMNS)
        rows: list[tables.Row] = [
            (name, usage.layer, *usage.cells(self.total)) for name, usage in self.rows.items()
        ]
        total: tables.Row = ("whole model", self.total.layer, *self.total.cells())
        return tables.Table(columns, rows, total, (uncounted_note(self.uncounted),) if self.uncounted else ())


@all_or_nothing()
def profile(model: nn.Module, example_inputs: Any) -> Profile:
    """Count and measure what ``model`` costs on a batch, in eval mode, without gradients.

    MACs are counted by torch's flop counter (one multiply-add is 1). The latency of the model is the median of
    ``torch.utils.benchmark`` with all threads; that of a layer is its median over a few passes with a timer around
    every layer, so the layers need not add up to the model. A factorized layer is one row.

    Args:
        model: any ``nn.Module``; it is not changed.
        example_inputs: a batch as the model is called with: a tensor, a tuple of positional arguments, or a
            mapping of keyword arguments.

    Raises:
        TypeError: ``example_inputs`` is no batch, or the model cannot be called with it.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> report = profile(model, torch.zeros(1, 64))
    >>> {name: (row.layer, row.params, row.macs) for name, row in report.rows.items()}
    {'0': ('Linear 64>32', 2080, 2048), '2': ('Linear 32>10', 330, 320)}
    >>> report.total.params, report.total.macs, report.total.bytes
    (2410, 2368, 9640)
    """
    surgery.check_model(model)
    return profile_in_turn([model], example_inputs)[0]


def profile_in_turn(models: Sequence[nn.Module], batch: Any) -> list[Profile]:
    """Profile several models on the same batch, their latencies in turn, so that drift hits all alike.

    Args:
        models: the models.
        batch: as they are called with.

    Raises:
        TypeError: one of the models cannot be called with the batch.
    """
    # Counting comes first: it refuses a batch that does not fit with an error that says what does.
    layers = [dict(_layers(model)) for model in models]
    counts = [observe(model, batch, parts) for model, parts in zip(models, layers, strict=True)]
    seconds = latency(list(models), batch)
    return [_profile(*parts, batch) for parts in zip(models, layers, counts, seconds, strict=True)]


def _profile(
    model: nn.Module, layers: Mapping[str, nn.Module], counts: ForwardPass, seconds: float, batch: Any
) -> Profile:
    times = layer_seconds(model, batch, layers)
    rows = {
        name: Usage(
            _label(layer), count_params(layer), counts.macs.get(name, 0), _bytes(layer), times.get(name, 0.0)
        )
        for name, layer in layers.items()
    }
    total = Usage(type(model).__name__, count_params(model), counts.total_macs, _bytes(model), seconds)
    params = max(total.params - sum(row.params for row in rows.values()), 0)
    macs = total.macs - sum(counts.macs.values())
    inside = {id(tensor) for layer in layers.values() for tensor in _tensors(layer)}
    bytes = sum(tensor.nbytes for tensor in _tensors(model) if id(tensor) not in inside)
    if params or macs or bytes:
        rows[ELSEWHERE] = Usage("", params, macs, bytes, 0.0)
    return Profile(rows, total, counts.uncounted)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What has a row: factorized layers, attention, experts, and modules with parameters and without children."""
    whole = (Factorized, nn.MultiheadAttention, Unpacked)
    for name, module in surgery.walk(model, whole):
        is_whole = isinstance(module, whole) or surgery.unpacker_of(module)
        if is_whole or (not list(module.children()) and list(module.parameters())):
            yield name, module


def _label(layer: nn.Module) -> str:
    if isinstance(layer, Unpacked):
        ranks = (f"{role} {getattr(part, 'ranks', 'dense')}" for role, part in layer.layers().items())
        return f"{type(layer).__name__} {', '.join(ranks)}"
    return f"{type(layer).__name__} {layer.ranks}" if isinstance(layer, Factorized) else describe(layer)


def _bytes(module: nn.Module) -> int:
    return sum(map(bytes_of, _tensors(module)))


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, shared ones once."""
    return list({id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values())

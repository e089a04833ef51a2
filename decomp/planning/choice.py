"""The decision of a plan for one layer, as data, as JSON and as a row of a table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from decomp._util import tables
from decomp._util.schema import Value
from decomp.layers import ExpertLinear, Factorized
from decomp.layers.kernels import HUGGING_FACE_CONV1D, qualified_name
from decomp.planning.cost import COUNTED, Cost

Ranks = tuple[int, ...]
DENSE = "dense"  # the method of a layer that is not replaced
KEPT_DENSE = "kept dense on request"
COLUMNS = (
    tables.Column("layer", "name"),
    tables.Column("type", "detail"),
    tables.Column("method", "detail"),
    tables.Column("ranks", "detail"),
    tables.Column("params"),
    tables.Column("MACs"),
    tables.Column("error", measured=True),
    tables.Column("why / note", "remark"),
)


class Change(NamedTuple):
    """A cost before and after; ``before`` is 1.0 if costs are shares."""

    before: float
    after: float


class Measured(NamedTuple):
    """The seconds of one pass of the dense and of the compressed model, as measured in a runtime, by its name."""

    runtime: str
    seconds: Change

    @classmethod
    def read(cls, value: Value) -> "Measured":
        """Read what a plan in JSON holds."""
        runtime, seconds = value.items(2)
        return cls(runtime.text(), _read_change("seconds", seconds))


@dataclass(frozen=True)
class Choice:
    """The decision of a plan for one layer.

    For a layer that stays dense ``ranks`` is empty, ``method`` is "dense" and ``reason`` says why. ``costs`` are
    those of the layer by kind, before and after: "params", "bytes" and "macs", which are multiply-adds on the
    example inputs (ints) or a share of the dense layer's (floats). ``error`` is the planned relative error of the
    weight, and ``output_error`` that of the output about its mean, None without data. The plan of an applied model
    holds the measured errors instead; they differ for spatial kernels, whose output error is predicted by moments
    of the channels and of each axis in place of those of patches, and for layers that make up for a skip
    connection, where the error is that against the output that the sum needs. ``note`` describes
    adjustments, such as clamped ranks. ``kept_dense`` means that the user asked for a dense layer, which budgets
    then do not change.
    ``at_risk`` means that the ranks of a rule would cost the network more than they save: the layer stays dense,
    or is replaced because the rule is ``pure``.
    """

    layer: str
    shape: tuple[int, ...]
    method: str
    ranks: Ranks
    costs: Mapping[str, Change]
    error: float
    reason: str = ""
    note: str = ""
    output_error: float | None = None
    kept_dense: bool = False
    at_risk: bool = False

    @property
    def was_factorized(self) -> bool:
        """Whether the layer was factorized before the plan was made."""
        return bool(self.ranks and self.reason)

    @property
    def params(self) -> Change:
        """Parameters of the layer, before and after."""
        return self.costs["params"]

    @property
    def macs(self) -> Change:
        """Multiply-adds of the layer, before and after."""
        return self.costs["macs"]

    def saved(self, kind: str) -> float:
        """The reduction of a kind of cost; 0 for a kind that is not known."""
        change = self.costs.get(kind, Change(0, 0))
        return change.before - change.after

    def as_dense(self, reason: str) -> "Choice":
        """Return the choice that leaves this layer dense."""
        return replace(
            self,
            method=DENSE,
            ranks=(),
            costs={kind: Change(change.before, change.before) for kind, change in self.costs.items()},
            error=0.0,
            reason=reason,
            note="",
            output_error=None if self.output_error is None else 0.0,
            at_risk=False,
        )

    def keep_dense(self, decomposable: bool) -> "Choice":
        """Return the choice that leaves this layer dense because the user asked for it.

        A layer that is not ``decomposable`` anyway keeps the reason for that.
        """
        reason = KEPT_DENSE if decomposable or self.ranks else self.reason
        return replace(self.as_dense(reason), kept_dense=True)

    @classmethod
    def read(cls, value: Value) -> "Choice":
        """Read a choice from JSON written from ``dataclasses.asdict``.

        Raises:
            ValueError: a field is unknown, missing or of another type; the message names it.
        """
        optional = ["at_risk"]  # files of 0.2.0 and earlier do not have it
        entry = value.record(*(each.name for each in fields(cls) if each.name not in optional), optional=optional)
        costs = entry["costs"].record("params", "macs", optional=COUNTED)
        output_error = entry["output_error"]
        return cls(
            layer=entry["layer"].text(),
            shape=tuple(size.integer(least=0) for size in entry["shape"].items()),
            method=entry["method"].text(),
            ranks=tuple(rank.integer() for rank in entry["ranks"].items()),  # compared with the layer when used
            costs={kind: _read_change(kind, change) for kind, change in costs.items()},
            error=entry["error"].number(least=0),
            reason=entry["reason"].text(),
            note=entry["note"].text(),
            output_error=None if output_error.is_null else output_error.number(least=0),
            kept_dense=entry["kept_dense"].boolean(),
            at_risk="at_risk" in entry and entry["at_risk"].boolean(),
        )

    def row(self, name: str) -> tuple[str | tables.Cell, ...]:
        """The choice as a row of a table with the columns ``COLUMNS``."""
        costs = [_cell(change, replaced=bool(self.ranks)) for change in (self.params, self.macs)]
        ranks, error = " x ".join(map(str, self.ranks)), tables.Cell()
        if self.ranks:
            text = f"{self.error:.3f}" + ("" if self.output_error is None else f" / {self.output_error:.3f}")
            error = tables.Cell(text, value=self.error, share=self.error)
        note = "; ".join(filter(None, ("at risk" if self.at_risk else "", self.note)))
        return (name or "(the model)", self.layer, self.method, ranks, *costs, error, self.reason or note)

    def record(self, name: str) -> dict[str, Any]:
        """The choice as data: one entry per number and text, under the name of the layer."""
        costs = {
            f"{kind}_{when}": value
            for kind, change in self.costs.items()
            for when, value in zip(("before", "after"), change, strict=True)
        }
        head = {"layer": name, "type": self.layer, "method": self.method, "ranks": self.ranks}
        errors = {"error": self.error, "output_error": self.output_error}
        return head | costs | errors | {"reason": self.reason, "note": self.note, "at_risk": self.at_risk}


def _read_change(kind: str, value: Value) -> Change:
    """The change of a cost, in whole numbers but for MACs, which may be shares, and seconds."""
    before, after = value.items(2)
    if kind in ("macs", "seconds"):
        return Change(before.number(least=0), after.number(least=0))
    return Change(before.integer(least=0), after.integer(least=0))


def _cell(change: Change, *, replaced: bool) -> tables.Cell:
    def write(value: float) -> str:
        return f"{value:.2f}" if isinstance(change.before, float) else tables.number(value)

    return tables.change(*change, write) if replaced else tables.Cell(write(change.before), value=change.after)


def where_it_stays(choices: Mapping[str, Choice], kind: str, left: float, total: float) -> str:
    """Where a model's cost of a kind is that stays: in layers that stay dense, by reason, and outside of layers.

    ``left`` is that of the whole model as chosen, ``total`` that of the dense one, of which shares are given. A
    layer without ranks and without a reason is undecided: it is not named.

    >>> costs = {"macs": Change(60, 60)}
    >>> where_it_stays({"a": Choice("Linear", (), DENSE, (), costs, 0.0, "excluded")}, "macs", 80.0, 100.0)
    "60 % in 'a' (excluded), 20 % outside of layers"
    """
    after = {name: choice.costs[kind].after for name, choice in choices.items() if kind in choice.costs}
    if kind == "macs":  # those of a module with weights of its own include the layers inside of it
        for name in after:
            around = next((outer for outer in _around(name) if outer in after), None)
            if around is not None:
                after[around] -= choices[name].costs[kind].before
    groups: dict[str, list[str]] = {}
    for name in after:
        if not choices[name].ranks and choices[name].reason:
            groups.setdefault(choices[name].reason, []).append(name)
    costs = {reason: sum(after[name] for name in names) for reason, names in groups.items()}
    parts = []
    for reason in sorted(groups, key=lambda reason: -costs[reason])[:3]:
        if costs[reason] >= 0.005 * total:
            names = sorted(groups[reason], key=lambda name: -after[name])
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            first = repr(names[0]) if names[0] else "the model itself"
            parts.append(f"{100 * costs[reason] / total:.0f} % in {first}{more} ({reason})")
    outside = left - sum(after.values())
    if outside >= 0.005 * total:
        parts.append(f"{100 * outside / total:.0f} % outside of layers")
    return ", ".join(parts)


def _around(name: str) -> Iterator[str]:
    """The names of the modules around one, the innermost first.

    >>> list(_around("layer1.0.conv"))
    ['layer1.0', 'layer1', '']
    """
    while name:
        name = name.rpartition(".")[0]
        yield name


def unchanged_choice(module: nn.Module, reason: str, macs: float = 1.0) -> Choice:
    """The choice that leaves a layer unchanged, for a layer that was not analysed under any method."""
    if isinstance(module, Factorized):
        shape = module.dense_shape
    else:
        weight = getattr(module, "weight", None)
        shape = () if weight is None or is_lazy(weight) else tuple(weight.shape)
    cost = Cost.of(module, recurse=isinstance(module, (Factorized, nn.MultiheadAttention)))
    costs = {kind: Change(count, count) for kind, count in cost.items()} | {"macs": Change(macs, macs)}
    return Choice(describe(module), shape, DENSE, (), costs, 0.0, reason)


def describe(module: nn.Module) -> str:
    """A short description of a layer: type, channels, kernel, stride and groups.

    >>> describe(nn.Conv2d(64, 128, (3, 1), stride=2, groups=4))
    'Conv2d 64>128 3x1 /2 g4'
    """
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return f"{kind} {module.in_features}>{module.out_features}"
    if isinstance(module, ExpertLinear):
        return f"{kind} {module.in_features}>{module.out_features} x{module.groups}"
    if isinstance(module, nn.Embedding) or qualified_name(type(module)) == HUGGING_FACE_CONV1D:
        return f"{kind} {'>'.join(map(str, module.weight.shape))}"  # type: ignore[arg-type]
    if isinstance(module, nn.RNNBase):
        layers = "" if module.num_layers == 1 else f" x{module.num_layers}"
        projection = f" p{module.proj_size}" if module.proj_size else ""
        both = " both ways" if module.bidirectional else ""
        return f"{kind} {module.input_size}>{module.hidden_size}{projection}{layers}{both}"
    if not isinstance(module, nn.modules.conv._ConvNd):
        return kind
    stride = "" if set(module.stride) == {1} else f" /{_sizes(module.stride)}"
    groups = "" if module.groups == 1 else f" g{module.groups}"
    kernel = "x".join(map(str, module.kernel_size))
    return f"{kind} {module.in_channels}>{module.out_channels} {kernel}{stride}{groups}"


def _sizes(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes))

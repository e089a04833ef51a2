"""The decision of a plan for one layer, as data, as JSON and as a row of a table."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from decomp._util import tables
from decomp._util.schema import Value
from decomp.layers import Factorized
from decomp.layers.kernels import HUGGING_FACE_CONV1D, qualified_name
from decomp.planning.cost import COUNTED, Cost

Ranks = tuple[int, ...]
DENSE = "dense"  # the method of a layer that is not replaced
KEPT_DENSE = "kept dense on request"
COLUMNS = ("layer", "type", "method", "ranks", ">params", ">MACs", ">error", "why / note")


class Change(NamedTuple):
    """A cost before and after; ``before`` is 1.0 if costs are shares."""

    before: float
    after: float


@dataclass(frozen=True)
class Choice:
    """The decision of a plan for one layer.

    For a layer that stays dense ``ranks`` is empty, ``method`` is "dense" and ``reason`` says why. ``costs`` are
    those of the layer by kind, before and after: "params", "bytes" and "macs", which are multiply-adds on the
    example inputs (ints) or a share of the dense layer's (floats). ``error`` is the planned relative error of the
    weight, and ``output_error`` that of the output about its mean, None without data. The plan of an applied model
    holds the measured errors instead; they differ for spatial kernels, whose output error is predicted by moments
    of the channels and of each axis in place of those of patches. ``note`` describes adjustments, such as clamped
    ranks. ``kept_dense`` means that the user asked for a dense layer, which budgets then do not change.
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
        entry = value.record(*(field.name for field in fields(cls)))
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
        )

    def row(self, name: str) -> tuple[str, ...]:
        """The choice as a row of a table with the columns ``COLUMNS``."""
        costs = [_change(change, replaced=bool(self.ranks)) for change in (self.params, self.macs)]
        ranks, error = " x ".join(map(str, self.ranks)), f"{self.error:.3f}" if self.ranks else ""
        if self.ranks and self.output_error is not None:
            error += f" / {self.output_error:.3f}"
        return (name or "(the model)", self.layer, self.method, ranks, *costs, error, self.reason or self.note)


def _read_change(kind: str, value: Value) -> Change:
    """The change of a counted cost; only MACs may be shares."""
    before, after = value.items(2)
    if kind == "macs":
        return Change(before.number(least=0), after.number(least=0))
    return Change(before.integer(least=0), after.integer(least=0))


def _change(change: Change, *, replaced: bool) -> str:
    before, after = (f"{v:.2f}" if isinstance(change.before, float) else tables.number(v) for v in change)
    return f"{before} => {after}" if replaced else before


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
    if isinstance(module, nn.Embedding) or qualified_name(type(module)) == HUGGING_FACE_CONV1D:
        return f"{kind} {'>'.join(map(str, module.weight.shape))}"  # type: ignore[arg-type]
    if not isinstance(module, nn.modules.conv._ConvNd):
        return kind
    stride = "" if set(module.stride) == {1} else f" /{_sizes(module.stride)}"
    groups = "" if module.groups == 1 else f" g{module.groups}"
    kernel = "x".join(map(str, module.kernel_size))
    return f"{kind} {module.in_channels}>{module.out_channels} {kernel}{stride}{groups}"


def _sizes(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes))

"""One layer under one method: its analysis and its price, and the choice of its ranks."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from decomp.costs import Price, count_params
from decomp.layers import Factorized, group_kernels
from decomp.methods import Analysis, Method, Ranks
from decomp.ranks import Fixed, Rule
from decomp.spectra import Spectrum


class Change(NamedTuple):
    """A cost before and after; ``before`` is 1.0 where it is a share."""

    before: float
    after: float


@dataclass(frozen=True)
class Choice:
    """What a plan says of one layer.

    ``ranks`` is empty and ``method`` is "dense" where the layer stays as it is; ``reason`` then says why.
    ``params`` counts the layer's parameters. ``macs`` counts its multiply-adds on the example inputs (ints), or
    is a share of the dense layer's (floats). ``error`` is the relative error of the weight. ``note`` says what
    was adjusted.
    """

    layer: str
    shape: tuple[int, ...]
    method: str
    ranks: Ranks
    params: Change
    macs: Change
    error: float
    reason: str = ""
    note: str = ""

    def as_dense(self, reason: str) -> "Choice":
        """Return the choice to leave this layer dense."""
        return replace(
            self,
            method="dense",
            ranks=(),
            params=Change(self.params.before, self.params.before),
            macs=Change(self.macs.before, self.macs.before),
            error=0.0,
            reason=reason,
            note="",
        )


def undecided(module: nn.Module, reason: str, macs: float = 1.0) -> Choice:
    """The choice of a layer that no method looks at."""
    if isinstance(module, Factorized):
        shape = module.dense_shape
    else:
        weight = getattr(module, "weight", None)
        shape = () if weight is None or is_lazy(weight) else tuple(weight.shape)
    params = count_params(module)
    return Choice(describe(module), shape, "dense", (), Change(params, params), Change(macs, macs), 0.0, reason)


def describe(module: nn.Module) -> str:
    """Name a layer the way a table can hold it.

    >>> describe(nn.Conv2d(64, 128, (3, 1), stride=2, groups=4))
    'Conv2d 64>128 3x1 /2 g4'
    """
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return f"{kind} {module.in_features}>{module.out_features}"
    if not isinstance(module, nn.modules.conv._ConvNd):
        return kind
    stride = "" if set(module.stride) == {1} else f" /{_sizes(module.stride)}"
    groups = "" if module.groups == 1 else f" g{module.groups}"
    kernel = "x".join(map(str, module.kernel_size))
    return f"{kind} {module.in_channels}>{module.out_channels} {kernel}{stride}{groups}"


def _sizes(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes))


@dataclass(frozen=True)
class Candidate:
    """One layer under one method, analysed once: every rank has its error and its cost at once."""

    name: str
    layer: str
    shape: tuple[int, ...]
    method: Method
    limits: Ranks
    analysis: Analysis
    price: Price
    absolute_macs: bool

    @classmethod
    def of(cls, name: str, module: nn.Module, method: Method, shapes: list[tuple[int, ...]] | None) -> "Candidate":
        """Analyse the weight of ``module``; ``shapes`` are those of its inputs, where they are known."""
        kernels = group_kernels(module).detach()
        limits = method.limits(kernels)
        price = Price(module, method.layers[type(module)], limits, shapes)
        shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        analysis = method.analyse(kernels)
        return cls(name, describe(module), shape, method, limits, analysis, price, shapes is not None)

    @property
    def spectra(self) -> tuple[Spectrum, ...]:
        return self.analysis.spectra

    def error(self, ranks: Ranks) -> float:
        """Relative error of the weight at these ranks."""
        return self.analysis.error(ranks)

    def params_share(self, ranks: Ranks) -> float:
        """Parameters at these ranks, as a share of the dense layer's."""
        return self.price(ranks).params / self.price.dense.params

    def macs_share(self, ranks: Ranks) -> float:
        """MACs at these ranks, as a share of the dense layer's."""
        return self.price(ranks).macs / self.price.dense.macs

    def decide(self, request: "Rule | Fixed | None") -> Choice:
        """Choose the ranks that a rule or the user asks for, or dense with the reason.

        Raises:
            ValueError: the ranks do not fit this layer; the message names it.
        """
        if request is None:
            return self._choice((), reason="ranks= names no rank for it")
        if isinstance(request, Fixed):
            ranks, note = self._fitted(request)
            return self._unless_worse(ranks, note)
        ranks = tuple(request(self))
        if len(ranks) != len(self.limits) or any(
            not 0 <= r <= most for r, most in zip(ranks, self.limits, strict=True)
        ):
            raise ValueError(
                f"layer {self.name!r}: {request!r} gave ranks {ranks}, allowed are 0 to {self.limits}"
            )
        if 0 in ranks:
            return self._choice((), reason=getattr(request, "nothing", f"{request!r} keeps nothing of it"))
        return self._unless_worse(ranks, "")

    def _fitted(self, request: Fixed) -> tuple[Ranks, str]:
        try:
            ranks, clamped = request.fit(self.limits)
        except ValueError as error:
            raise ValueError(f"layer {self.name!r}: {error}") from None
        return ranks, f"clamped to {_ranks(ranks)}" if clamped else ""

    def _unless_worse(self, ranks: Ranks, note: str) -> Choice:
        cost, dense = self.price(ranks), self.price.dense
        if cost.params < dense.params and cost.macs < dense.macs:
            return self._choice(ranks, note=note)
        params, macs = cost.params / dense.params, cost.macs / dense.macs
        return self._choice((), reason=f"not cheaper at {_ranks(ranks)}: params x{params:.2f}, MACs x{macs:.2f}")

    def _choice(self, ranks: Ranks, reason: str = "", note: str = "") -> Choice:
        dense = self.price.dense
        cost = self.price(ranks) if ranks else dense
        return Choice(
            self.layer,
            self.shape,
            self.method.name if ranks else "dense",
            ranks,
            Change(dense.params, cost.params),
            Change(dense.macs, cost.macs) if self.absolute_macs else Change(1.0, cost.macs / dense.macs),
            self.error(ranks) if ranks else 0.0,
            reason,
            note,
        )


def _ranks(ranks: Ranks) -> str:
    return str(ranks[0]) if len(ranks) == 1 else str(ranks)

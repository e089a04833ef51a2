"""Moments of the inputs and states of recurrent layers, and decomposition by the error of their gates."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from decomp.calibration.moments import (
    LARGEST_MOMENTS,
    LARGEST_VALIDATED_MOMENTS,
    Moments,
    MomentSums,
    chosen_shrinkage,
    oracle_shrinkage,
)
from decomp.data.batches import FitSplit
from decomp.layers import InputSVDRNN
from decomp.layers.kernels import recurrent_matrices, shape_of
from decomp.linalg import as_float64, shrunk, symmetric_power
from decomp.network.forward import hooked
from decomp.network.restoring import lock, temporarily

Matrices: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class RecurrentMoments:
    """Second moments of what the matrices of an LSTM, GRU or RNN multiply, about zero, in float64.

    ``seconds`` has a batch (matrices, n, n) for each role of :func:`decomp.layers.kernels.recurrent_matrices`: E[x
    x^T] of the inputs of each layer, and E[h h^T] of its states, one per direction; the identity where these are
    too large. ``shrunk`` are these, shrunk towards a multiple of the identity, and ``held_out`` those of the rows
    that are held out of both, None where there are none. ``importance`` is the squared relative change of the
    network's output, or of the loss, per squared error of the gates; None without gradients.
    """

    shape: tuple[int, ...]
    samples: int
    seconds: Matrices
    shrunk: Matrices
    importance: float | None = None
    held_out: Matrices | None = None

    @property
    def positions(self) -> int:
        """The number of rows in the moments: all of them."""
        return self.samples

    @property
    def of_positions(self) -> int:
        """The number of rows in the data."""
        return self.samples

    @property
    def standard_error(self) -> float:
        """That of the moments against those of all rows."""
        return 0.0

    def to(self, device: torch.device) -> "RecurrentMoments":
        """The same moments on another device."""

        def moved(matrices: Matrices) -> dict[str, Tensor]:
            return {role: each.to(device) for role, each in matrices.items()}

        held_out = None if self.held_out is None else moved(self.held_out)
        return replace(self, seconds=moved(self.seconds), shrunk=moved(self.shrunk), held_out=held_out)


_FLAGS = lock()
"""Held while frozen weights require gradients: they are those of all threads."""

AnyMoments: TypeAlias = Moments | RecurrentMoments


def gate_kernels(kernels: Matrices, moments: RecurrentMoments) -> dict[str, Tensor]:
    """W C^1/2 of every matrix W: ||(W - W') C^1/2||^2 = E ||(W - W') x||^2 is its error in the gates.

    The gates are meant before their nonlinearity.
    """
    return {role: as_float64(each) @ symmetric_power(moments.shrunk[role], 0.5) for role, each in kernels.items()}


def gate_factors(
    method: Any, kernels: Matrices, ranks: tuple[int, ...], moments: RecurrentMoments
) -> tuple[Any, ...]:
    """The factors of ``method`` with the least error of the gates; matrices of full rank stay as they are."""
    found = method.factors(gate_kernels(kernels, moments), ranks)
    roles = [role for role in method.rank_names if role in kernels]
    return tuple(
        kernels[role]
        if isinstance(each, Tensor)
        else (each[0], each[1] @ symmetric_power(moments.shrunk[role], -0.5))
        for role, each in zip(roles, found, strict=True)
    )


@torch.no_grad()
def gate_error(layer: Any, dense: nn.RNNBase, seconds: Matrices) -> float:
    """Relative error of all gates before their nonlinearity, by moments of the inputs and states."""
    squared = energy = 0.0
    ours = recurrent_matrices(layer.to_dense())
    for role, matrices in recurrent_matrices(dense).items():
        weight, second = as_float64(matrices), seconds[role]
        lost = weight - as_float64(ours[role])
        squared += float(((lost @ second) * lost).sum())
        energy += float(((weight @ second) * weight).sum())
    return (max(squared, 0.0) / energy) ** 0.5 if energy > 0 else 0.0


class RecurrentSums:
    """Running sums over the inputs and states of every layer inside a recurrent one, and over gradients.

    The fused kernels of torch show only the inputs of the first layer and the outputs of the last: a copy as a
    chain of one-layer modules is run on the same inputs.
    """

    def __init__(self, name: str, module: nn.RNNBase, split: FitSplit | None = None) -> None:
        self.name, self.module = name, module
        self._split = split
        self.samples = 0
        self._kernels = {role: each.detach() for role, each in recurrent_matrices(module).items()}
        inputs = {role: each for role, each in self._kernels.items() if role in InputSVDRNN.roles}
        self._chain = InputSVDRNN.from_kernels(module, inputs).eval()
        self._sums = {
            role: [MomentSums(1, each.shape[2]) if each.shape[2] <= LARGEST_MOMENTS else None for _ in each]
            for role, each in self._kernels.items()
        }
        self._gradients: float | None = None

    @property
    def weights(self) -> list[nn.Parameter]:
        """The parameters that are decomposed."""
        return [p for name, p in self.module.named_parameters() if name.startswith(("weight_ih", "weight_hh"))]

    @torch.no_grad()
    def add(self, positional: Sequence[Any], keywords: Mapping[str, Any], *, batch: int) -> None:
        """Accumulate the inputs and states of one call."""

        def watch(place: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                directions = 2 if self.module.bidirectional else 1
                role, index = ("upper", place - 1) if place else ("input", 0)
                self._add(role, index, args[0], batch)
                for direction, states in enumerate(_rows(output[0]).chunk(directions, -1)):
                    self._add("recurrent", place * directions + direction, states, batch)

            return hook

        layers = [self._chain.get_submodule(f"layer_l{place}") for place in range(self.module.num_layers)]
        with hooked(after=[(layer, watch(place)) for place, layer in enumerate(layers)]):
            self._chain(*positional, **keywords)
        self.samples += len(_rows((*positional, *keywords.values())[0]))

    def add_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """Accumulate the squared gradients by the weights."""
        if any(grad is not None for grad in grads):
            squares = sum(float(grad.double().square().sum()) for grad in grads if grad is not None)
            self._gradients = (self._gradients or 0.0) + squares

    def moments(self, energy: float = 1.0) -> RecurrentMoments:
        """The moments; squared gradients are divided by ``energy`` to get the importance of the layer."""
        seconds, shrunk_seconds = {}, {}
        for role, kernels in self._kernels.items():
            pairs = [self._second(each, both) for each, both in zip(kernels, self._sums[role], strict=True)]
            seconds[role], shrunk_seconds[role] = (torch.cat(each) for each in zip(*pairs, strict=True))
        moments = RecurrentMoments(
            shape_of(self.module), self.samples, seconds, shrunk_seconds, held_out=self._held_out()
        )
        if self._gradients is None:
            return moments
        # To first order, an error dW of random direction changes the output by |g|^2 |dW|^2 / n in the mean.
        weights = [as_float64(weight) for weight in self.weights]
        change = self._gradients * sum(float(w.square().sum()) for w in weights) / sum(w.numel() for w in weights)
        gates = sum(float(each.square().sum()) for each in gate_kernels(self._kernels, moments).values())
        return replace(moments, importance=change / energy / max(gates, 1e-300))

    def _add(self, role: str, index: int, given: Any, batch: int) -> None:
        sums = self._sums[role][index]
        if sums is not None:
            rows = _rows(given).to(torch.float64)[None]
            first = rows.shape[1] if self._split is None else self._split.fitted(batch, rows.shape[1])
            sums.add(rows[:, :first])
            sums.add(rows[:, first:], held_out=True)

    def _held_out(self) -> dict[str, Tensor] | None:
        """The moments of the rows that are held out; None unless there are some, and others to fit to."""
        every = [sums for each in self._sums.values() for sums in each if sums is not None]
        if not all(sums.has(held_out=part) for sums in every for part in (False, True)):
            return None
        held_out = {}
        for role, kernels in self._kernels.items():
            identity = torch.eye(kernels.shape[2], dtype=torch.float64, device=kernels.device)[None]
            seconds = [
                identity if sums is None else sums.second(centred=False, held_out=True).to(kernels.device)
                for sums in self._sums[role]
            ]
            held_out[role] = torch.cat(seconds)
        return held_out

    def _second(self, kernel: Tensor, sums: MomentSums | None) -> tuple[Tensor, Tensor]:
        """The moments of the inputs of one matrix, and those that are shrunk as does best on held-out batches."""
        size = kernel.shape[1]
        if sums is None:
            identity = torch.eye(size, dtype=torch.float64, device=kernel.device)[None]
            return identity, identity
        second = sums.second(centred=False).to(kernel.device)
        rho = oracle_shrinkage(second, round(sums.count))
        if 1 < size <= LARGEST_VALIDATED_MOMENTS and sums.has(held_out=False) and sums.has(held_out=True):
            fitted, measured = (
                sums.second(centred=False, held_out=part).to(kernel.device) for part in (False, True)
            )
            rho = chosen_shrinkage(as_float64(kernel)[None], fitted, measured, rho)
        return second, shrunk(second, max(rho, torch.finfo(torch.float64).eps * size))


@contextmanager
def requiring_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let parameters require gradients in the block, frozen ones too."""
    if not parameters:
        yield
        return
    with _FLAGS:
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]

        def freeze() -> None:
            for parameter in frozen:
                parameter.requires_grad_(False)

        with temporarily(freeze):
            for parameter in frozen:
                parameter.requires_grad_()
            yield


def _rows(given: Any) -> Tensor:
    rows: Tensor = given.data if isinstance(given, PackedSequence) else given
    return rows.reshape(-1, rows.shape[-1])

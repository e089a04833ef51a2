"""LSTM, GRU and RNN layers with low-rank weights: linear layers before recurrent ones, or a loop over steps."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from decomp.layers.factorized import Factorized
from decomp.layers.kernels import recurrent_matrices, weight_matrix

States = Tensor | tuple[Tensor, Tensor]

_PARAMETERS = ("weight_ih_l", "weight_hh_l", "weight_hr_l", "bias_ih_l", "bias_hh_l")


class LowRankRecurrence(nn.Module):
    """One recurrent layer whose recurrent weights are products: W_hh h = B (A h), step by step.

    It is called like a one-layer ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` and has its parameters, except for
    ``expand_hh_l0`` (G H x r) and ``reduce_hh_l0`` (r x P) in place of ``weight_hh_l0``, and the same with
    ``_reverse``. The input product of all steps is one matrix product. torch has no fused kernel for low-rank
    recurrent weights: ``proj_size`` changes what an LSTM gives, not only how it is computed.
    """

    def __init__(self, like: nn.RNNBase, rank: int) -> None:
        super().__init__()
        self.mode, self.batch_first, self.bidirectional = like.mode, like.batch_first, like.bidirectional
        self.input_size, self.hidden_size, self.rank = like.input_size, like.hidden_size, rank
        self.state_size = like.proj_size or like.hidden_size
        for name, parameter in like.named_parameters():
            if name.startswith("weight_hh"):
                rows, columns = parameter.shape
                self.register_parameter(_expand(name), nn.Parameter(parameter.new_empty(rows, rank)))
                self.register_parameter(_reduce(name), nn.Parameter(parameter.new_empty(rank, columns)))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty_like(parameter)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize every parameter uniformly in +-1 / sqrt(H), as torch does."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor | PackedSequence, hx: States | None = None) -> tuple[Any, States]:
        if isinstance(input, PackedSequence):
            steps, restored = input.data.split(input.batch_sizes.tolist()), input.unsorted_indices
            batch, sorting = int(input.batch_sizes[0]), input.sorted_indices
        else:
            by_step = (
                input.unsqueeze(1) if input.dim() == 2 else input.transpose(0, 1) if self.batch_first else input
            )
            steps, batch, sorting, restored = by_step.unbind(0), by_step.shape[1], None, None
        first = self._first_states(hx, steps[0], batch, unbatched=not batched(input), sorting=sorting)
        outputs, last = zip(*(self._run(suffix, steps, first) for suffix in self._suffixes()), strict=True)
        rows: Tensor = torch.cat([torch.cat(each) for each in outputs], -1)
        ends = [torch.stack(each) for each in zip(*last, strict=True)]
        if restored is not None:
            ends = [each.index_select(1, restored) for each in ends]
        if isinstance(input, PackedSequence):
            output: Any = with_data(input, rows)
        else:
            output = rows.unflatten(0, (len(steps), batch))
            output = output.transpose(0, 1) if self.batch_first and batched(input) else output
        if not batched(input):
            output, ends = output.squeeze(1), [each.squeeze(1) for each in ends]
        return output, ends[0] if len(ends) == 1 else (ends[0], ends[1])

    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    def _first_states(
        self, hx: States | None, step: Tensor, batch: int, *, unbatched: bool, sorting: Tensor | None
    ) -> dict[str, list[Tensor]]:
        """The states (batch, size) that each direction begins with, zeros without ``hx``."""
        sizes = [self.state_size, self.hidden_size] if self.mode == "LSTM" else [self.state_size]
        directions = len(self._suffixes())
        if hx is None:
            states = [step.new_zeros(directions, batch, size) for size in sizes]
        else:
            states = list(hx) if isinstance(hx, tuple | list) else [hx]
            states = [each.unsqueeze(1) for each in states] if unbatched else states
            for state, size in zip(states, sizes, strict=True):
                if state.shape != (directions, batch, size):
                    expected = (directions, size) if unbatched else (directions, batch, size)
                    raise RuntimeError(f"hx: a state of shape {expected} is needed, not {tuple(state.shape)}")
            if sorting is not None:
                states = [each.index_select(1, sorting) for each in states]
        return {suffix: [each[place] for each in states] for place, suffix in enumerate(self._suffixes())}

    def _run(
        self, suffix: str, steps: tuple[Tensor, ...], first: dict[str, list[Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of every step, and the last states, of one direction.

        Packed sequences are sorted by length: of a step with b rows, the first b sequences take part. The others
        keep their state, which forwards is their last one and backwards their first.
        """
        counts = [len(step) for step in steps]
        gates = functional.linear(torch.cat(steps), self._own("weight_ih", suffix), self._bias("bias_ih", suffix))
        states, outputs = first[suffix], []
        order = list(gates.split(counts))
        for given in reversed(order) if suffix else order:
            active = [state[: len(given)] for state in states]
            new = self._step(suffix, given, active)
            outputs.append(new[0])
            rest = [state[len(given) :] for state in states]
            states = [torch.cat(pair) if len(pair[1]) else pair[0] for pair in zip(new, rest, strict=True)]
        return outputs[::-1] if suffix else outputs, states

    def _step(self, suffix: str, given: Tensor, states: list[Tensor]) -> list[Tensor]:
        hidden = functional.linear(states[0], self._own("reduce_hh", suffix))
        hidden = functional.linear(hidden, self._own("expand_hh", suffix), self._bias("bias_hh", suffix))
        if self.mode == "LSTM":
            enter, forget, cell, leave = (given + hidden).chunk(4, -1)
            memory = forget.sigmoid() * states[1] + enter.sigmoid() * cell.tanh()
            output = leave.sigmoid() * memory.tanh()
            if self.state_size != self.hidden_size:
                output = functional.linear(output, self._own("weight_hr", suffix))
            return [output, memory]
        if self.mode == "GRU":
            (reset, update, new), (own_reset, own_update, own_new) = given.chunk(3, -1), hidden.chunk(3, -1)
            new = (new + (reset + own_reset).sigmoid() * own_new).tanh()
            return [torch.lerp(new, states[0], (update + own_update).sigmoid())]
        total = given + hidden
        return [total.relu() if self.mode == "RNN_RELU" else total.tanh()]

    def _own(self, kind: str, suffix: str) -> Tensor:
        return cast(Tensor, self._parameters[f"{kind}_l0{suffix}"])

    def _bias(self, kind: str, suffix: str) -> Tensor | None:
        return self._parameters.get(f"{kind}_l0{suffix}")

    def extra_repr(self) -> str:
        return f"{self.mode}, {self.input_size}, {self.hidden_size}, rank={self.rank}"


def _expand(name: str) -> str:
    return name.replace("weight_hh", "expand_hh")


def _reduce(name: str) -> str:
    return name.replace("weight_hh", "reduce_hh")


def batched(input: Tensor | PackedSequence) -> bool:
    """Whether an input of a recurrent layer has an axis of sequences."""
    return isinstance(input, PackedSequence) or input.dim() == 3


def with_data(packed: PackedSequence, data: Tensor) -> PackedSequence:
    """The packed sequence with other rows."""
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


class InputSVDRNN(Factorized):
    """An LSTM, GRU or RNN with input weights of low rank: ``nn.Linear(S -> r)`` and a one-layer RNN per layer.

    W_ih x = B (A x): A is the linear layer, B the input weight of a recurrent layer with r inputs, so that the
    fused kernels of torch run the recurrence. Both directions share A: [W_ih; W_ih_reverse] is factorized as one
    matrix (D G H x S), with D directions and G gates. A layer of full rank has no linear layer. Ranks are (input,
    upper): that of the first layer, and one for all layers above it, where there are any. The input
    weights of a layer have r (S + D G H) parameters and MACs per step, in place of S D G H; recurrent weights,
    biases and projections stay as they are.

    It replaces ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` and is called like them. ``weight_ih_l0`` and the other
    dense parameters can be read; what is written into them is lost.

    Factors are a pair (B, A) of shapes (layers, D G H, r) and (layers, r, S) for each rank; a single tensor is a
    matrix of full rank.

    Source: Prabhavalkar et al. 2016 (On the compression of recurrent neural networks), who let the recurrent
    weights and the input weights of the next layer share A.

    >>> dense = nn.LSTM(64, 32, num_layers=2, bidirectional=True)
    >>> layer = InputSVDRNN.like(dense, (8, 64))
    >>> [name for name, child in layer.named_children()], layer.layer_l0
    (['reduce_l0', 'layer_l0', 'layer_l1'], LSTM(8, 32, bidirectional=True))
    """

    method = "svd_rnn_input"
    absorbs_inputs = "nothing"
    absorbs_outputs = "nothing"
    roles: ClassVar[tuple[str, ...]] = ("input", "upper")

    def build(self, dense: nn.RNNBase, device: Any) -> None:
        limits = {role: min(matrices.shape[1:]) for role, matrices in self._matrices(dense).items()}
        ranks = dict(zip(limits, self.ranks, strict=True))
        dtype = next(dense.parameters()).dtype
        for place in range(dense.num_layers):
            inputs, role = getattr(dense, f"weight_ih_l{place}").shape[1], "upper" if place else "input"
            if ranks[role] < limits[role]:
                reduce = nn.Linear(inputs, ranks[role], bias=False, device=device, dtype=dtype)
                self.add_module(f"reduce_l{place}", reduce)
                inputs = ranks[role]
            layer: nn.Module = _one_layer(dense, inputs, device, dtype)
            if ranks.get("recurrent", 0) < limits.get("recurrent", 0):
                layer = LowRankRecurrence(cast(nn.RNNBase, layer), ranks["recurrent"])
            self.add_module(f"layer_l{place}", layer)

    @classmethod
    def _matrices(cls, dense: nn.RNNBase) -> dict[str, Tensor]:
        """The matrices that have a rank, by role."""
        return {role: each for role, each in recurrent_matrices(dense).items() if role in cls.roles}

    @classmethod
    def like(cls, dense: Any, ranks: tuple[int, ...], *, device: object = None) -> Self:
        parameters = dict(dense.named_parameters())
        layer = cls(dense, tuple(ranks), next(iter(parameters.values())).device if device is None else device)
        layer.train(dense.training)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(any(parameters[source].requires_grad for source in layer._sources(name)))
        return layer

    def _sources(self, name: str) -> list[str]:
        """The parameters of the dense layer that one of the own parameters stands for."""
        child, own = name.split(".")
        place = child.rpartition("_l")[2]
        if child.startswith("reduce"):
            return [f"weight_ih_l{place}{suffix}" for suffix in self._suffixes()]
        own = own.replace("expand_hh", "weight_hh").replace("reduce_hh", "weight_hh")
        return [own.replace("_l0", f"_l{place}")]

    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    @classmethod
    def factor_kernels(cls, dense: nn.Module, factors: Any) -> Mapping[str, Tensor]:
        kernels = {}
        for role, factor in zip(cls._matrices(cast(nn.RNNBase, dense)), factors, strict=True):
            left, right = (factor, None) if isinstance(factor, Tensor) else factor
            kernels[role] = left
            if right is not None:
                kernels[f"{role}_reduce"] = right
        return kernels

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        own = [role for role in kernels if not role.endswith("_reduce")]
        return tuple(
            kernels[role].shape[2] if f"{role}_reduce" in kernels else min(kernels[role].shape[1:]) for role in own
        )

    @classmethod
    def refittable(cls, kernels: Mapping[str, Tensor]) -> tuple[str, ...]:
        return ()

    @classmethod
    def from_kernels(cls, dense: Any, kernels: Mapping[str, Tensor]) -> Self:
        layer = cls.like(dense, cls.ranks_of(kernels), device="meta")
        values = layer._values(dense, kernels)
        for name, parameter in list(layer.named_parameters()):
            source, value = getattr(dense, layer._sources(name)[0]), values[name]
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{cls.__name__}.{name}: the factors have a weight of shape {tuple(value.shape)}, the layer "
                    f"needs {tuple(parameter.shape)}"
                )
            value = value.detach().to(source.device, source.dtype, copy=True).contiguous()
            owner, _, last = name.rpartition(".")
            setattr(layer.get_submodule(owner), last, nn.Parameter(value, requires_grad=parameter.requires_grad))
        layer.flatten_parameters()
        return layer

    def _values(self, dense: Any, kernels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of all own parameters, by name."""
        count, values = len(self._suffixes()), {}
        for place in range(self.num_layers):
            role, index = ("input", 0) if place == 0 else ("upper", place - 1)
            blocks = kernels[role][index].chunk(count)
            if f"{role}_reduce" in kernels:
                values[f"reduce_l{place}.weight"] = kernels[f"{role}_reduce"][index]
            for direction, suffix in enumerate(self._suffixes()):
                start = f"layer_l{place}."
                for name in _parameter_names(dense, place, suffix):
                    values[start + name.replace(f"_l{place}", "_l0")] = getattr(dense, name)
                values[f"{start}weight_ih_l0{suffix}"] = blocks[direction]
                if "recurrent" in kernels:
                    recurrent = f"{start}weight_hh_l0{suffix}"
                    index_of = place * count + direction
                    if "recurrent_reduce" in kernels:
                        values[_expand(recurrent)] = kernels["recurrent"][index_of]
                        values[_reduce(recurrent)] = kernels["recurrent_reduce"][index_of]
                    else:
                        values[recurrent] = kernels["recurrent"][index_of]
        return values

    def dense_parameters(self) -> dict[str, Tensor]:
        """The parameters of the dense layer by name, with products of factors in their place."""
        device = next(self.parameters()).device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):  # as for ``dense_weight``
                return self.dense_parameters()
        values: dict[str, Tensor] = {}
        for place in range(self.num_layers):
            reduce, layer = self._stage(place)
            for name, parameter in layer.named_parameters():
                own: Tensor = parameter
                if name.startswith("reduce_hh"):
                    continue
                if name.startswith("expand_hh"):
                    own = own @ layer.get_parameter(name.replace("expand", "reduce"))
                    name = name.replace("expand", "weight")
                elif name.startswith("weight_ih") and reduce is not None:
                    own = own @ reduce.weight
                values[name.replace("_l0", f"_l{place}")] = own
        return values

    def dense_kernels(self) -> Tensor:
        return weight_matrix(self.dense_parameters(), self.num_layers)[None]

    def _stage(self, place: int) -> tuple[nn.Linear | None, nn.Module]:
        return cast(Any, self._modules.get(f"reduce_l{place}")), cast(nn.Module, self._modules[f"layer_l{place}"])

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.mode == "LSTM":
            options["proj_size"] = self.proj_size
        if self.mode.startswith("RNN"):
            options["nonlinearity"] = self.nonlinearity
        dtype = next(self.parameters()).dtype
        dense: Any = self.dense_type(**options, device="meta", dtype=dtype).train(self.training)
        trained = {
            source for name, own in self.named_parameters() if own.requires_grad for source in self._sources(name)
        }
        for name, value in self.dense_parameters().items():
            setattr(dense, name, nn.Parameter(value.detach().clone(), requires_grad=name in trained))
        self._give_plain_attributes(dense)
        dense.flatten_parameters()
        return cast(nn.Module, dense)

    @property
    def bias(self) -> Any:
        """Whether there are biases, as in torch's recurrent layers."""
        return any(name.startswith("bias") for name, _ in self.layer_l0.named_parameters())

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The dense parameters of every layer and direction."""
        values = self.dense_parameters()
        return [
            [values[name] for name in _parameter_names(values, place, suffix)]
            for place in range(self.num_layers)
            for suffix in self._suffixes()
        ]

    def flatten_parameters(self) -> None:
        """Lay out the parameters of every recurrent layer in one piece of memory, for cuDNN."""
        for child in self.children():
            if isinstance(child, nn.RNNBase):
                child.flatten_parameters()

    def __getattr__(self, name: str) -> Any:
        if name.startswith(_PARAMETERS) and vars(self).get("_modules"):
            values = self.dense_parameters()
            if name in values:
                return values[name]
        return super().__getattr__(name)

    def _require_no_product(self, name: str) -> None:
        if name in ("weight", "bias") or name.startswith(_PARAMETERS):
            raise AttributeError(
                f"{type(self).__name__}.{name} cannot be set or pruned: it is computed from the parameters of the "
                "layers inside. Use these in its place (layer.layer_l0.weight_ih_l0, layer.reduce_l0.weight), or "
                "the dense layer that decomp.densify gives"
            )

    def forward(self, input: Any, hx: States | None = None) -> Any:
        count = len(self._suffixes())
        states = None if hx is None else list(hx) if isinstance(hx, tuple | list) else [hx]
        total = count * self.num_layers
        for state in states or ():
            if state.shape[0] != total:
                raise RuntimeError(f"hx: states of {total} layers and directions are needed, not {state.shape[0]}")
        ends: list[Any] = []
        for place in range(self.num_layers):
            if place and self.dropout and self.training:
                input = _on_rows(lambda rows: functional.dropout(rows, self.dropout), input)
            reduce, layer = self._stage(place)
            if reduce is not None:
                input = _on_rows(reduce, input)
            own = states and [state[place * count : (place + 1) * count] for state in states]
            given: Any = (tuple(own) if self.mode == "LSTM" else own[0]) if own else None
            input, end = _run_differentiably(layer, input, given)
            ends.append(end)
        if self.num_layers == 1:
            return input, ends[0]
        if self.mode == "LSTM":
            hidden, cell = zip(*ends, strict=True)
            return input, (torch.cat(hidden), torch.cat(cell))
        return input, torch.cat(ends)


class SVDRNN(InputSVDRNN):
    """An LSTM, GRU or RNN with input and recurrent weights of low rank.

    As :class:`InputSVDRNN`, and W_hh h = B (A h) for each direction of each layer, with one rank for all: ranks
    are (input, recurrent, upper), or the first two for a single layer. A recurrent rank below the full one makes
    the recurrence a loop in Python (:class:`LowRankRecurrence`): fewer parameters and MACs, but on small layers
    more time than torch's fused kernels take.

    >>> layer = SVDRNN.like(nn.GRU(64, 32), (8, 4))
    >>> layer.layer_l0
    LowRankRecurrence(GRU, 8, 32, rank=4)
    """

    method = "svd_rnn"
    roles: ClassVar[tuple[str, ...]] = ("input", "recurrent", "upper")


def _run_differentiably(layer: nn.Module, input: Any, hx: States | None) -> Any:
    """Run a one-layer recurrence as in training mode where gradients are on: else cuDNN refuses the backward pass.

    There is nothing in it that behaves otherwise in training: dropout is between the layers.
    """
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if layer.training or recorded or not torch.is_grad_enabled():
        return layer(input, hx)
    layer.training = True
    try:
        return layer(input, hx)
    finally:
        layer.training = False


def _one_layer(dense: Any, inputs: int, device: Any, dtype: Any) -> nn.RNNBase:
    """A recurrent layer with the options of ``dense`` but one layer, of so many inputs."""
    options: dict[str, Any] = {name: getattr(dense, name) for name in ("bias", "batch_first", "bidirectional")}
    if dense.mode == "LSTM":
        options["proj_size"] = dense.proj_size
    if dense.mode.startswith("RNN"):
        options["nonlinearity"] = dense.nonlinearity
    return cast(nn.RNNBase, type(dense)(inputs, dense.hidden_size, **options, device=device, dtype=dtype))


def _parameter_names(dense: Any, place: int, suffix: str) -> Iterator[str]:
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    for name in (f"{kind}_l{place}{suffix}" for kind in kinds):
        if name in dense if isinstance(dense, Mapping) else name in dense._parameters:
            yield name


def _on_rows(function: Any, input: Any) -> Any:
    """Apply a function to the last axis of a tensor or of a packed sequence."""
    return with_data(input, function(input.data)) if isinstance(input, PackedSequence) else function(input)

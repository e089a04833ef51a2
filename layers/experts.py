"""Fused experts of a mixture: layers whose weight is chosen for each row, and the module that routes to them."""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from decomp.layers.svd import SVDMatrix
from decomp.layers.unpacked import Unpacked, parameter_like, take_plain_attributes

_ALIGNMENT = 16  # bytes, of the rows of a grouped product
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExpertLinear(nn.Module):
    """Linear layers of several experts, y_n = W_e x_n with the expert e of each row n: E T S parameters, no bias.

    The weight has the shape (E T, S), as that of a grouped 1x1 convolution; ``groups`` is the number of experts E.

    Args:
        experts: the number of experts E.
        in_features: S of each expert.
        out_features: T of each expert.
        device: where the weight is.
        dtype: of the weight.

    >>> layer = ExpertLinear(4, 8, 6)
    >>> layer(torch.randn(3, 8), torch.tensor([2, 0, 2])).shape
    torch.Size([3, 6])
    """

    bias: None

    def __init__(
        self, experts: int, in_features: int, out_features: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.groups, self.in_features, self.out_features = experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(experts * out_features, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weight of every expert as torch initializes a linear layer."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, input: Tensor, experts: Tensor | None = None, implementation: str | None = None) -> Tensor:
        """Multiply each row (N, S) by the weight of its expert.

        Args:
            input: rows.
            experts: the expert of each row (N); by default the first one.
            implementation: as in transformers: "grouped_mm" sorts the rows and multiplies all experts in one call
                (where that is possible: 16-byte aligned sizes, no float64), "batched_mm" gathers a weight for each
                row, and with any other the experts are looped over.
        """
        weight = self.weight.unflatten(0, (self.groups, self.out_features))
        if experts is None:
            return functional.linear(input, weight[0])
        if implementation == "batched_mm":
            return torch.bmm(weight[experts], input[:, :, None])[:, :, 0]
        ordered, order = experts.sort(stable=True)
        ends = torch.searchsorted(ordered, torch.arange(self.groups, device=ordered.device), right=True)
        rows = input[order]
        if implementation == "grouped_mm" and _can_group(rows, weight):
            rows = rows.to(weight.dtype)  # no autocast reaches this product
            products = functional.grouped_mm(rows, weight.mT, offs=ends.to(torch.int32))
        else:
            stops = ends.tolist()
            bounds = zip([0, *stops[:-1]], stops, strict=True)
            products = torch.cat(
                [
                    functional.linear(rows[start:stop], each)
                    for (start, stop), each in zip(bounds, weight, strict=True)
                ]
            )
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return products[inverse]

    def extra_repr(self) -> str:
        return f"experts={self.groups}, in_features={self.in_features}, out_features={self.out_features}"


def routes_rows(layer: nn.Module) -> bool:
    """Whether the second argument of a layer is the expert of each row, whose weight multiplies the row."""
    return isinstance(layer, (ExpertLinear, SVDExpertLinear))


def _can_group(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch can multiply the rows by the weights (E, T, S) in one grouped product."""
    aligned = all(size * weight.element_size() % _ALIGNMENT == 0 for size in weight.shape[1:])
    if not aligned or weight.dtype not in _GROUPED_DTYPES or not hasattr(functional, "grouped_mm"):
        return False
    if torch.compiler.is_compiling() and weight.dtype != torch.bfloat16:
        return False  # inductor has it for bfloat16 alone
    return rows.device.type != "cuda" or torch.cuda.get_device_capability(rows.device) >= (8, 0)


class SVDExpertLinear(SVDMatrix):
    """``ExpertLinear(S -> r)`` then ``ExpertLinear(r -> T)``, one rank for all experts.

    Params E r (S + T), MACs r (S + T) per row.

    >>> layer = SVDExpertLinear.like(ExpertLinear(4, 64, 48), (8,))
    >>> layer.reduce, layer.expand.out_features
    (ExpertLinear(experts=4, in_features=64, out_features=8), 48)
    """

    def build(self, dense: ExpertLinear, device: Any) -> None:
        (rank,) = self.ranks
        dtype = dense.weight.dtype
        self.reduce = ExpertLinear(dense.groups, dense.in_features, rank, device, dtype)
        self.expand = ExpertLinear(dense.groups, rank, dense.out_features, device, dtype)

    def empty_dense(self) -> nn.Module:
        return ExpertLinear(cast(int, self.groups), cast(int, self.in_features), cast(int, self.out_features))

    def forward(self, input: Tensor, experts: Any = None, implementation: str | None = None) -> Tensor:
        for factor in (self.reduce, self.expand):
            input = factor(input, experts, implementation)
        return input


class UnpackedExperts(Unpacked):
    """Fused experts of transformers (Mixtral, Qwen2-MoE, ...) with ``gate_up_proj`` and ``down_proj`` as layers.

    y = sum_k w_k W_down,e(k) (act(g) * u) with (g, u) = W_gate_up,e(k) x over the experts e(k) of a token. The
    packed module holds both weights as parameters (E, T, S). The products are made by the implementation that the
    configuration of the model names (``model.set_experts_implementation``), and gated by ``_apply_gate`` of the
    packed type.

    Args: see :class:`Unpacked`.
    """

    roles = ("gate_up_proj", "down_proj")
    part = ExpertLinear
    gate_up_proj: nn.Module
    down_proj: nn.Module

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Experts under the contract of ``use_experts_implementation`` in transformers, with fused gates."""
        weights = [getattr(module, role, None) for role in cls.roles]
        flags = ("num_experts", "has_gate", "has_bias", "is_transposed")
        is_fused = all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights)
        return is_fused and hasattr(type(module), "_apply_gate") and all(hasattr(module, flag) for flag in flags)

    @classmethod
    def weights_of(cls, packed: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
        return {role: (cast(Tensor, getattr(packed, role)), None) for role in cls.roles}

    def unpack(self, packed: Any, parts: Mapping[str, nn.Module], *, share: bool) -> None:
        for role, (weight, _) in self.weights_of(packed).items():
            if role in parts:
                self.add_module(role, parts[role])
                continue
            experts, outputs, inputs = weight.shape
            layer = ExpertLinear(experts, inputs, outputs, "meta", weight.dtype)
            layer.weight = parameter_like(weight.flatten(0, 1), share=share)
            self.add_module(role, layer.train(packed.training))
        if hasattr(packed, "act_fn"):  # of _apply_gate, which may have an activation of its own
            self.act_fn = packed.act_fn if share else copy.deepcopy(packed.act_fn)
        self.training = packed.training

    @torch.no_grad()
    def packed(self, parts: Mapping[str, nn.Module] | None = None) -> nn.Module:
        """Build the packed module; see :meth:`Unpacked.packed`."""
        experts = self.dense_type.__new__(self.dense_type)
        nn.Module.__init__(experts)  # its own __init__ would need the configuration, and make weights
        take_plain_attributes(experts, self)
        del experts.dense_type
        for role, layer in self.layers(parts).items():
            weight = layer.weight.unflatten(0, (layer.groups, layer.out_features))
            experts.register_parameter(role, parameter_like(weight, share=False))
        if hasattr(self, "act_fn"):
            experts.act_fn = copy.deepcopy(self.act_fn)
        experts.training = self.training
        return experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Route each token (N, H) to its k experts (N, k) and sum their outputs with these weights (N, k)."""
        implementation = getattr(getattr(self, "config", None), "_experts_implementation", None)
        tokens, most = top_k_index.shape
        experts = top_k_index.reshape(-1)
        rows = self.gate_up_proj(hidden_states.repeat_interleave(most, 0), experts, implementation)
        gated = cast(Any, self.dense_type)._apply_gate(self, rows)
        outputs = self.down_proj(gated, experts, implementation) * top_k_weights.reshape(-1, 1)
        summed: Tensor = outputs.unflatten(0, (tokens, most)).sum(1)
        return summed.to(hidden_states.dtype)

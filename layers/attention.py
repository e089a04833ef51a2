"""Multi-head attention whose four projections are layers, in place of torch's packed weights."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from decomp.layers.unpacked import Unpacked, parameter_like, take_plain_attributes


class UnpackedAttention(Unpacked):
    """``nn.MultiheadAttention`` whose projections are the layers ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``.

    torch packs the weights of the first three into one, and reads that of the last without calling the layer: none
    of them could be replaced. Here each is called, and is an ``nn.Linear`` or a factorized layer. Signature, masks
    and attributes are those of ``nn.MultiheadAttention``. ``in_proj_weight`` and ``in_proj_bias`` are read-only,
    concatenated at each access.

    Args: see :class:`Unpacked`.

    >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
    >>> unpacked, x = UnpackedAttention(attention), torch.randn(1, 5, 8)
    >>> torch.allclose(unpacked(x, x, x)[0], attention(x, x, x)[0], atol=1e-6)
    True
    >>> type(unpacked.packed()).__name__
    'MultiheadAttention'
    """

    roles = ("q_proj", "k_proj", "v_proj", "out_proj")
    part = nn.Linear
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    embed_dim: int
    num_heads: int
    head_dim: int
    kdim: int
    vdim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    bias_k: Tensor | None
    bias_v: Tensor | None
    _qkv_same_embed_dim: bool

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @classmethod
    def weights_of(cls, packed: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
        attention: Any = packed
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        pairs = (*zip(weights, biases, strict=True), (attention.out_proj.weight, attention.out_proj.bias))
        return dict(zip(cls.roles, pairs, strict=True))

    def unpack(self, packed: Any, parts: Mapping[str, nn.Module], *, share: bool) -> None:
        for role, (weight, bias) in self.weights_of(packed).items():
            self.add_module(role, parts[role] if role in parts else _linear(weight, bias, share=share))
        for name in ("bias_k", "bias_v"):
            given = getattr(packed, name)
            if given is not None:
                self.register_parameter(name, parameter_like(given, share=share))
        self.train(packed.training)
        self.out_proj.training = packed.out_proj.training

    @torch.no_grad()
    def packed(self, parts: Mapping[str, nn.Module] | None = None) -> nn.MultiheadAttention:
        """Build the ``nn.MultiheadAttention``; see :meth:`Unpacked.packed`."""
        layers = self.layers(parts)
        weights, biases = [each.weight for each in layers.values()], [each.bias for each in layers.values()]
        options = ("dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
        with torch.device("meta"):
            attention: Any = nn.MultiheadAttention(
                self.embed_dim,
                self.num_heads,
                bias=biases[0] is not None,
                add_bias_kv=self.bias_k is not None,
                **{name: getattr(self, name) for name in options},
            )
        take_plain_attributes(attention, self)
        del attention.dense_type
        if self._qkv_same_embed_dim:
            attention.in_proj_weight = _joined(weights[:3])
        else:
            for role, weight in zip(self.roles[:3], weights[:3], strict=True):
                setattr(attention, f"{role}_weight", _joined([weight]))
        if biases[0] is not None:
            attention.in_proj_bias = _joined(biases[:3])
        attention.out_proj.weight = _joined(weights[3:])
        attention.out_proj.bias = None if biases[3] is None else _joined(biases[3:])
        if self.bias_k is not None and self.bias_v is not None:
            attention.bias_k, attention.bias_v = _joined([self.bias_k]), _joined([self.bias_v])
        attention.train(self.training)
        attention.out_proj.training = layers["out_proj"].training
        return cast(nn.MultiheadAttention, attention)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The packed weight (3 E, E), or None where keys or values have another size, as torch has it."""
        if not self._qkv_same_embed_dim:
            return None
        return torch.cat([cast(Tensor, layer.weight) for layer in (self.q_proj, self.k_proj, self.v_proj)])

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The packed bias (3 E), or None."""
        biases = [layer.bias for layer in (self.q_proj, self.k_proj, self.v_proj)]
        return None if biases[0] is None else torch.cat(cast(list[Tensor], biases))

    @property
    def q_proj_weight(self) -> Tensor | None:
        """The weight of the query projection where torch does not pack it, else None."""
        return None if self._qkv_same_embed_dim else cast(Tensor, self.q_proj.weight)

    @property
    def k_proj_weight(self) -> Tensor | None:
        """The weight of the key projection where torch does not pack it, else None."""
        return None if self._qkv_same_embed_dim else cast(Tensor, self.k_proj.weight)

    @property
    def v_proj_weight(self) -> Tensor | None:
        """The weight of the value projection where torch does not pack it, else None."""
        return None if self._qkv_same_embed_dim else cast(Tensor, self.v_proj.weight)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as ``nn.MultiheadAttention`` does, without its fused path; see there for shapes and masks."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise TypeError("UnpackedAttention takes padded tensors: give a key_padding_mask, not nested tensors")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint on attn_mask: give the causal mask as attn_mask as well")
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None  # scaled_dot_product_attention makes it
        else:
            is_causal = False
        batched, batch_first = query.dim() == 3, self.batch_first or query.dim() == 2
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        heads = [
            self._heads(layer(given), batch_first=batch_first)
            for layer, given in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        ]
        queries = heads[0]
        keys, values = self._extended(heads[1], self.bias_k), self._extended(heads[2], self.bias_v)
        mask = self._mask(attn_mask, key_padding_mask, queries, keys)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = queries * self.head_dim**-0.5 @ keys.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, dropout) if dropout else weights
            attended = weights @ values
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = functional.scaled_dot_product_attention(queries, keys, values, mask, dropout, is_causal)
        joined = attended.transpose(1, 2) if batch_first else attended.permute(2, 0, 1, 3)
        output: Tensor = self.out_proj(joined.flatten(-2))
        if batched:
            return output, weights
        return output[0], None if weights is None else weights[0]

    def _heads(self, projected: Tensor, *, batch_first: bool) -> Tensor:
        """Split (N, L, E), or (L, N, E), into heads (N, H, L, D)."""
        heads: Tensor = projected.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2) if batch_first else heads.permute(1, 2, 0, 3)

    def _extended(self, heads: Tensor, bias: Tensor | None) -> Tensor:
        """Add the position of ``add_bias_kv`` to keys or values, and that of ``add_zero_attn``."""
        more = [heads]
        if bias is not None:
            more.append(bias.view(1, self.num_heads, 1, self.head_dim).expand(len(heads), -1, -1, -1))
        if self.add_zero_attn:
            more.append(heads.new_zeros(len(heads), self.num_heads, 1, self.head_dim))
        return torch.cat(more, 2) if len(more) > 1 else heads

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, queries: Tensor, keys: Tensor
    ) -> Tensor | None:
        """Both masks as one to add to the scores (N, H, L, S); what was added to the keys is never masked.

        Raises:
            RuntimeError: a mask has a shape that does not fit.
            TypeError: a mask is neither boolean nor floating.
        """
        extra = (self.bias_k is not None) + self.add_zero_attn
        batch, length, sources = len(queries), queries.shape[2], keys.shape[2] - extra
        masks = []
        if attn_mask is not None:
            shapes = ((length, sources), (batch * self.num_heads, length, sources))
            added = _additive(attn_mask, "attn_mask", shapes, queries.dtype)
            masks.append(added.unflatten(0, (batch, self.num_heads)) if added.dim() == 3 else added[None, None])
        if key_padding_mask is not None:
            added = _additive(key_padding_mask, "key_padding_mask", ((batch, sources),), queries.dtype)
            masks.append(added[:, None, None])
        if not masks:
            return None
        return functional.pad(sum(masks[1:], masks[0]), (0, extra))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _linear(weight: Tensor, bias: Tensor | None, *, share: bool) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = parameter_like(weight, share=share)
    if bias is not None:
        layer.bias = parameter_like(bias, share=share)
    return layer


def _joined(tensors: list[Tensor]) -> nn.Parameter:
    """One parameter of several, trained if any of them is."""
    return nn.Parameter(torch.cat(tensors), requires_grad=any(tensor.requires_grad for tensor in tensors))


def _additive(mask: Tensor, name: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Tensor:
    if mask.shape not in shapes:
        raise RuntimeError(f"{name} has shape {tuple(mask.shape)}, it must be {' or '.join(map(str, shapes))}")
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise TypeError(f"{name} is {mask.dtype}: write a boolean or a floating mask")
    return mask.to(dtype)

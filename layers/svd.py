"""Two factors for a matrix: W = B A, first A (``reduce``), then B (``expand``)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from decomp.layers.factorized import Factorized
from decomp.layers.kernels import ConvNd, group_kernels, pointwise_like, spatial_like


class SVDMatrix(Factorized):
    """W = B A per group, with factors (B, A) of shapes (groups, T, r) and (groups, r, S)."""

    method = "svd"
    reduce: nn.Module
    expand: nn.Module

    @classmethod
    def factor_kernels(cls, dense: nn.Module, factors: Any) -> Mapping[str, Tensor]:
        left, right = factors
        return {"reduce": right.reshape(-1, *right.shape[-2:]), "expand": left.reshape(-1, *left.shape[-2:])}

    @classmethod
    def ranks_of(cls, kernels: Mapping[str, Tensor]) -> tuple[int, ...]:
        return (kernels["reduce"].shape[1],)

    def dense_kernels(self) -> Tensor:
        left, right = group_kernels(self.expand), group_kernels(self.reduce)
        product = left.flatten(2) @ right.flatten(2)
        return product.reshape(*product.shape, *left.shape[3:])


class SVDLinear(SVDMatrix):
    """``nn.Linear(S -> r, no bias)`` then ``nn.Linear(r -> T)``: params and MACs r (S + T).

    W = B A, the truncated SVD, which is the best approximation of rank r (Eckart and Young 1936).
    It replaces ``nn.Linear`` and the ``Conv1D`` of Hugging Face, which is a linear layer too.

    Source: Denton et al. 2014, section 3.2; Girshick 2015, section 3.1.

    >>> layer = SVDLinear.like(nn.Linear(100, 50), (8,))
    >>> layer.reduce
    Linear(in_features=100, out_features=8, bias=False)
    >>> layer.expand
    Linear(in_features=8, out_features=50, bias=True)
    """

    def build(self, dense: nn.Linear, device: Any) -> None:
        (rank,) = self.ranks
        has_bias, dtype = dense.bias is not None, dense.weight.dtype
        outputs, inputs = dense.weight.mT.shape if self.input_first else dense.weight.shape
        self.reduce = nn.Linear(inputs, rank, bias=False, device=device, dtype=dtype)
        self.expand = nn.Linear(rank, outputs, bias=has_bias, device=device, dtype=dtype)


class SVDEmbedding(SVDMatrix):
    """``nn.Embedding(n, r)`` then ``nn.Linear(r -> dim, no bias)``: params r (n + dim), MACs r dim per entry.

    The dense embedding is the matrix W (dim x n) that multiplies one-hot vectors.

    >>> layer = SVDEmbedding.like(nn.Embedding(1000, 64), (8,))
    >>> layer.reduce, layer.expand
    (Embedding(1000, 8), Linear(in_features=8, out_features=64, bias=False))
    """

    def build(self, dense: nn.Embedding, device: Any) -> None:
        (rank,) = self.ranks
        dtype = dense.weight.dtype
        self.reduce = nn.Embedding(
            dense.num_embeddings,
            rank,
            padding_idx=dense.padding_idx,
            scale_grad_by_freq=dense.scale_grad_by_freq,
            sparse=dense.sparse,
            device=device,
            dtype=dtype,
        )
        self.expand = nn.Linear(rank, dense.embedding_dim, bias=False, device=device, dtype=dtype)

    def empty_dense(self) -> nn.Module:
        names = ("padding_idx", "scale_grad_by_freq", "sparse")
        options = {name: getattr(self, name) for name in names}
        return self.dense_type(self.num_embeddings, self.embedding_dim, **options)


class SVDConv(SVDMatrix):
    """A 1x1 convolution as two, of r channels per group in between: params r (S + T) per group.

    Stride and padding are on the factor where they make the other one cheap: the first of a convolution (the
    second then has fewer positions), the last of a transposed one, whose stride adds positions.

    >>> layer = SVDConv.like(nn.Conv2d(64, 128, 1, stride=2), (16,))
    >>> layer.reduce.stride, layer.expand.stride
    ((2, 2), (1, 1))
    """

    def build(self, dense: ConvNd, device: Any) -> None:
        middle = self.ranks[0] * dense.groups
        first, last = (pointwise_like, spatial_like) if dense.transposed else (spatial_like, pointwise_like)
        self.reduce = first(dense, dense.in_channels, middle, bias=False, device=device)
        self.expand = last(dense, middle, dense.out_channels, bias=dense.bias is not None, device=device)

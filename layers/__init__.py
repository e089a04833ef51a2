"""Factorized layers: chains of ordinary torch layers that replace one dense layer."""

if __name__ != "decomp.layers":
    raise ImportError(
        f"this folder is the package decomp.layers, but it was imported as {__name__!r}: "
        "write 'import decomp.layers' instead"
    )

from decomp.layers.attention import UnpackedAttention
from decomp.layers.block_term import BlockTermConv
from decomp.layers.cp import CP4Conv, CPConv
from decomp.layers.experts import ExpertLinear, SVDExpertLinear, UnpackedExperts, routes_rows
from decomp.layers.factorized import Factorized
from decomp.layers.filters import (
    DepthwisePointwiseConv,
    FlattenedConv,
    PointwiseDepthwiseConv,
    SeparableConv,
    SharedBankConv,
)
from decomp.layers.folded import ChannelSVDConv, InputSVDConv
from decomp.layers.kernels import group_kernels, join_kernels
from decomp.layers.kronecker import KroneckerLinear
from decomp.layers.monochromatic import MonochromaticConv
from decomp.layers.recurrent import SVDRNN, InputSVDRNN
from decomp.layers.svd import SVDConv, SVDEmbedding, SVDLinear
from decomp.layers.trains import AsymmetricConv, SpatialSVDConv, TensorTrainConv
from decomp.layers.tucker import TuckerConv
from decomp.layers.unpacked import Unpacked

__all__ = [
    "SVDRNN",
    "AsymmetricConv",
    "BlockTermConv",
    "CP4Conv",
    "CPConv",
    "ChannelSVDConv",
    "DepthwisePointwiseConv",
    "ExpertLinear",
    "Factorized",
    "FlattenedConv",
    "InputSVDConv",
    "InputSVDRNN",
    "KroneckerLinear",
    "MonochromaticConv",
    "PointwiseDepthwiseConv",
    "SVDConv",
    "SVDEmbedding",
    "SVDExpertLinear",
    "SVDLinear",
    "SeparableConv",
    "SharedBankConv",
    "SpatialSVDConv",
    "TensorTrainConv",
    "TuckerConv",
    "Unpacked",
    "UnpackedAttention",
    "UnpackedExperts",
    "group_kernels",
    "join_kernels",
    "routes_rows",
]

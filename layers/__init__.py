"""Factorized layers: chains of ordinary torch layers that stand for one dense layer."""

if __name__ != "decomp.layers":
    raise ImportError(
        f"this folder is the package decomp.layers, but it was imported as {__name__!r}: "
        "write 'import decomp.layers' instead"
    )

from decomp.layers.factorized import Factorized
from decomp.layers.kernels import group_kernels, join_kernels
from decomp.layers.svd import SVDConv, SVDLinear
from decomp.layers.tucker import TuckerConv

__all__ = ["Factorized", "SVDConv", "SVDLinear", "TuckerConv", "group_kernels", "join_kernels"]

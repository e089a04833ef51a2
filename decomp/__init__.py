"""Low-rank and tensor decomposition that makes trained PyTorch models smaller and faster."""

from decomp import layers, ranks
from decomp.api import plan, tucker
from decomp.plans import Plan

__all__ = ["Plan", "layers", "plan", "ranks", "tucker"]

"""Low-rank and tensor decomposition that makes trained PyTorch models smaller and faster."""

from decomp import layers, ranks
from decomp.api import compress, densify, plan, tucker
from decomp.finetuning import finetune_layerwise
from decomp.plans import Plan
from decomp.reports import compare, profile
from decomp.sensitivities import sensitivity

__all__ = [
    "Plan",
    "compare",
    "compress",
    "densify",
    "finetune_layerwise",
    "layers",
    "plan",
    "profile",
    "ranks",
    "sensitivity",
    "tucker",
]

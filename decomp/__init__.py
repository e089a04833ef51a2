"""Low-rank and tensor decomposition that makes trained PyTorch models smaller and faster."""

from decomp import layers, plots, ranks
from decomp.api import compress, densify, plan
from decomp.curves import tradeoff
from decomp.decompositions import block_term, cp, flattened, separable, svd, tucker
from decomp.explorer import explore
from decomp.finetuning import finetune_layerwise
from decomp.plans import Plan
from decomp.reports import compare, profile
from decomp.sensitivities import sensitivity

__all__ = [
    "Plan",
    "block_term",
    "compare",
    "compress",
    "cp",
    "densify",
    "explore",
    "finetune_layerwise",
    "flattened",
    "layers",
    "plan",
    "plots",
    "profile",
    "ranks",
    "sensitivity",
    "separable",
    "svd",
    "tradeoff",
    "tucker",
]

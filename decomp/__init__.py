"""Low-rank and tensor decomposition that makes trained PyTorch models smaller and faster."""

from decomp import layers, losses, plots, ranks
from decomp.api import compress, densify, plan
from decomp.calibration import Statistics, calibrate
from decomp.curves import tradeoff
from decomp.decompositions import block_term, cp, flattened, separable, svd, tucker
from decomp.distilling import finetune
from decomp.explorer import explore
from decomp.finetuning import finetune_layerwise
from decomp.folding import fold_batch_norm
from decomp.plans import Plan
from decomp.repairing import repair
from decomp.reports import compare, profile
from decomp.sensitivities import sensitivity

__all__ = [
    "Plan",
    "Statistics",
    "block_term",
    "calibrate",
    "compare",
    "compress",
    "cp",
    "densify",
    "explore",
    "finetune",
    "finetune_layerwise",
    "flattened",
    "fold_batch_norm",
    "layers",
    "losses",
    "plan",
    "plots",
    "profile",
    "ranks",
    "repair",
    "sensitivity",
    "separable",
    "svd",
    "tradeoff",
    "tucker",
]

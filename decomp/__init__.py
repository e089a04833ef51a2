"""Low-rank and tensor decomposition that makes trained PyTorch models smaller and faster."""

from decomp import adapters, layers, losses, plots, ranks, runtimes
from decomp._util.version import installed_version
from decomp.analysis.compare import compare
from decomp.analysis.html_report import report
from decomp.analysis.profile import profile
from decomp.analysis.tradeoff import tradeoff
from decomp.api import block_term, compress, cp, densify, flattened, plan, separable, svd, tucker
from decomp.calibration.calibrate import Statistics, calibrate
from decomp.calibration.sensitivity import sensitivity
from decomp.explorer.launch import explore
from decomp.files.load import load
from decomp.files.pickled import safe_globals
from decomp.files.save import save
from decomp.hosts import tell_transformers
from decomp.network.batch_norm_folding import fold_batch_norm
from decomp.planning.budget import OutOfReach, seconds
from decomp.planning.build import NothingToDecompose
from decomp.planning.plan import Plan, after_swaps
from decomp.recovery.repair import repair
from decomp.runtimes.export import export
from decomp.runtimes.inference import for_inference
from decomp.training.end_to_end import finetune
from decomp.training.layerwise import finetune_layerwise

__version__ = installed_version()
after_swaps(tell_transformers)

__all__ = [
    "NothingToDecompose",
    "OutOfReach",
    "Plan",
    "Statistics",
    "__version__",
    "adapters",
    "block_term",
    "calibrate",
    "compare",
    "compress",
    "cp",
    "densify",
    "explore",
    "export",
    "finetune",
    "finetune_layerwise",
    "flattened",
    "fold_batch_norm",
    "for_inference",
    "layers",
    "load",
    "losses",
    "plan",
    "plots",
    "profile",
    "ranks",
    "repair",
    "report",
    "runtimes",
    "safe_globals",
    "save",
    "seconds",
    "sensitivity",
    "separable",
    "svd",
    "tradeoff",
    "tucker",
]

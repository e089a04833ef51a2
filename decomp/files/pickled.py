"""The classes that a pickled plan or compressed model names, for ``torch.load`` with ``weights_only=True``."""

from torch import nn

from decomp import layers
from decomp.planning.budget import Budget, Request
from decomp.planning.choice import Change, Choice
from decomp.planning.cost import Cost
from decomp.planning.plan import Plan

FACTORS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.Embedding, nn.ModuleList),
)


def safe_globals() -> list[type]:
    """Return the classes of plans and factorized layers, for ``torch.serialization.safe_globals``.

    With them ``torch.load`` reads, with ``weights_only=True``, a checkpoint that holds a plan. Whole models hold
    classes of their own as well: ``torch.serialization.get_unsafe_globals_in_checkpoint(path)`` lists them.

    >>> import tempfile, torch
    >>> from decomp import plan
    >>> path = f"{tempfile.mkdtemp()}/plan.pt"
    >>> torch.save(plan(nn.Sequential(nn.Linear(64, 64)), ranks=8), path)
    >>> with torch.serialization.safe_globals(safe_globals()):
    ...     torch.load(path, weights_only=True)
    <Plan: 1 of 1 layers replaced>
    """
    own = [each for each in vars(layers).values() if isinstance(each, type)]
    return [Plan, Choice, Change, Cost, Request, Budget, *own, *FACTORS]

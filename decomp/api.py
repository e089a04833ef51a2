"""The calls that users make."""

from typing import Any

from torch import nn

from decomp.methods import Method
from decomp.planning import make_plan
from decomp.plans import Plan
from decomp.selection import Selector


def tucker(
    model: nn.Module,
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    inplace: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Return the model with smaller layers: Tucker-2 on spatial convolutions, SVD on linear and 1x1 ones.

    K[t, s, i, j] ~= sum_{a, b} U[t, a] C[a, b, i, j] V[s, b] becomes 1x1, k x k and 1x1 convolutions; W ~= B A
    becomes two linear layers or 1x1 convolutions. A layer is replaced only where its parameters and its MACs
    both fall. The result carries its plan as ``decomp_plan``: ``print(small.decomp_plan)``.

    Args:
        model: any ``nn.Module``. It is left as it is, unless ``inplace``.
        ranks: a rule's name ("vbmf"), a rule (``decomp.ranks.energy(0.9)``), an int, a tuple (out, in), a mapping
            from globs of layer names to any of these (the last match wins), or a :class:`Plan`.
        layers: which layers: a glob on names, an exact type, a predicate (name, module) -> bool, or several.
        exclude: which of these stay dense, written likewise.
        example_inputs: a batch as the model is called with, to count MACs at its sizes. Without it MACs are
            compared in the limit of large inputs.
        inplace: change ``model`` itself. Every factor is computed before the first swap.
        progress: show progress bars; by default where there is a terminal.

    Raises:
        ValueError: no layer would be replaced (the message says why), a weight is not finite, or ranks do not fit.
        TypeError: the model is compiled, scripted or wrapped, or an argument has the wrong type.

    Source: Kim et al. 2016 (Compression of deep convolutional neural networks for fast and low power mobile
    applications), sections 3.1 and 3.2. An optimizer made before the call knows none of the new parameters:
    make it afterwards.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> small = tucker(nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU()), ranks=(16, 8))
    >>> small[0]
    TuckerConv(
      ranks=(16, 8)
      (reduce): Conv2d(32, 8, kernel_size=(1, 1), stride=(1, 1), bias=False)
      (core): Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), bias=False)
      (expand): Conv2d(16, 64, kernel_size=(1, 1), stride=(1, 1))
    )
    """
    if isinstance(ranks, Plan):
        if layers is not None or exclude != () or example_inputs is not None:
            raise ValueError(
                "a Plan says itself which layers it is about: leave layers=, exclude= and example_inputs= out"
            )
        decided = ranks
    else:
        decided = make_plan(model, "tucker", ranks, layers, exclude, example_inputs, progress)
    return decided.apply(model, inplace=inplace, progress=progress)


def plan(
    model: nn.Module,
    method: str | Method = "tucker",
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    progress: bool | None = None,
) -> Plan:
    """Decide method and ranks of every layer without changing anything; the arguments are those of :func:`tucker`.

    The weight of each layer is factorized once, here: changing a rank afterwards is instant.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> decided = plan(nn.Sequential(nn.Conv2d(32, 64, 3), nn.Linear(64, 10)), ranks=8)
    >>> decided["0"].ranks, decided["0"].params
    ((8, 8), Change(before=18496, after=1408))
    >>> decided.with_ranks("0", (16, 8))["0"].ranks
    (16, 8)
    >>> decided.keep_dense("0")["0"].reason
    'kept dense on request'
    """
    return make_plan(model, method, ranks, layers, exclude, example_inputs, progress)

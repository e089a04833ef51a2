"""The calls that users make."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from decomp import surgery
from decomp.budgets import Budget, Wish
from decomp.layers import Factorized
from decomp.methods import Method
from decomp.planning import make_budget_plan, make_plan
from decomp.plans import Plan, drop_plan
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
    macs: float | None = None,
    params: float | None = None,
    seconds: float | None = None,
    methods: str | Sequence[str | Method] = "auto",
    objective: str = "product",
    multiple_of: int = 1,
    weights: Mapping[str, float] | None = None,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    progress: bool | None = None,
) -> Plan:
    """Decide method and ranks of every layer without changing anything.

    With ``method`` and ``ranks`` each layer is decided by itself, and the arguments are those of :func:`tucker`;
    with a budget (``macs``, ``params`` or ``seconds``) all together, as by :func:`compress`.
    The weight of each layer is factorized once, here: changing a rank or the budget afterwards is instant.

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
    budget = Budget.of(macs=macs, params=params, seconds=seconds)
    wish = Wish(objective, multiple_of, weights)
    if budget is None:
        if (methods, wish) != ("auto", Wish()):
            raise ValueError(
                "methods=, objective=, multiple_of=, weights= go with a budget: macs=, params=, seconds="
            )
        return make_plan(model, method, ranks, layers, exclude, example_inputs, progress)
    if (method, ranks) != ("tucker", "vbmf"):
        raise ValueError("a budget chooses methods and ranks itself: leave method and ranks out, write methods=")
    return make_budget_plan(model, budget, methods, wish, layers, exclude, example_inputs, progress)


def compress(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    seconds: float | None = None,
    methods: str | Sequence[str | Method] = "auto",
    objective: str = "product",
    multiple_of: int = 1,
    weights: Mapping[str, float] | None = None,
    layers: Selector = None,
    exclude: Selector = (),
    inplace: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Return the model within a budget, the method and the ranks of all layers chosen together.

    Maximizes the product over the layers of the energy that each keeps, (1 - error^2)^weight, or another
    ``objective``, subject to the sum of costs; a layer may stay dense. Costs are those of the layers that would
    be built, and the budget is never exceeded.

    Args:
        model: any ``nn.Module``; left as it is, unless ``inplace``.
        example_inputs: a batch as the model is called with; a budget of parameters does without.
        macs: multiply-adds of one pass on ``example_inputs``: a float in (0, 1) is a share, an int is absolute.
        params: parameters of the model, likewise.
        seconds: seconds of one pass on ``example_inputs``, predicted from layers measured on this machine.
        methods: names of methods, or "auto" for all of them.
        objective: "product" of the shares of energy kept (Zhang et al. 2016, section 3.2.3); "sum" of squared
            relative errors; "max", the largest relative error of a layer (Liebenwein et al. 2021).
        multiple_of: ranks are multiples of it, or full; 8 suits GPUs.
        weights: how much the error of a layer counts, by name; 1 where it says nothing. See
            :func:`decomp.sensitivity`.
        layers: which layers; see :func:`tucker`.
        exclude: which of these stay dense.
        inplace: change ``model`` itself.
        progress: show progress bars; by default where there is a terminal.

    Raises:
        ValueError: the budget cannot be reached; the message names the least that can.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> small = compress(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), params=0.5)
    >>> small.decomp_plan.params.after <= 0.5 * small.decomp_plan.params.before
    True
    """
    if (macs, params, seconds) == (None, None, None):
        raise ValueError("compress needs a budget: macs=, params= or seconds=, e.g. macs=0.5")
    decided = plan(
        model,
        macs=macs,
        params=params,
        seconds=seconds,
        methods=methods,
        objective=objective,
        multiple_of=multiple_of,
        weights=weights,
        layers=layers,
        exclude=exclude,
        example_inputs=example_inputs,
        progress=progress,
    )
    return decided.apply(model, inplace=inplace, progress=progress)


def densify(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Return the model with every factorized layer multiplied back into the ordinary layer it stands for.

    This is the way to compress in stages (MUSCO, Gusak et al. 2019): compress, fine-tune, and choose lower ranks
    for the fine-tuned weights: ``compress(densify(small), example_inputs, macs=0.25)``.

    Raises:
        ValueError: the model has no factorized layer.

    >>> import torch
    >>> small = tucker(nn.Sequential(nn.Linear(64, 64)), ranks=8)
    >>> densify(small)[0]
    Linear(in_features=64, out_features=64, bias=True)
    """
    surgery.check_model(model)
    dense = {name: module.to_dense() for name, module in model.named_modules() if isinstance(module, Factorized)}
    if not dense:
        raise ValueError("the model has no factorized layer: there is nothing to multiply back")
    return drop_plan(surgery.swap(model, dense, inplace=inplace))

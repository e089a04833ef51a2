"""The calls that decide: plans, budgets; and the way back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from decomp.applying import apply_plan
from decomp.layers import Factorized
from decomp.methods import Method
from decomp.network import surgery
from decomp.network.selection import Selector
from decomp.planning.budget import Budget, Wish
from decomp.planning.plan import PLAN, Plan
from decomp.planning.planner import Scope, make_budget_plan, make_plan


def plan(
    model: nn.Module,
    method: str | Method = "tucker",
    ranks: Any = "vbmf",
    *,
    macs: float | None = None,
    params: float | None = None,
    seconds: float | None = None,
    methods: str | Sequence[str | Method] = "auto",
    objective: str = "auto",
    multiple_of: int = 1,
    weights: Mapping[str, float] | None = None,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Plan:
    """Decide method and ranks of every layer without changing anything.

    With ``method`` (a row of the table of methods, or a family) and ``ranks`` each layer is decided by itself; the
    arguments are those of :func:`decomp.tucker`, ``options`` those of the method (``fold=``, ``modes=``,
    ``blocks=``, ``scheme=``, ``solver=``). With a budget (``macs``, ``params`` or ``seconds``) all layers are
    decided together, as by :func:`compress`. The weight of each layer is factorized once, here: changing a rank
    or the budget afterwards is instant.

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
    scope = Scope(layers, exclude, example_inputs, data, inputs, progress)
    if budget is None:
        if (methods, wish) != ("auto", Wish()):
            raise ValueError(
                "methods=, objective=, multiple_of=, weights= go with a budget: macs=, params=, seconds="
            )
        return make_plan(model, method, options, ranks, scope)
    if (method, ranks, options) != ("tucker", "vbmf", {}):
        raise ValueError(
            "a budget chooses methods and ranks itself: leave method, ranks and options out, write methods="
        )
    return make_budget_plan(model, budget, methods, wish, scope)


def compress(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    seconds: float | None = None,
    methods: str | Sequence[str | Method] = "auto",
    objective: str = "auto",
    multiple_of: int = 1,
    weights: Mapping[str, float] | None = None,
    layers: Selector = None,
    exclude: Selector = (),
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    finetune: bool | Mapping[str, Any] = False,
    asymmetric: bool = False,
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
        methods: rows of the table of methods; "auto" are svd and tucker, which know their error at all ranks at
            once.
        objective: "product" of the shares of energy kept (Zhang et al. 2016, section 3.2.3); "sum" of squared
            relative errors; "max", the largest relative error of a layer (Liebenwein et al. 2021); "network", the
            sum of what the errors do to the network, known where ``data`` comes from ``calibrate(..., loss=)``.
            "auto" is "network" where that is known, else "product".
        multiple_of: ranks are multiples of it, or full; 8 suits GPUs.
        weights: how much the error of a layer counts, by name; 1 where it says nothing. See
            :func:`decomp.sensitivity`.
        layers: which layers; see :func:`tucker`.
        exclude: which of these stay dense.
        data: batches, or what :func:`decomp.calibrate` made of them; see :func:`decomp.tucker`.
        inputs: what the model is called with, from a batch of ``data``.
        finetune: fine-tune layer by layer afterwards; see :func:`decomp.tucker`.
        asymmetric: decompose each layer for what reaches it in the compressed network; see :func:`decomp.tucker`.
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
        data=data,
        inputs=inputs,
        progress=progress,
    )
    scope = Scope(data=data, inputs=inputs, progress=progress)
    return apply_plan(model, decided, scope, finetune=finetune, inplace=inplace, asymmetric=asymmetric)


def densify(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Return the model with every factorized layer multiplied back into the ordinary layer it stands for.

    This is the way to compress in stages (MUSCO, Gusak et al. 2019): compress, fine-tune, and choose lower ranks
    for the fine-tuned weights: ``compress(densify(small), example_inputs, macs=0.25)``.

    Raises:
        ValueError: the model has no factorized layer.

    >>> import torch
    >>> small = plan(nn.Sequential(nn.Linear(64, 64)), ranks=8).apply(nn.Sequential(nn.Linear(64, 64)))
    >>> densify(small)[0]
    Linear(in_features=64, out_features=64, bias=True)
    """
    surgery.check_model(model)
    dense = {name: module.to_dense() for name, module in model.named_modules() if isinstance(module, Factorized)}
    if not dense:
        raise ValueError("the model has no factorized layer: there is nothing to multiply back")
    model = surgery.swap(model, dense, inplace=inplace)
    vars(model).pop(PLAN, None)  # it is no longer true of the model
    return model

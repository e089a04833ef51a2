"""The calls that decide: plans, budgets; and the way back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from decomp.calibration.calibrate import Statistics
from decomp.layers import Factorized
from decomp.methods import Method, default_options
from decomp.network import surgery
from decomp.network.selection import Selector
from decomp.planning.budget import Budget, Wish
from decomp.planning.plan import PLAN, Plan
from decomp.planning.planner import Scope, make_budget_plan, make_plan
from decomp.recovery.sequential import apply_asymmetric
from decomp.training.layerwise import FinetuneReport, LayerReport, finetune_layerwise

REPORT = "decomp_finetuning"  # the attribute of a model that carries the report of its fine-tuning


def apply_plan(
    model: nn.Module,
    decided: Plan,
    scope: Scope,
    *,
    finetune: bool | Mapping[str, Any],
    inplace: bool,
    asymmetric: bool = False,
) -> nn.Module:
    """Swap the factorized layers in; with ``finetune`` train them layer by layer against ``model``.

    Raises:
        ValueError: there are no batches to learn from, or no dense model left to do so.
    """
    wanted = {"finetune": finetune is not False, "asymmetric": asymmetric}
    for option in (name for name, given in wanted.items() if given):
        if scope.data is None or isinstance(scope.data, Statistics):
            raise ValueError(
                f"{option}= needs batches: give data=, an iterable of what the model is called with (and what "
                "calibrate made of them to decomp.plan, whose plan goes in as ranks=)"
            )
        if inplace:
            raise ValueError(
                f"{option}= learns from the dense model, which inplace=True changes: leave one of them out"
            )
    settings = dict(finetune) if isinstance(finetune, Mapping) else {}
    given = {"inputs": scope.inputs, "progress": scope.progress} | settings
    if asymmetric:
        return _layer_after_layer(model, decided, scope, given if wanted["finetune"] else None)
    small = decided.apply(model, inplace=inplace, progress=scope.progress)
    if wanted["finetune"]:
        setattr(small, REPORT, finetune_layerwise(small, model, scope.data, **given))
    return small


def _layer_after_layer(
    model: nn.Module, decided: Plan, scope: Scope, settings: Mapping[str, Any] | None
) -> nn.Module:
    """Decompose each layer for what reaches it by then; with settings fine-tune it before the next one."""
    reports: dict[str, LayerReport] = {}
    for refused in {"blocks", "checkpoint", "layers"} & set(settings or ()):
        raise ValueError(
            f"finetune={{{refused!r}: ...}} does not go with asymmetric=True, which trains every layer as soon as "
            "it is decomposed: call decomp.finetune_layerwise afterwards"
        )

    def teach(small: nn.Module, name: str) -> None:
        reports.update(finetune_layerwise(small, model, scope.data, layers=name, **settings or {}))

    small = apply_asymmetric(
        model,
        decided,
        scope.data,
        inputs=scope.inputs,
        teach=None if settings is None else teach,
        progress=scope.progress,
    )
    if settings is not None:
        setattr(small, REPORT, FinetuneReport(reports))
    return small


def decompose(
    model: nn.Module,
    method: str,
    options: Mapping[str, Any],
    ranks: Any,
    scope: Scope,
    finetune: bool | Mapping[str, Any],
    inplace: bool,
    asymmetric: bool,
) -> nn.Module:
    """Plan by a method and its options, unless ``ranks`` is a plan already, and apply."""
    if isinstance(ranks, Plan):
        if replace(scope, progress=None, data=None, inputs=None) != Scope():
            raise ValueError(
                "a Plan says itself which layers it is about: leave layers=, exclude= and example_inputs= out"
            )
        if scope.data is not None and finetune is False and not asymmetric:
            raise ValueError("a Plan says itself what it was made from: give data= to decomp.plan")
        defaults = default_options(method)
        changed = {name: value for name, value in options.items() if value != defaults[name]}
        if changed:
            raise ValueError(f"a Plan says itself which methods it uses: leave {next(iter(changed))}= out")
        decided = ranks
    else:
        decided = make_plan(model, method, options, ranks, scope)
    return apply_plan(model, decided, scope, finetune=finetune, inplace=inplace, asymmetric=asymmetric)


def tucker(
    model: nn.Module,
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    finetune: bool | Mapping[str, Any] = False,
    asymmetric: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
    solver: Any = None,
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
        data: batches as the model is called with, or what :func:`decomp.calibrate` made of them. The factors then
            minimize the error of each layer's output on them, and energy, error and budgets are about that error.
        inputs: what the model is called with, from a batch: ``lambda batch: batch[0]`` where labels come with it.
        finetune: True, or arguments of :func:`decomp.finetune_layerwise` as a mapping: train the factors layer by
            layer on ``data``; the report is the attribute ``decomp_finetuning`` of the result.
        asymmetric: decompose layer after layer, each for the inputs that it gets in the network compressed so far
            and for the outputs of the dense one (Zhang et al. 2016, section 3.3); with ``finetune`` it is trained
            before the next one is decomposed. Takes a pass over ``data`` per layer, several where it is large.
        inplace: change ``model`` itself. Every factor is computed before the first swap.
        progress: show progress bars; by default where there is a terminal.
        solver: takes the place of HOOI: ``tensorly.decomposition.partial_tucker``, or a function like it.

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
    scope = Scope(layers, exclude, example_inputs, data, inputs, progress)
    return decompose(model, "tucker", {"solver": solver}, ranks, scope, finetune, inplace, asymmetric)


def svd(
    model: nn.Module,
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    finetune: bool | Mapping[str, Any] = False,
    asymmetric: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
    fold: str = "channel",
) -> nn.Module:
    """Return the model with smaller layers: SVD of matrices, and of kernels folded to matrices.

    W ~= B A for linear layers and 1x1 convolutions; a spatial kernel is folded first. ``fold="channel"``
    (T x S k^2, Zhang et al. 2016) gives k x k and 1x1; ``"input"`` (S x T k^2) 1x1 and k x k; ``"spatial"``
    (S kh x T kw, Jaderberg et al. 2014, scheme 2) k x 1 and 1 x k. The rank is one number r. The other arguments,
    errors and what comes back are those of :func:`tucker`.

    Source: Denton et al. 2014, section 3.2; Girshick 2015, section 3.1.

    >>> small = svd(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=8, fold="spatial")
    >>> small[0].first.weight.shape, small[0].second.weight.shape
    (torch.Size([8, 32, 3, 1]), torch.Size([64, 8, 1, 3]))
    """
    scope = Scope(layers, exclude, example_inputs, data, inputs, progress)
    return decompose(model, "svd", {"fold": fold}, ranks, scope, finetune, inplace, asymmetric)


def cp(
    model: nn.Module,
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    finetune: bool | Mapping[str, Any] = False,
    asymmetric: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
    modes: int = 3,
    solver: Any = None,
) -> nn.Module:
    """Return the model with smaller layers: CP on spatial convolutions, SVD on linear and 1x1 ones.

    K[t, s, i, j] ~= sum_r A[t, r] B[s, r] C[i, j, r] becomes 1x1, depthwise k x k, 1x1 (``modes=3``); with
    ``modes=4`` C is split along the axes: 1x1, depthwise k x 1, depthwise 1 x k, 1x1. The rank is one number R.
    Fitted by alternating least squares, then corrected so that terms do not grow against each other; the plan
    notes sum_r ||term r||^2 / ||K||^2. CP has no spectrum: a spectral rule takes the largest R that costs no more
    than the Tucker-2 of that rule. ``solver`` is ``tensorly.decomposition.parafac`` or a function like it. The
    other arguments, errors and what comes back are those of :func:`tucker`.

    Source: Lebedev et al. 2015 (four modes); Phan et al. 2020 (three modes, error-preserving correction).

    >>> small = cp(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=16)
    >>> [tuple(factor.weight.shape) for factor in small[0].children()]
    [(16, 32, 1, 1), (16, 1, 3, 3), (64, 16, 1, 1)]
    """
    scope = Scope(layers, exclude, example_inputs, data, inputs, progress)
    return decompose(model, "cp", {"modes": modes, "solver": solver}, ranks, scope, finetune, inplace, asymmetric)


def block_term(
    model: nn.Module,
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    finetune: bool | Mapping[str, Any] = False,
    asymmetric: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
    blocks: int = 4,
) -> nn.Module:
    """Return the model with smaller layers: block-term on spatial convolutions, SVD on linear and 1x1 ones.

    K ~= sum_g C_g x1 U_g x2 V_g, a sum of ``blocks`` Tucker-2 terms, becomes 1x1, k x k in groups, 1x1. Ranks are
    (G, out, in), out and in per block; an int fills these two. One block is Tucker-2, blocks of rank 1 are CP. A
    spectral rule takes the largest ranks that cost no more than its Tucker-2. The other arguments, errors and
    what comes back are those of :func:`tucker`.

    Source: De Lathauwer 2008 (Decompositions of a higher-order tensor in block terms, part II).

    >>> small = block_term(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=8, blocks=2)
    >>> small[0].ranks, small[0].core.groups
    ((2, 8, 8), 2)
    """
    scope = Scope(layers, exclude, example_inputs, data, inputs, progress)
    return decompose(model, "block_term", {"blocks": blocks}, ranks, scope, finetune, inplace, asymmetric)


def separable(
    model: nn.Module,
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    finetune: bool | Mapping[str, Any] = False,
    asymmetric: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
    scheme: str = "spatial",
) -> nn.Module:
    """Return the model with smaller layers: separable filters on spatial convolutions, SVD on the others.

    ``scheme`` says which filters are shared: ``"spatial"`` k x 1 and 1 x k over all channels (Jaderberg et al.
    2014, scheme 2); ``"channelwise"`` m separable filters per input channel (their scheme 1);
    ``"depthwise_pointwise"`` and ``"pointwise_depthwise"`` m whole filters per input or output channel (Guo et
    al. 2018); ``"shared_bank"`` m separable filters for all channels (Rigamonti et al. 2013). The rank is that
    number m, or r. The other arguments, errors and what comes back are those of :func:`tucker`.

    >>> small = separable(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=2, scheme="depthwise_pointwise")
    >>> [tuple(factor.weight.shape) for factor in small[0].children()]
    [(64, 1, 3, 3), (64, 64, 1, 1)]
    """
    scope = Scope(layers, exclude, example_inputs, data, inputs, progress)
    return decompose(model, "separable", {"scheme": scheme}, ranks, scope, finetune, inplace, asymmetric)


def flattened(
    model: nn.Module,
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    finetune: bool | Mapping[str, Any] = False,
    asymmetric: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Return the model with smaller layers: flattened filters on spatial convolutions, SVD on the others.

    K[t, s, i, j] ~= sum_m a[t, m, s] v[t, m, i] h[t, m, j] becomes 1x1, depthwise k x 1 and 1 x k with m terms for
    each output channel. The rank is m; the paper trains m = 1. Lossy: fine-tune afterwards. The other arguments,
    errors and what comes back are those of :func:`tucker`.

    Source: Jin, Dundar and Culurciello 2015 (Flattened convolutional neural networks), section 3.

    >>> small = flattened(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=1)
    >>> [tuple(factor.weight.shape) for factor in small[0].children()]
    [(64, 32, 1, 1), (64, 1, 3, 1), (64, 1, 1, 3)]
    """
    scope = Scope(layers, exclude, example_inputs, data, inputs, progress)
    return decompose(model, "flattened", {}, ranks, scope, finetune, inplace, asymmetric)


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

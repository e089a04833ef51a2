"""The public calls: one per decomposition, plans, budgets, and the conversion back to dense layers.

``tucker`` and the other decompositions choose the ranks of each layer separately, ``compress`` distributes one
budget over all layers; both make a plan and apply it. ``plan`` only makes the plan, which the decompositions
accept as ``ranks=``. Shared keyword arguments are documented once, in ``decomp.planning.arguments``.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Unpack, cast

from torch import Tensor, nn
from typing_extensions import TypeAliasType

from decomp._util.arguments import arguments_of, with_arguments
from decomp._util.naming import some
from decomp._util.warn import warn
from decomp.calibration.calibrate import Statistics
from decomp.data.batches import require_passes
from decomp.layers import Factorized
from decomp.methods import Method, MethodOptions, Solver, default_options
from decomp.network import surgery
from decomp.network.forward import Batch
from decomp.network.restoring import all_or_nothing
from decomp.planning.arguments import (
    BudgetArguments,
    CallArguments,
    CompressArguments,
    PlanArguments,
    RankLimits,
    Scope,
)
from decomp.planning.budget import Budget
from decomp.planning.cost import COSTS, Bounds
from decomp.planning.plan import PLAN, CompressedModule, Plan, tell_swapped
from decomp.planning.planner import make_budget_plan, make_plan, with_macs
from decomp.planning.safeguard import energy_kept
from decomp.ranks import RankSpec
from decomp.recovery.sequential import apply_sequentially
from decomp.training.layerwise import FinetuneReport, LayerReport, finetune_layerwise

REPORT = "decomp_finetuning"  # the attribute of a compressed model that holds the report of its fine-tuning

Ranks = TypeAliasType("Ranks", RankSpec | Mapping[str, RankSpec] | Plan)
"""Values of ``ranks=``: a rule or its name, fixed ranks, a mapping from globs to these, or a plan."""


@with_arguments(CallArguments, renamed={"asymmetric": "sequential"})
@all_or_nothing()
def tucker(
    model: nn.Module, ranks: Ranks = "vbmf", *, solver: Solver | None = None, **arguments: Unpack[CallArguments]
) -> CompressedModule:
    """Return the model with smaller layers: Tucker-2 on spatial convolutions, SVD on linear and 1x1 ones.

    K[t, s, i, j] ~= sum_{a, b} U[t, a] C[a, b, i, j] V[s, b] becomes 1x1, k x k and 1x1 convolutions; W ~= B A
    becomes two linear layers or 1x1 convolutions. A layer is replaced only if that lowers both its parameters and
    its MACs, and, for rules that see one layer at a time, only where it saves more than it costs the network
    (:class:`decomp.ranks.SpectralRule`). The result has its plan as an attribute: ``print(small.decomp_plan)``.

    Args:
        model: any ``nn.Module``; not changed, unless ``inplace``.
        ranks: a rule's name ("vbmf"), a rule (``decomp.ranks.energy(0.9)``), an int, a tuple (out, in), a mapping
            from globs of layer names to any of these (the last match wins), or a :class:`Plan`.
        solver: replaces HOOI: ``tensorly.decomposition.partial_tucker``, or a function like it.

    Raises:
        NothingToDecompose: no layer would be replaced (the message says why); a ``ValueError``.
        ValueError: a weight is not finite, or ranks do not fit.
        TypeError: the model is compiled, scripted or wrapped, or an argument has the wrong type.

    Source: Kim et al. 2016 (Compression of deep convolutional neural networks for fast and low power mobile
    applications), sections 3.1 and 3.2. Create optimizers after the call: earlier ones do not have the new
    parameters.

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
    return _decompose(model, "tucker", {"solver": solver}, ranks, arguments)


@with_arguments(CallArguments, renamed={"asymmetric": "sequential"})
@all_or_nothing()
def svd(
    model: nn.Module, ranks: Ranks = "vbmf", *, fold: str = "channel", **arguments: Unpack[CallArguments]
) -> CompressedModule:
    """Return the model with smaller layers: SVD of matrices, and of kernels folded to matrices.

    W ~= B A for linear layers and 1x1 convolutions; a spatial kernel is folded to a matrix first. A layer is
    replaced only if that lowers both its parameters and its MACs.

    Args:
        model: any ``nn.Module``; not changed, unless ``inplace``.
        ranks: as for :func:`tucker`; a rank is one number r.
        fold: how spatial kernels become matrices. "channel": T x S k^2 (Zhang et al. 2016), run as k x k and 1x1;
            "input": S x T k^2, run as 1x1 and k x k; "spatial": S kh x T kw (Jaderberg et al. 2014, scheme 2), run
            as k x 1 and 1 x k.

    Raises:
        ValueError: no layer would be replaced, a weight is not finite, ranks do not fit, or ``fold`` is unknown.
        TypeError: as for :func:`tucker`.

    Source: Denton et al. 2014, section 3.2; Girshick 2015, section 3.1.

    >>> small = svd(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=8, fold="spatial")
    >>> small[0].first.weight.shape, small[0].second.weight.shape
    (torch.Size([8, 32, 3, 1]), torch.Size([64, 8, 1, 3]))
    """
    return _decompose(model, "svd", {"fold": fold}, ranks, arguments)


@with_arguments(CallArguments, renamed={"asymmetric": "sequential"})
@all_or_nothing()
def cp(
    model: nn.Module,
    ranks: Ranks = "vbmf",
    *,
    modes: int = 3,
    solver: Solver | None = None,
    **arguments: Unpack[CallArguments],
) -> CompressedModule:
    """Return the model with smaller layers: CP on spatial convolutions, SVD on linear and 1x1 ones.

    K[t, s, i, j] ~= sum_r A[t, r] B[s, r] C[i, j, r] becomes 1x1, depthwise k x k, 1x1. Fitted by alternating
    least squares, then corrected so that terms do not cancel each other; the note of the plan states
    sum_r ||term r||^2 / ||K||^2. CP has no spectrum: for a spectral rule R is the largest that costs no more than
    the Tucker-2 of that rule.

    Args:
        model: any ``nn.Module``; not changed, unless ``inplace``.
        ranks: as for :func:`tucker`; a rank is one number R.
        modes: 3 as above, or 4: C is split along the axes, run as 1x1, depthwise k x 1 and 1 x k, 1x1.
        solver: replaces the built-in solver: ``tensorly.decomposition.parafac``, or a function like it.

    Raises:
        ValueError: no layer would be replaced, a weight is not finite, ranks do not fit, or ``modes`` is not 3 or
            4.
        TypeError: as for :func:`tucker`.

    Source: Lebedev et al. 2015 (four modes); Phan et al. 2020 (three modes, error-preserving correction).

    >>> small = cp(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=16)
    >>> [tuple(factor.weight.shape) for factor in small[0].children()]
    [(16, 32, 1, 1), (16, 1, 3, 3), (64, 16, 1, 1)]
    """
    return _decompose(model, "cp", {"modes": modes, "solver": solver}, ranks, arguments)


@with_arguments(CallArguments, renamed={"asymmetric": "sequential"})
@all_or_nothing()
def block_term(
    model: nn.Module, ranks: Ranks = "vbmf", *, blocks: int = 4, **arguments: Unpack[CallArguments]
) -> CompressedModule:
    """Return the model with smaller layers: block-term on spatial convolutions, SVD on linear and 1x1 ones.

    K ~= sum_g C_g x1 U_g x2 V_g, a sum of Tucker-2 terms, becomes 1x1, k x k in groups, 1x1. One block is
    Tucker-2, blocks of rank 1 are CP. For a spectral rule the ranks are the largest that cost no more than its
    Tucker-2.

    Args:
        model: any ``nn.Module``; not changed, unless ``inplace``.
        ranks: as for :func:`tucker`; ranks are (G, out, in), out and in per block, and an int fills these two.
        blocks: the number G of terms, if ``ranks`` does not set it.

    Raises:
        ValueError: no layer would be replaced, a weight is not finite, ranks do not fit, or ``blocks`` is below 1.
        TypeError: as for :func:`tucker`.

    Source: De Lathauwer 2008 (Decompositions of a higher-order tensor in block terms, part II).

    >>> small = block_term(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=8, blocks=2)
    >>> small[0].ranks, small[0].core.groups
    ((2, 8, 8), 2)
    """
    return _decompose(model, "block_term", {"blocks": blocks}, ranks, arguments)


@with_arguments(CallArguments, renamed={"asymmetric": "sequential"})
@all_or_nothing()
def separable(
    model: nn.Module, ranks: Ranks = "vbmf", *, scheme: str = "spatial", **arguments: Unpack[CallArguments]
) -> CompressedModule:
    """Return the model with smaller layers: separable filters on spatial convolutions, SVD on the others.

    A spatial kernel becomes convolutions along one axis each, or few filters per channel and a 1x1 convolution.

    Args:
        model: any ``nn.Module``; not changed, unless ``inplace``.
        ranks: as for :func:`tucker`; a rank is one number: of filters m, or of intermediate channels r.
        scheme: which filters are shared. "spatial": k x 1 and 1 x k over all channels (Jaderberg et al. 2014,
            scheme 2); "channelwise": m separable filters per input channel (their scheme 1);
            "depthwise_pointwise" and "pointwise_depthwise": m whole filters per input or output channel (Guo et
            al. 2018); "shared_bank": m separable filters for all channels (Rigamonti et al. 2013).

    Raises:
        ValueError: no layer would be replaced, a weight is not finite, ranks do not fit, or ``scheme`` is unknown.
        TypeError: as for :func:`tucker`.

    Source: Jaderberg, Vedaldi and Zisserman 2014, section 2; Guo et al. 2018; Rigamonti et al. 2013.

    >>> model = nn.Sequential(nn.Conv2d(32, 64, 3))
    >>> small = separable(model, ranks=2, scheme="depthwise_pointwise")
    >>> [tuple(factor.weight.shape) for factor in small[0].children()]
    [(64, 1, 3, 3), (64, 64, 1, 1)]
    """
    return _decompose(model, "separable", {"scheme": scheme}, ranks, arguments)


@with_arguments(CallArguments, renamed={"asymmetric": "sequential"})
@all_or_nothing()
def flattened(model: nn.Module, ranks: Ranks = "vbmf", **arguments: Unpack[CallArguments]) -> CompressedModule:
    """Return the model with smaller layers: flattened filters on spatial convolutions, SVD on the others.

    K[t, s, i, j] ~= sum_m a[t, m, s] v[t, m, i] h[t, m, j] becomes 1x1, depthwise k x 1 and 1 x k with m terms for
    each output channel; the paper trains m = 1. The error is large: fine-tune afterwards.

    Args:
        model: any ``nn.Module``; not changed, unless ``inplace``.
        ranks: as for :func:`tucker`; a rank is one number m.

    Raises:
        ValueError: no layer would be replaced, a weight is not finite, or ranks do not fit.
        TypeError: as for :func:`tucker`.

    Source: Jin, Dundar and Culurciello 2015 (Flattened convolutional neural networks), section 3.

    >>> small = flattened(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=1)
    >>> [tuple(factor.weight.shape) for factor in small[0].children()]
    [(64, 32, 1, 1), (64, 1, 3, 1), (64, 1, 1, 3)]
    """
    return _decompose(model, "flattened", {}, ranks, arguments)


@with_arguments(PlanArguments)
@all_or_nothing()
def plan(
    model: nn.Module,
    method: str | Method = "tucker",
    ranks: Ranks = "vbmf",
    **arguments: Unpack[PlanArguments],
) -> Plan:
    """Choose method and ranks of every layer without changing the model.

    With ``method`` and ``ranks`` each layer is planned separately; with a budget all layers are planned
    together, as by :func:`compress`. The weight of each layer is analysed once, here: changing ranks or the
    budget of the plan afterwards takes no time.

    Args:
        model: any ``nn.Module``; it is not changed.
        method: a row of the table of methods (``decomp.methods.METHODS``), a family of rows, or a
            ``decomp.methods.Method`` of your own. If it supports only spatial kernels, matrices are planned
            with svd.
        ranks: as for :func:`tucker`.

    Raises:
        ValueError: ranks do not fit, the budget cannot be reached, or arguments contradict each other.
        TypeError: the method has no such option, or an argument has the wrong type.

    Source: Kim et al. 2016, section 3.2 (ranks by vbmf); Zhang et al. 2016, section 3.2.3 (budgets).

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
    options = {name: value for name, value in _part(arguments, MethodOptions).items() if value is not None}
    budget, scope = Budget.of(_part(arguments, Bounds)), _part(arguments, Scope)
    spending = _part(arguments, BudgetArguments)
    if budget is None:
        limits = _part(arguments, RankLimits)
        own = {name: each for name, each in arguments_of(BudgetArguments).items() if name not in limits}
        changed = [name for name, each in own.items() if spending[name] != each.default]
        if changed:
            names, kinds = (", ".join(f"{name}=" for name in each) for each in (changed, COSTS))
            raise ValueError(f"{names} need a budget: write one of {kinds} as well")
        return make_plan(model, method, options, ranks, limits, scope)
    if (method, ranks, options) != ("tucker", "vbmf", {}):
        raise ValueError(
            "a budget chooses methods and ranks itself: leave method, ranks and options out, write methods="
        )
    return make_budget_plan(model, spending, budget, scope)


@with_arguments(CompressArguments, renamed={"asymmetric": "sequential"})
@all_or_nothing()
def compress(
    model: nn.Module, example_inputs: Batch | None = None, **arguments: Unpack[CompressArguments]
) -> CompressedModule:
    """Return the model compressed to a budget, with methods and ranks of all layers chosen together.

    Maximizes the product over the layers of the energy that each retains, (1 - error^2)^weight, or another
    ``objective``, subject to the bound on the sum of costs; layers may stay dense. Batches in ``data`` give the
    weights: how much the network's output feels each layer. Costs are those of the actual factorized layers, and
    the budget is never exceeded.

    Args:
        model: any ``nn.Module``; not changed, unless ``inplace``.
        example_inputs: a batch as the model is called with, for the sizes of inputs. By default a batch of
            ``data``; a budget of parameters or bytes needs neither.

    Raises:
        OutOfReach: the budget cannot be reached (the message gives the smallest possible cost, and the layers in
            the way); a ``ValueError``.
        NothingToDecompose: no layer can be decomposed, or none has to be for this budget; a ``ValueError``.
        TypeError: as for :func:`tucker`.

    Source: Zhang et al. 2016, section 3.2.3 (product of energies); Idelbayev and Carreira-Perpinan 2020
    (Lagrangian).

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> small = compress(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), params=0.5)
    >>> small.decomp_plan.params.after <= 0.5 * small.decomp_plan.params.before
    True
    """
    _require_batches(arguments)
    if Budget.of(_part(arguments, Bounds)) is None:
        kinds = ", ".join(f"{kind}=" for kind in COSTS)
        raise ValueError(f"compress needs a budget: one of {kinds}, e.g. macs=0.5")
    shared: Any = {name: value for name, value in arguments.items() if name in arguments_of(PlanArguments)}
    decided = plan(model, example_inputs=example_inputs, **shared)
    return _apply(model, decided, arguments)


@all_or_nothing()
@surgery.outside_inference_mode()
def densify(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Return the model with every factorized layer converted to a dense layer, the product of its factors.

    For compression in stages: compress, fine-tune, and choose lower ranks for the fine-tuned weights:
    ``compress(densify(small), example_inputs, macs=0.25)``.

    Args:
        model: a model with factorized layers; not changed, unless ``inplace``.
        inplace: change ``model`` itself.

    Raises:
        ValueError: the model has no factorized layer.

    Source: Gusak et al. 2019 (MUSCO), multi-stage compression.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> small = plan(model, ranks=8).apply(model)
    >>> densify(small)[0]
    Linear(in_features=64, out_features=64, bias=True)
    """
    surgery.check_model(model)
    dense = {name: module.to_dense() for name, module in model.named_modules() if isinstance(module, Factorized)}
    if not dense:
        raise ValueError("the model has no factorized layer: there is nothing to convert back")
    whole = surgery.swap(model, dense, inplace=inplace)
    vars(whole).pop(PLAN, None)  # it no longer describes the model
    tell_swapped(whole)
    return whole


def _part(arguments: Mapping[str, Any], group: type[Any]) -> Any:
    """The arguments of a call that belong to one group."""
    return {name: arguments[name] for name in arguments_of(group)}


def _decompose(
    model: nn.Module, method: str, options: Mapping[str, Any], ranks: Ranks, arguments: CallArguments
) -> CompressedModule:
    """Plan by a method and its options, unless ``ranks`` is a plan already, and apply."""
    _require_batches(arguments)
    limits, scope = _part(arguments, RankLimits), _part(arguments, Scope)
    if not isinstance(ranks, Plan):
        decided = make_plan(model, method, options, ranks, limits, scope, by_output=arguments["finetune"] is False)
        if arguments["finetune"] is False and not _is_sequential(arguments):
            _warn_of_risk(decided)
        return _apply(model, decided, arguments)
    if arguments["layers"] is not None or arguments["exclude"] not in ((), [], None):
        raise ValueError("a Plan already determines the layers: leave layers= and exclude= out")
    for name, each in arguments_of(RankLimits).items():
        if limits[name] != each.default:
            raise ValueError(f"a Plan already determines the ranks: give {name}= to decomp.plan instead")
    if arguments["data"] is not None and arguments["finetune"] is False and not _is_sequential(arguments):
        raise ValueError(f"a Plan already determines the statistics, {_why_not_sequential(arguments)}")
    defaults = default_options(method)
    changed = [name for name, value in options.items() if value != defaults[name]]
    if changed:
        raise ValueError(f"a Plan already determines the methods: leave {changed[0]}= out")
    if arguments["example_inputs"] is not None:
        ranks = with_macs(ranks, model, arguments["example_inputs"])
    return _apply(model, ranks, arguments)


def _warn_of_risk(decided: Plan) -> None:
    """Warn where the ranks of rules are expected to destroy the model."""
    risky = {name: choice for name, choice in decided.items() if choice.at_risk and choice.ranks}
    if risky:
        warn(
            f"the ranks of {some(sorted(risky))} keep {100 * energy_kept(risky):.0f} % of the energy on average: "
            "the model may hardly work before it is fine-tuned. Measure it, or write "
            "compress(model, x, macs=0.5), which spends a budget where the network needs it"
        )


def _is_sequential(arguments: CallArguments | CompressArguments) -> bool:
    """Whether layer after layer is decomposed: as asked for, and by default where the data allows it."""
    asked, data = arguments["sequential"], arguments["data"]
    if asked is not None:
        return asked
    again = isinstance(data, Iterable) and not isinstance(data, Statistics | Iterator | Tensor)
    return again and not arguments["inplace"]


def _why_not_sequential(arguments: CallArguments) -> str:
    """Why data= beside a plan is not decomposed layer after layer, and what to write instead."""
    if arguments["sequential"] is False:
        return (
            "and sequential=False does not use data: leave one of them out, or give data= to decomp.plan instead"
        )
    if isinstance(arguments["data"], Statistics):
        return "and data= is other statistics: give them to decomp.plan instead"
    require_passes(arguments["data"])
    return "and inplace=True keeps no dense model for data= to compare with: leave one of them out"


def _require_batches(arguments: CallArguments | CompressArguments) -> None:
    """Check what fine-tuning and the decomposition layer after layer need, before anything is computed.

    Raises:
        ValueError: ``finetune`` or ``sequential`` without batches, or with ``inplace``.
        TypeError: they need several passes, and the data has one only.
    """
    data = arguments["data"]
    needing = {"finetune": arguments["finetune"] is not False, "sequential": arguments["sequential"] is True}
    for option in (name for name, given in needing.items() if given):
        if data is None or isinstance(data, Statistics):
            raise ValueError(
                f"{option}= needs batches: give data= an iterable of batches (to use statistics from calibrate as "
                "well, give them to decomp.plan, and its plan as ranks=)"
            )
        if arguments["inplace"]:
            raise ValueError(f"{option}= needs the dense model, which inplace=True changes: leave one of them out")
        require_passes(data)


def _apply(model: nn.Module, decided: Plan, arguments: CallArguments | CompressArguments) -> CompressedModule:
    """Apply the plan; with ``finetune`` train the factors layer by layer against the dense ``model``."""
    finetune, data, progress = arguments["finetune"], arguments["data"], arguments["progress"]
    settings: dict[str, Any] = {"inputs": arguments["inputs"], "progress": progress}
    settings |= dict(finetune) if isinstance(finetune, Mapping) else {}
    if arguments["sequential"] is True and finetune is not False:
        return _training_each(model, decided, data, settings)
    if _is_sequential(arguments):
        small = apply_sequentially(model, decided, data, inputs=arguments["inputs"], progress=progress)
    else:
        small = decided.apply(model, inplace=arguments["inplace"], progress=progress)
    if finetune is not False:
        setattr(small, REPORT, finetune_layerwise(small, model, cast(Any, data), **settings))
    return small


def _training_each(model: nn.Module, decided: Plan, data: Any, settings: Mapping[str, Any]) -> CompressedModule:
    """Decompose layer after layer, and train each against the dense ``model`` before the next."""
    reports: dict[str, LayerReport] = {}
    for refused in {"blocks", "checkpoint", "layers"} & set(settings):
        raise ValueError(
            f"finetune={{{refused!r}: ...}} is not possible with sequential=True, which trains each layer as it "
            "is decomposed: leave sequential=True out, and all are trained afterwards"
        )

    def finetune(small: nn.Module, name: str) -> None:
        reports.update(finetune_layerwise(small, model, data, layers=name, **settings))

    shared = {"inputs": settings["inputs"], "progress": settings["progress"]}
    small = apply_sequentially(model, decided, data, after_each=finetune, **shared)
    setattr(small, REPORT, FinetuneReport(reports))
    return small

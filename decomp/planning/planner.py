"""Making a plan: by rank rules, each layer separately, or by a budget, all layers together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from decomp._util.progress import bar
from decomp.calibration.calibrate import Statistics, calibrate
from decomp.calibration.recurrent import AnyMoments
from decomp.layers import Factorized
from decomp.layers.kernels import shape_of
from decomp.methods import AUTO, METHODS, Method, kinds_of, method_for, method_named, row_named
from decomp.network.eligibility import WhyNot
from decomp.network.flops import Call, observe
from decomp.network.surgery import names_of
from decomp.network.unpacking import unpacked
from decomp.planning.arguments import BudgetArguments, RankLimits, Scope
from decomp.planning.budget import Budget, OutOfReach, Request
from decomp.planning.build import NothingToDecompose
from decomp.planning.by_output import (
    nearer,
    statistics_by_output,
    with_mask,
    with_tempered_importances,
)
from decomp.planning.candidate import Candidate
from decomp.planning.choice import Change
from decomp.planning.cost import COSTS, COUNTED, Price
from decomp.planning.in_runtime import SecondsInRuntime
from decomp.planning.latency import Timings, in_eager, latency, layer_seconds
from decomp.planning.output_check import near_in_output
from decomp.planning.plan import Plan
from decomp.planning.safeguard import safeguard
from decomp.planning.survey import Survey, survey
from decomp.ranks import RULES, parse_request
from decomp.runtimes import find


def make_plan(
    model: nn.Module,
    method: str | Method,
    options: Mapping[str, Any],
    ranks: Any,
    limits: RankLimits,
    scope: Scope,
    *,
    by_output: bool = True,
) -> Plan:
    """Plan every layer of ``model`` separately; see :func:`decomp.plan`.

    With ``by_output`` the ranks of rules are changed where the output of the network is far off with them.
    """
    given_model, model, earlier = model, unpacked(model), ranks if isinstance(ranks, Plan) else None
    request = Request(**limits) if earlier is None else earlier.request
    named = method_named(method, options)

    earlier_methods = [] if earlier is None else _methods_of_budget(earlier)

    def methods_of(name: str, module: nn.Module) -> list[Method]:
        """The methods of a layer, the one of its choice first.

        They are the one that an earlier plan chose, and those of its budget. Without these it is the named one, or
        svd if that does not support the layer.
        """
        is_chosen = earlier is not None and name in earlier and bool(earlier[name].ranks)
        chosen = [earlier.method_of(name)] if earlier is not None and is_chosen else []
        others = [method for method in earlier_methods if method not in chosen and not method.why_not(module)]
        return [*chosen, *others] or ([] if earlier_methods else [method_for(named, module)])

    def why_not(name: str, module: nn.Module) -> str:
        methods = methods_of(name, module)
        return methods[0].why_not(module) if methods else _unsupported(earlier_methods)

    statistics = _statistics(model, scope)
    surveyed = _survey(model, [named, *earlier_methods], why_not, statistics, scope)
    if earlier is not None:
        earlier.require_fit({name: layer.module for name, layer in surveyed.layers.items()})
        planned_ranks = {name: choice.ranks for name, choice in earlier.items() if choice.ranks}
        ranks = {name: each for name, each in planned_ranks.items() if name in surveyed.decomposable}
    request_of = parse_request(
        ranks,
        {name: surveyed.layers[name].names for name in surveyed.decomposable},
        RULES,
        {each: choice.reason for name, choice in surveyed.refused.items() for each in surveyed.layers[name].names},
    )
    choices = dict(surveyed.refused)
    candidates: dict[str, list[Candidate]] = {}
    for name, module in bar(scope["progress"], "analyse", surveyed.decomposable.items()):
        moments = statistics.get(name)
        calls = surveyed.calls(name)
        first, *others = methods_of(name, module)
        candidate = Candidate.of(name, module, first, calls, moments=moments)
        candidates[name] = [candidate, *(_alone(name, module, each, calls, moments=moments) for each in others)]
        choices[name] = candidate.decide(request_of(name), **limits)
        candidate.keep(choices[name].ranks)
        if earlier is not None and name in earlier and not choices[name].ranks:
            dense = choices[name].as_dense(earlier[name].reason or choices[name].reason)
            choices[name] = replace(dense, kept_dense=earlier[name].kept_dense)
    rules = {name: request_of(name) for name in candidates}
    firsts = {name: each[0] for name, each in candidates.items()}
    choices |= safeguard(choices, rules, firsts, **limits)
    plan = Plan(
        {name: choices[name] for name in surveyed.layers},
        surveyed.cost,
        candidates,
        statistics=statistics,
        request=request,
        uncounted=surveyed.uncounted,
    )
    if not by_output or earlier is not None or surveyed.example is None:
        return plan
    # Not batches that were held out: statistics, which hold one batch, lead to the plan that their batches do.
    example = statistics.example if isinstance(statistics, Statistics) else surveyed.example
    return near_in_output(plan, rules, given_model, with_mask(example))


def make_budget_plan(model: nn.Module, given: BudgetArguments, budget: Budget, scope: Scope) -> Plan:
    """Plan all layers of ``model`` together under a budget; see :func:`decomp.compress`."""
    if scope["example_inputs"] is None and scope["data"] is None and COSTS[budget.kind].needs_inputs:
        raise ValueError(f"a budget of {budget.kind} needs the sizes of inputs: give example_inputs=")
    names: Sequence[str | Method] = AUTO if given["methods"] == "auto" else given["methods"]
    allowed = [row_named(name) for name in ([names] if isinstance(names, str) else names)]
    request = Request(
        budget,
        tuple(method.name for method in allowed),
        given["objective"],
        given["multiple_of"],
        given["weights"],
        given["min_gain"],
    )

    def fitting(module: nn.Module) -> list[Method]:
        return [method for method in allowed if not method.why_not(module)]

    def why_not(name: str, module: nn.Module) -> str:
        return "" if fitting(module) else _unsupported(allowed)

    given_model, model = model, unpacked(model)
    may_choose = request.objective == "auto" and request.weights is None
    by_output = statistics_by_output(model, scope) if may_choose else None
    statistics = _statistics(model, scope) if by_output is None else by_output
    surveyed = _survey(model, allowed, why_not, statistics, scope)
    timed = budget.kind not in COUNTED
    in_runtime = None
    if given["runtime"] is not None:
        if not timed:
            raise ValueError("runtime= says where seconds are measured: it needs a budget of seconds=")
        asked = cast(float, given["seconds"])
        in_runtime = SecondsInRuntime(find(given["runtime"]), asked, given_model, model, surveyed, fitting, scope)
        if request.multiple_of == 1:
            request = replace(request, multiple_of=in_runtime.multiple)
    timings: Timings = {}
    candidates: dict[str, list[Candidate]] = {}
    for name, module in bar(
        scope["progress"], "time and analyse" if timed else "analyse", surveyed.decomposable.items()
    ):
        options: dict[str, Any] = {"moments": statistics.get(name)}
        if timed:
            device = next(module.parameters()).device
            if in_runtime is None:
                options["measure"] = in_eager(device, timings)
            else:
                options |= in_runtime.options(name, device)
        candidates[name] = [
            _alone(name, module, each, surveyed.calls(name), **options) for each in fitting(module)
        ]
    if not candidates:
        reasons = sorted({choice.reason for choice in surveyed.refused.values()}) or ["it has no layer"]
        raise NothingToDecompose(f"no layer can be decomposed under a budget: {'; '.join(reasons[:4])}")
    if by_output is not None:
        tempered = with_tempered_importances(candidates)
        candidates = candidates if tempered is None else tempered
        if tempered is None:
            by_output, request = None, replace(request, objective="product")
    bound: Any = {budget.kind: budget.value}
    seconds = None
    if in_runtime is not None:
        seconds = in_runtime.timed(candidates)
        bound = {"seconds": in_runtime.target(seconds.before)}
    elif timed:
        seconds = _timed_inside(given_model, model, surveyed, candidates)
    undecided = {name: first.choose((), "undecided") for name, (first, *_) in candidates.items()}
    choices = surveyed.refused | undecided
    plan = Plan(
        {name: choices[name] for name in surveyed.layers},
        surveyed.cost,
        candidates,
        statistics=statistics,
        seconds=seconds,
        request=request,
        uncounted=surveyed.uncounted,
    )
    decided = None if by_output is None else _by_the_better_objective(plan, given_model, bound, scope)
    if in_runtime is not None:
        return in_runtime.kept(plan if decided is None else decided, bound["seconds"])
    return plan.with_budget(**bound) if decided is None else decided


def _by_the_better_objective(plan: Plan, model: nn.Module, bound: Any, scope: Scope) -> Plan | None:
    """The plan under the objective that leaves the network's output nearer to the dense one, on held-out batches.

    The layers' own errors are the other one: sensitivities are of first order, and of few batches. None where the
    budget is out of reach, or no layer has to be replaced for it.
    """
    try:
        by_output, alike = (plan.with_budget(objective=name, **bound) for name in ("network", "product"))
    except OutOfReach:
        return None
    return nearer(by_output, alike, model, scope) if by_output.replaced and alike.replaced else None


def with_macs(plan: Plan, model: nn.Module, example_inputs: Any) -> Plan:
    """Return the plan of ``model`` with the MACs that these inputs need.

    Raises:
        ValueError: the plan was made for another model.
    """
    model = unpacked(model, plan.replaced)
    modules = {name: module for module, names in names_of(model) for name in names if name in plan}
    plan.require_fit(modules)
    forward_pass = observe(model, example_inputs, modules)
    macs: dict[str, Change] = {}
    saved = 0.0  # by layers that are factorized already
    for name, choice in plan.items():
        now = forward_pass.macs.get(name, 0)
        before = after = now
        if choice.ranks and isinstance(modules[name], Factorized):
            before = round(now * choice.macs.before / choice.macs.after) if choice.macs.after else now
            saved += before - now
        elif choice.ranks and now:
            module, method = modules[name], plan.method_of(name)
            layer = cast(type[Factorized], method.layer_of(module))
            price = Price(module, layer, method.limits(method.kernels(module)), forward_pass.calls[name])
            after = price(choice.ranks).macs
        macs[name] = Change(before, after)
    return plan.with_macs(macs, forward_pass.total_macs + round(saved), forward_pass.uncounted)


def _statistics(model: nn.Module, scope: Scope) -> Mapping[str, AnyMoments]:
    """``data`` if it is statistics already, else those of its batches; empty without data."""
    data = scope["data"]
    if data is None:
        return {}
    if isinstance(data, Statistics):
        _require_same_model(data, model)
        return data
    return calibrate(
        model,
        data,
        inputs=scope["inputs"],
        layers=scope["layers"],
        exclude=scope["exclude"],
        progress=scope["progress"],
    )


def _survey(
    model: nn.Module,
    methods: Sequence[Method],
    why_not: WhyNot,
    statistics: Mapping[str, AnyMoments],
    scope: Scope,
) -> Survey:
    """Survey the layers, with sizes from the example inputs, else from the data."""
    example = scope["example_inputs"]
    if example is None and isinstance(statistics, Statistics):
        example = statistics.example
    return survey(model, kinds_of(*methods), why_not, scope["layers"], scope["exclude"], example)


def _methods_of_budget(earlier: Plan) -> list[Method]:
    """The methods that the budget of an earlier plan chooses from; none for a plan without a budget.

    Methods of the user that no layer took are left out: the plan holds only their names.
    """
    if earlier.request.budget is None:
        return []
    known = METHODS | {method.name: method for method in earlier.methods.values()}
    return [known[name] for name in earlier.request.methods if name in known]


def _alone(name: str, module: nn.Module, method: Method, calls: list[Call] | None, **options: Any) -> Candidate:
    """A candidate whose ranks are chosen later: until then, bases would take as much memory as the weights."""
    candidate = Candidate.of(name, module, method, calls, **options)
    candidate.keep()
    return candidate


def _unsupported(methods: Sequence[Method]) -> str:
    return f"none of {[method.name for method in methods]} supports this layer"


def _require_same_model(statistics: Statistics, model: nn.Module) -> None:
    known = dict(model.named_modules())
    for name, moments in statistics.items():
        shape = shape_of(known.get(name))
        if moments.shape != shape and not isinstance(known.get(name), Factorized):
            raise ValueError(
                f"data: the statistics are of another model, layer {name!r} had weight {moments.shape}, "
                f"here it has {shape}"
            )


def _timed_inside(
    given: nn.Module, model: nn.Module, surveyed: Survey, candidates: Mapping[str, list[Candidate]]
) -> Change:
    """Time the given model, and rescale the seconds of each layer alone to those inside the unpacked one."""
    inside = layer_seconds(model, surveyed.example, surveyed.decomposable)
    (total,) = latency([given], surveyed.example)
    share = min(1.0, total / sum(inside.values()))
    for name, each in candidates.items():
        for stopwatch in filter(None, (candidate.stopwatch for candidate in each)):
            stopwatch.rescale(share * inside[name] / stopwatch.dense)
    return Change(total, total)

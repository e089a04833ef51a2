"""Making a plan: by rank rules, each layer separately, or by a budget, all layers together."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
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
from decomp.network.tracing import tails
from decomp.network.unpacking import unpacked
from decomp.planning.arguments import BudgetArguments, RankLimits, Scope
from decomp.planning.budget import Budget, OutOfReach, Request, seconds
from decomp.planning.build import NothingToDecompose
from decomp.planning.by_output import nearer, statistics_by_output, with_tempered_importances
from decomp.planning.candidate import Candidate
from decomp.planning.choice import Change
from decomp.planning.cost import COSTS, COUNTED, Price
from decomp.planning.latency import (
    RANK_SHARES,
    RUNTIME_RANK_SHARES,
    RuntimeClock,
    Stopwatch,
    Timings,
    in_eager,
    latency,
    layer_seconds,
    preferred_multiple,
    seconds_of,
)
from decomp.planning.plan import Plan
from decomp.planning.safeguard import safeguard
from decomp.planning.survey import Survey, survey
from decomp.ranks import RULES, parse_request
from decomp.runtimes import Runtime, find, ready

CORRECTIONS = 5  # how often a bound on seconds is corrected by what was measured
WITHIN = 0.05  # it is not corrected any more where the measured time is below it by less than this,
MARGIN = 0.01  # and by more than this, by which two measurements of one model differ
MOST_BATCHES = 32  # of data, for the ranges of a quantizing runtime


def make_plan(
    model: nn.Module,
    method: str | Method,
    options: Mapping[str, Any],
    ranks: Any,
    limits: RankLimits,
    scope: Scope,
) -> Plan:
    """Plan every layer of ``model`` separately; see :func:`decomp.plan`."""
    model, earlier = unpacked(model), ranks if isinstance(ranks, Plan) else None
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
    return Plan(
        {name: choices[name] for name in surveyed.layers},
        surveyed.cost,
        candidates,
        statistics=statistics,
        request=request,
        uncounted=surveyed.uncounted,
    )


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
    timings: Timings = {}
    runtime = None if given["runtime"] is None else find(given["runtime"])
    if runtime is not None and not timed:
        raise ValueError("runtime= says where seconds are measured: it needs a budget of seconds=")
    clock, multiple, run_dense, batches = None, 1, None, []
    if runtime is not None:
        _require_share_or_duration(cast(float, given["seconds"]))
        batches = _batches(scope, surveyed.example)
        clock = RuntimeClock(runtime, tails(model, surveyed.example, surveyed.decomposable), timings)
        multiple = _multiple(clock, surveyed, fitting)
        if request.multiple_of == 1:
            request = replace(request, multiple_of=multiple)
    candidates: dict[str, list[Candidate]] = {}
    for name, module in bar(
        scope["progress"], "time and analyse" if timed else "analyse", surveyed.decomposable.items()
    ):
        calls, moments = surveyed.calls(name), statistics.get(name)
        options: dict[str, Any] = {"moments": moments, "multiple": multiple}
        if timed:
            device = next(module.parameters()).device
            options["shares"] = RUNTIME_RANK_SHARES if clock else RANK_SHARES
            options["measure"] = clock.measure(name, device) if clock else in_eager(device, timings)
        candidates[name] = [_alone(name, module, each, calls, **options) for each in fitting(module)]
    if not candidates:
        reasons = sorted({choice.reason for choice in surveyed.refused.values()}) or ["it has no layer"]
        raise NothingToDecompose(f"no layer can be decomposed under a budget: {'; '.join(reasons[:4])}")
    if by_output is not None:
        tempered = with_tempered_importances(candidates)
        candidates = candidates if tempered is None else tempered
        if tempered is None:
            by_output, request = None, replace(request, objective="product")
    if runtime is not None:
        run_dense = ready(runtime, given_model, surveyed.example, batches)
    undecided = {name: first.choose((), "undecided") for name, (first, *_) in candidates.items()}
    choices = surveyed.refused | undecided
    plan = Plan(
        {name: choices[name] for name in surveyed.layers},
        surveyed.cost,
        candidates,
        statistics=statistics,
        seconds=_timed_together(given_model, model, surveyed, candidates, run_dense) if timed else None,
        request=request,
        uncounted=surveyed.uncounted,
    )
    bound: Any = {budget.kind: budget.value}
    if runtime is not None:
        asked = cast(float, given["seconds"])
        if not isinstance(asked, seconds):
            bound = {"seconds": asked * cast(Change, plan.seconds).before}
    decided = None if by_output is None else _by_the_better_objective(plan, given_model, bound, scope)
    plan = plan if decided is None else decided
    if runtime is not None and run_dense is not None:
        target = float(bound["seconds"])
        return _kept_as_measured(plan, given_model, surveyed.example, runtime, batches, run_dense, asked, target)
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


def _batches(scope: Scope, example: Any) -> list[Any]:
    """Batches for a quantizing runtime: of the data, or, where these are statistics, the example."""
    data, inputs = scope["data"], scope["inputs"]
    if data is None or isinstance(data, Statistics):
        return [example]
    given: Iterable[Any] = islice(data, MOST_BATCHES)
    return [inputs(batch) if inputs else batch for batch in given]


def _multiple(clock: RuntimeClock, surveyed: Survey, fitting: Callable[[nn.Module], list[Method]]) -> int:
    """The multiple of ranks that the runtime likes, measured on the layer with the most MACs."""
    most = surveyed.forward_pass.macs if surveyed.forward_pass else {}
    name = max(surveyed.decomposable, key=lambda name: most.get(name, 0), default=None)
    if name is None:
        return 1
    module = surveyed.decomposable[name]
    method, calls = fitting(module)[0], surveyed.calls(name) or []
    limits = method.limits(method.kernels(module))
    price = Price(module, cast(type[Factorized], method.layer_of(module)), limits, calls)
    return preferred_multiple(price, limits, calls, clock.measure(name, next(module.parameters()).device))


def _require_share_or_duration(asked: float) -> None:
    """Check a bound of seconds in a runtime, before layers are timed there for minutes.

    Raises:
        ValueError: it is a number above 1, which is no share.
    """
    if not isinstance(asked, seconds) and asked > 1:
        raise ValueError(
            f"seconds={asked!r} with runtime=: write a share of the dense model's time, in (0, 1], or "
            f"decomp.seconds({asked!r}) for a duration"
        )


def _kept_as_measured(
    plan: Plan,
    model: nn.Module,
    example: Any,
    runtime: Runtime,
    batches: Sequence[Any],
    run_dense: Callable[[Any], Any],
    asked: float,
    target: float,
) -> Plan:
    """The plan with the most seconds within the bound, as measured.

    A plan that is predicted to save p seconds of the dense model's t and saves m leads to the next bound
    t - p (t - b) / m, with b just below the bound that was asked for: parts outside of the layers may take more or
    less than was predicted, and savings may be smaller, but they grow together. A time that is nearer
    to the bound than a measurement is exact is taken only where there is no other. ``target`` is the bound in
    seconds, ``asked`` how the call put it.

    Raises:
        OutOfReach: the fastest choice of ranks is above the bound.
    """
    total = cast(Change, plan.seconds).before
    if target >= total:
        return plan.with_budget(seconds=target)
    surely = (1 - MARGIN) * target

    def merit(found: float) -> tuple[bool, float]:
        return found <= surely, found if found <= surely else -found

    best: tuple[float, Plan] | None = None
    bound, least, fastest = target, 0.0, total
    for _ in range(CORRECTIONS):
        try:
            tried = plan.with_budget(seconds=bound)
        except OutOfReach as error:
            if bound <= least:
                break  # the fastest choice that is predicted was measured
            least = bound = error.least * (1 + 1e-9)
            tried = plan.with_budget(seconds=bound)
        if not tried.replaced:
            break
        run = ready(runtime, tried.build(model), example, batches)
        before, after = seconds_of([run_dense, run], example)
        found = after * total / before
        fastest = min(fastest, found)
        if found <= target and (best is None or merit(found) > merit(best[0])):
            best = found, tried
        if (1 - WITHIN) * target < found <= surely:
            break
        saved = total - cast(Change, tried.seconds).after
        if found < total:
            bound = total - saved * (total - (1 - WITHIN / 2) * target) / (total - found)
        else:
            bound = total - 2 * saved  # no faster: only more can help
        bound = max(bound, 1e-9 * total)  # out of reach, where the fastest choice is tried
        if bound <= least:
            break
    if best is None:
        raise OutOfReach(
            f"seconds={asked!r} cannot be reached in {runtime.name}: of the dense model's {total:.3g} s the least "
            f"that was measured is {fastest:.3g}, a share of {fastest / total:.3f}",
            fastest,
        )
    slowest, kept = best
    return kept.with_measured(runtime.name, Change(total, slowest))


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


def _timed_together(
    given: nn.Module,
    model: nn.Module,
    surveyed: Survey,
    candidates: Mapping[str, list[Candidate]],
    run_dense: Callable[[Any], Any] | None,
) -> Change:
    """Time the given model, and rescale the seconds of each layer alone to those inside the unpacked one.

    In a runtime, where ``run_dense`` runs the given model, layers cannot be timed inside: there all are rescaled
    alike, where together they take longer than the whole.
    """
    if run_dense is not None:
        (total,) = seconds_of([run_dense], surveyed.example)
        alone = sum(cast(Stopwatch, first.stopwatch).dense for first, *_ in candidates.values())
        for each in candidates.values():
            for candidate in each:
                cast(Stopwatch, candidate.stopwatch).rescale(min(1.0, total / alone))
        return Change(total, total)
    inside = layer_seconds(model, surveyed.example, surveyed.decomposable)
    (total,) = latency([given], surveyed.example)
    share = min(1.0, total / sum(inside.values()))
    for name, each in candidates.items():
        for stopwatch in filter(None, (candidate.stopwatch for candidate in each)):
            stopwatch.rescale(share * inside[name] / stopwatch.dense)
    return Change(total, total)

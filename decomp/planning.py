"""Making a plan: which layers can be decomposed, by which method, to which ranks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from decomp import surgery
from decomp.candidates import Candidate
from decomp.choices import Change, Choice, undecided
from decomp.costs import Cost, count_params
from decomp.layers import Factorized
from decomp.methods import METHODS, Method
from decomp.methods.svd import SVD
from decomp.observing import Observation, observe
from decomp.plans import ALREADY_FACTORIZED, PLAN, Plan
from decomp.progress import bar
from decomp.ranks import RULES, parse_request
from decomp.selection import Selector, select

NEVER: dict[type[nn.Module], str] = {
    nn.RNNBase: "never decomposed: its fused kernels read packed weights",
    nn.RNNCellBase: "never decomposed: its fused kernels read packed weights",
    nn.MultiheadAttention: "never decomposed: its packed projections are read without being called",
    nn.Bilinear: "never decomposed: no method takes three-way products",
}
DECOMPOSABLE: tuple[type[nn.Module], ...] = tuple({kind: 0 for m in METHODS.values() for kind in m.layers})


@dataclass(frozen=True)
class Site:
    """One layer of the model, and why it is out of the question, if it is."""

    module: nn.Module
    reason: str = ""


def make_plan(
    model: nn.Module,
    method: str | Method,
    ranks: Any,
    layers: Selector,
    exclude: Selector,
    example_inputs: Any,
    progress: bool | None,
) -> Plan:
    """Plan every layer of ``model``; see :func:`decomp.plan`."""
    surgery.check_model(model)
    earlier = ranks if isinstance(ranks, Plan) else None
    method_of = _methods(method, earlier)
    sites = _selected(_sites(model, method_of), layers, exclude)
    open_layers = {name: site.module for name, site in sites.items() if not site.reason}
    if earlier is not None:
        earlier.require_fit({name: site.module for name, site in sites.items()})
        ranks = {name: choice.ranks for name, choice in earlier.items() if choice.ranks and name in open_layers}
    request_of = parse_request(ranks, open_layers, RULES)
    seen = None
    if example_inputs is not None:
        seen = observe(model, example_inputs, {name: site.module for name, site in sites.items()})
    choices: dict[str, Choice] = {}
    candidates: dict[str, Candidate] = {}
    for name, site in bar(progress, "analyse", sites.items()):
        reason = site.reason or (_out_of_reach(name, seen) if seen else "")
        if reason:
            choices[name] = _undecided(model, name, site.module, reason, seen)
            continue
        calls = seen.calls[name] if seen else None
        candidates[name] = Candidate.of(name, site.module, method_of(name, site.module), calls)
        choices[name] = candidates[name].decide(request_of(name))
        if earlier is not None and not choices[name].ranks and name in earlier:
            choices[name] = choices[name].as_dense(earlier[name].reason or choices[name].reason)
    total = Cost(count_params(model), seen.total_macs if seen else 0)
    return Plan(choices, _before(total, sites, choices), candidates)


def _out_of_reach(name: str, seen: Observation) -> str:
    if name not in seen.macs:
        return "example_inputs never reach it"
    if name in seen.read:
        return "the model reads its weight and does not only call it: factors would be multiplied each time"
    return "" if seen.macs[name] else "example_inputs reach it with an empty batch"


def _methods(method: str | Method, earlier: Plan | None) -> Callable[[str, nn.Module], Method]:
    """The method of each layer: the one named where it takes the layer, else SVD; a plan brings its own."""
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(
            f"method={method!r} is unknown: write one of {sorted(METHODS)}, or a decomp.methods.Method"
        )
    named = METHODS[method] if isinstance(method, str) else method

    def method_of(name: str, module: nn.Module) -> Method:
        if earlier is not None and name in earlier and earlier[name].ranks:
            return earlier.method_of(name)
        if type(module) in named.layers and named.takes(module):
            return named
        return SVD if SVD.takes(module) else named

    return method_of


def _sites(model: nn.Module, method_of: Callable[[str, nn.Module], Method]) -> dict[str, Site]:
    """Every layer that could be thought of, by its first name, in the order of ``named_modules``."""
    shared = surgery.shared_parameters(model)
    sites: dict[str, Site] = {}
    for name, module in surgery.walk(model, (Factorized, *NEVER)):
        never = next((reason for kind, reason in NEVER.items() if isinstance(module, kind)), "")
        if never:
            sites[name] = Site(module, never)
        elif isinstance(module, Factorized):
            sites[name] = Site(module, ALREADY_FACTORIZED)
        elif isinstance(module, DECOMPOSABLE):
            reason = surgery.refusal(module, shared) or _subclass(module)
            sites[name] = Site(module, reason or _unsuited(module, method_of(name, module)))
        elif any(sum(size > 1 for size in p.shape) > 1 for p in module.parameters(False) if not is_lazy(p)):
            sites[name] = Site(module, f"no method takes {type(module).__name__}")
    return sites


def _subclass(module: nn.Module) -> str:
    if type(module) in DECOMPOSABLE:
        return ""
    kind = next(kind for kind in DECOMPOSABLE if isinstance(module, kind))
    return f"{type(module).__name__}, a subclass of {kind.__name__}: it may compute otherwise"


def _unsuited(module: nn.Module, method: Method) -> str:
    groups = getattr(module, "groups", 1)
    if groups > 1 and groups == getattr(module, "in_channels", 0) == getattr(module, "out_channels", 0):
        return "depthwise: one channel per group leaves nothing to decompose"
    takes = type(module) in method.layers and method.takes(module)
    return "" if takes else f"{method.name} is not for this layer"


def _selected(sites: dict[str, Site], layers: Selector, exclude: Selector) -> dict[str, Site]:
    """Mark what ``layers=`` leaves out and ``exclude=`` takes out, in that order."""
    modules = {name: site.module for name, site in sites.items()}
    if layers is not None:
        chosen = select(layers, modules, "layers")
        sites = {
            n: s if n in chosen or s.reason else replace(s, reason="not among layers=") for n, s in sites.items()
        }
    if exclude is not None and exclude != ():
        banned = select(exclude, modules, "exclude")
        sites = {n: replace(s, reason="excluded") if n in banned else s for n, s in sites.items()}
    return sites


def _undecided(model: nn.Module, name: str, module: nn.Module, reason: str, seen: Observation | None) -> Choice:
    """A layer that is out of the question; one factorized earlier keeps the choice that made it."""
    choice = undecided(module, reason, seen.macs.get(name, 0) if seen else 1.0)
    if not isinstance(module, Factorized):
        return choice
    earlier = getattr(model, PLAN, None)
    if isinstance(earlier, Plan) and name in earlier and earlier[name].ranks == module.ranks:
        share = earlier[name].macs.after / (earlier[name].macs.before or 1)
        after = seen.macs.get(name, 0) if seen else share
        before = (round(after / share) if share else 0) if seen else 1.0
        return replace(earlier[name], macs=Change(before, after), reason=reason)
    return replace(choice, method=module.method, ranks=module.ranks)


def _before(total: Cost, sites: dict[str, Site], choices: dict[str, Choice]) -> Cost:
    """Cost of the model as it was before any layer was factorized; MACs are 0 where they are not known."""
    factorized = [choices[name] for name, site in sites.items() if isinstance(site.module, Factorized)]
    params = sum(int(choice.params.before - choice.params.after) for choice in factorized)
    macs = sum(int(choice.macs.before - choice.macs.after) for choice in factorized) if total.macs else 0
    return Cost(total.params + params, total.macs + macs)

"""Accuracy without fine-tuning at three budgets of MACs: one allocation over the network against uniform rules.

The network that reads digits, 3 seeds. Every row keeps the budget; the uniform rules are scaled to it.

    python benchmarks/allocation_digits.py
"""

import statistics
from collections.abc import Callable
from math import sqrt

from torch import nn

import decomp
from decomp._util.tables import render
from decomp.digits import Digits, load_digits, train
from decomp.planning.plan import Plan

BUDGETS = (0.5, 0.25, 0.125)
SEEDS = range(3)


def scaled(plan: Plan, rule: Callable[[float], object], budget: float) -> Plan:
    """The plan of the largest strength in (0, 1) of a rule that keeps the budget, by bisection."""
    low, high, best = 0.0, 1.0, None
    for _ in range(24):
        middle = (low + high) / 2
        tried = plan.with_ranks("*", rule(middle))
        if tried.macs.after <= budget * tried.macs.before:
            low, best = middle, tried
        else:
            high = middle
    return best if best is not None else plan.with_ranks("*", rule(1e-6))


def share_of_ranks(share: float) -> Callable[[object], tuple[int, ...]]:
    return lambda candidate: tuple(max(1, int(share * limit)) for limit in candidate.limits)


def strategies(model: nn.Module, plan: Plan, digits: Digits) -> dict[str, Callable[[float], Plan]]:
    measured = decomp.sensitivity(model, digits.images, progress=False)

    def loss(network: nn.Module, batch: tuple) -> object:
        return nn.functional.cross_entropy(network(batch[0]), batch[1])

    fisher = decomp.sensitivity(model, digits.train, loss=loss, inputs=lambda batch: batch[0], progress=False)
    return {
        "uniform share of the ranks": lambda b: scaled(plan, share_of_ranks, b),
        "uniform energy": lambda b: scaled(plan, decomp.ranks.energy, b),
        "vbmf, weakened to the budget": lambda b: scaled(plan, lambda s: decomp.ranks.vbmf(1 - s or 1), b),
        "global: sum of errors": lambda b: plan.with_budget(macs=b, objective="sum"),
        "global: product of energies": lambda b: plan.with_budget(macs=b, objective="product"),
        "global: largest error": lambda b: plan.with_budget(macs=b, objective="max"),
        "global: sum, measured weights": lambda b: plan.with_budget(macs=b, objective="sum", weights=measured),
        "global: product, measured weights": lambda b: plan.with_budget(
            macs=b, objective="product", weights=measured
        ),
        "global: sum, Fisher weights": lambda b: plan.with_budget(macs=b, objective="sum", weights=fisher),
    }


def main() -> None:
    accuracies: dict[str, dict[float, list[float]]] = {}
    for seed in SEEDS:
        digits = load_digits(seed)
        model = train(digits, seed, progress=False)
        plan = decomp.plan(model, macs=0.9, example_inputs=digits.test[0][:1], progress=False)
        for name, strategy in strategies(model, plan, digits).items():
            for budget in BUDGETS:
                decided = strategy(budget)
                accuracy = digits.accuracy(decided.apply(model, progress=False))
                accuracies.setdefault(name, {}).setdefault(budget, []).append(accuracy)
    rows = []
    for name, found in accuracies.items():
        everything = [accuracy for budget in BUDGETS for accuracy in found[budget]]
        error = statistics.stdev(everything) / sqrt(len(everything))
        cells = [f"{statistics.mean(found[budget]):.1%}" for budget in BUDGETS]
        rows.append((name, *cells, f"{statistics.mean(everything):.1%} +- {error:.1%}"))
    columns = ("ranks", *(f">{budget:g} of the MACs" for budget in BUDGETS), ">mean +- standard error")
    print(render(f"accuracy without fine-tuning, {len(SEEDS)} seeds", columns, rows))


if __name__ == "__main__":
    main()

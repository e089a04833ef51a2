"""Budgets over the whole network: kept, used, near the best, and honest where they cannot be."""

from itertools import pairwise, product

import numpy as np
import pytest
import scipy.sparse
import torch
from networks import plant_spectra
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

import decomp
from decomp.network.flops import observe
from decomp.planning.allocation import (
    BINS,
    BudgetTooSmall,
    Front,
    allocate,
    allocate_minmax,
    allocate_quickly,
)
from decomp.planning.budget import OBJECTIVES, Budget
from decomp.planning.cost import count_params


def network(seed, widths, kernels):
    torch.manual_seed(seed)
    layers = []
    for (inputs, outputs), kernel in zip(pairwise(widths), kernels, strict=True):
        layers += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 20)]
    return plant_spectra(nn.Sequential(*layers), seed, decay=0.6 + 0.1 * seed).eval()


def total(model, kind, image):
    return count_params(model) if kind == "params" else observe(model, image, {}).total_macs


@pytest.mark.parametrize("objective", sorted(OBJECTIVES.keys() - {"network"}))
@pytest.mark.parametrize("seed", range(8))
def test_a_budget_is_never_exceeded_and_nearly_all_of_it_is_used(seed, objective):
    rng = np.random.default_rng(seed)
    widths = [3, *rng.integers(16, 80, size=rng.integers(2, 5)).tolist()]
    model = network(seed, widths, rng.choice([1, 3, 5], size=len(widths) - 1).tolist())
    image = torch.zeros(1, 3, 12, 12)
    plan = decomp.plan(model, macs=0.95, example_inputs=image)
    for kind, share in product(("macs", "params"), rng.uniform(0.25, 0.9, size=3)):
        decided = plan.with_budget(**{kind: float(share)}, objective=objective)
        before = total(model, kind, image)
        small = decided.apply(model)
        assert total(small, kind, image) == getattr(decided, kind).after <= share * before
        used = getattr(decided, kind).after / (share * before)
        assert used >= 0.97 or _nothing_more_fits(decided, kind, share * before), (kind, share, used)


def _nothing_more_fits(plan, kind, bound):
    """No layer alone can go on to its next better option within what is left."""
    left = bound - getattr(plan, kind).after
    for name, (candidate, *_) in plan._candidates.items():
        _, costs, squared = candidate.front(kind, 1)
        now = plan[name]
        here = getattr(now, kind).after
        dense = getattr(now, kind).before
        better = costs[squared < now.error**2 - 1e-12] if now.ranks else np.array([])
        options = [*better.tolist(), *([dense] if now.ranks else [])]
        if any(cost - here <= left for cost in options):
            return False
    return True


def brute_force(options, budgets, combine):
    """The least loss within each budget, over all choices of one option per layer."""
    costs, losses = np.zeros(1), np.zeros(1)
    for of_layer, losses_of_layer in options:
        costs = (costs[:, None] + of_layer).ravel()
        losses = combine(losses[:, None], losses_of_layer).ravel()
    return [losses[costs <= budget].min() for budget in budgets]


@pytest.mark.parametrize("seed", range(25))
def test_allocation_equals_brute_force_on_small_networks(seed):
    rng = np.random.default_rng(seed)
    everything = []
    for _ in range(rng.integers(2, 5)):
        full = int(rng.integers(100, 2000))
        costs = np.append(np.sort(rng.choice(np.arange(1, full), size=18, replace=False)), full).astype(float)
        losses = np.append(np.sort(rng.random(18) ** 3)[::-1], 0.0) * rng.uniform(0.1, 3)
        everything.append((costs, losses))
    fronts = [Front.of(costs, losses) for costs, losses in everything]
    budget = float(rng.uniform(0.15, 0.9) * sum(costs[-1] for costs, _ in everything))
    # Costs above the least are rounded up to bins: no worse than the best of a budget smaller by a bin per layer.
    tighter = budget - len(fronts) * (budget - sum(costs[0] for costs, _ in everything)) / BINS
    best, best_of_tighter = brute_force(everything, [budget, tighter], np.add)
    # The greedy one stops within a step of the relaxed optimum.
    step = max(-np.diff(front.losses[front.hull]).min(initial=0.0) for front in fronts)
    lowest = brute_force(everything, [budget], np.maximum)[0]
    for function, combine, least, most in (
        (allocate, sum, best, best_of_tighter),
        (allocate_quickly, sum, best, best + step),
        (allocate_minmax, max, lowest, lowest),
    ):
        chosen = function(fronts, budget)
        assert sum(costs[place] for (costs, _), place in zip(everything, chosen, strict=True)) <= budget
        loss = combine(losses[place] for (_, losses), place in zip(everything, chosen, strict=True))
        assert least - 1e-12 <= loss <= most + 1e-12


def many_fronts(seed, layers):
    """Many layers and one that dominates: the path where only the options nearby are looked at."""
    rng = np.random.default_rng(seed)
    fronts = []
    for layer in range(layers):
        count = 120
        costs = np.cumsum(rng.uniform(1, 10, size=count)) * (40 if layer == 0 else rng.uniform(0.2, 2))
        losses = (np.arange(1, count + 1) ** -rng.uniform(0.3, 2)) * rng.uniform(0.1, 5)
        losses[-1] = 0.0
        fronts.append(Front.of(costs, losses))
    return fronts


def least_loss(fronts, budget):
    """The integer program in SciPy: a bound, proved to 0.1 %, that no choice within the budget goes below."""
    costs, losses = (np.concatenate([getattr(front, what) for front in fronts]) for what in ("costs", "losses"))
    layer = np.repeat(np.arange(len(fronts)), [len(front.costs) for front in fronts])
    one_each = scipy.sparse.csr_array((np.ones(len(layer)), (layer, np.arange(len(layer)))))
    limits = [LinearConstraint(costs[None], -np.inf, budget), LinearConstraint(one_each, 1, 1)]
    solved = milp(losses, integrality=1, bounds=Bounds(0, 1), constraints=limits, options={"mip_rel_gap": 1e-3})
    assert solved.success
    return solved.mip_dual_bound


@pytest.mark.parametrize("seed", range(12))
def test_allocation_over_many_layers_is_within_two_percent_of_the_integer_program(seed):
    """The quick one is within three here; what it promises, a step, is a lot where one layer dominates."""
    fronts = many_fronts(seed, layers=40 + 4 * seed)
    budget = (0.2 + 0.05 * seed) * sum(float(front.costs[-1]) for front in fronts)
    bound = least_loss(fronts, budget)
    for function, most in ((allocate, 1.02), (allocate_quickly, 1.03)):
        chosen = function(fronts, budget)
        assert sum(float(front.costs[place]) for front, place in zip(fronts, chosen, strict=True)) <= budget
        loss = sum(float(front.losses[place]) for front, place in zip(fronts, chosen, strict=True))
        assert bound * (1 - 1e-6) <= loss <= most * bound


def test_a_budget_a_hair_above_the_least_is_kept():
    costs = np.array([1e6, 2e6, 1e7])
    fronts = [Front.of(costs, np.array([3.0, 1.0, 0.0]))] * 3
    assert allocate(fronts, float(np.nextafter(3e6, 4e6))) == [0, 0, 0]
    assert allocate(fronts, 3e6) == [0, 0, 0]


def test_what_was_kept_dense_stays_so_and_a_budget_that_is_met_says_so():
    model = plant_spectra(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    plan = decomp.plan(model, params=0.5)
    pinned = plan.keep_dense("0").with_budget(params=0.6)
    assert pinned["0"].ranks == ()
    assert pinned["1"].ranks != ()
    assert pinned.params.after <= 0.6 * pinned.params.before
    met = plan.with_budget(params=10**9)
    assert met["0"].reason == "the dense model is within params=1000000000"
    assert plan.with_budget(params=np.int64(5000)).params.after <= 5000


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"0": -1.0}, "weights: '0' has -1.0"),
        ({"0": float("nan")}, "weights: '0' has nan"),
        ({"0": float("inf")}, "weights: '0' has inf"),
        ({"0": "much"}, "weights: '0' has 'much'"),
        ({"zzz": 1.0}, "weights: no layer 'zzz'; layers are '0'"),
    ],
)
def test_bad_weights_are_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        decomp.plan(nn.Sequential(nn.Linear(32, 32)), params=0.5, weights=weights)


def test_a_layer_that_stays_dense_is_among_the_choices_and_says_why():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(64, 2) @ torch.randn(2, 64))
    plan = decomp.plan(model, params=0.6)
    assert plan["0"].ranks == ()
    assert "dense under the budget params=0.6" in plan["0"].reason
    assert plan["1"].ranks != ()


def test_weights_move_the_budget_to_the_layers_that_count():
    model = plant_spectra(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    even = decomp.plan(model, params=0.5)
    tilted = decomp.plan(model, params=0.5, weights={"0": 100.0})
    assert tilted["0"].error < even["0"].error
    assert tilted["1"].error > even["1"].error


def test_ranks_are_multiples_where_asked():
    model = network(0, [3, 40, 64], [3, 3])
    plan = decomp.plan(model, macs=0.5, multiple_of=8, example_inputs=torch.zeros(1, 3, 12, 12))
    assert plan.macs.after <= 0.5 * plan.macs.before
    for name, choice in plan.items():
        limits = plan._candidates[name][0].limits
        assert all(rank % 8 == 0 or rank == limit for rank, limit in zip(choice.ranks, limits, strict=False))
    assert any(choice.ranks for choice in plan.values())


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_an_impossible_budget_names_the_least_that_can_be_reached(kind):
    model, image = network(0, [3, 40, 64], [3, 3]), torch.zeros(1, 3, 12, 12)
    with pytest.raises(ValueError, match=rf"{kind}=1e-05 cannot be reached: the least is") as caught:
        decomp.compress(model, image, **{kind: 1e-5})
    words = str(caught.value)
    share = float(words.split("a share of ")[1].split(" ")[0])
    least = int(words.split("the least is ")[1].split(", a share")[0].replace(",", ""))
    decomp.compress(model, image, **{kind: share})
    small = decomp.compress(model, image, **{kind: least})
    assert total(small, kind, image) == least
    for below in (share - 0.001, least - 1):
        with pytest.raises(ValueError, match="cannot be reached"):
            decomp.compress(model, image, **{kind: below})


def test_an_absolute_budget_and_one_in_a_plan_of_many():
    model, image = network(1, [3, 40, 64], [3, 3]), torch.zeros(1, 3, 12, 12)
    small = decomp.compress(model, image, macs=1_000_000)
    assert decomp.profile(small, image).total.macs <= 1_000_000
    assert small.decomp_plan.macs.after > 0.97 * 1_000_000
    only = decomp.compress(model, image, macs=0.9, layers="3")
    assert [name for name, choice in only.decomp_plan.items() if choice.ranks] == ["3"]


def test_seconds_are_predicted_from_measured_layers():
    model, image = network(0, [3, 96, 128], [3, 5]), torch.zeros(4, 3, 24, 24)
    plan = decomp.plan(model, seconds=1e6, example_inputs=image)
    assert all(choice.ranks == () for choice in plan.values()), (
        "a bound that the dense model keeps changes nothing"
    )
    bound = 0.6 * plan.seconds.before
    decided = plan.with_budget(seconds=bound)
    assert decided.seconds.after <= bound
    assert decided.seconds.before == plan.seconds.before > 0
    assert any(choice.ranks for choice in decided.values())
    assert "predicted" in str(decided)
    small = decided.apply(model)
    assert small.decomp_plan.seconds == decided.seconds
    assert decomp.Plan.from_json(decided.to_json()).seconds == decided.seconds
    assert "predicted" in decomp.compare(small, model, image).summary
    with pytest.raises(ValueError, match="seconds=1e-09 cannot be reached: the least is"):
        plan.with_budget(seconds=1e-9)
    with pytest.raises(ValueError, match="make the plan with seconds="):
        decomp.plan(model, macs=0.5, example_inputs=image).with_budget(seconds=bound)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"macs": 0.5, "params": 0.5}, "one budget at a time, not macs= and params="),
        ({"macs": 1.5}, "macs=1.5: write a share"),
        ({"macs": 0}, "macs=0: write a share"),
        ({"params": -3}, "params=-3"),
        ({"params": True}, "params=True"),
        ({"seconds": 0.0}, "seconds=0.0: write seconds above 0"),
        ({"params": 0.5, "ranks": 4}, "leave method, ranks and options out"),
        ({"params": 0.5, "objective": "best"}, "'best' is unknown: write one of"),
        ({"params": 0.5, "multiple_of": 0}, "multiple_of=0"),
        ({"params": 0.5, "methods": "tuker"}, "'tuker' is unknown"),
        ({"macs": 0.5}, "give example_inputs="),
        ({"objective": "sum"}, "need a budget"),
        ({"params": 0.5, "layers": "0", "exclude": "0"}, "no layer can be decomposed under a budget: excluded"),
    ],
)
def test_bad_budgets_say_what_to_write(arguments, words):
    with pytest.raises(ValueError, match=words):
        decomp.plan(nn.Sequential(nn.Linear(32, 32)), **arguments)


def test_compress_needs_a_budget_and_a_budget_its_candidates():
    with pytest.raises(ValueError, match="compress needs a budget"):
        decomp.compress(nn.Linear(32, 32))
    plan = decomp.Plan.from_json(decomp.plan(nn.Linear(32, 32), ranks=4).to_json())
    with pytest.raises(ValueError, match=r"holds no spectra.*decomp\.plan\(model, ranks=plan\)"):
        plan.with_budget(params=0.5)
    assert Budget.of({}) is None
    with pytest.raises(BudgetTooSmall):
        allocate([Front.of(np.array([2.0]), np.array([0.0]))], 1.0)


def test_methods_can_be_restricted():
    model = network(0, [3, 40, 64], [3, 3])
    plan = decomp.plan(model, params=0.98, methods=["svd"])
    assert "none of ['svd'] supports this layer" in plan["3"].reason
    assert {choice.method for choice in plan.values()} == {"dense", "svd"}


def test_densify_gives_back_ordinary_layers_that_compute_the_same():
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, stride=(2, 1), padding=(1, 2), groups=1),
        nn.ConvTranspose2d(24, 24, 3, stride=2, output_padding=1, groups=2, bias=False),
        nn.Conv2d(24, 32, 1, padding_mode="reflect"),
        nn.Flatten(2),
        nn.Linear(18 * 28, 40),
    ).eval()
    model[0].requires_grad_(False)
    image = torch.randn(2, 3, 16, 12)
    model[4] = nn.Linear(model[:4](image).shape[-1], 40).eval()
    model[1].tag = "up"
    small = decomp.tucker(model, ranks=6)
    dense = decomp.densify(small)
    assert dense[1].tag == "up"
    assert all(parameter.is_contiguous() for parameter in dense.parameters())
    assert [type(layer) for layer in dense] == [type(layer) for layer in model]
    torch.testing.assert_close(dense(image), small(image))
    assert [p.requires_grad for p in dense.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not hasattr(dense, "decomp_plan")
    assert hasattr(small, "decomp_plan")
    with pytest.raises(ValueError, match="no factorized layer"):
        decomp.densify(dense)


def test_compression_in_stages_goes_on_from_the_fine_tuned_weights():
    model, image = network(2, [3, 32, 48], [3, 3]), torch.zeros(1, 3, 12, 12)
    data = [torch.randn(8, 3, 12, 12) for _ in range(3)]
    once = decomp.compress(model, image, macs=0.5)
    decomp.finetune_layerwise(once, model, data, steps=20)
    twice = decomp.compress(decomp.densify(once), image, macs=0.25)
    decomp.finetune_layerwise(twice, model, data, steps=20)
    dense_macs = decomp.profile(model, image).total.macs
    assert decomp.profile(twice, image).total.macs <= 0.25 * dense_macs
    # The second stage cuts the fine-tuned product, not the original weight.
    decided = decomp.plan(decomp.densify(once), macs=0.25, example_inputs=image)
    first = decomp.plan(model, macs=0.25, example_inputs=image)
    assert {n: c.error for n, c in decided.items()} != {n: c.error for n, c in first.items()}

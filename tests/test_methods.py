"""The methods against published counts, TensorLy, planted kernels, and random layer configurations."""

import copy
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_cases import factorized, small_ranks, with_weight
from tensorly.cp_tensor import cp_to_tensor
from tensorly.decomposition import parafac, partial_tucker
from tensorly.tucker_tensor import tucker_to_tensor
from torch import nn
from torch.utils._pytree import tree_leaves

import decomp
from decomp.layers import group_kernels
from decomp.methods import METHODS, method_named, to_tensorly
from decomp.methods.solvers.block_term import fit_block_term
from decomp.network.flops import Call
from decomp.planning.cost import Price, count_macs, count_params

LC = json.loads((Path(__file__).parent / "data" / "published_cases.json").read_text())["lc_alexnet"]
CONVOLUTIONS = [  # of the ungrouped AlexNet of that table, with the size of their input
    (nn.Conv2d(3, 96, 11, stride=4, padding=2), 227),
    (nn.Conv2d(96, 256, 5, padding=2), 27),
    (nn.Conv2d(256, 384, 3, padding=1), 13),
    (nn.Conv2d(384, 384, 3, padding=1), 13),
    (nn.Conv2d(384, 256, 3, padding=1), 13),
]
MATRICES = [nn.Linear(9216, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 1000)]


# The formula that gives the other four to the rounding gives 436.75 for these ranks; 436 was published.
MISPRINT = pytest.mark.xfail(
    strict=True, reason="436 published, 436.75 counted: a rank or the count is a misprint"
)
ROWS = [pytest.param(r, id=r["tag"], marks=MISPRINT if r["tag"] == "scheme_1_v1" else ()) for r in LC["rows"]]


@pytest.mark.parametrize("row", ROWS)
def test_published_macs_of_low_rank_alexnets(row):
    """Scheme 1 is the channel fold; scheme 2 the spatial one (kernels are square: the order does not count)."""
    method = METHODS["svd_channel" if row["tag"].startswith("scheme_1") else "svd_spatial"]
    macs = 0
    for (dense, size), rank in zip(CONVOLUTIONS, row["ranks"][:5], strict=True):
        limits = method.limits(group_kernels(dense))
        call = Call((1, dense.in_channels, size, size))
        macs += Price(dense, method.layer_of(dense), limits, [call])((rank,)).macs
    for dense, rank in zip(MATRICES, row["ranks"][5:], strict=True):
        layer = METHODS["svd"].layer_of(dense)
        macs += Price(dense, layer, (min(dense.weight.shape),), [Call((1, dense.in_features))])((rank,)).macs
    assert abs(macs / 1e6 - row["mflops_published"]) <= 0.5


KINDS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


@st.composite
def configurations(draw):
    """Any convolution that torch takes, a method for it, ranks within its limits, and an input."""
    axes = draw(st.sampled_from([1, 2, 2, 2, 3]))
    transposed = draw(st.integers(0, 3)) == 0
    groups = draw(st.sampled_from([1, 1, 2, 3]))

    def per_axis(least, most):
        return tuple(draw(st.integers(least, most)) for _ in range(axes))

    inputs, outputs = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    kernel, stride, dilation = per_axis(1, 4), per_axis(1, 3), per_axis(1, 2)
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if transposed:
        options["padding"] = per_axis(0, 1)
        pairs = zip(stride, dilation, strict=True)
        options["output_padding"] = tuple(draw(st.integers(0, max(pair) - 1)) for pair in pairs)
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        same = set(stride) == {1} and draw(st.booleans())
        options["padding"] = "same" if same else per_axis(0, 2)
    sizes = tuple(draw(st.integers(8, 10)) for _ in range(axes))
    dense = KINDS[axes][transposed](inputs, outputs, kernel, dtype=torch.float64, **options)
    names = [name for name, method in METHODS.items() if not method.why_not(dense)]
    name = draw(st.sampled_from(names))
    limits = METHODS[name].limits(group_kernels(dense))
    ranks = tuple(draw(st.integers(1, min(limit, 6))) for limit in limits)
    return name, dense, ranks, (draw(st.integers(1, 2)), inputs, *sizes)


def check(configuration):
    """The layer, with any factors, is the convolution with their product; its price is what torch counts."""
    name, dense, ranks, shape = configuration
    layer = METHODS[name].layer_of(dense).like(dense, ranks)
    assert layer.ranks == ranks
    oracle = layer.to_dense()
    assert repr(oracle) == repr(dense)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), oracle(x), rtol=0, atol=1e-9)
    limits = METHODS[name].limits(group_kernels(dense))
    price = Price(dense, type(layer), limits, [Call(shape)])(ranks)
    params, macs = count_params(layer), count_macs(layer, [Call(shape)])
    assert price == {"params": params, "macs": macs, "bytes": params * dense.weight.element_size()}


RELAXED = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(RELAXED, max_examples=60)
@given(configurations())
def test_random_layers(configuration):
    check(configuration)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(RELAXED, max_examples=1500)
@given(configurations())
def test_many_random_layers(configuration):
    check(configuration)


@pytest.mark.parametrize("groups", [1, 2])
def test_factors_go_to_tensorly_and_back(groups):
    dense = nn.Conv2d(8, 12, 3, groups=groups, dtype=torch.float64)
    for name, ranks, rebuild in [
        ("tucker", (4, 3), tucker_to_tensor),
        ("tucker", (12 // groups, 3), tucker_to_tensor),
        ("cp", (7,), cp_to_tensor),
        ("cp4", (7,), cp_to_tensor),
    ]:
        layer = factorized(name, dense, ranks)
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            kernels = torch.stack([rebuild(factors) for factors in to_tensorly(layer)])
        expected = group_kernels(layer.to_dense()).detach()
        torch.testing.assert_close(kernels.reshape(expected.shape), expected, rtol=0, atol=1e-12)
    assert tensorly.get_backend() == "numpy"


def test_tensorly_has_no_form_for_the_others():
    with pytest.raises(
        TypeError, match="SVDLinear cannot be converted to TensorLy: give a TuckerConv, CPConv or CP4Conv"
    ):
        to_tensorly(factorized("svd", nn.Linear(8, 8), (2,)))


def test_decompositions_of_tensorly_as_solvers():
    model = nn.Sequential(nn.Conv2d(16, 24, 3, groups=2))
    ours = decomp.tucker(model, ranks=(4, 3))
    theirs = decomp.tucker(model, ranks=(4, 3), solver=partial_tucker)
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        made = [
            partial_tucker(half, [4, 3], modes=[0, 1])[0] for half in model[0].weight.detach().double().chunk(2)
        ]
        expected = torch.cat(
            [torch.einsum("ta,abij,sb->tsij", factors[0], core, factors[1]) for core, factors in made]
        )
    torch.testing.assert_close(theirs[0].weight, expected.float(), rtol=0, atol=1e-6)
    norms = [float((small[0].weight - model[0].weight).detach().norm()) for small in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert norms[0] <= norms[1] * (1 + 1e-5)
    assert not torch.equal(theirs[0].weight, ours[0].weight)
    called = []

    def solver(tensor, rank):
        called.append((tuple(tensor.shape), rank))
        return parafac(tensor, rank, init="random", random_state=0, n_iter_max=200)

    for modes, shape in [(3, (12, 8, 9)), (4, (12, 8, 3, 3))]:
        small = decomp.cp(model, ranks=8, modes=modes, solver=solver)
        assert called[-1] == (shape, 8)
        error = float((small[0].weight - model[0].weight).detach().norm() / model[0].weight.detach().norm())
        assert small.decomp_plan["0"].error == pytest.approx(error, abs=1e-5)
    assert tensorly.get_backend() == "numpy"


def test_options_that_a_method_does_not_have_are_an_error():
    model = nn.Sequential(nn.Conv2d(16, 24, 3))
    with pytest.raises(TypeError, match="tucker has no option blocks=: write solver="):
        decomp.plan(model, "tucker", ranks=4, blocks=2)
    with pytest.raises(TypeError, match="tensor_train has no option modes="):
        decomp.plan(model, "tensor_train", ranks=4, modes=2)
    with pytest.raises(ValueError, match=r"modes=5: write 3 .* or 4"):
        decomp.cp(model, ranks=4, modes=5)
    with pytest.raises(
        ValueError, match=r"fold='rows' is unknown: write one of \['channel', 'input', 'spatial'\]"
    ):
        decomp.svd(model, ranks=4, fold="rows")
    with pytest.raises(ValueError, match="blocks=0: write an int of at least 1"):
        decomp.block_term(model, ranks=4, blocks=0)


@pytest.mark.parametrize(
    "name", ["cp", "block_term", "flattened", "separable_channelwise", "shared_bank", "monochromatic"]
)
def test_without_a_spectrum_a_spectral_rule_costs_no_more_than_its_tucker(name):
    dense = nn.Conv2d(24, 32, 3, padding=1)
    kernels = torch.einsum("ta,abij,sb->tsij", torch.randn(32, 5), torch.randn(5, 4, 3, 3), torch.randn(24, 4))
    with_weight(dense, (kernels + 0.05 * torch.randn(32, 24, 3, 3))[None])
    x = torch.randn(1, 24, 8, 8)
    rule = decomp.ranks.vbmf(pure=True)
    reference = decomp.plan(dense, ranks=rule, example_inputs=x)[""]
    choice = decomp.plan(dense, name, ranks=rule, example_inputs=x)[""]
    assert reference.ranks == (5, 4)
    if name in ("flattened", "separable_channelwise", "shared_bank"):
        assert (
            choice.reason == "more expensive at every rank than the Tucker-2 (5, 4) of vbmf(weaken=1.0, pure=True)"
        )
        return
    assert choice.params.after <= reference.params.after
    assert choice.macs.after <= reference.macs.after
    more = tuple(rank + (place > 0 or len(choice.ranks) == 1) for place, rank in enumerate(choice.ranks))
    beyond = decomp.plan(dense, name, ranks=more, example_inputs=x)[""]
    assert beyond.params.after > reference.params.after or beyond.macs.after > reference.macs.after


@pytest.mark.parametrize("name", ["cp", "block_term"])
def test_an_error_bound_holds_where_errors_are_fitted(name):
    dense = nn.Conv2d(16, 24, 3)
    plan = decomp.plan(dense, name, ranks=decomp.ranks.error(0.75))
    assert plan[""].ranks, plan[""].reason
    assert plan[""].error <= 0.75
    small = plan.apply(dense)
    error = float((small.weight - dense.weight).detach().norm() / dense.weight.detach().norm())
    assert plan[""].error == pytest.approx(error, abs=1e-5)
    candidate = plan._candidates[""][0]
    ranks = plan[""].ranks
    fewer = (ranks[0] - 3,) if name == "cp" else (ranks[0], ranks[1] - 2, ranks[2] - 2)
    assert candidate.error(fewer) > 0.75


def test_a_fit_is_used_again_unless_the_weight_has_changed(monkeypatch):
    module, calls = sys.modules["decomp.methods.cp"], []
    solver = module.fit_cp
    monkeypatch.setattr(module, "fit_cp", lambda *given, **more: calls.append(1) or solver(*given, **more))
    dense = nn.Conv2d(8, 12, 3)
    plan = decomp.plan(dense, "cp", ranks=6)
    plan.apply(dense)
    assert len(calls) == 1
    assert "energy of its terms x" in plan[""].note
    dense.weight.data.mul_(2)
    small = plan.apply(dense)
    assert len(calls) == 2
    assert float((small.weight - dense.weight).detach().norm() / dense.weight.detach().norm()) < 0.9
    with pytest.raises(ValueError, match="the weight has changed since the plan was made: make a new plan"):
        plan.with_ranks("", 7)


def test_int_ranks_of_block_terms_leave_the_blocks_alone():
    dense = nn.Conv2d(24, 32, 3)
    assert decomp.plan(dense, "block_term", ranks=4)[""].ranks == (4, 4, 4)
    assert decomp.plan(dense, "block_term", ranks=4, blocks=2)[""].ranks == (2, 4, 4)
    assert decomp.plan(dense, "block_term", ranks=(3, 5, 4))[""].ranks == (3, 5, 4)


def test_planted_blocks_are_found_and_do_not_cancel():
    left, right = torch.randn(24, 3, 4, dtype=torch.float64), torch.randn(20, 3, 3, dtype=torch.float64)
    core = torch.randn(3, 4, 3, 9, dtype=torch.float64)
    tensor = torch.einsum("tna,nabj,snb->tsj", left, core, right)
    blocks, squared_error, degeneracy = fit_block_term(tensor, 3, 4, 3)
    assert squared_error / float(tensor.square().sum()) < 1e-6
    assert squared_error == pytest.approx(float((tensor - blocks.dense()).square().sum()), abs=1e-12)
    assert degeneracy < 5
    for factor in (blocks.left, blocks.right):
        gram = torch.einsum("sna,snb->nab", factor, factor)
        torch.testing.assert_close(gram, torch.eye(gram.shape[-1], dtype=gram.dtype).expand_as(gram))


def test_block_terms_beat_tucker_where_the_kernel_is_made_of_them():
    left, right = torch.randn(32, 4, 4, dtype=torch.float64), torch.randn(32, 4, 4, dtype=torch.float64)
    core = torch.randn(4, 4, 4, 3, 3, dtype=torch.float64)
    dense = with_weight(
        nn.Conv2d(32, 32, 3), torch.einsum("tna,nabij,snb->tsij", left, core, right)[None]
    ).double()
    block = decomp.plan(dense, "block_term", ranks=(4, 4, 4))[""]
    tucker = decomp.plan(dense, "tucker", ranks=(11, 10))[""]
    assert block.params.after <= tucker.params.after
    assert block.error < 0.05 < tucker.error


def test_monochromatic_finds_planted_colours():
    colours = torch.randn(3, 5, dtype=torch.float64)
    cluster = torch.arange(30) % 3
    filters = torch.randn(30, 7, 7, dtype=torch.float64)
    kernels = torch.einsum("ts,tij->tsij", colours[cluster], filters)
    dense = with_weight(nn.Conv2d(5, 30, 7).double(), kernels[None])
    small = factorized("monochromatic", dense, (3,))
    torch.testing.assert_close(small.weight, dense.weight, rtol=0, atol=1e-10)
    found = small.colour.index
    assert all(len(found[cluster == each].unique()) == 1 for each in range(3))
    assert len(found.unique()) == 3


def test_tensor_train_error_is_within_its_bound_and_near_the_best():
    """Oseledets 2011: within sqrt(3) of the best, which is at least the largest tail of an unfolding."""
    dense = nn.Conv2d(8, 12, 3, dtype=torch.float64)
    analysis = METHODS["tensor_train"].analyse(group_kernels(dense).detach())
    tails = [s.values[0] ** 2 for s in analysis.spectra]
    for ranks in [(2, 5, 3), (4, 9, 6), (8, 10, 12), (3, 24, 2)]:
        parts = [float(tail[rank:].sum()) for tail, rank in zip(tails, ranks, strict=True)]
        squared = analysis.squared_error(ranks)
        assert max(parts) - 1e-9 <= squared <= sum(parts) + 1e-9


def test_asymmetric_with_full_last_rank_is_the_spatial_svd():
    dense = nn.Conv2d(8, 12, 3, dtype=torch.float64)
    spatial = factorized("svd_spatial", dense, (6,)).dense_weight()
    torch.testing.assert_close(
        factorized("asymmetric", dense, (6, 12)).dense_weight(), spatial, rtol=0, atol=1e-10
    )


def test_families_name_rows_of_the_table():
    assert method_named("svd", {"fold": "spatial"}) is METHODS["svd_spatial"]
    assert method_named("separable", {"scheme": "channelwise"}) is METHODS["separable_channelwise"]
    assert method_named("cp", {"modes": 4}) is METHODS["cp4"]
    for name in METHODS:
        plan = decomp.plan(nn.Sequential(nn.Conv2d(16, 16, 3), nn.Linear(16, 16)), METHODS[name], ranks=2)
        again = decomp.Plan.from_json(plan.to_json())
        assert {again.method_of(layer).name for layer in again if again[layer].ranks} <= {name, "svd"}
        assert np.isfinite([choice.error for choice in plan.values()]).all()


SMALL = [
    *(nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3), nn.Conv2d(8, 2, (1, 3)), nn.Conv2d(6, 9, (3, 5), groups=3)),
    *(nn.Conv3d(3, 4, (1, 3, 3)), nn.ConvTranspose2d(3, 5, 3), nn.Conv1d(3, 4, 5), nn.Conv2d(4, 4, 3, groups=2)),
]


@pytest.mark.parametrize("dense", SMALL, ids=str)
def test_listed_ranks_are_within_the_limits_and_their_factors_fit(dense):
    dense = dense.double()
    kernels = group_kernels(dense).detach()
    for name, method in METHODS.items():
        if method.why_not(dense):
            continue
        limits, analysis = method.limits(kernels), method.analyse(kernels)
        assert (analysis.ranks >= 1).all(), name
        assert (analysis.ranks <= np.array(limits)).all(), name
        rows = np.unique(np.linspace(0, len(analysis.ranks) - 1, 3).astype(int))
        for ranks in analysis.ranks[rows].tolist():
            layer = factorized(name, dense, tuple(ranks))
            error = float((layer.weight - dense.weight).detach().norm() / dense.weight.detach().norm())
            assert error <= analysis.error(tuple(ranks)) + 2e-7, (name, ranks)
        for rule in (decomp.ranks.params(0.5), decomp.ranks.energy(0.5), "vbmf"):
            plan = decomp.plan(dense, method, ranks=rule)
            if plan[""].ranks:
                plan.apply(dense)


def test_the_shared_bank_is_exact_at_its_limit_with_groups():
    dense = nn.Conv2d(2, 2, (3, 5), groups=2, dtype=torch.float64)
    (most,) = METHODS["shared_bank"].limits(group_kernels(dense))
    weight = factorized("shared_bank", dense, (most,)).dense_weight()
    torch.testing.assert_close(weight, dense.weight, rtol=0, atol=1e-10)


def test_plans_of_every_method_can_be_pickled_and_copied():
    model = nn.Sequential(nn.Conv2d(16, 24, 3), nn.Linear(30, 30))
    for method in METHODS.values():
        plan = decomp.plan(model, method, ranks=2)
        again = pickle.loads(pickle.dumps(plan))
        assert dict(again) == dict(plan)
        assert copy.deepcopy(plan).with_ranks("1", 1)["1"].ranks == ((1,) if plan["1"].method != "dense" else ())


def test_a_changed_weight_makes_a_fitted_plan_stale():
    for name in ("cp", "tensor_train"):
        dense = nn.Conv2d(16, 24, 3)
        plan = decomp.plan(dense, name, ranks=8)
        dense.weight.data.mul_(2)
        for ranks in (8, 9, *(["vbmf"] if name == "cp" else [])):
            with pytest.raises(ValueError, match="the weight has changed since the plan was made"):
                plan.with_ranks("", ranks)


def test_a_tuple_is_for_matrices_and_methods_of_so_many_ranks():
    model = nn.Sequential(nn.Conv2d(24, 32, 3), nn.Conv2d(24, 32, 1))
    assert decomp.plan(model, "tucker", ranks=(16, 8))["1"].ranks == (8,)
    with pytest.raises(ValueError, match=r"ranks=\(16, 8\) has 2 entries, 1 are needed"):
        decomp.plan(model, "cp", ranks=(16, 8))


def test_options_next_to_a_plan_are_refused():
    model = nn.Sequential(nn.Conv2d(24, 32, 3))
    plan = decomp.plan(model, ranks=8)
    with pytest.raises(ValueError, match="a Plan already determines the methods: leave modes= out"):
        decomp.cp(model, ranks=plan, modes=4)


def test_solvers_do_not_depend_on_the_default_device():
    dense = nn.Conv2d(8, 8, 3)
    kernels = group_kernels(dense).detach()
    fitting = {name: small_ranks(name, dense) for name in METHODS if not METHODS[name].why_not(dense)}
    expected = {name: (ranks, METHODS[name].factors(kernels, ranks)) for name, ranks in fitting.items()}
    assert len(expected) == len(METHODS) - len({"svd", "kronecker", "svd_rnn_input", "svd_rnn"})
    with torch.device("meta"):
        made = {name: METHODS[name].factors(kernels, ranks) for name, (ranks, _) in expected.items()}
    for name, (_, factors) in expected.items():
        ours, theirs = (
            [each for each in tree_leaves(found) if isinstance(each, torch.Tensor)]
            for found in (made[name], factors)
        )
        assert ours
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), name


def test_multiples_of_eight_use_the_budget():
    core = (
        torch.randn(128, 64, 3, 3)
        / torch.maximum(torch.arange(1.0, 129)[:, None], torch.arange(1.0, 65))[..., None, None]
    )
    dense = with_weight(nn.Conv2d(64, 128, 3), core[None])
    plan = decomp.plan(dense, params=0.3, methods=["tensor_train"], multiple_of=8)
    assert all(rank % 8 == 0 for rank in plan[""].ranks)
    assert plan.params.after > 0.2 * plan.params.before

"""Kronecker sums against NumPy's kron, Eckart and Young on the rearranged matrix, and what is built."""

import json

import numpy as np
import pytest
import torch
from layer_cases import with_weight
from torch import nn

import decomp
from decomp.layers import KroneckerLinear, group_kernels
from decomp.layers.kronecker import split_sizes
from decomp.methods import METHODS
from decomp.methods.kronecker import factors, rearranged

KRONECKER = METHODS["kronecker"]
SHAPES = [(12, 20), (20, 12), (16, 16), (7, 12), (12, 5), (1, 6), (30, 1)]


def kron_sum(left, right):
    return sum(np.kron(a, b) for a, b in zip(left.numpy(), right.numpy(), strict=True))


def linear(shape, *, bias=True):
    return nn.Linear(shape[1], shape[0], bias=bias, dtype=torch.float64)


def factorized(dense, rank):
    return KroneckerLinear.from_factors(dense, KRONECKER.factors(group_kernels(dense).detach(), (rank,)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_of_all_ranks_are_those_of_sums_that_numpy_builds(shape):
    kernels = torch.randn(1, *shape, dtype=torch.float64)
    analysis = KRONECKER.analyse(kernels)
    (most,) = KRONECKER.limits(kernels)
    assert analysis.ranks.ravel().tolist() == list(range(1, most + 1))
    for rank in range(1, most + 1):
        built = kron_sum(*factors(kernels, (rank,)))
        lost = float(((kernels[0].numpy() - built) ** 2).sum())
        assert analysis.squared_error((rank,)) == pytest.approx(lost, abs=1e-12 * analysis.energy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_sum_of_as_many_products_is_nearer(shape):
    """The norm of the rearranged difference is that of the difference; beside that, alternating least squares."""
    weight = torch.randn(1, *shape, dtype=torch.float64)
    t1, s1, t2, s2 = split_sizes(*shape)
    rank = min(2, *KRONECKER.limits(weight))
    left, right = (torch.randn(rank, *size, dtype=torch.float64) for size in ((t1, s1), (t2, s2)))
    difference = weight - torch.from_numpy(kron_sum(left, right))[None]
    flat = rearranged(weight)[0] - left.flatten(1).T @ right.flatten(1)
    assert float(flat.norm()) == pytest.approx(float(difference.norm()), rel=1e-13)
    for _ in range(200):
        a, b = left.flatten(1).T, right.flatten(1)
        a = torch.linalg.lstsq(b.T, rearranged(weight)[0].T).solution.T
        b = torch.linalg.lstsq(a, rearranged(weight)[0]).solution
        left, right = a.T.reshape(rank, t1, s1), b.reshape(rank, t2, s2)
    by_als = float((weight[0] - torch.from_numpy(kron_sum(left, right))).square().sum())
    ours = KRONECKER.analyse(weight).squared_error((rank,))
    assert ours <= by_als * (1 + 1e-12) + 1e-24
    assert ours == pytest.approx(by_als, rel=0.05, abs=1e-20)


def test_planted_sums_are_recovered():
    left, right = torch.randn(3, 10, 2, dtype=torch.float64), torch.randn(3, 2, 10, dtype=torch.float64)
    assert split_sizes(20, 20) == (10, 2, 2, 10)
    weight = torch.from_numpy(kron_sum(left, right))[None]
    built = kron_sum(*factors(weight, (3,)))
    assert np.abs(built - weight[0].numpy()).max() < 1e-12 * float(weight.abs().max())
    assert KRONECKER.analyse(weight).error((2,)) > 0.05


@pytest.mark.parametrize("shape", [(48, 64), (96, 384), (384, 96), (31, 60), (60, 31), (10, 512)], ids=str)
def test_the_split_has_the_fewest_params_then_the_fewest_macs(shape):
    """Against all pairs of products: no dimension that has divisors goes to one side whole."""

    def halves(number):
        every = [(a, b) for a in range(1, number + 1) for b in range(1, number + 1) if a * b == number]
        return [pair for pair in every if 1 not in pair] or every

    outputs, inputs = shape
    every = [(t1, s1, t2, s2) for t1, t2 in halves(outputs) for s1, s2 in halves(inputs)]
    costs = {(t1 * s1 + t2 * s2, inputs * t2 + s1 * outputs) for t1, s1, t2, s2 in every}
    mirrored = {(t1 * s1 + t2 * s2, inputs * t1 + s2 * outputs) for t1, s1, t2, s2 in every}
    assert costs == mirrored, "the other order of the factors would be cheaper somewhere"
    t1, s1, t2, s2 = split_sizes(*shape)
    assert (t1, s1, t2, s2) in every
    assert (t1 * s1 + t2 * s2, inputs * t2 + s1 * outputs) == min(costs)


def test_half_of_the_params_of_a_square_layer_can_be_kept():
    """Squarer sizes would need more MACs than the dense layer there, and a budget could not be spent."""
    plan = decomp.plan(nn.Linear(96, 96), params=0.5, methods=["kronecker"])
    assert plan.params.after > 0.48 * plan.params.before


def test_a_matrix_that_cannot_be_split_is_refused():
    dense = nn.Linear(7, 5)
    assert KRONECKER.why_not(dense) == (
        "kronecker splits outputs or inputs into two factors, and neither 5 nor 7 has any"
    )
    with pytest.raises(ValueError, match="neither 5 outputs nor 7 inputs are a product of two numbers above 1"):
        KroneckerLinear.like(dense, (2,))
    assert decomp.plan(nn.Linear(31, 37), "kronecker", ranks=2)[""].method == "svd"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_runs_the_product_for_any_number_of_axes(shape, bias):
    dense = linear(shape, bias=bias)
    small = factorized(dense, min(2, *KRONECKER.limits(group_kernels(dense))))
    assert (small.bias is None) == (not bias)
    expected = nn.functional.linear
    for axes in ((), (3,), (2, 3), (2, 1, 4), (0, 3)):
        x = torch.randn(*axes, shape[1], dtype=torch.float64)
        torch.testing.assert_close(small(x), expected(x, small.dense_weight(), dense.bias), rtol=0, atol=1e-12)
    full = factorized(dense, *KRONECKER.limits(group_kernels(dense)))
    torch.testing.assert_close(full.dense_weight(), dense.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(full.to_dense()(x), dense(x), rtol=0, atol=1e-12)


def test_costs_are_those_of_the_formulas():
    dense = nn.Linear(64, 48)
    t1, s1, t2, s2 = split_sizes(48, 64)
    plan = decomp.plan(dense, "kronecker", ranks=3, example_inputs=torch.zeros(5, 64))
    assert plan[""].params.after == 3 * (t1 * s1 + t2 * s2) + 48
    assert plan[""].macs.after == 5 * 3 * (64 * t2 + 48 * s1)
    assert plan[""].costs["bytes"].after == 4 * plan[""].params.after


def test_flags_gradients_and_round_trips():
    dense = linear((12, 20)).requires_grad_(False)
    dense.bias.requires_grad_(True)
    small = factorized(dense, 2)
    assert {name: p.requires_grad for name, p in small.named_parameters()} == {
        "reduce.weight": False,
        "expand.weight": False,
        "shift.bias": True,
    }
    parameters = {name: p.detach().requires_grad_() for name, p in small.named_parameters()}
    x = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(small, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))
    exported = torch.export.export(small, (x.detach(),)).module()
    torch.testing.assert_close(exported(x), small(x))
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 24, bias=False))
    compressed = decomp.plan(model, "kronecker", ranks=2).apply(model)
    plan = decomp.Plan.from_json(json.dumps(json.loads(compressed.decomp_plan.to_json())))
    again = plan.build(nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 24, bias=False)))
    again.load_state_dict(compressed.state_dict())
    x = torch.randn(2, 48)
    torch.testing.assert_close(again(x), compressed(x), rtol=0, atol=0)
    assert [type(layer).__name__ for layer in decomp.densify(compressed)] == ["Linear", "ReLU", "Linear"]


def test_the_conv1d_of_hugging_face_is_a_matrix_as_well():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    dense = transformers.Conv1D(24, 36)
    torch.nn.init.normal_(dense.bias)
    small = decomp.plan(dense, "kronecker", ranks=2).apply(dense)
    x = torch.randn(2, 5, 36)
    expected = x @ small.dense_weight() + dense.bias
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-5)
    assert small.dense_weight().shape == dense.weight.shape


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 48), (48, 24)])
def test_with_data_the_error_of_the_output_is_the_true_one(inputs, outputs):
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Linear(inputs, outputs))
    data = [torch.randn(64, inputs) @ torch.randn(inputs, inputs) for _ in range(4)]
    statistics = decomp.calibrate(dense, data, held_out=False, progress=False)
    small = decomp.plan(dense, "kronecker", ranks=2, data=statistics).apply(dense)
    kept = decomp.plan(dense, "kronecker", ranks=2).apply(dense)
    torch.testing.assert_close(small[0].dense_weight(), kept[0].dense_weight(), rtol=0, atol=1e-6)
    x = torch.cat(data).double()
    x = x - x.mean(0)
    weight, error = (
        each.detach().double() for each in (dense[0].weight, dense[0].weight - small[0].dense_weight())
    )
    expected = float((x @ error.T).norm() / (x @ weight.T).norm())
    if (
        outputs >= inputs
    ):  # else only the moments of the outputs are known, and the error of the weight stands for it
        assert small.decomp_plan["0"].output_error == pytest.approx(expected, rel=1e-4)


def test_a_budget_takes_it_where_the_weight_is_a_sum_of_products():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.copy_(torch.kron(torch.randn(32, 2), torch.randn(2, 32)) / 8)
        model[2].weight.copy_(torch.randn(64, 4) @ torch.randn(4, 64) / 8)
    plan = decomp.compress(model, params=0.2, methods=["svd", "kronecker"]).decomp_plan
    assert (plan["0"].method, plan["2"].method) == ("kronecker", "svd")
    assert plan.params.after <= 0.2 * plan.params.before
    assert max(choice.error for choice in plan.values()) < 1e-5


def test_it_wins_on_sums_of_products_alone():
    """Mean relative errors over ten 64 x 64 matrices at a quarter of the parameters; its page quotes them."""

    def normal(*size):
        return torch.randn(size, dtype=torch.float64)

    assert split_sizes(64, 64) == (32, 2, 2, 32)
    kinds = {
        "random": lambda: normal(64, 64),
        "rank 8": lambda: normal(64, 8) @ normal(8, 64),
        "8 products": lambda: sum(torch.kron(normal(32, 2), normal(2, 32)) for _ in range(8)),
    }
    errors = {name: [] for name in kinds}
    for name, make in kinds.items():
        for _ in range(10):
            dense = with_weight(linear((64, 64), bias=False), make()[None])
            plans = [decomp.plan(dense, method, ranks=8)[""] for method in ("svd", "kronecker")]
            assert all(plan.params == (64 * 64, 64 * 64 / 4) for plan in plans)
            errors[name].append([plan.error for plan in plans])
    means = {name: np.mean(pairs, 0).tolist() for name, pairs in errors.items()}
    assert means["random"] == pytest.approx([0.79, 0.79], abs=0.01)
    assert means["rank 8"] == pytest.approx([0.0, 0.61], abs=0.02)
    assert means["8 products"] == pytest.approx([0.60, 0.0], abs=0.02)


def test_budgets_count_the_whole_metric_of_the_outputs():
    """With gradients: an error of 1 counts what it counts for the SVD of the layer, wide or tall."""
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    data = [torch.randn(64, 24, dtype=torch.float64) for _ in range(4)]
    statistics = decomp.calibrate(model, data, loss="output", progress=False)
    plan = decomp.plan(model, params=0.6, methods=["svd", "kronecker"], data=statistics)
    for name in ("0", "2"):
        energies = {each.method.name: each.analysis.energy for each in plan.candidates[name]}
        assert energies["kronecker"] == pytest.approx(energies["svd"], rel=1e-9)
    assert plan.params.after <= 0.6 * plan.params.before
    assert torch.isfinite(plan.apply(model)(data[0])).all()


def test_repair_says_that_it_leaves_the_layer_alone():
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24))
    data = [torch.randn(64, 24) for _ in range(4)]
    small = decomp.plan(model, "kronecker", ranks={"0": 2}, data=data).apply(model)
    small = decomp.plan(small, "svd", ranks={"2": 4}, data=data).apply(small)
    before = {name: value.clone() for name, value in small[0].state_dict().items()}
    for nonlinear in (False, True):
        report = decomp.repair(small, model, data, nonlinear=nonlinear, progress=False)
        assert report["0"].note == "its last factor mixes no outputs: not refitted"
        assert report["2"].error_after <= report["2"].error_before
        assert all(torch.equal(value, before[name]) for name, value in small[0].state_dict().items())


def test_gpt2_runs_with_its_conv1d_as_sums_of_products():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_positions": 16, "n_embd": 48, "n_layer": 1, "n_head": 4, "vocab_size": 120}
    config = transformers.GPT2Config(bos_token_id=1, eos_token_id=2, **sizes)
    model = transformers.GPT2LMHeadModel(config).eval()
    batch = {"input_ids": torch.randint(3, 120, (2, 12))}
    plan = decomp.plan(model, "kronecker", ranks=3, example_inputs=batch)
    small = plan.apply(model)
    layers = [layer for layer in small.modules() if isinstance(layer, KroneckerLinear)]
    assert len(layers) == 4
    assert all(type(layer.to_dense()).__name__ == "Conv1D" for layer in layers)
    expected = decomp.densify(small)(**batch).logits
    torch.testing.assert_close(small(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert decomp.profile(small, batch).total.macs == plan.macs.after


def test_layerwise_fine_tuning_lowers_the_error():
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 24))
    data = [torch.randn(64, 24) for _ in range(8)]
    small = decomp.plan(model, "kronecker", ranks=2).apply(model)
    report = decomp.finetune_layerwise(small, model, data, progress=False)
    assert all(layer.error_after < layer.error_before for layer in report.values())

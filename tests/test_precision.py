"""Large float32 weights: float32 products give the errors, ranks and factors of float64."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import decomp
from decomp.linalg import leading_rows
from decomp.methods import METHODS
from decomp.network.flops import _convolution_shape
from decomp.ranks.spectral import evbmf_rank

ROWS, COLUMNS = 600, 800


def with_spectrum(values, rows=ROWS, columns=COLUMNS):
    values = torch.as_tensor(values, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))[0] for n in (rows, columns))
    return (left * values) @ right.T


def noise(rows=ROWS, columns=COLUMNS):
    return torch.randn(rows, columns, dtype=torch.float64) / columns**0.5


INDEX = torch.arange(1, ROWS + 1.0, dtype=torch.float64)
WEIGHTS = {
    "noise": noise,
    "planted": lambda: with_spectrum(torch.linspace(9, 3, 40)) + noise(),
    "weakly planted": lambda: with_spectrum(torch.linspace(2.5, 1.5, 20)) + noise(),
    "power law": lambda: with_spectrum(INDEX**-1),
    "steep power law": lambda: with_spectrum(INDEX**-3),
    "one large value": lambda: with_spectrum([1e4]) + noise(),
    "exactly of rank 40": lambda: with_spectrum(torch.linspace(9, 3, 40)),
    "rank 40 in bfloat16": lambda: with_spectrum(torch.linspace(9, 3, 40)).bfloat16(),
    "bfloat16": lambda: (with_spectrum(torch.linspace(9, 3, 40)) + noise()).bfloat16(),
}
RANKS = (1, 10, 39, 40, 41, 70, 200, 590)


@pytest.fixture(params=WEIGHTS)
def weight(request):
    return WEIGHTS[request.param]().float()


def test_planned_errors_are_those_of_numpy_in_float64(weight):
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    analysis = METHODS["svd"].analyse(weight[None])
    for rank in RANKS:
        exact = np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())
        assert analysis.error((rank,)) == pytest.approx(exact, rel=1e-3, abs=1e-7)


def test_rules_choose_the_ranks_that_they_choose_from_numpys_spectrum(weight):
    exact = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    values = METHODS["svd"].analyse(weight[None]).spectra[0].values[0]
    assert evbmf_rank(values, *weight.shape) == evbmf_rank(exact, *weight.shape)
    for share in (0.5, 0.9, 0.99, 0.9999, 0.999999):
        ranks = [int(np.searchsorted((each**2).cumsum(), share * (each**2).sum())) for each in (values, exact)]
        assert ranks[0] == ranks[1]


@pytest.mark.parametrize("known", [False, True], ids=["alone", "from the plan"])
def test_the_error_of_the_factors_is_within_a_thousandth_of_the_least(weight, known):
    exact = weight.double()
    values = np.linalg.svd(exact.numpy(), compute_uv=False)
    analysis = METHODS["svd"].analyse(weight[None])
    for rank in RANKS:
        options = {"bases": analysis.bases((rank,))} if known else {}
        left, right = METHODS["svd"].factors(weight[None], (rank,), **options)
        error = float((exact - left[0] @ right[0]).norm() / exact.norm())
        least = np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())
        assert least * (1 - 1e-5) - 1e-8 <= error <= least * (1 + 1e-3) + 3e-7


def test_a_tall_matrix_and_a_wide_one_have_the_same_error():
    weight = WEIGHTS["planted"]().float()
    pairs = [METHODS["svd"].factors(each[None], (30,)) for each in (weight, weight.T)]
    errors = [
        float((each - left[0] @ right[0]).norm())
        for each, (left, right) in zip((weight, weight.T), pairs, strict=True)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def test_factors_do_not_depend_on_the_users_settings_and_leave_random_numbers_alone():
    weight = WEIGHTS["planted"]().float()
    state = torch.get_rng_state()
    expected = leading_rows(weight, 30)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(expected, leading_rows(weight, 30))
    before = torch.get_float32_matmul_precision()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(expected, leading_rows(weight, 30))
        analysis = METHODS["svd"].analyse(weight[None])
    exact = METHODS["svd"].analyse(weight.double()[None])
    assert analysis.error((30,)) == pytest.approx(exact.error((30,)), rel=1e-6)
    torch.set_float32_matmul_precision("medium")
    try:
        left, right = METHODS["svd"].factors(weight[None], (30,))
    finally:
        torch.set_float32_matmul_precision(before)
    error = float((weight - left[0] @ right[0]).norm() / weight.double().norm())
    assert error == pytest.approx(exact.error((30,)), rel=1e-9)


def kernel(outputs, inputs, groups=1):
    core = torch.randn(groups, outputs, inputs, 3, 3)
    rows, columns = torch.arange(1, outputs + 1.0), torch.arange(1, inputs + 1.0)
    decaying = core * torch.maximum(rows[:, None], columns[None])[None, :, :, None, None] ** -0.6
    return decaying + 0.02 * torch.randn_like(core)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ranks", [(8, 20), (60, 40), (192, 40), (60, 160)])
def test_tucker_in_float32_has_the_error_of_float64(groups, ranks):
    single = kernel(192, 160, groups)
    double = single.double()
    analysis = METHODS["tucker"].analyse(single)
    exact = METHODS["tucker"].analyse(double)
    assert analysis.error(ranks) == pytest.approx(exact.error(ranks), rel=1e-5)
    errors = []
    for kernels, options in ((single, {"bases": analysis.bases(ranks)}), (single, {}), (double, {})):
        core, (left, right) = METHODS["tucker"].factors(kernels, ranks, **options)
        rebuilt = torch.einsum("gta,gab...,gsb->gts...", left, core, right)
        errors.append(float((double - rebuilt).norm() / double.norm()))
    assert max(errors[:2]) <= errors[2] * (1 + 3e-4)
    assert errors[0] <= exact.error(ranks) * (1 + 1e-6)


def test_tucker_of_an_exactly_low_rank_kernel_has_no_error():
    core, left, right = torch.randn(20, 16, 3, 3), torch.randn(192, 20), torch.randn(160, 16)
    single = torch.einsum("ta,ab...,sb->ts...", left.double(), core.double(), right.double()).float()[None]
    analysis = METHODS["tucker"].analyse(single)
    assert analysis.error((20, 16)) < 1e-6
    assert analysis.error((19, 16)) > 1e-3
    core, (left, right) = METHODS["tucker"].factors(single, (20, 16), bases=analysis.bases((20, 16)))
    rebuilt = torch.einsum("gta,gab...,gsb->gts...", left, core, right)
    assert float((single.double() - rebuilt).norm() / single.norm()) < 1e-6


def network():
    return nn.Sequential(nn.Linear(ROWS, COLUMNS), nn.Unflatten(1, (8, 10, 10)), nn.Conv2d(8, 96, 3))


def counted(monkeypatch):
    calls = []
    for name in ("eigh", "eigvalsh", "svd", "svdvals"):
        original = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *a, f=original, **k: (calls.append(tuple(a[0].shape)), f(*a, **k))[1]
        )
    return calls


@pytest.mark.parametrize("ranks", [16, (16, 4), decomp.ranks.params(0.2)])
def test_applying_a_plan_decomposes_nothing_as_large_as_a_layer_again(monkeypatch, ranks):
    dense = network()
    plan = decomp.plan(dense, ranks=ranks)
    calls = counted(monkeypatch)
    small = plan.apply(dense)
    assert plan["0"].ranks
    assert not [shape for shape in calls if shape[-1] >= ROWS]
    assert small.decomp_plan["0"].error == plan["0"].error


def test_kept_bases_serve_smaller_ranks_and_larger_ones_are_computed():
    dense = network()
    plan = decomp.plan(dense, ranks=16)
    for rank in (8, 16, 24):
        small = plan.with_ranks("0", rank).apply(dense)
        difference = (small[0].dense_weight() - dense[0].weight).detach().double()
        measured = float(difference.norm() / dense[0].weight.detach().double().norm())
        assert measured == pytest.approx(plan.with_ranks("0", rank)["0"].error, rel=1e-3)


def test_bases_of_a_weight_that_has_changed_since_are_not_used():
    dense = network()
    plan = decomp.plan(dense, ranks=16)
    with torch.no_grad():
        dense[0].weight.copy_(WEIGHTS["exactly of rank 40"]().T[:, :ROWS])
    small = plan.apply(dense)
    values = np.linalg.svd(dense[0].weight.detach().double().numpy(), compute_uv=False)
    least = np.sqrt((values[16:] ** 2).sum() / (values**2).sum())
    assert small.decomp_plan["0"].error == pytest.approx(least, rel=1e-3)
    assert "changed" in small.decomp_plan["0"].note


def test_a_plan_keeps_the_leading_columns_that_it_chose_and_a_budget_none():
    budgeted = decomp.plan(network(), params=0.5)
    assert budgeted["0"].ranks
    for each in budgeted.candidates["0"]:
        assert not each.weight_analysis.bases((1,))
    plan = decomp.plan(network(), ranks=16)
    kept = plan.candidates["0"][0].weight_analysis.bases((16,))
    assert [tuple(each.shape) for each in kept] == [(1, ROWS, 16)]
    assert kept[0].untyped_storage().nbytes() == kept[0].numel() * kept[0].element_size()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 5, stride=3, padding=2),
        nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(0, 3), dilation=(2, 1), groups=2),
        nn.Conv3d(4, 6, 3, padding=1),
        nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1, output_padding=2),
        nn.ConvTranspose2d(4, 6, (3, 5), stride=(2, 3), dilation=(1, 2), groups=2, output_padding=(1, 0)),
    ],
)
def test_the_shape_of_a_convolution_is_that_of_torch(layer):
    axes = len(layer.kernel_size)
    for size in (13, 20):
        x = torch.randn(2, 4, *range(size, size + axes))
        options = (
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.transposed,
            layer.output_padding,
            layer.groups,
        )
        assert _convolution_shape(x, layer.weight, layer.bias, *options) == list(layer(x).shape)


def test_the_first_plan_of_a_process_does_not_import_torchs_compiler():
    code = """
import sys, decomp
from torch import nn
model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1), nn.ConvTranspose2d(16, 8, 3), nn.Linear(20, 16))
assert decomp.plan(model, ranks=2).apply(model)
print([m for m in ("sympy", "torch._dynamo", "torch._inductor") if m in sys.modules])
"""
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_grouped_matrices_are_decomposed_group_by_group():
    weight = torch.stack([WEIGHTS[name]().float() for name in ("planted", "power law")])
    left, right = METHODS["svd"].factors(weight, (30,))
    for group in range(2):
        alone = METHODS["svd"].analyse(weight[group : group + 1])
        error = float((weight[group] - left[group] @ right[group]).norm() / weight[group].norm())
        assert error == pytest.approx(alone.error((30,)), rel=1e-3)

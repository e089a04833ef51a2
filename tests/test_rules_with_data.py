"""Rank rules with data: which ones read the outputs of a layer, and which always read its weight."""

from dataclasses import replace

import pytest
import torch
from layer_cases import SPATIAL
from torch import nn

import decomp
from decomp.methods import METHODS
from decomp.ranks import energy, gavish_donoho, mdl, vbmf

QUIET = {"progress": False}
WITHOUT_SPECTRA = [
    name for name in SPATIAL if not METHODS[name].analyse(torch.randn(1, 6, 4, 3, 3, dtype=torch.float64)).spectra
]


def few_directions():
    """A convolution with a planted spectrum, and inputs with most of their energy in few directions."""
    model = nn.Sequential(nn.Conv2d(12, 20, 3, padding=1)).eval()
    with torch.no_grad():
        planted = torch.einsum("tr,rsij->tsij", torch.randn(20, 3), torch.randn(3, 12, 3, 3))
        model[0].weight.copy_(planted / planted.std() + torch.randn_like(planted))
    mixing = torch.linalg.qr(torch.randn(12, 12))[0] * torch.logspace(0, -2, 12)
    return model, [torch.einsum("st,bthw->bshw", mixing, torch.randn(8, 12, 6, 6)) for _ in range(4)]


def test_there_are_methods_without_spectra():
    assert {"cp", "block_term"} <= set(WITHOUT_SPECTRA)


@pytest.mark.parametrize("method", WITHOUT_SPECTRA)
def test_energy_of_the_outputs_bounds_methods_without_spectra_by_the_tucker_of_the_outputs(method):
    model, data = few_directions()
    rule = energy(0.9, pure=True)
    statistics = decomp.calibrate(model, data, **QUIET)
    tucker, by_weight = (
        decomp.plan(model, ranks=rule, data=d, example_inputs=data[0], **QUIET)["0"] for d in (statistics, None)
    )
    assert tucker.params.after < 0.5 * by_weight.params.after
    plan = decomp.plan(model, method, rule, data=statistics, **QUIET)
    choice, (candidate,) = plan["0"], plan.candidates["0"]
    assert choice.params.after <= tucker.params.after or not choice.ranks
    within = [
        params
        for params, macs in zip(candidate.grid.costs["params"], candidate.grid.costs["macs"], strict=True)
        if params <= tucker.params.after and macs <= tucker.macs.after
    ]
    assert choice.params.after == max(within, default=choice.params.before)


@pytest.mark.parametrize("method", WITHOUT_SPECTRA)
@pytest.mark.parametrize("rule", [vbmf(), gavish_donoho(), mdl()], ids=lambda rule: type(rule).__name__)
def test_rules_that_separate_noise_read_the_weight_whatever_the_data(method, rule):
    model, data = few_directions()
    with_data = decomp.plan(model, method, rule, data=data, **QUIET)["0"]
    assert with_data.ranks == decomp.plan(model, method, rule, example_inputs=data[0])["0"].ranks


def test_a_plan_from_data_says_that_its_errors_are_predictions_and_the_model_what_was_measured():
    model, data = few_directions()
    plan = decomp.plan(model, ranks=4, data=decomp.calibrate(model, data, held_out=False, **QUIET), **QUIET)
    assert "error of weight / predicted output" in " ".join(str(plan).split())
    small = plan.apply(model)
    assert "predicted" not in str(small.decomp_plan)
    x = torch.cat(data)
    with torch.no_grad():
        outputs = model(x) - model(x).mean((0, 2, 3), keepdim=True)
        error = float((small(x) - model(x)).norm() / outputs.norm())
    assert small.decomp_plan["0"].output_error == pytest.approx(error, rel=1e-4)
    assert small.decomp_plan["0"].output_error != pytest.approx(plan["0"].output_error, rel=1e-6)


@pytest.mark.parametrize("sizes", [(20, 12), (12, 20)])
def test_the_predicted_error_of_a_matrix_is_that_of_what_is_built(sizes):
    model = nn.Sequential(nn.Linear(*sizes)).double()
    data = [torch.randn(40, sizes[0], dtype=torch.float64) for _ in range(4)]
    statistics = decomp.calibrate(model, data, held_out=False, **QUIET)
    moments = {name: replace(each, shrinkage=0.0) for name, each in statistics.items()}
    plan = decomp.plan(model, ranks=5, data=decomp.Statistics(moments, statistics.example), **QUIET)
    assert plan.apply(model).decomp_plan["0"].output_error == pytest.approx(plan["0"].output_error, rel=1e-9)

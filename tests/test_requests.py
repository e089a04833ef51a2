"""A plan keeps what it was asked for; bytes are a cost like the others."""

import json
import pickle

import numpy as np
import pytest
import torch
from networks import plant_spectra
from torch import nn

import decomp
from decomp.planning.budget import Budget, Request


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(8, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 40, 3), nn.Flatten(), nn.Linear(40 * 16, 24)
    return plant_spectra(nn.Sequential(*layers)).eval()


@pytest.fixture
def image():
    return torch.zeros(1, 8, 6, 6)


def multiples_of_eight(plan):
    """Of every rank that is not full."""
    limits = {"0": (48, 8), "2": (40, 48), "4": (24,)}
    ranks = [pair for name, c in plan.items() if c.ranks for pair in zip(c.ranks, limits[name], strict=True)]
    assert ranks
    return all(rank % 8 == 0 or rank == limit for rank, limit in ranks)


def test_another_budget_is_spent_as_the_first_one(model, image):
    wish = {"objective": "sum", "multiple_of": 8, "weights": {"4": 3.0}, "methods": ["svd", "svd_channel"]}
    plan = decomp.plan(model, macs=0.5, example_inputs=image, **wish)
    assert plan.request == Request(Budget("macs", 0.5), ("svd", "svd_channel"), "sum", 8, {"4": 3.0})
    again = plan.with_budget(macs=0.3)
    assert dict(again) == dict(decomp.plan(model, macs=0.3, example_inputs=image, **wish))
    assert {choice.method for choice in again.values()} <= {"svd", "svd_channel", "dense"}
    other = plan.with_budget(params=0.4, objective="product", multiple_of=1, weights={})
    wish |= {"objective": "product", "multiple_of": 1, "weights": None}
    assert dict(other) == dict(decomp.plan(model, params=0.4, example_inputs=image, **wish))
    assert other.request.methods == ("svd", "svd_channel")


def test_the_request_survives_ranks_json_and_the_model(model, image):
    plan = decomp.plan(model, macs=0.5, example_inputs=image, multiple_of=8)
    assert multiples_of_eight(plan)
    edited = plan.with_ranks("2", (11, 13)).keep_dense("4")
    assert edited["2"].ranks == (11, 13)
    assert edited.request == plan.request
    assert multiples_of_eight(edited.with_budget(macs=0.4))
    read = decomp.Plan.from_json(plan.to_json())
    assert read.request == plan.request
    editable = decomp.plan(model, ranks=read, example_inputs=image)
    assert dict(editable) == dict(plan)
    assert dict(editable.with_budget(macs=0.4)) == dict(plan.with_budget(macs=0.4))
    assert plan.apply(model).decomp_plan.request == plan.request


def test_methods_of_a_request_are_chosen_among_again_after_json(model, image):
    methods = ["svd", "svd_channel", "tucker"]
    plan = decomp.plan(model, macs=0.6, example_inputs=image, methods=methods)
    editable = decomp.plan(model, ranks=decomp.Plan.from_json(plan.to_json()), example_inputs=image)
    for share in (0.5, 0.3, 0.2):
        assert dict(editable.with_budget(macs=share)) == dict(plan.with_budget(macs=share))


@pytest.mark.parametrize("dense_share", [0.99, 0.6])
def test_layers_that_were_dense_are_decomposed_by_the_methods_of_the_request_alone(dense_share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 36))
    plan = decomp.plan(model, params=dense_share, methods=["kronecker"])
    assert any(not choice.ranks for choice in plan.values())
    for earlier in (plan, decomp.Plan.from_json(plan.to_json())):
        again = decomp.plan(model, ranks=earlier).with_budget(params=0.3)
        assert {choice.method for choice in again.values()} == {"kronecker"}
        assert dict(again) == dict(plan.with_budget(params=0.3))


def test_a_layer_that_no_method_of_the_request_supports_says_so_again():
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Flatten(), nn.Linear(32, 16))
    plan = decomp.plan(model, params=0.9, methods=["kronecker"])
    again = decomp.plan(model, ranks=plan)
    assert again["0"].reason == plan["0"].reason == "none of ['kronecker'] supports this layer"
    assert dict(again) == dict(plan)


def test_numbers_of_numpy_are_taken_and_written_to_json(model, image):
    wish = {"multiple_of": np.int64(8), "weights": {"4": np.float32(3.0)}}
    plan = decomp.plan(model, macs=0.5, example_inputs=image, **wish)
    request = decomp.Plan.from_json(plan.to_json()).request
    assert (request.multiple_of, request.weights) == (8, {"4": 3.0})


def test_a_layer_kept_dense_stays_so_in_files_and_new_plans(model, image):
    pinned = decomp.plan(model, macs=0.5, example_inputs=image).keep_dense("2")
    read = decomp.Plan.from_json(pinned.to_json())
    for plan in (pinned, decomp.plan(model, ranks=read, example_inputs=image)):
        spent = plan.with_budget(macs=0.7)
        assert (spent["2"].ranks, spent["2"].kept_dense) == ((), True)


def test_a_layer_that_cannot_be_decomposed_keeps_its_reason_when_kept_dense():
    model = nn.Sequential(nn.Linear(16, 12), nn.Bilinear(3, 4, 5), nn.Embedding(20, 12))
    plan = decomp.plan(model, ranks=2)
    kept = plan.keep_dense("*")
    assert kept["0"].reason == "kept dense on request"
    assert [kept[name].reason for name in "12"] == [plan[name].reason for name in "12"]


def test_a_pickled_plan_keeps_its_predicted_seconds(model, image):
    plan = decomp.plan(model, seconds=10.0, example_inputs=image).with_ranks("*", 4)
    assert pickle.loads(pickle.dumps(plan)).seconds == plan.seconds


def test_plans_of_the_first_format_are_read(model, image):
    plan = decomp.plan(model, ranks=8, example_inputs=image)
    data = json.loads(plan.to_json())
    earlier = {"format": "decomp-plan-1", "before": {kind: data["before"][kind] for kind in ("params", "macs")}}
    earlier |= {"seconds": None, "layers": {}}
    for name, entry in data["layers"].items():
        costs = entry.pop("costs")
        del entry["kept_dense"]
        earlier["layers"][name] = entry | {kind: costs[kind] for kind in ("params", "macs")}
    read = decomp.Plan.from_json(json.dumps(earlier))
    assert (read.params, read.macs, read.bytes) == (plan.params, plan.macs, None)
    small, expected = read.apply(model), plan.apply(model)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_parameters_in_their_dtypes(model, image, dtype):
    model[0].to(dtype)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    for bound in (0.3, 30_000):
        small = decomp.compress(model, bytes=bound)
        after = sum(p.numel() * p.element_size() for p in small.parameters())
        assert small.decomp_plan.bytes == (before, after)
        most = bound * before if isinstance(bound, float) else bound
        assert 0.9 * most < after <= most
    assert f"bytes {before / 1e3:.3g}".rstrip(".") in str(decomp.plan(model, bytes=0.3))


def test_bytes_and_parameters_choose_alike_where_there_is_one_dtype(model):
    by_params, by_bytes = decomp.plan(model, params=0.4), decomp.plan(model, bytes=0.4)
    assert dict(by_params) == dict(by_bytes)


def test_the_budget_is_refused_as_a_whole(model):
    with pytest.raises(ValueError, match="one budget at a time, not params= and bytes="):
        decomp.plan(model, params=0.5, bytes=0.5)
    with pytest.raises(ValueError, match=r"bytes=1.5: write a share in \(0, 1\), or an absolute int"):
        decomp.compress(model, bytes=1.5)
    with pytest.raises(ValueError, match="bytes=3 cannot be reached: the least is"):
        decomp.compress(model, bytes=3)
    with pytest.raises(ValueError, match=r"objective= need a budget: write one of macs=, params=, bytes="):
        decomp.plan(model, objective="sum")


def test_a_plan_of_packed_attention_takes_example_inputs_where_it_is_applied():
    layer, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 5, 32)
    plan = decomp.plan(layer, ranks={"self_attn.q_proj": 4})
    small = decomp.svd(layer, plan, example_inputs=x)
    assert small.decomp_plan.macs == decomp.plan(layer, ranks=plan, example_inputs=x).macs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sequential": False}, "sequential=False does not use data"),
        ({"inplace": True}, "inplace=True keeps no dense model"),
        ({"data": "statistics"}, "data= is other statistics"),
        ({"data": "generator"}, "gone through only once"),
    ],
)
def test_data_beside_a_plan_are_refused_by_what_keeps_them_from_being_used(model, options, words):
    images = [torch.randn(4, 8, 6, 6) for _ in range(4)]
    plan = decomp.plan(model, "svd", ranks=4)
    kinds = {"statistics": lambda: decomp.calibrate(model, images), "generator": lambda: iter(images)}
    given = {"data": images, **options}
    if isinstance(given["data"], str):
        given["data"] = kinds[given["data"]]()
    with pytest.raises((ValueError, TypeError), match=words):
        decomp.svd(model, plan, progress=False, **given)

"""A file that was edited by hand or damaged is read as what it says, or refused by the name of a field."""

import json
import random

import mutants
import pytest
import torch
from torch import nn

import decomp
from decomp._util.schema import Value
from decomp.analysis.tradeoff import PointStore

X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
IDENTITY = {"model": "a digest", "score": "output error", "finetuned": False}


def network():
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10), nn.Linear(10, 10))


@pytest.fixture(scope="module")
def plan():
    torch.manual_seed(0)
    return decomp.plan(network(), macs=0.5, example_inputs=X, weights={"0": 1.5})


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("points") / "points.json"
    decomp.tradeoff(network(), X, budgets=(0.5, 1e-9), path=path, progress=False)
    return json.loads(path.read_text()) | {"head": IDENTITY}


def put(tree, value, *place):
    for key in place[:-1]:
        tree = tree[key]
    tree[place[-1]] = value


CONV = ("layers", "0")
REFUSED = [
    ((*CONV, "shape"), [1e999], r"layers\.0\.shape\[0\]: Infinity given, an integer of at least 0 is needed"),
    ((*CONV, "method"), [], r"layers\.0\.method: a list of 0 given, a string is needed"),
    ((*CONV, "ranks"), "33", r"layers\.0\.ranks: '33' given, a list \[\.\.\.\] is needed"),
    ((*CONV, "ranks"), [3.9, 3.9], r"layers\.0\.ranks\[0\]: 3\.9 given, an integer is needed"),
    ((*CONV, "ranks"), [True, 3], r"layers\.0\.ranks\[0\]: true given, an integer is needed"),
    ((*CONV, "reason"), 5, r"layers\.0\.reason: 5 given, a string is needed"),
    ((*CONV, "error"), float("nan"), r"layers\.0\.error: NaN given, a finite number of at least 0 is needed"),
    ((*CONV, "error"), 10**400, r"layers\.0\.error: 10{39}\.\.\. given, a finite number of at least 0 is needed"),
    ((*CONV, "costs", "params"), [-1, 3], r"layers\.0\.costs\.params\[0\]: -1 given, an integer of at least 0"),
    ((*CONV, "costs", "params"), [9], r"layers\.0\.costs\.params: a list of 1 given, a list of 2 is needed"),
    ((*CONV, "costs", "macs", 1), "x", r"layers\.0\.costs\.macs\[1\]: 'x' given, a finite number of at least 0"),
    ((*CONV, "costs"), {"macs": [1, 1]}, r"layers\.0\.costs\.params: this field is missing"),
    ((*CONV, "colour"), "red", r"layers\.0\.colour: unknown field; there can be layer, shape, method"),
    (("before", "macs"), 10**400, r"before\.macs: 10{39}\.\.\. given, an integer of at least 0 is needed"),
    (("before", "params"), None, r"before\.params: null given"),
    (("seconds",), [1.0], r"seconds: a list of 1 given, a list of 2 is needed"),
    (("layers",), [], r"layers: a list of 0 given, an object \{\.\.\.\} is needed"),
    (("request", "objective"), "least", r"request\.objective: 'least' given, one of 'auto', 'max'"),
    (("request", "multiple_of"), 0, r"request\.multiple_of: 0 given, an integer of at least 1 is needed"),
    (("request", "weights"), {"0": -1}, r"request\.weights\.0: -1 given, a finite number of at least 0 is needed"),
    (("request", "budget", "kind"), "flops", r"request\.budget\.kind: 'flops' given, one of 'macs', 'params'"),
    (("request", "budget", "value"), 1.5, r"request\.budget\.value: 1\.5 given, a share in \(0, 1\)"),
    (("request", "methods"), "svd", r"request\.methods: 'svd' given, a list \[\.\.\.\] is needed"),
    (("format",), "decomp-plan-9", r"format: 'decomp-plan-9' given, one of 'decomp-plan-2', 'decomp-plan-1'"),
    (("owner",), 1, r"owner: unknown field"),
]


@pytest.mark.parametrize(("place", "value", "message"), REFUSED)
def test_the_field_of_a_plan_that_is_wrong_is_named(plan, place, value, message):
    tree = json.loads(plan.to_json())
    put(tree, value, *place)
    with pytest.raises(ValueError, match=f"^not a plan of decomp in JSON: {message}"):
        decomp.Plan.from_json(json.dumps(tree))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"format": ' * 100_000, "nested too deep"),
        ("9" * 5000, "digits"),
        ('{"format": 1, "format": 2}', "'format' is there twice"),
        ("5", "the document: 5 given, an object"),
        (b"\xff\xfe\xff", "not a plan"),
        (None, "must be str"),
        ("", "Expecting value"),
    ],
)
def test_what_is_no_json_of_a_plan_is_refused(text, message):
    with pytest.raises(ValueError, match=f"not a plan of decomp in JSON: .*{message}|{message} of decomp"):
        decomp.Plan.from_json(text)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("points", 0, "line"), [1], r"points\[0\]\.line: a list of 1 given, a string is needed"),
        (("points", 0, "plan", "head"), 5, r"points\[0\]\.plan\.head: unknown field"),
        (("points", 0, "plan", "layers", "0", "ranks"), "33", r"points\[0\]\.plan\.layers\.0\.ranks: '33' given"),
        (("points", 0, "costs", "seconds"), -1.0, r"points\[0\]\.costs\.seconds: -1\.0 given, a finite number of"),
        (("points", 0, "score"), "good", r"points\[0\]\.score: 'good' given, a number is needed"),
        (("dense",), 5, r"dense: 5 given, an object"),
        (("head",), 5, r"head: 5 given, an object"),
        (("head", "owner"), 5, r"head\.owner: unknown field"),
        (("points",), {}, r"points: an object of 0 given, a list"),
    ],
)
def test_the_field_of_a_trade_off_that_is_wrong_is_named_with_the_file(points, tmp_path, place, value, message):
    path, tree = tmp_path / "points.json", json.loads(json.dumps(points))
    put(tree, value, *place)
    path.write_text(json.dumps(tree))
    with pytest.raises(
        ValueError, match=rf"path='.*points\.json' holds no trade-off of decomp: {message}.*; remove"
    ):
        PointStore.open(path, IDENTITY)


def equal(one, two):
    """Whether two documents say the same: true is not 1, and 1.0 is."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(equal(value, two[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(equal, one, two))
    return isinstance(one, bool) == isinstance(two, bool) and (one == two or (one != one and two != two))


def outcome(read, *given):
    """What was read, or the message of the ValueError; any other error is raised."""
    try:
        return read(*given), ""
    except ValueError as error:
        return None, str(error)


def check_plans(plan, count, seed):
    draw, document, refused = random.Random(seed), json.loads(plan.to_json()), 0
    earlier = {key: document[key] for key in ("seconds", "before")} | {"format": "decomp-plan-1", "layers": {}}
    for name, entry in document["layers"].items():
        fields, costs = {key: value for key, value in entry.items() if key != "costs"}, entry["costs"]
        earlier["layers"][name] = fields | {kind: costs[kind] for kind in ("params", "macs")}
    for number in range(2 * count):
        whole = earlier if number % 8 == 7 else document
        text = mutants.in_the_tree(whole, draw) if number % 2 else mutants.in_the_text(json.dumps(whole), draw)
        read, error = outcome(decomp.Plan.from_json, text)
        if error:
            refused += 1
            assert error.startswith("not a plan of decomp in JSON: "), text
            continue
        assert str(read)
        given = json.loads(text)
        if given["format"] == "decomp-plan-2":
            assert equal(json.loads(read.to_json()), given), text
    assert count / 2 < refused < 2 * count


def check_trade_offs(points, path, count, seed):
    draw, refused = random.Random(seed), 0
    for number in range(2 * count):
        text = mutants.in_the_tree(points, draw) if number % 2 else mutants.in_the_text(json.dumps(points), draw)
        path.write_text(text, encoding="utf-8")
        store, error = outcome(PointStore.open, path, IDENTITY)
        if error:
            refused += 1
            assert str(path) in error, text
            continue
        given = json.loads(text)
        assert equal([point.to_dict() for point in store.points.values()], given["points"]), text
        assert equal(store.dense.to_dict(), given["dense"])
    assert count / 2 < refused < 2 * count


def test_a_damaged_plan_is_read_as_it_says_or_refused(plan):
    check_plans(plan, 200, seed=0)


def test_a_damaged_trade_off_is_read_as_it_says_or_refused(points, tmp_path):
    check_trade_offs(points, tmp_path / "points.json", 200, seed=0)


@pytest.mark.slow
def test_thousands_of_damaged_plans_and_trade_offs(plan, points, tmp_path):
    check_plans(plan, 4000, seed=1)
    check_trade_offs(points, tmp_path / "points.json", 4000, seed=1)


def test_values_that_are_sound_are_read_as_they_are():
    document = Value.parse('{"a": [1, 2.5, -3], "b": null, "c": "text"}')
    entry = document.record("a", "b", optional=("c", "d"))
    assert [value.number() for value in entry["a"].items()] == [1, 2.5, -3]
    assert entry["b"].is_null
    assert entry["c"].one_of(["text"]) == "text"
    assert Value(2**63 - 1).integer() == 2**63 - 1
    assert Value(float("inf")).number(finite=False) == float("inf")

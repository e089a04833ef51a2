"""A compressed model in one file: read back as it was, or refused by the name of the file and of the entry."""

import copy
import json
import os
import random
import stat
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import layer_cases
import mutants
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

import decomp
from decomp.files.header import FORMAT, Header
from decomp.methods import METHODS
from decomp.planning.choice import Change, Choice, describe
from decomp.planning.cost import Cost
from decomp.planning.plan import Plan

ROOT = Path(__file__).parents[1]
PAIRS = [(name, kind) for name in METHODS for kind in layer_cases.KINDS if layer_cases.takes(name, kind)]
PAIRS += [(name, None) for name in layer_cases.MATRIX]


class Network(nn.Module):
    """Convolutions and a linear layer, tied weights, buffers of every sort, and a part that stays dense."""

    def __init__(self, width=16, classes=(10,)):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.mixer = nn.Conv2d(width, width, 3, padding=1)
        self.again = self.norm  # one module under two names
        self.head = nn.Linear(width, classes[0])
        self.words = nn.Embedding(classes[0], width)
        self.head.weight = self.words.weight
        self.register_buffer("scale", torch.rand(width, 1, 1))
        self.register_buffer("ramp", torch.linspace(0, 1, width), persistent=False)

    def forward(self, x):
        y = self.again(self.mixer(self.norm(self.conv(x)))) * self.scale
        return self.head(y.mean((2, 3)) + self.ramp)


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def compressed(dtype=torch.float32, **options):
    small = decomp.tucker(Network(**options).to(dtype), ranks=4, layers="mixer")
    return small.eval()


def meta(make=Network, **options):
    with torch.device("meta"):
        return make(**options)


def require_equal(one, two):
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (second[name].dtype, second[name].shape), name
        same = [each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (tensor, second[name])]
        assert torch.equal(*same), name
    assert one.decomp_plan.to_json() == two.decomp_plan.to_json()


def planned(model, name):
    """A plan by which a method replaces every layer of a list of layers."""
    choices = {}
    for place, dense in model.named_children():
        costs = {"params": Change(9, 3), "macs": Change(1.0, 0.5)}
        ranks = layer_cases.small_ranks(name, dense)
        choices[place] = Choice(
            describe(dense), tuple(dense.weight.shape), name, ranks, costs, 0.25, note="a note"
        )
    return Plan(choices, Cost(params=99))


@pytest.mark.parametrize(("name", "kind"), PAIRS, ids=lambda each: getattr(each, "__name__", str(each)))
def test_every_method_on_every_kind_of_layer_comes_back_as_it_was(name, kind, tmp_path):
    if kind is None:
        layers, inputs = layer_cases.matrices(), [torch.randn(2, 8, dtype=torch.float64)] * 3
    else:
        layers, inputs = zip(*islice(layer_cases.cases(kind), 0, None, 11), strict=True)
    small = planned(nn.ModuleList(layers), name).build(nn.ModuleList(layers))
    decomp.save(small, tmp_path / "small.safetensors")
    fresh = nn.ModuleList(copy.deepcopy(layer).to("meta") for layer in layers)
    again = decomp.load(tmp_path / "small.safetensors", fresh)
    require_equal(small, again)
    for one, two, x in zip(small, again, inputs, strict=True):
        assert torch.equal(one(x), two(x))


def test_an_embedding_comes_back_as_it_was(tmp_path):
    def make():
        return nn.Sequential(nn.Embedding(50, 32, padding_idx=0), nn.Linear(32, 8))

    small = decomp.svd(make(), ranks=4, layers="0")
    decomp.save(small, tmp_path / "small.safetensors")
    require_equal(small, decomp.load(tmp_path / "small.safetensors", make()))


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("make", [Network, meta], ids=["cpu", "meta"])
def test_the_dtype_is_that_of_the_file_and_the_outputs_are_exact(dtype, make, tmp_path):
    small, fresh = compressed(dtype), make()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    state = torch.get_rng_state()
    decomp.save(small, tmp_path / "small.safetensors")
    again = decomp.load(tmp_path / "small.safetensors", fresh).eval()
    assert torch.equal(torch.get_rng_state(), state)
    require_equal(small, again)
    assert torch.equal(small(X.to(dtype)), again(X.to(dtype)))
    assert isinstance(fresh.mixer, nn.Conv2d), "the given model was changed"
    assert all(tensor.is_meta or torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    assert again.head.weight is again.words.weight
    assert again.again is again.norm
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_eight_bit_floats_and_other_types_come_back(tmp_path):
    def make():
        model = Network()
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool, torch.int8):
            model.register_buffer(str(dtype).split(".")[1], torch.tensor([0.0, 1.0, 2.0]).to(dtype))
        model.frozen = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
        return model

    small = decomp.tucker(make(), ranks=4, layers="mixer")
    decomp.save(small, tmp_path / "small.safetensors")
    for fresh in (make(), meta(make)):
        again = decomp.load(tmp_path / "small.safetensors", fresh)
        require_equal(small, again)
        assert not again.frozen.requires_grad


def test_a_buffer_outside_of_the_state_comes_back_too(tmp_path):
    small = compressed()
    small.ramp = small.ramp * 2
    decomp.save(small, tmp_path / "small.safetensors")
    for fresh in (Network(), meta()):
        again = decomp.load(tmp_path / "small.safetensors", fresh).eval()
        assert torch.equal(again.ramp, small.ramp)
        assert torch.equal(again(X), small(X))
        assert "ramp" not in again.state_dict()


def test_shared_tensors_are_written_once_and_overlapping_ones_apart(tmp_path):
    model = Network()
    whole = torch.arange(12.0)
    model.register_buffer("left", whole[:8])
    model.register_buffer("right", whole[4:])
    model.register_buffer("turned", torch.arange(6.0).reshape(2, 3).mT)
    small = decomp.tucker(model, ranks=4, layers="mixer")
    decomp.save(small, tmp_path / "small.safetensors")
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        assert not {"words.weight", "again.weight"} & set(file.keys())
        assert "head.weight" in file.keys()  # noqa: SIM118
        assert torch.equal(file.get_tensor("right"), whole[4:])
        assert torch.equal(file.get_tensor("turned"), model.turned)


def test_the_memory_format_is_that_of_the_model(tmp_path):
    decomp.save(compressed().to(memory_format=torch.channels_last), tmp_path / "small.safetensors")
    again = decomp.load(tmp_path / "small.safetensors", Network().to(memory_format=torch.channels_last))
    assert again.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert again.mixer.core.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_given_model_says_which_parameters_are_frozen(tmp_path):
    decomp.save(compressed(), tmp_path / "small.safetensors")
    fresh = Network()
    fresh.conv.weight.requires_grad_(False)
    again = decomp.load(tmp_path / "small.safetensors", fresh)
    assert not again.conv.weight.requires_grad
    assert again.norm.weight.requires_grad


def test_a_model_that_was_compressed_in_two_steps_comes_back(tmp_path):
    small = decomp.svd(compressed(), ranks=2, layers="conv", fold="spatial")
    decomp.save(small, tmp_path / "small.safetensors")
    require_equal(small, decomp.load(tmp_path / "small.safetensors", Network()))


def test_a_model_read_in_inference_mode_can_be_trained(tmp_path):
    decomp.save(compressed(), tmp_path / "small.safetensors")
    with torch.inference_mode():
        again = decomp.load(tmp_path / "small.safetensors", meta())
    again(X).sum().backward()
    assert again.mixer.core.weight.grad is not None


def test_request_and_errors_come_back_with_the_plan(tmp_path):
    small = decomp.compress(Network(32), X, macs=0.6, multiple_of=2, layers="mixer")
    decomp.save(small, tmp_path / "small.safetensors")
    plan = decomp.load(tmp_path / "small.safetensors", meta(width=32)).decomp_plan
    assert plan.request == small.decomp_plan.request
    assert plan["mixer"].error == small.decomp_plan["mixer"].error > 0


# Files that are refused.


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("files") / "small.safetensors"
    small = compressed()
    decomp.save(small, path)
    return path, small


def rewritten(path, target, *, tensors=None, fields=None, drop=()):
    """A file with other tensors or fields of its header, and with checksums that fit."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    held = {name: tensor for name, tensor in {**held, **(tensors or {})}.items() if name not in drop}
    metadata.pop("checksum")
    from decomp.files import header

    metadata |= {"checksums": json.dumps({name: header.checksum(name, each) for name, each in held.items()})}
    metadata |= fields or {}
    safetensors.torch.save_file(held, target, {**metadata, "checksum": header._of_all(metadata)})
    return target


def refused(path, model, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as raised:
        decomp.load(path, model)
    assert repr(str(path)) in str(raised.value)
    assert isinstance(model.mixer, nn.Conv2d)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_files_of_others_are_refused(written, tmp_path):
    path, target = written[0], tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(3)}, target)
    refused(target, Network(), "not a file that decomp.save wrote")
    safetensors.torch.save_file({"a": torch.zeros(3)}, target, {"format": "pt"})
    refused(target, Network(), "not a file that decomp.save wrote")
    torch.save({"a": torch.zeros(3)}, target)
    refused(target, Network(), "damaged, or not a file of decomp.save")
    target.write_bytes(b"")
    refused(target, Network(), "damaged, or not a file of decomp.save")
    newer = {"format": "decomp-model-2", "version": "9.1"}
    refused(rewritten(path, target, fields=newer), Network(), "'decomp-model-2', written by decomp 9.1; .* reads")
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        decomp.load(tmp_path / "nothing.safetensors", Network())
    with pytest.raises(FileNotFoundError):
        decomp.load(tmp_path, Network())


def test_a_file_of_another_model_is_refused_by_the_name_of_the_entry(written, tmp_path):
    path, target = written[0], tmp_path / "other.safetensors"
    refused(path, Network(24), "the plan was made for another model: layer 'mixer' is Conv2d 24>24 3x3")
    refused(
        path, Network(classes=(11,)), r"its entry 'head.weight' has the shape \(10, 16\), the model needs \(11,"
    )
    untied = Network()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    require_equal(written[1], decomp.load(path, untied))
    apart = rewritten(path, target, tensors={"words.weight": torch.zeros(10, 16)}, fields={"shared": "{}"})
    refused(apart, Network(), "it has no entry 'again.weight'")
    shared = json.dumps(
        {name.replace("norm", "again"): name for name in written[1].state_dict() if "norm" in name}
    )
    apart = rewritten(path, target, tensors={"words.weight": torch.zeros(10, 16)}, fields={"shared": shared})
    refused(apart, Network(), "'head.weight' and 'words.weight' are one tensor in the model, and two in the file")
    more = Network()
    more.extra = nn.Linear(3, 3)
    refused(path, more, r"it has no entry 'extra\.weight', which the model has")
    fewer = Network()
    del fewer.scale
    refused(path, fewer, "its entry 'scale' is not in the model")
    integers = rewritten(path, target, tensors={"conv.bias": torch.zeros(16, dtype=torch.int64)})
    refused(integers, Network(), r"its entry 'conv.bias' is of dtype torch.int64, the model needs torch.float32")
    refused(rewritten(path, target, drop=["ramp"]), meta_ramp(), "it has no entry 'ramp', which the model has")


def meta_ramp():
    model = Network()
    model.ramp = model.ramp.to("meta")
    return model


def test_a_flipped_bit_is_found_and_its_entry_named(written, tmp_path):
    path, target = written[0], tmp_path / "damaged.safetensors"
    content = bytearray(path.read_bytes())
    with safe_open(path, "pt") as file:
        wanted = file.get_tensor("mixer.core.weight").numpy().tobytes()
    content[content.index(wanted) + 5] ^= 1
    target.write_bytes(content)
    refused(target, Network(), "damaged: the checksum of the entry 'mixer.core.weight'")
    missing = rewritten(path, target, fields={"checksums": "{}"})
    refused(missing, Network(), "damaged: its header and its entries differ on 'conv.bias'")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("plan", "{}", r"not a plan of decomp in JSON: format: null given"),
        ("plan", "[" * 100_000, "nested too deep"),
        ("shared", "[]", r"shared: a list of 0 given, an object"),
        ("shared", '{"a": 5}', r"shared\.a: 5 given, a string is needed"),
        ("not_in_state", '{"a": 5}', "not_in_state: an object of 1 given, a list"),
        ("not_in_state", "[3]", r"not_in_state\[0\]: 3 given, a string is needed"),
        ("constructor", '{"name": 5, "arguments": {}}', r"constructor\.name: 5 given, a string"),
        ("constructor", '{"name": "a"}', r"constructor\.arguments: this field is missing"),
        ("owner", "me", "owner: unknown field"),
    ],
)
def test_a_field_of_the_header_that_is_wrong_is_named(written, tmp_path, field, value, message):
    target = rewritten(written[0], tmp_path / "other.safetensors", fields={field: value})
    refused(target, Network(), message)


def outcome(path, model):
    """The model that was read, or the message of the ValueError; any other error is raised."""
    try:
        return decomp.load(path, model), ""
    except ValueError as error:
        return None, str(error)


def check_mutants(written, folder, count, seed):
    """Damaged files are refused by their name, and what is read in spite of the damage is what was written."""
    path, small = written
    content, draw, refusals = path.read_bytes(), random.Random(seed), 0
    target = folder / "mutant.safetensors"
    length = int.from_bytes(content[:8], "little") + 8
    header = content[8:length].decode()
    fresh = meta()
    for number in range(count):
        if number % 3 == 0:
            text = mutants.in_the_text(header, draw)
        elif number % 3 == 1:
            text = mutants.in_the_tree(json.loads(header), draw)
        if number % 3 == 2:
            mutant = mutants.in_the_bytes(content, draw)
        else:
            encoded = text.encode()
            mutant = len(encoded).to_bytes(8, "little") + encoded + content[length:]
        target.write_bytes(mutant)
        again, error = outcome(target, fresh)
        if again is None:
            refusals += 1
            assert repr(str(target)) in error, mutant
        else:
            require_equal(small, again)
    assert refusals > 0.8 * count


def test_a_damaged_file_is_refused_or_read_as_it_was(written, tmp_path):
    check_mutants(written, tmp_path, 200, seed=0)


@pytest.mark.slow
def test_thousands_of_damaged_files(written, tmp_path):
    check_mutants(written, tmp_path, 4000, seed=1)


# Models that are refused, and files that are written whole.


def test_what_a_file_cannot_hold_is_refused_by_its_name(tmp_path):
    path = tmp_path / "small.safetensors"

    def attempt(model, kind, message):
        with pytest.raises(kind, match=message):
            decomp.save(model, path)
        assert list(tmp_path.iterdir()) == []

    attempt(Network(), ValueError, r"the model has no plan \(decomp_plan\)")
    attempt(decomp.densify(compressed()), ValueError, "the model has no plan")
    attempt(nn.DataParallel(compressed()), TypeError, "wrapped in DataParallel")
    small = compressed()
    small.mixer = nn.Conv2d(16, 16, 3)
    attempt(small, ValueError, "layer 'mixer' is a Conv2d, the plan of the model says tucker: it was replaced")
    small = compressed()
    small.conv = small.mixer
    del small.mixer
    attempt(small, ValueError, "layer 'conv' is a TuckerConv, of which the plan of the model says nothing")
    small = compressed()
    del small.mixer
    attempt(small, ValueError, "replaces layer 'mixer', which the model does not have")
    small = compressed()
    small.mixer = decomp.tucker(nn.Sequential(nn.Conv2d(16, 16, 3)), ranks=3)[0]
    attempt(
        small, ValueError, r"'mixer' is tucker of ranks \(3, 3\), the plan of the model says tucker of ranks \(4,"
    )
    small = compressed()
    prune.l1_unstructured(small.mixer.core, "weight", 0.5)
    attempt(small, ValueError, "layer 'mixer': its factor 'core' is pruned: call torch.nn.utils.prune.remove")
    attempt(compressed().to("meta"), TypeError, "'scale' is on the meta device")
    small = compressed()
    small.register_buffer("sparse", torch.eye(3).to_sparse())
    attempt(small, TypeError, "'sparse' is a Tensor .sharded, quantized or sparse.")
    small = compressed()
    small.register_buffer("wide", torch.zeros(3, dtype=torch.complex128))
    attempt(small, TypeError, "'wide' is of dtype torch.complex128, which safetensors cannot hold")
    small = compressed()
    small.lazy = nn.LazyLinear(3)
    attempt(small, TypeError, r"'lazy\.weight' is not initialized yet")

    class Stateful(nn.Module):
        def get_extra_state(self):
            return {"steps": 3}

    small = compressed()
    small.counter = Stateful()
    attempt(small, TypeError, r"module 'counter' \(Stateful\) keeps an extra state")


def test_a_method_of_the_users_own_is_given_to_load(tmp_path):
    own = replace(METHODS["tucker"], name="mine")
    small = decomp.plan(Network(), own, 4, layers="mixer").apply(Network())
    decomp.save(small, tmp_path / "small.safetensors")
    require_equal(small, decomp.load(tmp_path / "small.safetensors", meta(), methods=[own]))
    refused(tmp_path / "small.safetensors", Network(), "layer 'mixer': unknown method 'mine'; .* methods=")
    text = small.decomp_plan.to_json()
    assert decomp.Plan.from_json(text, [own]).build(Network()).decomp_plan.to_json() == text


def test_a_file_is_replaced_whole_and_as_readable_as_others(tmp_path, monkeypatch):
    path = tmp_path / "small.safetensors"
    decomp.save(compressed(), path)
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    content = path.read_bytes()

    def broken(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        decomp.save(compressed(), path)
    assert path.read_bytes() == content
    assert sorted(each.name for each in tmp_path.iterdir()) == ["plain", "small.safetensors"]


# Constructors.


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user, which leaves a mark when it is imported."""
    (tmp_path / "users_models.py").write_text(
        "from pathlib import Path\n"
        "import torch\n"
        f"Path({str(tmp_path / 'imported')!r}).touch()\n"
        "class Net(torch.nn.Sequential):\n"
        "    def __init__(self, sizes, *, bias=True):\n"
        "        super().__init__(*(torch.nn.Linear(a, b, bias=bias) for a, b in zip(sizes, sizes[1:])))\n"
        "    @staticmethod\n"
        "    def large():\n"
        "        return Net([128, 128])\n"
        "def nothing():\n"
        "    return 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_models", raising=False)
    yield tmp_path
    sys.modules.pop("users_models", None)


def test_a_file_that_names_its_constructor_needs_no_model_if_the_caller_allows_it(module, monkeypatch):
    import users_models

    path = module / "small.safetensors"
    small = decomp.svd(users_models.Net((64, 64, 32), bias=False), ranks=4)
    decomp.save(small, path, constructor=users_models.Net, arguments={"sizes": (64, 64, 32), "bias": False})
    state = torch.get_rng_state()
    for allow in (["users_models.Net"], "users_models.Net", [users_models.Net]):
        require_equal(small, decomp.load(path, allow=allow))
    assert torch.equal(torch.get_rng_state(), state)
    require_equal(small, decomp.load(path, users_models.Net((64, 64, 32), bias=False)))
    del sys.modules["users_models"]
    (module / "imported").unlink()
    message = (
        r"small.safetensors': it names the constructor 'users_models.Net', .* write allow=\['users_models.Net'\]"
    )
    for allow in ((), ["users_models.Net.large"], ["torch.nn.Linear"]):
        with pytest.raises(ValueError, match=message):
            decomp.load(path, allow=allow)
    assert not (module / "imported").exists(), "a module was imported that was not allowed"
    code = f"import decomp; print(type(decomp.load({str(path)!r}, allow=['users_models.Net'])).__name__)"
    paths = os.pathsep.join([str(module), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "Net"


def test_constructors_and_arguments_that_cannot_come_back_are_refused(module, written):
    import users_models

    path, small = module / "small.safetensors", decomp.svd(users_models.Net.large(), ranks=4)
    decomp.save(small, path, constructor="users_models.Net.large")
    require_equal(small, decomp.load(path, allow=[users_models.Net.large]))
    decomp.save(small, path, constructor="users_models.nothing")
    with pytest.raises(TypeError, match=r"'users_models\.nothing' returned a int"):
        decomp.load(path, allow=["users_models.nothing"])

    def local():
        return users_models.Net.large()

    for constructor, arguments, kind, message in (
        (local, {}, ValueError, r"<locals>.local' cannot be imported"),
        ("users_models.Other", {}, ValueError, "'users_models.Other' cannot be imported"),
        (users_models.Net, {"sizes": torch.ones(3)}, TypeError, "only numbers, strings, lists and dicts"),
        (users_models.Net, {"sizes": [float("nan")]}, TypeError, "only numbers, strings, lists and dicts"),
        (users_models.Net, {"sizes": {1: 2}}, TypeError, "keys must be strings"),
        (None, {"sizes": [3]}, ValueError, "arguments= are those of constructor="),
        (5, {}, TypeError, "constructor=5: a class or a function"),
    ):
        with pytest.raises(kind, match=message):
            decomp.save(small, path, constructor=constructor, arguments=arguments)
    with pytest.raises(
        ValueError, match=r"it names no constructor: give the dense model, decomp.load\(path, model\)"
    ):
        decomp.load(written[0], allow=["users_models.Net"])


def test_the_header_reads_what_it_wrote(written):
    with safe_open(written[0], "pt") as file:
        metadata = file.metadata()
    header = Header.from_metadata(metadata)
    assert header.to_metadata() == metadata
    assert metadata["format"] == FORMAT
    assert header.not_in_state == {"ramp"}
    assert header.shared["words.weight"] == "head.weight"

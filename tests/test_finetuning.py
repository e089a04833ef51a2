"""Layer-by-layer fine-tuning: what it trains, against what, and what it leaves alone."""

import copy
import math
import threading

import pytest
import torch
from networks import plant_spectra
from torch import nn
from torch.nn import functional

import decomp
from decomp.data.activations import Activations
from decomp.data.batches import Batches
from decomp.network.pairing import repeated_blocks
from decomp.network.tracing import Tail, tails


class Net(nn.Module):
    """conv-BN-relu, conv-BN-add-relu, a 1x1 followed by an activation in place, a head: tails of every kind."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.conv2, self.bn2 = nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.point, self.act = nn.Conv2d(24, 32, 1), nn.ReLU(inplace=True)
        self.fc = nn.Linear(32, 16)

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(self.act(self.point(x)).mean((2, 3)))


@pytest.fixture
def dense():
    model = plant_spectra(Net())
    for norm in (model.bn1, model.bn2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def data():
    return [torch.randn(8, 8, 6, 6) for _ in range(6)]


def output_error(small, dense, data):
    with torch.no_grad():
        return sum(float((small(x) - dense(x)).norm() / dense(x).norm()) for x in data) / len(data)


def test_tails_are_the_normalization_and_activation_that_follow(dense, data):
    layers = {name: dense.get_submodule(name) for name in ("conv1", "conv2", "point", "fc")}
    found = tails(dense, data[0], layers)
    assert {name: len(tail.steps) for name, tail in found.items()} == {"conv1": 2, "conv2": 1, "point": 1, "fc": 0}
    y = torch.randn(2, 24, 6, 6)
    before = y.clone()
    assert torch.equal(found["conv1"](y), functional.relu(dense.bn1(y)))
    assert torch.equal(found["conv2"](y), dense.bn2(y))
    assert torch.equal(y, before), "an activation in place must not change what it is given"


def test_a_tail_ends_where_the_tensor_is_also_used_elsewhere():
    class Forked(nn.Module):
        def __init__(self, forked):
            super().__init__()
            self.conv, self.forked = nn.Conv2d(4, 4, 1), forked

        def forward(self, x):
            y = self.conv(x)
            z = functional.relu(y)
            return z + y if self.forked else z + x

    for forked, length in ((False, 1), (True, 0)):
        model = Forked(forked)
        assert len(tails(model, torch.randn(1, 4, 3, 3), {"conv": model.conv})["conv"].steps) == length


def test_every_layer_and_the_output_come_closer_to_the_dense_network(dense, data):
    small = decomp.tucker(dense, ranks={"conv*": (10, 8), "point": 8, "fc": 6})
    before = output_error(small, dense, data)
    report = decomp.finetune_layerwise(small, dense, data, steps=100)
    assert list(report) == ["conv1", "conv2", "point", "fc"]
    assert all(layer.error_after < layer.error_before and layer.steps <= 100 for layer in report.values())
    assert output_error(small, dense, data) < 0.7 * before
    assert "=>" in str(report)


def test_reported_error_is_that_of_the_features_after_norm_and_activation(dense, data):
    small = decomp.tucker(dense, ranks=(10, 8), layers="conv1")
    report = decomp.finetune_layerwise(small, dense, data, steps=20)

    def features(model):
        with torch.no_grad():
            return functional.relu(model.bn1(model.conv1(data[2])))  # of six batches, number 2 is held out

    error = float((features(small) - features(dense)).norm() / features(dense).norm())
    assert report["conv1"].error_after == pytest.approx(error, rel=1e-4)


def test_only_factors_change_and_flags_stay(dense, data):
    dense.train()
    small = decomp.tucker(dense, ranks={"conv2": (10, 8)})
    frozen = {n: t.clone() for n, t in small.state_dict().items() if not n.startswith("conv2")}
    teacher = copy.deepcopy(dense.state_dict())
    decomp.finetune_layerwise(small, dense, data, steps=10)
    assert all(torch.equal(small.state_dict()[name], value) for name, value in frozen.items())
    assert all(torch.equal(dense.state_dict()[name], value) for name, value in teacher.items())
    assert all(parameter.grad is None for model in (small, dense) for parameter in model.parameters())
    assert small.training
    assert small.bn1.training


def test_frozen_layers_are_reported_and_kept(dense, data):
    dense.conv1.requires_grad_(False)
    small = decomp.tucker(dense, ranks=(10, 8), layers="conv1")
    before = copy.deepcopy(small.state_dict())
    report = decomp.finetune_layerwise(small, dense, data, steps=10)
    assert (report["conv1"].note, report["conv1"].steps) == ("frozen: not trained", 0)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_each_layer_takes_the_learning_rate_that_is_best_for_it(dense, data, monkeypatch):
    def trained(**options):
        small = decomp.tucker(dense, ranks=4)
        decomp.finetune_layerwise(small, dense, data, steps=40, patience=None, progress=False, **options)
        return small

    monkeypatch.setattr("decomp.training.layerwise.LEARNING_RATES", (1e-9, 2e-3, math.inf))
    chosen, given = trained(), trained(lr=2e-3)
    for name, value in given.state_dict().items():
        assert torch.equal(value, chosen.state_dict()[name]), "as if it had been the only one"
    assert output_error(chosen, dense, data) < 0.9 * output_error(trained(lr=1e-9), dense, data)


@pytest.mark.parametrize(("lr", "note"), [(1e6, "no gain"), (float("inf"), "NaN in step 1: back to the last")])
def test_training_that_diverges_leaves_the_old_factors(dense, data, lr, note):
    small = decomp.tucker(dense, ranks=(10, 8), layers="conv1")
    before = copy.deepcopy(small.state_dict())
    report = decomp.finetune_layerwise(small, dense, data, steps=5, lr=lr)
    assert report["conv1"].note.startswith(note)
    assert report["conv1"].note.endswith("its factors were kept")
    assert report["conv1"].error_after == report["conv1"].error_before
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_reproducible_and_bounded_by_the_cache(dense, data):
    results = []
    for cache_bytes in (2**28, 2**28, 1):
        small = decomp.tucker(dense, ranks=(10, 8), layers="conv*")
        decomp.finetune_layerwise(small, dense, data, steps=18, cache_bytes=cache_bytes)
        results.append(small.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    # A window of one batch at a time goes through the same batches in the same order.
    assert all(torch.allclose(results[0][name], results[2][name], atol=1e-6) for name in results[0])


def test_windows_never_hold_more_than_the_cache(dense, data):
    small = decomp.tucker(dense, ranks=(10, 8), layers="conv1")
    pair_bytes = 4 * (data[0].numel() + 8 * 24 * 36)
    flow = Activations(small, dense, small.conv1, dense.conv1, Tail(), Batches(data, None), 2 * pair_bytes)
    assert [len(window.items) for window in flow.windows()] == [2, 2, 2]


def test_no_more_examples_are_made_than_are_trained_on(dense):
    data = [torch.randn(8, 8, 6, 6) for _ in range(40)]
    small = decomp.tucker(dense, ranks=(10, 8), layers="conv1")
    passes = []
    dense.conv1.register_forward_hook(lambda *_: passes.append(1))
    decomp.finetune_layerwise(small, dense, data, steps=5, held_out=0.1)
    assert len(passes) == 1 + 4 + 5, "to see the tails, a tenth of the batches held out, the steps"


def test_half_precision_is_trained_in_float32(dense, data):
    half = copy.deepcopy(dense).to(torch.bfloat16)
    small = decomp.tucker(half, ranks=(10, 8), layers="conv1")
    report = decomp.finetune_layerwise(small, half, [x.bfloat16() for x in data], steps=60)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert report["conv1"].error_after < report["conv1"].error_before


def test_batches_with_labels_keywords_and_tuples(dense, data):
    small = decomp.tucker(dense, ranks=(10, 8), layers="conv1")
    labelled = [(x, torch.zeros(8)) for x in data]
    with pytest.raises(TypeError, match=r"inputs=lambda batch: batch\[0\]"):
        decomp.finetune_layerwise(small, dense, labelled, steps=2)
    decomp.finetune_layerwise(small, dense, labelled, steps=2, inputs=lambda batch: batch[0])
    decomp.finetune_layerwise(small, dense, [{"x": x} for x in data], steps=2)
    decomp.finetune_layerwise(small, dense, [(x,) for x in data], steps=2)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], ValueError, "data is empty"),
        (iter([torch.zeros(1, 8, 6, 6)]), TypeError, "only once"),
        (torch.zeros(1, 8, 6, 6), TypeError, r"write \[batch\]"),
        (["text"], TypeError, "a batch must be a tensor"),
    ],
)
def test_bad_data_is_named(dense, data, error, words):
    small = decomp.tucker(dense, ranks=(10, 8), layers="conv1")
    with pytest.raises(error, match=words):
        decomp.finetune_layerwise(small, dense, data)


def test_swapped_or_foreign_models_are_refused(dense, data):
    small = decomp.tucker(dense, ranks=(10, 8), layers="conv1")
    with pytest.raises(ValueError, match=r"the order of arguments is \(small, dense, data\)"):
        decomp.finetune_layerwise(dense, small, data)
    with pytest.raises(ValueError, match="compress the model first"):
        decomp.finetune_layerwise(dense, dense, data)
    with pytest.raises(ValueError, match=r"'conv1'.*that small was made from"):
        decomp.finetune_layerwise(small, nn.Sequential(nn.Linear(2, 2)), data)


def test_layers_that_the_data_never_reaches_are_reported(data):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.used(x)

    dense = Aside()
    small = decomp.tucker(dense, ranks=(3, 3))
    report = decomp.finetune_layerwise(small, dense, data, steps=2)
    assert report["unused"].note == "the data never reaches it"
    assert report["used"].steps == 2


def test_transformer_with_a_padding_mask(data):
    """The dense teacher would run its fused path, which calls no layer."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    dense = plant_spectra(nn.TransformerEncoder(layer, 2)).eval()
    small = decomp.tucker(dense, ranks=6, layers="layers.1.linear*")
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    batches = [{"src": torch.randn(2, 5, 32), "src_key_padding_mask": mask} for _ in range(4)]
    report = decomp.finetune_layerwise(small, dense, batches, steps=60)
    assert list(report) == ["layers.1.linear1", "layers.1.linear2"]
    assert all(layer.error_after < layer.error_before for layer in report.values())


class Routed(nn.Module):
    """The first entry of a batch says which layer it goes through; a third layer is called twice."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.twice = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x):
        x = self.up(x) if x[0, 0] > 0 else self.down(x)
        return self.twice(functional.relu(self.twice(x)))


def test_layers_that_only_some_batches_reach_and_layers_called_twice():
    dense = plant_spectra(Routed())
    mix = torch.randn(24, 24)  # of white inputs the SVD is the best there is, and only noise would be learnt
    batches = [torch.randn(64, 24) @ mix for _ in range(8)]
    for place, batch in enumerate(batches):
        batch[0, 0] = 1.0 if place % 2 else -1.0
    small = decomp.tucker(dense, ranks=5)
    before = copy.deepcopy(small.twice)
    report = decomp.finetune_layerwise(small, dense, batches, steps=120, lr=2e-3)
    assert set(report) == {"up", "down", "twice"}
    assert all(layer.error_after < layer.error_before for layer in report.values())
    seen = []
    handle = dense.twice.register_forward_hook(lambda _, given, got: seen.append((given[0], got)))
    with torch.no_grad():
        for batch in batches:
            dense(batch)
        lost = [sum(float((layer(x) - y).norm() ** 2) for x, y in seen[1::2]) for layer in (before, small.twice)]
    handle.remove()
    assert lost[1] < lost[0], "the second call must not pay for the first"


def test_inputs_that_are_routed_differently_are_reported_and_not_trained():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.expert = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            return self.expert(x[self.gate(x)[:, 0] > 0])

    dense = plant_spectra(Gated())
    small = decomp.tucker(dense, ranks=3)
    kept = small.expert.reduce.weight.clone()
    report = decomp.finetune_layerwise(small, dense, [torch.randn(64, 24) for _ in range(4)], steps=4)
    assert report["gate"].steps == 4
    assert (report["expert"].note, report["expert"].steps) == ("routed differently: not trained", 0)
    assert torch.equal(kept, small.expert.reduce.weight)


def test_it_trains_under_no_grad_and_names_the_layer_of_an_error(dense, data):
    small = decomp.tucker(dense, ranks=(10, 8), layers="conv1")
    with torch.no_grad():
        report = decomp.finetune_layerwise(small, dense, data, steps=30)
    assert report["conv1"].error_after < report["conv1"].error_before

    def broken(optimizer, steps):
        raise RuntimeError("no schedule")

    with pytest.raises(RuntimeError, match="no schedule") as caught:
        decomp.finetune_layerwise(small, dense, data, steps=2, schedule=broken)
    assert caught.value.__notes__ == ["in layer 'conv1'"]


def test_data_that_is_empty_on_a_later_pass_is_an_error(dense, data):
    class Once:
        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(data if self.passes < 3 else [])

    small = decomp.tucker(dense, ranks=(10, 8), layers="conv1")
    with pytest.raises(ValueError, match="empty on a later pass"):
        decomp.finetune_layerwise(small, dense, Once(), steps=3)


class Residual(nn.Module):
    """A block that is called with a mask by its name, gives a pair, and changes its input in place."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, *, mask, seen=None):
        if seen is not None:
            seen.append(len(seen))
            x = x * len(seen)
        shortcut = x.clone()
        return shortcut + self.second(x.relu_().mul_(mask) + self.first(x)), x.mean()


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(24) for _ in range(2))
        self.head = nn.Linear(24, 16)

    def forward(self, x, mask):
        seen = []  # as a cache of keys and values, it goes from block to block and grows
        for block in self.blocks:
            x, _ = block(x, mask=mask, seen=seen)
        assert len(seen) == len(self.blocks)
        return self.head(x)


@pytest.fixture
def stack():
    dense = plant_spectra(Stack(), decay=0.5).eval()
    mix = torch.randn(24, 24)
    return dense, [(torch.randn(32, 24) @ mix, (torch.rand(32, 24) > 0.2).float()) for _ in range(6)]


def block_error(small, dense, data, place):
    """Relative error of what a block gives, on the batch that is held out."""
    seen = []

    def keep(module, given, got):
        seen.append(torch.cat([got[0].flatten(), got[1][None]]))

    for model in (small, dense):
        hook = model.blocks[place].register_forward_hook(keep)
        with torch.no_grad():
            model(*data[2])
        hook.remove()
    return float((seen[0] - seen[1]).norm() / seen[1].norm())


def test_a_block_is_trained_whole_with_all_that_it_is_called_with(stack):
    dense, data = stack
    small = decomp.tucker(dense, ranks=6)
    before = [block_error(small, dense, data, place) for place in range(2)]
    report = decomp.finetune_layerwise(small, dense, data, steps=100, blocks="blocks.*")
    assert list(report) == ["blocks.0", "blocks.1", "head"]
    assert report["blocks.0"].error_before == pytest.approx(before[0], rel=1e-4)
    for place in range(2):
        after = block_error(small, dense, data, place)
        assert report[f"blocks.{place}"].error_after == pytest.approx(after, rel=1e-4)
        assert after < before[place]


def test_auto_finds_the_modules_that_occur_several_times(stack):
    dense, data = stack
    reports = []
    for blocks in ("blocks.*", "auto"):
        small = decomp.tucker(dense, ranks=6)
        reports.append(decomp.finetune_layerwise(small, dense, data, steps=4, blocks=blocks, progress=False))
    assert [(name, each.error_after) for name, each in reports[0].items()] == [
        (name, each.error_after) for name, each in reports[1].items()
    ]
    assert list(decomp.finetune_layerwise(small, dense, data, steps=1, layers="head", blocks="auto")) == ["head"]


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class WithExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.out, self.experts = nn.Linear(4, 4), nn.Linear(4, 4), nn.ModuleList([Expert(), Expert()])


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.last = nn.ModuleList([WithExperts(), WithExperts()]), nn.Linear(4, 4)


def test_a_tower_is_no_block_and_a_block_may_hold_a_list_of_experts():
    model = nn.ModuleDict({"encoder": Tower(), "decoder": Tower()})
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    expected = [f"{tower}.layers.{place}" for tower in ("encoder", "decoder") for place in range(2)]
    assert repeated_blocks(model, layers) == expected


def test_a_block_knows_what_its_layers_do_together():
    """Two linear layers in a row are one matrix of rank 4: together they can be exact, one by one they cannot."""
    dense = nn.Sequential(nn.Sequential(nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)))
    with torch.no_grad():
        dense[0][1].weight.copy_(torch.randn(24, 4) @ torch.randn(4, 24) / 10 + 1e-6 * torch.randn(24, 24))
    data = [torch.randn(64, 24) for _ in range(8)]
    errors = {}
    for blocks in ((), "0"):
        small = decomp.tucker(dense, ranks={"0.0": 4, "0.1": 8})
        decomp.finetune_layerwise(small, dense, data, steps=400, lr=1e-2, blocks=blocks)
        errors[blocks] = output_error(small, dense, data)
    assert errors["0"] < 0.05 < 0.5 < errors[()]


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ("stages.*", "no module has such a name; modules are 'blocks', 'head'"),
        (["blocks.0", "blocks.0.first"], "block 'blocks.0.first' lies in another block"),
    ],
)
def test_blocks_that_are_none_are_refused(stack, blocks, words):
    dense, data = stack
    with pytest.raises(ValueError, match=words):
        decomp.finetune_layerwise(decomp.tucker(dense, ranks=6), dense, data, blocks=blocks)


def test_a_pass_ends_where_the_layer_was_reached(dense, data):
    """Nothing behind the layer runs, in either network."""
    small = decomp.tucker(dense, ranks=(10, 8), layers="conv1")
    heads = []
    for model in (small, dense):
        model.fc.register_forward_hook(lambda *_: heads.append(1))
    decomp.finetune_layerwise(small, dense, data, steps=5)
    assert len(heads) == 2, "one pass of each network, in which the tails are seen"


def test_what_a_block_shares_with_others_is_left_alone(stack):
    dense, data = stack
    dense.blocks[1].second.bias = dense.blocks[0].second.bias
    small = decomp.tucker(dense, ranks=6, layers="blocks.0.*")
    assert small.blocks[0].second.bias is small.blocks[1].second.bias
    shared = small.blocks[0].second.bias.detach().clone()
    first = small.blocks[0].first.expand.weight.detach().clone()
    decomp.finetune_layerwise(small, dense, data, steps=20, blocks="blocks.0")
    assert torch.equal(small.blocks[1].second.bias, shared)
    assert not torch.equal(small.blocks[0].first.expand.weight, first)


def test_a_block_that_is_called_with_what_cannot_be_copied():
    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(24, 24)

        def forward(self, x, lock):
            with lock:
                return self.layer(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Locked()

        def forward(self, x):
            return self.block(x, threading.Lock())

    dense = plant_spectra(Outer())
    mix = torch.randn(24, 24)
    small = decomp.tucker(dense, ranks=3)
    report = decomp.finetune_layerwise(
        small, dense, [torch.randn(16, 24) @ mix for _ in range(4)], steps=30, blocks="block"
    )
    assert report["block"].error_after < report["block"].error_before

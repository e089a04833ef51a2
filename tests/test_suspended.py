"""Passes that are held at each layer: the results of a pass for each layer, from fewer passes."""

import math
import threading
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch
from networks import plant_spectra
from torch import nn
from torch.nn import functional

import decomp
from decomp.data import suspended
from decomp.data.batches import Batches, FitSplit
from decomp.data.suspended import Gates, HeldExamples, held_bytes
from decomp.network.forward import evaluating


class Residual(nn.Module):
    """BatchNorms, a shortcut with a layer of its own, an activation in place, a head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.short = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(6, 12, 1)
        self.act, self.fc = nn.ReLU(inplace=True), nn.Linear(12, 10)

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        return self.fc(self.act(self.conv2(y) + self.short(x)).mean((2, 3)))


class Shared(nn.Module):
    """One layer under two names, and called twice; layers before, between and after its calls."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.between, self.last = (nn.Linear(16, 16) for _ in range(4))
        self.alias = self.twice

    def forward(self, x):
        return self.last(self.alias(self.between(functional.relu(self.twice(self.first(x))))))


class Branching(nn.Module):
    """Which layer comes first depends on the data."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        order = (self.a, self.b) if x[0, 0] > 0 else (self.b, self.a)
        for layer in order:
            x = functional.relu(layer(x))
        return self.c(x)


class Routed(Branching):
    """Some batches never reach a layer."""

    def forward(self, x):
        return self.c(functional.relu((self.a if x[0, 0] > 0 else self.b)(x)))


class Remembering(Branching):
    """Keeps in itself what a pass computes: two passes that take turns would mix."""

    def forward(self, x):
        self.kept = self.a(x)
        y = self.b(x)
        return self.c(functional.relu(y + self.kept))


class Locked(Branching):
    """A pass that is held inside of a lock would keep all others waiting."""

    lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return self.c(functional.relu(self.b(functional.relu(self.a(x)))))


class Own(Branching):
    """Changes the grad mode and autocast inside of its forward, and passes a keyword."""

    def forward(self, x):
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(input=x)
        return self.c(functional.relu(self.b(y.float())))


def rows(count):
    mix = torch.randn(16, 16)
    return [torch.randn(32, 16) @ mix for _ in range(count)]


def pictures(count):
    mix = torch.randn(6, 6)
    return [torch.einsum("ab,nbij->naij", mix, torch.randn(4, 6, 6, 6)) for _ in range(count)]


MODELS = {
    "residual": (Residual, pictures, True),
    "shared, called twice": (Shared, rows, True),
    "order that depends on the data": (Branching, rows, False),
    "routed": (Routed, rows, False),
    "keeps state": (Remembering, rows, False),
    "locks": (Locked, rows, False),
    "modes of its own": (Own, rows, True),
    "one layer": (lambda: nn.Sequential(nn.Linear(16, 16)), rows, True),
    "the model is the layer": (lambda: nn.Linear(16, 16), rows, True),
}


def sequential(model, data, **options):
    return decomp.svd(model, ranks=4, data=data, sequential=True, progress=False, **options)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(suspended, "SECONDS_TO_WAIT", 0.5)
    yield
    assert not passes_alive()


def passes_alive():
    return [thread for thread in threading.enumerate() if thread.name == "decomp-pass"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "batches", "held"), MODELS.values(), ids=MODELS)
def test_the_same_as_with_a_pass_for_each_layer(make, batches, held, training, monkeypatch):
    model = plant_spectra(make(), decay=0.5).train(training)
    data = batches(8)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    layers = {n: m for n, m in layers.items() if n != "twice"}
    if not isinstance(model, Residual):
        with evaluating(model):
            assert (held_bytes(model, layers, Batches(data)) is not None) == held
    results, plans = [], []
    for bound in (None, math.inf, 200.0):
        if bound is not None:  # infinite: a pass for each layer; 200 bytes per byte: some batches are held
            per_byte = None if bound == math.inf else dict.fromkeys(layers, bound)
            monkeypatch.setattr(suspended, "held_bytes", lambda *_, per_byte=per_byte: per_byte)
        if bound == 200.0:
            monkeypatch.setattr("decomp.recovery.sequential.CACHE_BYTES", 3 * 400 * suspended.size_of(data[0]) + 1)
        if bound == 200.0 and not held:
            break
        small = sequential(model, data)
        results.append(small.state_dict())
        plans.append(small.decomp_plan)
    for other, plan in zip(results[1:], plans[1:], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())
        assert dict(plan) == dict(plans[0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_number_of_passes_does_not_grow_with_the_depth():
    counts = []
    for depth in (3, 9):
        model = plant_spectra(nn.Sequential(*(nn.Linear(16, 16) for _ in range(depth))), decay=0.5)
        plan, data, begun = decomp.plan(model, ranks=4), rows(16), []
        model.register_forward_pre_hook(lambda *_, begun=begun: begun.append(1))
        small = decomp.svd(model, plan, data=data, sequential=True, progress=False)
        assert len(small.decomp_plan) == depth
        counts.append(len(begun))
    assert counts[0] == counts[1] <= 2 * 16 + 10, "both networks, and the first batches a few times more"


def test_layers_before_the_held_one_run_once(monkeypatch):
    """In the dense network the first layer runs as often as there are batches, and a few times more."""
    model = plant_spectra(nn.Sequential(*(nn.Linear(16, 16) for _ in range(6))), decay=0.5)
    data, calls = rows(20), Counter()
    original = nn.Linear.forward

    def forward(self, x):
        calls["first"] += self is model[0]
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    sequential(model, data)
    assert calls["first"] <= 2 * 20 + 10  # the first layer itself is run for its moments, and once by data=


@pytest.mark.parametrize(("make", "batches", "held"), MODELS.values(), ids=MODELS)
def test_fine_tuning_is_the_same_as_with_passes_for_each_layer(make, batches, held, monkeypatch):
    model = plant_spectra(make(), decay=0.5).train()
    data, results, reports = batches(8), [], []
    for cache in (2**30, 2**30, 1):
        small = decomp.svd(model, ranks=4)
        report = decomp.finetune_layerwise(small, model, data, steps=12, cache_bytes=cache, progress=False)
        reports.append([(name, each.error_after, each.note) for name, each in report.items()])
        results.append(small.state_dict())
        monkeypatch.setattr(suspended, "held_bytes", lambda *_: None)
    assert reports[0] == reports[1]
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[2][name], rtol=1e-4, atol=1e-5)


def test_fine_tuning_takes_one_pass_for_all_layers():
    counts = []
    for depth in (3, 9):
        model = plant_spectra(nn.Sequential(*(nn.Linear(16, 16) for _ in range(depth))), decay=0.5)
        small = decomp.svd(model, ranks=4)
        calls, begun = Counter(), []
        model.register_forward_pre_hook(lambda *_, begun=begun: begun.append(1))
        handle = small[0].register_forward_hook(
            lambda module, *_, calls=calls: calls.update([threading.current_thread().name == "decomp-pass"])
        )
        decomp.finetune_layerwise(small, model, rows(16), steps=6, progress=False)
        handle.remove()
        assert calls[True] == 9  # 3 held out, 6 steps: no more batches are needed
        counts.append(len(begun))
    assert counts[0] == counts[1] <= 16 + 6


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, Interrupt])
def test_what_ends_a_call_leaves_no_threads_no_hooks_and_no_flags(place, kind, monkeypatch):
    model, data = plant_spectra(Residual(), decay=0.5), pictures(6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    from decomp.recovery import sequential as module

    done = []
    original = module.by_moments

    def broken(*given):
        if len(done) == place:
            raise kind
        done.append(1)
        return original(*given)

    monkeypatch.setattr(module, "by_moments", broken)
    with pytest.raises(kind):
        sequential(model, data)
    assert all(each.training for each in model.modules())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_what_ends_fine_tuning_leaves_nothing_either(kind):
    model = plant_spectra(Residual(), decay=0.5)
    small = decomp.svd(model, ranks=2)
    made = []

    def broken(parameters, lr):
        made.append(1)
        if len(made) == 2:
            raise kind
        return torch.optim.Adam(parameters, lr)

    with pytest.raises(kind):
        decomp.finetune_layerwise(small, model, pictures(6), steps=3, optimizer=broken, progress=False)
    for network in (small, model):
        assert all(each.training for each in network.modules())
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in network.modules())


def test_an_error_in_a_pass_names_the_batch():
    class Failing(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            if len(x) == 31:
                raise RuntimeError("31 rows")
            return y

    model = plant_spectra(Failing(nn.Linear(16, 16), nn.Linear(16, 16)), decay=0.5)
    data = [*rows(3), torch.randn(31, 16)]
    plan = decomp.plan(model, "svd", ranks=4)

    class Early(Failing):
        def forward(self, x):
            return super().forward(self[0](x)) if len(x) == 31 else super().forward(x)

    with pytest.raises(RuntimeError, match=r"shapes|31 rows") as caught:
        decomp.svd(model, plan, data=[*rows(3), torch.randn(31, 17)], sequential=True, progress=False)
    assert any("in batch 3 of data" in note for note in caught.value.__notes__)
    assert decomp.svd(model, plan, data=data, sequential=True, progress=False)  # never run to its end


def every(examples, batches):
    """What a layer needs that needs all batches."""
    return 10**6


def test_what_is_held_is_bounded():
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    data = rows(10)
    layers = {"0": model[0], "2": model[2]}
    per_byte = held_bytes(model, layers, Batches(data))
    # At the second layer its input of 64 channels and its output of 16; the batch itself is not counted.
    assert per_byte == {"0": 64 / 16, "2": (64 + 16) / 16}
    pairs = {name: (layer, layer) for name, layer in layers.items()}
    order = {name: suspended.Tail() for name in layers}
    cache = int(3.5 * 2 * per_byte["0"] * suspended.size_of(data[0]))
    with HeldExamples(model, model, pairs, order, Batches(data), cache) as held, torch.no_grad():
        examples = held.of("0", 10, every)
        assert len(passes_alive()) == 6
        assert [example.batch for example in examples] == list(range(10))
        assert len(held._held) == 3
        for example, x in zip(examples, data, strict=True):
            assert torch.equal(example.received, x)
            assert torch.equal(example.targets[0], model[0](x))


def test_gates_hold_one_thread_at_a_time_and_leave_other_calls_alone():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with Gates(model, {"1": model[1]}, after=True).installed() as gates:
        passes = [gates.begin(torch.full((1, 16), float(value))) for value in range(3)]
        arrivals = [each.advance() for each in passes]
        assert [arrival.name for arrival in arrivals] == ["1"] * 3
        model(torch.ones(1, 16))  # a call of this thread runs through
        assert [each.advance() for each in passes] == [None] * 3
        with torch.no_grad():
            for value, each in enumerate(passes):
                assert torch.equal(each.output, model(torch.full((1, 16), float(value))))
                assert not each.output.requires_grad


def hourglass():
    """Its passes hold 4, 8.5, 1.5 and 5 times their batch: most at the second layer, least at the third."""
    widths = (16, 64, 8, 16, 64)
    return nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths))).eval()


def test_passes_are_given_up_where_there_is_no_room_and_others_begin_where_there_is():
    model, data = hourglass(), rows(12)
    layers = dict(model.named_children())
    per_byte = held_bytes(model, layers, Batches(data))
    assert per_byte == {"0": 4.0, "1": 4.5, "2": 1.5, "3": 5.0}
    size = suspended.size_of(data[0])
    pairs, order = (
        {name: (layer, layer) for name, layer in layers.items()},
        dict.fromkeys(layers, suspended.Tail()),
    )
    held_at = []
    with HeldExamples(model, model, pairs, order, Batches(data), 2 * 18 * size) as held, torch.no_grad():
        for name in layers:
            examples = held.of(name, 12, every)
            held_at.append(len(held._held))
            assert len(passes_alive()) == 2 * held_at[-1]
            assert [example.batch for example in examples] == list(range(12))
            for example, x in zip(examples, data, strict=True):
                assert torch.equal(example.targets[0], model[: int(name) + 1](x))
            held.replace(name, None, model)
    assert held_at == [4, 4, 12, 3]


def held_of_hourglass(data, cache, **options):
    model = hourglass()
    pairs = {name: (layer, layer) for name, layer in model.named_children()}
    order = dict.fromkeys(pairs, suspended.Tail())
    return model, HeldExamples(model, model, pairs, order, Batches(data), cache, **options)


@pytest.mark.parametrize("cache", [2**30, 2 * 18 * 2048, 1])
def test_a_layer_takes_as_many_batches_as_it_needs(cache):
    data = rows(12)
    model, examples_of = held_of_hourglass(data, cache, preferred=FitSplit(12).spread(12))
    begun, asked = [], []
    model.register_forward_pre_hook(lambda *_: begun.append(1))
    needed = {"0": 5, "1": 2, "2": 7, "3": 7}

    def enough(name, examples, batches):
        asked.append(len({each.batch for each in examples}) == batches)
        return needed[name]

    with examples_of as held, torch.no_grad():
        begun.clear()
        for name in needed:
            examples = held.of(name, 2, partial(enough, name))
            numbers = sorted(FitSplit(12).spread(12)[: needed[name]])
            assert [example.batch for example in examples] == numbers
            assert [example.batch for example in examples] == numbers
            for example in examples:
                assert torch.equal(example.targets[0], model[: int(name) + 1](data[example.batch]))
            held.replace(name, None, model)
    assert asked == [True] * 7, "once more where more than two are needed"
    if cache == 2**30:
        assert len(begun) == 2 * 7, "each batch that is needed, once in both networks"


def test_how_many_batches_are_used_does_not_depend_on_the_memory(monkeypatch):
    monkeypatch.setattr("decomp.calibration.sampling.CHEAP_PRODUCTS", 0)
    model, data = plant_spectra(hourglass(), decay=0.5), rows(20)
    results, passes = [], []
    for cache in (2**30, 2 * 18 * suspended.size_of(data[0]), 1):
        monkeypatch.setattr("decomp.recovery.sequential.CACHE_BYTES", cache)
        begun = []
        handle = model.register_forward_pre_hook(lambda *_, begun=begun: begun.append(1))
        results.append(sequential(model, data).state_dict())
        passes.append(len(begun))
        handle.remove()
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())
    # Layers of 8 to 64 inputs are fitted to 80 to 640 rows, which 8 to 20 batches of 32 have.
    assert passes[0] < passes[1] < passes[2]


class ChosenByValue(nn.Module):
    """How many rows reach the second layer depends on what the first one gives."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        hidden = self.a(x)
        return self.b(hidden[hidden[:, 0] > 0])


def test_a_layer_whose_rows_differ_in_number_is_decomposed_by_itself():
    torch.manual_seed(0)
    data = [torch.randn(64, 16) for _ in range(12)]
    small = decomp.svd(ChosenByValue().eval(), ranks=2, data=data, progress=False)
    assert small.decomp_plan["b"].note == "routed differently: decomposed by itself"


def test_layers_are_fitted_to_data_from_all_over_the_data(monkeypatch):
    monkeypatch.setattr("decomp.calibration.sampling.ROWS_PER_CHANNEL_TO_SEE", 10)  # eight of forty batches
    torch.manual_seed(0)
    model = plant_spectra(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval(), decay=0.5)
    bases = torch.linalg.qr(torch.randn(64, 64)).Q.split(16)  # of four classes, which come one after the other
    data = [torch.randn(256, 16) @ basis for basis in bases for _ in range(10)]
    unseen = torch.cat([torch.randn(64, 16) @ basis for basis in bases])

    def error(**options):
        small = decomp.svd(model, ranks=16, data=data, progress=False, **options)
        with torch.no_grad():
            right = model(unseen)
            return float((small(unseen) - right).norm() / right.norm())

    assert error() <= 1.02 * error(sequential=False)


class Fetched:
    """Data that counts the batches which were fetched."""

    def __init__(self, data):
        self.data, self.fetched = data, 0

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        for batch in self.data:
            self.fetched += 1
            yield batch


@pytest.mark.parametrize("network", [hourglass, Shared])
def test_data_is_fetched_a_few_times_however_many_layers_there_are(network):
    data = Fetched(rows(200))
    sequential(network().eval(), data)
    assert data.fetched <= 4 * len(data)  # statistics, the plan, the batches that layers use


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(96, 96)

    def forward(self, x, attention_mask):
        return self.layer(x)


class SometimesReached(nn.Module):
    """Its second layer is reached by every third batch, the first one among them."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(96, 96), nn.Linear(96, 96)

    def forward(self, x):
        hidden = self.first(x)
        return self.layer(hidden) if x[0, 0] > 0 else hidden


def padded_batches():
    mask = (torch.arange(64) < 2).long().expand(8, 64)
    return Padded().eval(), [{"x": torch.randn(8, 64, 96), "attention_mask": mask} for _ in range(100)]


def batches_for_some():
    data = [torch.randn(32, 96) for _ in range(120)]
    for number, batch in enumerate(data):
        batch[0, 0] = 1.0 if number % 3 == 0 else -1.0
    return SometimesReached().eval(), data


@pytest.mark.parametrize("case", [padded_batches, batches_for_some])
def test_a_layer_is_fitted_to_as_many_rows_as_it_needs_whatever_batches_hold(case, monkeypatch):
    """Padding, and batches that do not reach a layer, have no rows."""
    monkeypatch.setattr("decomp.calibration.sampling.CHEAP_PRODUCTS", 0)
    torch.manual_seed(0)
    model, data = case()
    small = decomp.svd(model, ranks=24, data=data, layers="layer", sequential=True, progress=False)
    assert "little data" not in small.decomp_plan["layer"].note  # 960 rows are wanted, a quarter is held out

"""Skip connections: what is added to the output of a layer, and what the layer makes up for because of it."""

import copy

import pytest
import torch
from networks import plant_spectra
from torch import nn

import decomp
from decomp.data import suspended
from decomp.network.tracing import Skip, tails
from decomp.recovery import sequential


class Branch(nn.Module):
    """x + f(x) with a function that says how, and the layer in the middle."""

    def __init__(self, join, channels=6):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.layer, self.other = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU()
        self.join = join

    def forward(self, x):
        return self.join(self, x)


def plus(block, x):
    return x + block.layer(block.norm(x))


def plus_dropped(block, x):
    return block.drop(block.layer(block.norm(x))) + x


def in_place(block, x):
    y = block.layer(block.norm(x))
    y += x
    return block.act(y) + y


def into_the_skip(block, x):
    x = x.clone()
    block.drop(x)
    x += block.layer(block.norm(x))
    return x


def added(block, x):
    return torch.add(block.layer(block.norm(x)), x)


def scaled(block, x):
    return torch.add(block.layer(block.norm(x)), x, alpha=2)


def activated(block, x):
    return x + block.act(block.layer(x))


def used_twice(block, x):
    y = block.layer(block.norm(x))
    return x + y + block.act(y)


def made_later(block, x):
    y = block.layer(block.norm(x))
    return y + block.other(x)


def made_before(block, x):
    z = block.other(x)
    return z + block.layer(block.norm(x))


def changed_since(block, x):
    z = block.other(x)
    z.mul_(2)
    return z + block.layer(block.norm(x))


def normalized_and_activated(block, x):
    return x + block.act(nn.functional.layer_norm(block.layer(block.norm(x)), (6,)))


def another_normalization(block, x):
    return x + nn.functional.layer_norm(block.layer(block.norm(x)), (6,))


def returned_too(block, x):
    y = block.layer(block.norm(x))
    return y, x + y


def called_again(block, x):
    y = block.layer(block.norm(x)) + x
    return y + block.layer(y)


def to_itself(block, x):
    y = block.layer(block.norm(x))
    return y + y


def broadcast(block, x):
    return block.layer(block.norm(x)) + x.mean(0, keepdim=True)


FOUND = {
    plus: ("norm", 0),
    plus_dropped: ("norm", 0),
    in_place: ("norm", 0),
    into_the_skip: ("norm", 0),
    added: ("norm", 0),
    made_before: ("other", None),
}
NOT_FOUND = (
    *(scaled, activated, normalized_and_activated, another_normalization, used_twice, returned_too),
    *(called_again, made_later, changed_since, to_itself, broadcast),
)


@pytest.mark.parametrize("join", [*FOUND, *NOT_FOUND], ids=lambda join: join.__name__)
def test_a_skip_is_found_where_a_tensor_is_added_to_the_output_and_was_there_before(join):
    model = Branch(join).eval()
    skip = tails(model, torch.randn(3, 6), {"layer": model.layer})["layer"].skip
    assert (skip and (skip.module, skip.place)) == FOUND.get(join)


def test_the_module_of_a_skip_is_called_once_and_is_no_part_of_a_layer():
    model = nn.Sequential(Branch(plus), Branch(plus)).eval()
    x = torch.randn(3, 6)
    found = tails(model, x, {"0.layer": model[0].layer, "1.layer": model[1].layer})
    assert (found["1.layer"].skip.module, found["1.layer"].skip.place) == ("1.norm", 0)
    model[1].norm = model[0].norm
    twice = tails(model, x, {"1.layer": model[1].layer})["1.layer"].skip
    assert (twice.module, twice.place) == ("1", 0), "the norm is called twice in a pass"
    parts = {"0": model[0], "0.norm": model[0].norm, "1.layer": model[1].layer}
    assert tails(model, x, parts)["1.layer"].skip.module == "1", "a layer is another module once it is replaced"


def test_tensors_that_do_not_count_their_changes_are_not_trusted():
    model = Branch(changed_since).eval()
    model.forward = torch.inference_mode()(model.forward)
    assert tails(model, torch.randn(3, 6), {"layer": model.layer})["layer"].skip is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_networks_that_differ_elsewhere_and_scripted_parts_are_recovered_as_before():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 1.0

    class Model(nn.Module):
        def __init__(self, stem):
            super().__init__()
            self.stem, self.layer = stem, nn.Linear(16, 16)

        def forward(self, x):
            h = self.stem(x)
            return h + self.layer(h)

    for stem, other in (
        (Wrapped(nn.Linear(16, 16)), nn.Linear(16, 16)),
        (torch.jit.script(nn.Linear(16, 16)), None),
    ):
        dense = Model(stem).eval()
        plain = Model(nn.Linear(16, 16)).eval()
        plain.layer = dense.layer
        small = decomp.svd(plain, ranks=4, layers="layer", progress=False)
        small.stem = stem if other is None else other
        data = [torch.randn(32, 16) for _ in range(8)]
        decomp.repair(small, dense, data, progress=False)
        decomp.finetune_layerwise(small, dense, data, steps=20, lr=2e-3, progress=False)


class Residual(nn.Module):
    """A convolution without a bias, its BatchNorm, and the sum."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn(self.conv(x))
        y += x
        return self.act(y)


@pytest.fixture
def residual():
    model = plant_spectra(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), *(Residual() for _ in range(3))), decay=0.6)
    for block in model[1:]:
        block.bn.running_mean.normal_()
        block.bn.running_var.uniform_(0.5, 2)
        block.bn.weight.data.uniform_(0.5, 2)
        block.bn.bias.data.normal_()
    return model.eval()


def test_the_correction_gives_the_sum_of_the_dense_network_whatever_the_batch_norm(residual):
    x = torch.randn(4, 8, 6, 6)
    skip = tails(residual, x, {"2.conv": residual[2].conv})["2.conv"].skip
    assert (skip.module, skip.place) == ("2", 0)
    r, other = torch.randn(2, 4, 8, 6, 6, dtype=torch.float64)
    y, bn = torch.randn(4, 8, 6, 6, dtype=torch.float64), copy.deepcopy(residual[2].bn).double()
    torch.testing.assert_close(bn(skip.corrected(y, r, other)) + other, bn(y) + r)
    assert skip.corrected(y, None, other) is y
    assert skip.corrected(y, r, other[:, :, :3]) is y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_channels_that_the_batch_norm_all_but_removes_are_not_corrected(dtype, factor):
    skip = Skip("", 0, factor * torch.tensor([1.0, -2.0, 0.01, 0.0], dtype=torch.float64))
    y, r = torch.zeros(1, 4, 1, 1, dtype=dtype), torch.ones(1, 4, 1, 1, dtype=dtype)
    corrected = factor * skip.corrected(y, r, torch.zeros_like(y))
    assert corrected.dtype == dtype
    assert corrected.flatten().tolist() == [1.0, -0.5, 0.0, 0.0]


def test_the_layer_before_the_sum_makes_up_for_the_error_of_the_skip():
    """Oracle: least squares for y + r - r^ at what the layer receives, cut to its rank."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.join, self.second = nn.Linear(20, 16), nn.Identity(), nn.Linear(16, 16)

        def forward(self, x):
            h = self.join(self.first(x))
            return h + self.second(h)

    dense = Model().double().requires_grad_(False)
    mix = torch.randn(20, 20, dtype=torch.float64)
    data = [torch.randn(60, 20, dtype=torch.float64) @ mix for _ in range(8)]
    small = decomp.svd(dense, ranks={"first": 3, "second": 2}, data=data, sequential=True, progress=False)
    x = torch.cat(data)
    hidden, wanted = small.first(x), dense(x)
    centre = hidden - hidden.mean(0)
    missing = wanted - hidden
    scores = torch.linalg.svd(centre, full_matrices=False)[0][:, :3]
    left, values, right = torch.linalg.svd(scores @ (scores.T @ (missing - missing.mean(0))), full_matrices=False)
    best = float(((left[:, :2] * values[:2]) @ right[:2] + missing.mean(0) - missing).square().sum())
    assert best <= float((small(x) - wanted).square().sum()) <= 1.02 * best


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_residual_networks_come_closer_with_the_correction(residual, monkeypatch, cache_bytes):
    monkeypatch.setattr(sequential, "CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(sequential, "KEEP_BYTES", cache_bytes)
    mix = torch.randn(8, 8)
    batches = [torch.einsum("ab,nbij->naij", mix, torch.randn(8, 8, 8, 8)) for _ in range(14)]
    data, unseen = batches[:12], torch.cat(batches[12:])
    arguments = {"ranks": decomp.ranks.params(0.4), "data": data, "sequential": True, "progress": False}
    errors = []
    for corrected in (Skip.corrected, lambda skip, output, dense, small: output):
        monkeypatch.setattr(Skip, "corrected", corrected)
        small = decomp.tucker(residual, **arguments)
        with torch.no_grad():
            errors.append(float((small(unseen) - residual(unseen)).norm()))
    assert errors[0] < 0.97 * errors[1]


def test_held_passes_see_the_same_skips_as_passes_of_their_own(residual, monkeypatch):
    data = [torch.randn(4, 8, 6, 6) for _ in range(8)]
    arguments = {"ranks": 3, "data": data, "sequential": True, "progress": False}
    held = decomp.tucker(residual, **arguments)
    monkeypatch.setattr(suspended, "held_bytes", lambda *_: None)
    own = decomp.tucker(residual, **arguments)
    for one, other in zip(held.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recovery", ["repair", "layer-wise"])
def test_recovery_aims_at_the_sum_too(residual, recovery, monkeypatch):
    mix = torch.randn(8, 8)
    batches = [torch.einsum("ab,nbij->naij", mix, torch.randn(8, 8, 8, 8)) for _ in range(14)]
    data, unseen = batches[:12], torch.cat(batches[12:])
    errors = []
    for corrected in (Skip.corrected, lambda skip, output, dense, small: output):
        monkeypatch.setattr(Skip, "corrected", corrected)
        small = decomp.tucker(residual, ranks=decomp.ranks.params(0.4), progress=False)
        if recovery == "repair":
            decomp.repair(small, residual, data, progress=False)
        else:
            decomp.finetune_layerwise(small, residual, data, steps=150, lr=2e-3, progress=False)
        with torch.no_grad():
            errors.append(float((small(unseen) - residual(unseen)).norm()))
    assert errors[0] < 0.97 * errors[1]

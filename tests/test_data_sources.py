"""Data as users have it: padding, workers, samplers with a generator, images of several sizes."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from networks import plant_spectra
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
)
from transformers import BertConfig, BertModel

import decomp
from decomp.calibration.unfold import patches_like
from decomp.data.batches import Batches, random_state, set_random_state
from decomp.training.checkpoint import pack, unpack


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=60, max_position_embeddings=16, initializer_range=0.2, **sizes)
    return plant_spectra(BertModel(config)).eval()


def sequences(count):
    """Tokens of each sequence alone, and all in batches of three, padded to 12 with a mask."""
    alone = [{"input_ids": torch.randint(1, 60, (1, int(length)))} for length in torch.randint(4, 12, (count,))]
    padded = []
    for start in range(0, count, 3):
        tokens, mask = torch.zeros(2, 3, 12, dtype=torch.long)
        for row, each in enumerate(alone[start : start + 3]):
            length = each["input_ids"].shape[1]
            tokens[row, :length], mask[row, :length] = each["input_ids"], 1
        padded.append({"input_ids": tokens, "attention_mask": mask})
    return alone, padded


LATER = "encoder.layer.1.*"  # what attention has gone through: the first projections see no mask


def test_a_mask_reaches_the_model_and_one_of_ones_changes_nothing():
    model, (_, padded) = bert(), sequences(12)
    bare = [{"input_ids": batch["input_ids"]} for batch in padded]
    full = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in padded]
    masked, unmasked, ones = (
        decomp.calibrate(model, data, layers=LATER, held_out=False, progress=False)
        for data in (padded, bare, full)
    )
    assert len(masked) == 6
    for name, moments in unmasked.items():
        seen = "inputs" if moments.inputs is not None else "outputs"
        torch.testing.assert_close(getattr(ones[name], seen), getattr(moments, seen), rtol=1e-4, atol=1e-6)
        assert float((getattr(masked[name], seen) - getattr(moments, seen)).norm()) > 0.01
        assert ones[name].samples == 4 * 3 * 12


def test_moments_are_those_of_the_tokens_that_are_no_padding():
    """The oracle is the same sequences one by one, none of them padded."""
    model, (alone, padded) = bert(), sequences(12)
    expected, found = (
        decomp.calibrate(model, data, layers=LATER, held_out=False, progress=False) for data in (alone, padded)
    )
    for name, moments in expected.items():
        assert found[name].samples == moments.samples
        for kind in ("inputs", "outputs"):
            torch.testing.assert_close(getattr(found[name], kind), getattr(moments, kind), rtol=1e-4, atol=1e-6)


def test_fine_tuning_with_masks_brings_the_tokens_that_are_no_padding_closer():
    model, (alone, padded) = bert(), sequences(36)
    small = decomp.svd(model, ranks=8, layers="encoder.*")

    @torch.no_grad()
    def error():
        lost = energy = 0.0
        for batch in alone:
            ours, theirs = (each(**batch).last_hidden_state for each in (small, model))
            lost, energy = lost + float((ours - theirs).square().sum()), energy + float(theirs.square().sum())
        return (lost / energy) ** 0.5

    before = error()
    report = decomp.finetune_layerwise(small, model, padded, steps=60, lr=5e-3, progress=False)
    assert len(report) == 12
    assert error() < 0.9 * before


def net():
    model = nn.Sequential(
        *(nn.Conv2d(6, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(24, 12, 1)),
    )
    model = plant_spectra(model, decay=0.6)
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model.eval()


class Images(Dataset):
    """An image by its number, made where it is asked for."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(6, 8, 8, generator=generator)
        return image + image.roll(1, 1) + image.roll(1, 0)


@pytest.mark.parametrize("shuffle", [False, True])
def test_workers_change_nothing(shuffle):
    """The same order and the same numbers, bit by bit, whoever makes the batches."""
    model, results = net(), []
    for workers in (0, 2):
        torch.manual_seed(5)
        loader = DataLoader(Images(48), batch_size=8, shuffle=shuffle, num_workers=workers)
        statistics = decomp.calibrate(model, loader, held_out=False, progress=False)
        small = decomp.tucker(model, ranks=5)
        repaired = decomp.repair(small, model, loader, progress=False)
        tuned = decomp.finetune_layerwise(small, model, loader, steps=8, progress=False)
        errors = [
            (name, layer.error_before, layer.error_after)
            for report in (repaired, tuned)
            for name, layer in report.items()
        ]
        results.append((statistics, errors, small.state_dict()))
    (alone, errors, state), (helped, errors_of_helped, state_of_helped) = results
    assert errors == errors_of_helped
    assert len(errors) == 6
    assert all(after < before for _, before, after in errors[:3])
    assert any(after < before for _, before, after in errors[3:])
    assert all(torch.equal(value, state_of_helped[name]) for name, value in state.items())
    for name, moments in alone.items():
        assert torch.equal(moments.outputs, helped[name].outputs)
        assert moments.shrinkage == helped[name].shrinkage


def shuffled(kind, rows):
    generator = torch.Generator().manual_seed(1)
    data, options = TensorDataset(rows), {"batch_size": 8}
    if kind == "shuffle":
        return DataLoader(data, shuffle=True, **options)
    if kind == "shuffle by a generator":
        return DataLoader(data, shuffle=True, generator=generator, **options)
    if kind == "a sampler":
        return DataLoader(data, sampler=RandomSampler(data), **options)
    if kind == "a sampler by a generator":
        return DataLoader(data, sampler=RandomSampler(data, generator=generator), **options)
    if kind == "a batch sampler by a generator":
        sampler = SubsetRandomSampler(range(64), generator=generator)
        return DataLoader(data, batch_sampler=BatchSampler(sampler, 8, drop_last=False))
    if kind == "a dataset that shuffles":
        return DataLoader(Shuffling(rows, np.random.default_rng(1)), **options)
    return DataLoader(data, sampler=Permuting(64, RANDOM[kind]()), **options)


class Permuting(Sampler):
    """A sampler of one's own, with whatever random generator."""

    def __init__(self, count, source):
        self.count, self._source = count, source

    def __len__(self):
        return self.count

    def __iter__(self):
        order = list(range(self.count))
        self._source.shuffle(order)
        return iter(order)


class Shuffling(IterableDataset):
    def __init__(self, rows, source):
        self.rows, self.source = rows, source

    def __iter__(self):
        return iter([(self.rows[place],) for place in self.source.permutation(len(self.rows))])


RANDOM = {
    "Python's generator": lambda: random.Random(1),
    "NumPy's earlier generator": lambda: np.random.RandomState(1),
    "NumPy's PCG64": lambda: np.random.default_rng(1),
    "NumPy's MT19937": lambda: np.random.Generator(np.random.MT19937(1)),
    "NumPy's Philox": lambda: np.random.Generator(np.random.Philox(1)),
    "NumPy's SFC64": lambda: np.random.Generator(np.random.SFC64(1)),
}
SAMPLERS = ["shuffle", "shuffle by a generator", "a sampler", "a sampler by a generator"]
KINDS = [*SAMPLERS, "a batch sampler by a generator", "a dataset that shuffles", *RANDOM]


@pytest.mark.parametrize("kind", KINDS)
def test_the_random_state_of_data_survives_a_checkpoint(kind):
    loader = shuffled(kind, torch.arange(64))
    state = random_state(loader)
    first = torch.cat([batch for (batch,) in loader])
    set_random_state(unpack(pack(state)), loader)
    assert torch.equal(torch.cat([batch for (batch,) in loader]), first)
    assert not torch.equal(torch.cat([batch for (batch,) in loader]), first)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_is_made_in_the_same_order(kind):
    rows = torch.arange(64)
    batches = Batches.in_fixed_order(shuffled(kind, rows), lambda batch: batch[0])
    first, second = (torch.cat(list(batches)) for _ in range(2))
    assert sorted(first.tolist()) == rows.tolist() != first.tolist()
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_both_held_out_and_trained_on(kind):
    """Fine-tuning goes through the data several times: what is held out of one pass stays so in the next.

    What is held out is measured after every step; the others are looked at once or twice to make examples.
    """
    rows, steps = torch.eye(64), 20
    dense = plant_spectra(nn.Sequential(nn.Linear(64, 32), nn.ReLU()))
    small = decomp.svd(dense, ranks=4)
    seen = {True: Counter(), False: Counter()}

    def watch(module, given):
        seen[torch.is_grad_enabled()].update(given[0].argmax(1).tolist())

    small[0].register_forward_pre_hook(watch)  # the copy that is trained is made with its hooks
    options = {"steps": steps, "inputs": lambda batch: batch[0], "progress": False, "patience": None}
    report = decomp.finetune_layerwise(small, dense, shuffled(kind, rows), **options)["0"]
    assert report.steps == steps
    trained, measured = set(seen[True]), {row for row, count in seen[False].items() if count >= steps}
    assert (len(trained), len(measured)) == (48, 16)
    assert not trained & measured


SIZES = [(12, 12), (7, 15), (12, 12), (20, 6), (7, 15), (9, 9), (16, 16), (12, 12)]


@pytest.fixture
def images():
    """Smooth along one axis, each batch of a size of its own."""
    mix = torch.randn(6, 6)
    made = []
    for height, width in SIZES:
        x = torch.einsum("ab,nbij->naij", mix, torch.randn(4, 6, height, width)) + 0.5
        made.append(x + x.roll(1, 2))
    return made


def test_moments_of_images_of_several_sizes_are_over_all_positions(images):
    """Oracle: NumPy on all rows of all sizes together."""
    model = net()
    statistics = decomp.calibrate(model, images, held_out=False, progress=False)
    seen = {name: [] for name in statistics}
    for name, rows in seen.items():
        layer = model.get_submodule(name)
        spatial = layer.kernel_size == (3, 3)

        def watch(module, given, got, rows=rows, spatial=spatial):
            values = patches_like(module)(given[0]) if spatial else got
            rows.append(values.transpose(0, 1).flatten(1).double().numpy())

        layer.register_forward_hook(watch)
    with torch.no_grad():
        for x in images:
            model(x)
    assert list(statistics) == ["0", "3", "5"]
    for name, moments in statistics.items():
        rows = np.concatenate(seen[name], 1)
        found = moments.outputs if moments.patches is None else moments.patches
        np.testing.assert_allclose(found[0].numpy(), np.cov(rows, bias=True), rtol=1e-4, atol=1e-6)
        assert moments.samples == 4 * len(SIZES)
        assert rows.shape[1] == sum(4 * h * w if name == "0" else 4 * -(-h // 2) * -(-w // 2) for h, w in SIZES)
        assert len(moments.means) == len(set(SIZES)) == 5


@torch.no_grad()
def error(small, dense, data):
    lost = sum(float((small(x) - dense(x)).square().sum()) for x in data)
    return (lost / sum(float(dense(x).square().sum()) for x in data)) ** 0.5


def test_images_of_several_sizes_go_through_every_call(images):
    model = net()
    plain = decomp.tucker(model, ranks=5)
    small = decomp.tucker(model, ranks=5, data=images, sequential=False, progress=False)
    assert error(small, model, images) < error(plain, model, images)
    held_out = images[3::4]
    before = error(small, model, held_out)
    report = decomp.repair(small, model, images, progress=False)
    assert report.output_error_before == pytest.approx(before, rel=1e-5)
    assert report.output_error_after == pytest.approx(error(small, model, held_out), rel=1e-5)
    assert report.output_error_after < before
    tuned = decomp.finetune_layerwise(small, model, images, steps=40, progress=False)
    assert list(tuned) == ["0", "3", "5"]
    assert error(small, model, images) < report.output_error_after
    with torch.no_grad():  # of eight batches, numbers 2 and 7 are held out; the layers before are done
        pairs = [(small(images[place]), model(images[place])) for place in (2, 7)]
    lost, energy = (
        sum(float(each.square().sum()) for each in values)
        for values in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    assert tuned["5"].error_after == pytest.approx((lost / energy) ** 0.5, rel=1e-4)
    sequential = decomp.tucker(model, ranks=5, data=images, sequential=True, progress=False)
    assert error(sequential, model, images) < error(plain, model, images)


@pytest.mark.parametrize("size", [6, 30])
def test_the_mean_that_is_corrected_is_that_over_all_positions(size):
    """As BatchNorm averages: a large image has more positions than a small one, and another mean here."""
    model = net()
    data = [torch.randn(4, 6, 6, 6), torch.randn(4, 6, size, size) + 2] * 2
    statistics = decomp.calibrate(model, data, layers="0", held_out=False, progress=False)
    small = decomp.tucker(model, ranks=4, data=statistics, layers="0", progress=False)
    with torch.no_grad():
        lost = [(small[:2](x) - model[:2](x)).transpose(0, 1).flatten(1) for x in data]
        scale = torch.cat([model[:2](x).transpose(0, 1).flatten(1) for x in data], 1).std(1)
    assert float((torch.cat(lost, 1).mean(1) / scale).abs().max()) < 1e-4

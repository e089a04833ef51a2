"""Statistics over a sample of the positions: unbiased, as far off as they say, and enough."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from layer_cases import KINDS
from networks import plant_spectra
from rows import rows_of
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import decomp
from decomp.calibration.sampling import Sampler, Sampling, stratified
from decomp.calibration.unfold import Patches, patches_like, some_rows
from decomp.digits import load_digits, train


@pytest.mark.parametrize(("total", "count"), [(7, 3), (10, 10), (1000, 37), (5, 4)])
def test_every_position_is_drawn_as_often_as_any_other(total, count):
    drawn = torch.stack([torch.bincount(stratified(total, count, seed), minlength=total) for seed in range(4000)])
    assert drawn.sum(1).unique().tolist() == [count]
    expected = count / total
    deviation = math.sqrt(max(drawn.double().var(0).max(), 1e-6) / 4000)
    assert float((drawn.double().mean(0) - expected).abs().max()) < 5 * deviation


def test_a_draw_is_repeatable_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    first, second, other = (stratified(1000, 20, seed) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_ten_positions_for_each_channel_and_more_where_they_are_cheap():
    assert [Sampling().enough(channels) for channels in (2304, 512, 64, 8)] == [23040, 2**15, 2**21, 2**27]
    # A fit takes 40 rows per channel where they cost no more than 2^37 multiply-adds.
    assert [Sampling().to_fit(channels) for channels in (4096, 2304, 1536, 512)] == [40960, 25890, 58254, 2**15]
    assert all(Sampling().least(channels) >= Sampling().to_fit(channels) for channels in (4096, 2304, 1536, 64))
    assert (Sampling(7).to_fit(64), Sampling("all").least(64)) == (7, math.inf)
    assert (Sampling(7).enough(64), Sampling("all").enough(64)) == (7, math.inf)
    assert Sampling(batches=10).share(2304) == 2304


def test_layers_that_few_batches_reach_make_up_for_the_others():
    always, seldom = (Sampler(Sampling(1000, batches=10), 4) for _ in range(2))
    for batch in range(10):
        always.draw(5000, batch)
        if batch in (4, 9):
            seldom.draw(5000, batch)
    assert always.taken == seldom.taken == 1000
    for batches in (1, 20):
        sampler = Sampler(Sampling(1000), 4)
        for batch in range(batches):
            sampler.draw(5000, batch)
        assert 1000 <= sampler.taken <= 1000 * (1 + math.log(batches)) + batches


@pytest.mark.parametrize("positions", [0, -3, True, "some", 0.5])
def test_what_is_no_number_of_positions_is_said(positions):
    with pytest.raises(ValueError, match='write "auto", "all", or a number above 0'):
        decomp.calibrate(nn.Linear(4, 4), [torch.randn(8, 4)], positions=positions, progress=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("last", [False, True])
def test_patches_at_chosen_positions_are_those_of_the_unfolded_input(kind, mode, last):
    transposed = issubclass(kind, nn.modules.conv._ConvTransposeNd)
    if mode != "zeros" and transposed:
        pytest.skip("torch pads transposed convolutions with zeros only")
    dense = kind(4, 6, 3, stride=2, padding=2, dilation=1 if mode == "reflect" else 2, groups=2, padding_mode=mode)
    x = torch.randn(3, 4, *(7,) * KINDS[kind])
    if last and KINDS[kind] == 2:
        x = x.to(memory_format=torch.channels_last)
    patches = Patches(dense)
    every = rows_of(patches_like(dense)(x), KINDS[kind], 2).detach()
    assert patches.count(x) == every.shape[1]
    indices = torch.tensor([0, 5, 5, every.shape[1] - 1])
    assert torch.equal(patches.rows(x, indices), every[:, indices].float())
    assert torch.equal(patches.rows(x, None), every.float())
    rows = rows_of(x, KINDS[kind], 2)
    indices = torch.tensor([0, 5, 5, rows.shape[1] - 1])
    assert torch.equal(some_rows(x, KINDS[kind], 2, indices), rows[:, indices].float())


def images(count, seed, channels=6):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=torch.Generator().manual_seed(99))
    made = []
    for _ in range(count):
        x = torch.randn(2, channels, 24, 24, generator=generator)
        made.append(torch.einsum("ab,nbij->naij", mix, x) + torch.randn(2, channels, 1, 1, generator=generator))
    return made


@pytest.mark.parametrize("kind", ["inputs", "patches", "outputs"])
@pytest.mark.parametrize("known", [True, False])
def test_sampled_moments_are_unbiased_and_as_far_off_as_they_say(kind, known):
    """Over 30 sets of images: the mean of the differences vanishes, their root mean square is the stated error."""

    class Stream(IterableDataset):
        def __init__(self, batches):
            self.batches = batches

        def __iter__(self):
            return iter(self.batches)

    dense = nn.Conv2d(6, 5, 3, bias=False)
    differences, stated = [], []
    for seed in range(30):
        data = images(8, seed)
        given = data if known else DataLoader(Stream(data), batch_size=None)
        full = decomp.calibrate(dense, data, positions="all", held_out=False, progress=False)[""]
        some = decomp.calibrate(dense, given, positions=400, held_out=False, progress=False)[""]
        assert (full.positions, full.of_positions, full.standard_error) == (8 * 2 * 22 * 22,) * 2 + (0.0,)
        assert some.of_positions == full.positions
        assert 400 <= some.positions < 400 * (1 if known else 4) + 10
        exact = getattr(full, kind)
        differences.append((getattr(some, kind) - exact) / exact.norm())
        stated.append(some.standard_error)
    differences = torch.stack(differences)
    mean_square = float(differences.square().sum((1, 2, 3)).mean())
    error = sum(stated) / len(stated)
    assert error < 0.3
    if kind == "patches":
        assert 0.5 * error < mean_square**0.5 < 1.25 * error
    assert float(differences.mean(0).norm()) < 1.7 * (mean_square / len(stated)) ** 0.5


def test_digits_with_a_sample_are_digits_with_all_positions():
    """Errors and ranks within a standard error, for one shrinkage: of its five values two may nearly tie."""
    digits = load_digits()
    model = train(digits, progress=False)
    full, some = (
        decomp.calibrate(model, digits.images, positions=positions, progress=False) for positions in ("all", 8192)
    )
    assert sum(some[name].positions < some[name].of_positions / 2 for name in full) >= 6
    assert all(moments.positions == moments.of_positions for moments in full.values())
    alike = {name: replace(moments, shrinkage=full[name].shrinkage) for name, moments in some.items()}
    some = decomp.Statistics(alike, some.example)
    for name, moments in some.items():
        for kind in ("patches", "inputs", "outputs"):
            a, b = getattr(full[name], kind), getattr(moments, kind)
            assert a is None or float((a - b).norm() / a.norm()) <= 1.25 * max(moments.standard_error, 0.05)
    compared = 0
    for ranks in (decomp.ranks.params(0.3), decomp.ranks.energy(0.9)):
        plans = [decomp.plan(model, ranks=ranks, data=statistics) for statistics in (full, some)]
        fixed = decomp.plan(model, ranks=plans[0], data=some)
        small = [plan.apply(model, progress=False).decomp_plan for plan in (plans[0], fixed)]
        for name, choice in plans[0].items():
            error = max(some[name].standard_error, 0.01)  # inputs may be sampled where patches are not
            if not choice.ranks:
                continue
            compared += 1
            assert fixed[name].output_error == pytest.approx(choice.output_error, rel=error)
            assert small[1][name].output_error == pytest.approx(small[0][name].output_error, rel=error)
            other = plans[1][name].ranks
            limits = small[0][name].shape
            for a, b, limit in zip(choice.ranks, other, limits, strict=False):
                assert abs(a - b) <= max(1, error * limit)
    assert compared > 12


def test_statistics_say_how_many_positions_were_used():
    data = images(8, 0)
    statistics = decomp.calibrate(
        nn.Sequential(nn.Conv2d(6, 8, 3)), data, positions=100, held_out=False, progress=False
    )
    text = str(statistics)
    assert "standard error" in text
    assert f"{statistics['0'].positions}" in text
    assert "7744" in text


@pytest.mark.parametrize("loss", [None, "output"])
def test_calibration_is_repeatable_and_leaves_the_random_state_alone(loss):
    data = images(6, 1)
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
    before = torch.get_rng_state()
    first = decomp.calibrate(model, data, positions=50, loss=loss, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(7)
    second = decomp.calibrate(model, data, positions=50, loss=loss, progress=False)
    for name, moments in first.items():
        for kind in ("inputs", "outputs", "patches", "row_metric"):
            a, b = getattr(moments, kind), getattr(second[name], kind)
            assert (a is None and b is None) or torch.equal(a, b)


def stratified_by_seed(first, total, count, seed):
    return stratified(total, count, first + seed)


def test_sampled_gradients_are_unbiased(monkeypatch):
    """The importance of a layer, from a tenth of the positions, is that from all of them."""
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
    ratios, data = [], images(4, 0)
    for seed in range(20):
        draw = partial(stratified_by_seed, 1000 * seed)
        monkeypatch.setattr("decomp.calibration.sampling.stratified", draw)
        full, some = (
            decomp.calibrate(model, data, positions=positions, loss="output", progress=False)["0"].importance
            for positions in ("all", 300)
        )
        ratios.append(some / full)
    ratios = torch.tensor(ratios)
    assert float((ratios.mean() - 1).abs()) < 3 * float(ratios.std()) / len(ratios) ** 0.5 + 1e-3


def test_one_forward_pass_and_with_a_loss_one_backward_pass():
    """Counted, not timed: calls of the layer, and gradients that reach its output."""
    model = plant_spectra(nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    data, calls, gradients = images(5, 0), [], []
    model[0].register_full_backward_hook(lambda *_: gradients.append(1))
    model.register_forward_hook(lambda *_: calls.append(1))
    decomp.calibrate(model, data, layers="2", progress=False)
    assert len(calls) == 1 + len(data)  # one more finds what follows each layer
    calls.clear()
    decomp.calibrate(model, data, layers="2", loss="output", progress=False)
    assert len(calls) == 1 + len(data)
    assert not gradients, "no gradient goes further back than the first layer"


def test_a_batch_of_nothing_but_padding_is_left_out():
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12)).eval()
    batches = [{"input": torch.randn(4, 6, 12), "attention_mask": torch.ones(4, 6)} for _ in range(8)]
    batches[2]["attention_mask"] = torch.zeros(4, 6)
    small = decomp.svd(
        model, ranks=3, data=batches, inputs=lambda batch: batch["input"], sequential=True, progress=False
    )
    report = decomp.repair(small, model, batches, inputs=lambda batch: batch["input"], progress=False)
    assert report.output_error_after <= report.output_error_before

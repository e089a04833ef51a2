"""Errors of the data name the batch; the order of passes; windows."""

import copy
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import decomp
from decomp.data.batches import CLOSED_FORM_SPLIT, Batches, BatchSplit, OwnRandomness, random_state

GOOD = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (torch.ones(0, 3), ValueError, r"batch 1 is empty, a tensor \(0, 3\): leave"),
        (torch.full((2, 3), torch.nan), ValueError, r"batch 1 holds NaN or infinity, in a tensor \(2, 3\)"),
        ((GOOD, torch.full((2,), torch.inf)), ValueError, "batch 1 holds NaN or infinity"),
        ({"x": torch.full((2, 3), torch.inf).half()}, ValueError, "batch 1 holds NaN"),
        ("text", TypeError, "batch 1 holds no tensor, it is one str: a batch must be a tensor"),
        (["a", 3], TypeError, "batch 1 holds no tensor, it is 2 elements"),
        ([], TypeError, "batch 1 holds no tensor"),
        (None, TypeError, "batch 1 holds no tensor"),
        (np.ones(3), TypeError, "batch 1 .*torch.from_numpy"),
    ],
)
def test_a_bad_batch_is_named(bad, error, words):
    with pytest.raises(error, match=words):
        list(Batches([GOOD, bad]))


@pytest.mark.parametrize(
    "batch",
    [
        GOOD,
        (GOOD, "label"),
        {"x": GOOD, "mask": None},
        UserDict(x=GOOD),
        torch.tensor([1, 2]),
        torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]),  # an additive mask
        GOOD.to_sparse(),
    ],
)
def test_sound_batches_pass(batch):
    assert len(list(Batches([batch]))) == 1


def test_what_the_model_makes_of_a_batch_is_named_too():
    dense = nn.Sequential(nn.Linear(16, 8))
    small = decomp.tucker(dense, ranks=2)
    data = [torch.randn(4, 16)] * 2 + [torch.randn(4, 15)]
    for call in (
        lambda: decomp.finetune_layerwise(copy.deepcopy(small), dense, data, steps=4, held_out=0),
        lambda: decomp.finetune(copy.deepcopy(small), data, teacher=dense, steps=4),
    ):
        with pytest.raises(RuntimeError, match="shapes") as caught:
            call()
        assert any("in batch 2 of data: one tensor (4, 15)" in note for note in caught.value.__notes__)
    with pytest.raises(IndexError) as caught:
        list(Batches([GOOD, (GOOD,)], lambda batch: batch[1]))
    assert "in batch 1 of data" in caught.value.__notes__[0]


def test_a_pass_that_ends_early_is_named():
    class Shrinking:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([GOOD] * (5 - self.passes))

    batches = Batches(Shrinking())
    assert len(list(batches)) == 4
    with pytest.raises(ValueError, match="data ended before batch 3 on a later pass, and gave 4 batches before"):
        list(batches)


def test_batches_are_counted_with_and_without_a_length():
    class Endless:
        def __iter__(self):
            return iter([GOOD] * 3)

    assert Batches([GOOD] * 2).count() == 2
    assert Batches(Endless()).count() == 3


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_data_has_random_numbers_of_its_own(generator):
    loader = DataLoader(TensorDataset(torch.arange(32)), 4, shuffle=True, generator=generator)
    state = random_state(loader)
    expected = [batch[0] for batch in OwnRandomness(loader, state, same_order=True)]
    before = torch.get_rng_state()
    again = OwnRandomness(loader, state, same_order=True)
    for _ in range(2):
        got = []
        for batch in again:
            got.append(batch[0])
            torch.rand(3)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    torch.set_rng_state(before)
    shuffled = OwnRandomness(loader, state, same_order=False)
    first, second = ([batch[0] for batch in shuffled] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.cat(first), torch.cat(expected))
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_what_closed_forms_hold_out_is_every_fourth_batch():
    assert [index for index in range(12) if CLOSED_FORM_SPLIT.held_out(index)] == [3, 7, 11]
    assert all(CLOSED_FORM_SPLIT.train(index) != CLOSED_FORM_SPLIT.held_out(index) for index in range(12))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("share", "every"), [(0.5, 2), (0.4, 2), (0.25, 4), (0.2, 5), (0.1, 10), (0.0, None)])
def test_a_share_holds_out_the_middle_of_every_k_batches_of_a_process(share, every, size):
    splits = [BatchSplit.of_share(share, rank, size) for rank in range(size)]
    for index in range(60):
        (own,) = [split for split in splits if split.own(index)]
        held_out = every is not None and index // size % every == every // 2
        assert own.held_out(index) == held_out != own.train(index)
        assert not any(split.held_out(index) or split.train(index) for split in splits if split is not own)


class Epochs:
    """Data whose order depends on how often they were gone through to the end."""

    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return 6

    def __iter__(self):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(self.epoch))
        yield from (torch.full((1, 2), float(number)) for number in order)
        self.epoch += 1


@pytest.mark.parametrize("part", [None, lambda index: index % 2 == 0])
def test_passes_whose_order_may_change_go_on_to_their_end(part):
    """Else processes that take other batches would shuffle differently from then on."""
    data = Epochs()
    batches = Batches(data)
    for epoch in range(3):
        assert data.epoch == epoch
        list(batches.numbered(part=part))


def test_what_is_kept_is_a_copy_and_is_not_fetched_again():
    buffer, fetched = torch.zeros(1, 2), []

    class Refilled:
        def __iter__(self):
            for number in range(5):
                fetched.append(number)
                yield buffer.fill_(number)

    batches = Batches.in_fixed_order(Refilled(), None, keep_bytes=8 * 3)
    chosen = {0, 2, 3}.__contains__
    for _ in range(3):
        found = [(index, float(batch[0, 0])) for index, batch in batches.numbered(part=chosen)]
        assert found == [(0, 0.0), (2, 2.0), (3, 3.0)]
    assert fetched == [0, 1, 2, 3, 4]
    more = {0, 1, 2, 3}.__contains__
    assert [index for index, _ in batches.numbered(part=more)] == [0, 1, 2, 3]
    assert fetched == [0, 1, 2, 3, 4, 0, 1]

"""Tucker-2 against TensorLy, brute force and the known bounds."""

from itertools import pairwise

import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import partial_tucker
from torch import nn

from decomp.layers import TuckerConv, group_kernels
from decomp.methods import METHODS

TUCKER = METHODS["tucker"]


def relative_error(kernels, factors):
    core, (left, right) = factors
    approximation = torch.einsum("gta,gab...,gsb->gts...", left, core, right)
    return float((kernels - approximation).norm() / kernels.norm())


def kernel(outputs=16, inputs=12, groups=1, decay=0.7):
    core = torch.randn(groups, outputs, inputs, 3, 3, dtype=torch.float64)
    rows, columns = torch.arange(1, outputs + 1.0), torch.arange(1, inputs + 1.0)
    return core * torch.maximum(rows[:, None], columns[None])[None, :, :, None, None] ** -decay


@pytest.mark.parametrize("groups", [1, 3])
def test_planned_error_is_that_of_the_truncated_hosvd_at_every_pair_of_ranks(groups):
    kernels = kernel(7, 5, groups)
    analysis = TUCKER.analyse(kernels)
    unfolded_out, unfolded_in = kernels.flatten(2), kernels.transpose(1, 2).flatten(2)
    bases = [torch.linalg.svd(unfolded)[0] for unfolded in (unfolded_out, unfolded_in)]
    for out in range(1, 8):
        for inside in range(1, 6):
            left, right = bases[0][:, :, :out], bases[1][:, :, :inside]
            core = torch.einsum("gts...,gta,gsb->gab...", kernels, left, right)
            expected = relative_error(kernels, (core, (left, right)))
            assert analysis.error((out, inside)) == pytest.approx(expected, abs=1e-12)


def test_hooi_is_between_the_tail_of_a_mode_and_the_truncated_hosvd():
    kernels = kernel()
    analysis = TUCKER.analyse(kernels)
    improved = 0
    for ranks in [(1, 1), (3, 5), (8, 4), (15, 11), (16, 3), (5, 12)]:
        error = relative_error(kernels, TUCKER.factors(kernels, ranks))
        tails = [
            np.sqrt((s.values[:, r:] ** 2).sum()) / kernels.norm().item()
            for s, r in zip(analysis.spectra, ranks, strict=True)
        ]
        assert max(tails) - 1e-12 <= error <= analysis.error(ranks) + 1e-12
        improved += error < analysis.error(ranks) - 1e-6
    assert improved >= 3, "HOOI should improve on the HOSVD where both modes are truncated"


@pytest.mark.parametrize("ranks", [(4, 3), (8, 8), (12, 2)])
def test_error_is_no_worse_than_tensorly(ranks):
    kernels = kernel()
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (core, factors), _ = partial_tucker(kernels[0], list(ranks), modes=[0, 1], n_iter_max=200, tol=1e-10)
    theirs = relative_error(kernels, (core[None], [factor[None] for factor in factors]))
    ours = relative_error(kernels, TUCKER.factors(kernels, ranks))
    assert ours <= theirs * (1 + 1e-4)


def test_factors_of_tensorly_make_the_same_layer():
    dense = nn.Conv2d(12, 16, 3, padding=1).double()
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        found = partial_tucker(dense.weight.detach(), [16, 5], modes=[0, 1], n_iter_max=50)[0]
    layer = TuckerConv.from_factors(dense, found)
    assert layer.ranks == (16, 5)  # a full mode has no 1x1 convolution: its factor goes into the core
    assert [role for role, _ in layer.named_children()] == ["reduce", "core"]
    expected = torch.einsum("ta,abij,sb->tsij", found[1][0], found[0], found[1][1])
    torch.testing.assert_close(layer.dense_weight(), expected, rtol=0, atol=1e-12)


def test_more_rank_is_never_more_error():
    kernels = kernel(10, 8)
    errors = [relative_error(kernels, TUCKER.factors(kernels, (r + 2, r))) for r in range(1, 9)]
    assert all(after <= before + 1e-9 for before, after in pairwise(errors))
    assert errors[-1] < 1e-12


def test_spectra_are_the_singular_values_of_the_unfoldings():
    kernels = group_kernels(nn.Conv2d(3, 40, 3).double())
    out, inside = TUCKER.analyse(kernels).spectra
    assert (out.rows, out.columns, inside.rows, inside.columns) == (40, 27, 3, 360)
    np.testing.assert_allclose(out.values[0], torch.linalg.svdvals(kernels[0].flatten(1)).detach(), atol=1e-7)
    unfolded = kernels[0].transpose(0, 1).flatten(1)
    np.testing.assert_allclose(inside.values[0], torch.linalg.svdvals(unfolded).detach(), atol=1e-7)


def test_svd_error_is_exact():
    weight = torch.randn(1, 9, 14, dtype=torch.float64)
    analysis = METHODS["svd"].analyse(weight)
    for rank in range(1, 10):
        left, right = METHODS["svd"].factors(weight, (rank,))
        expected = float((weight - left @ right).norm() / weight.norm())
        assert analysis.error((rank,)) == pytest.approx(expected, abs=1e-7)

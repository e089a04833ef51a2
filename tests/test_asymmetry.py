"""Layer after layer: each decomposed for what reaches it in the compressed network."""

import copy

import pytest
import torch
from networks import plant_spectra
from rows import target_of
from torch import nn

import decomp
from decomp.recovery.batch_norm_shift import BatchNormShift
from decomp.recovery.least_squares import Refit


class Net(nn.Module):
    """Convolutions with and without a bias, with and without a BatchNorm, and a head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 24, 3, padding=1)
        self.conv3, self.bn3 = nn.Conv2d(24, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 16)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv2(x) + x)
        return self.fc(torch.relu(self.bn3(self.conv3(x))).mean((2, 3)))


@pytest.fixture
def net():
    model = plant_spectra(Net(), decay=0.7)
    for norm in (model.bn1, model.bn3):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(0.5, 2)
        norm.bias.data.normal_()
    return model.eval()


@pytest.fixture
def data():
    mix = torch.randn(8, 8)
    return [torch.einsum("ab,nbij->naij", mix, torch.randn(8, 8, 8, 8)) for _ in range(12)]


@torch.no_grad()
def error(small, dense, data):
    lost = sum(float((small(x) - dense(x)).square().sum()) for x in data)
    return (lost / sum(float(dense(x).square().sum()) for x in data)) ** 0.5


def test_two_matrices_are_what_reduced_rank_regression_says():
    """Oracle: y = W2 W1 x from x^ = W1' x by least squares, cut to the leading directions of what it gives."""
    dense = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 12)).double()
    dense.requires_grad_(False)
    mix = torch.randn(20, 20, dtype=torch.float64)
    data = [torch.randn(60, 20, dtype=torch.float64) @ mix for _ in range(8)]
    small = decomp.svd(dense, ranks={"0": 3, "1": 2}, data=data, sequential=True, progress=False)
    x = torch.cat(data)
    hidden = small[0](x)
    y = dense(x)
    assert small[0].ranks == (3,)
    # Rank 3 is all that reaches the second layer: the least squares solution on it, cut to rank 2.
    centre = hidden - hidden.mean(0)
    scores = torch.linalg.svd(centre, full_matrices=False)[0][:, :3]
    fitted = scores @ (scores.T @ (y - y.mean(0)))
    left, values, right = torch.linalg.svd(fitted, full_matrices=False)
    best = float(((left[:, :2] * values[:2]) @ right[:2] + y.mean(0) - y).square().sum())
    found = float((small(x) - y).square().sum())
    symmetric = decomp.svd(dense, ranks={"0": 3, "1": 2}, data=data, sequential=False, progress=False)
    assert best <= found <= 1.02 * best
    assert found < 0.97 * float((symmetric(x) - y).square().sum())


@pytest.mark.parametrize("call", [decomp.tucker, decomp.svd, decomp.separable])
def test_the_network_comes_closer_than_with_every_layer_by_itself(net, data, call):
    known, unknown = data[:9], data[9:]
    before = copy.deepcopy(net.state_dict())
    symmetric = call(net, ranks=decomp.ranks.params(0.4), data=known, sequential=False, progress=False)
    small = call(net, ranks=decomp.ranks.params(0.4), data=known, sequential=True, progress=False)
    assert error(small, net, unknown) < 0.97 * error(symmetric, net, unknown)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module.training for module in small.modules())
    training = call(net.train(), ranks=decomp.ranks.params(0.4), data=known, sequential=True, progress=False)
    assert all(module.training for module in (*training.modules(), *net.modules()))
    ranks = {name: choice.ranks for name, choice in small.decomp_plan.items()}
    assert ranks == {name: choice.ranks for name, choice in symmetric.decomp_plan.items()}
    assert [type(module) for module in small.modules()] == [type(module) for module in symmetric.modules()]


def test_the_plan_on_the_model_says_how_well_each_layer_does_on_what_it_gets(net, data):
    data = data[:8]  # of more batches a layer may use some
    small = decomp.tucker(net, ranks=8, data=data, sequential=True, progress=False)
    seen = {}
    for key, model in (("ours", small), ("theirs", net)):
        hook = model.bn1.register_forward_hook(lambda _, given, got, key=key: seen.setdefault(key, []).append(got))
        with torch.no_grad():
            for x in data:
                model(x)
        hook.remove()
    scale = (net.bn1.weight / (net.bn1.running_var + net.bn1.eps).sqrt()).detach()[:, None, None]
    lost = sum(float(((a - b) / scale).square().sum()) for a, b in zip(seen["ours"], seen["theirs"], strict=True))
    with torch.no_grad():
        energy = sum(float(net.conv1(x).square().sum()) for x in data)
    assert small.decomp_plan["conv1"].output_error == pytest.approx((lost / energy) ** 0.5, rel=1e-5)


def test_means_are_those_of_the_dense_network(net, data, monkeypatch):
    """Into the bias where there is one, into the BatchNorm where there is none."""
    monkeypatch.setattr("decomp.calibration.sampling.ROWS_PER_CHANNEL_TO_SEE", 10**6)  # all batches
    small = decomp.tucker(net, ranks=6, data=data, sequential=True, progress=False)
    with torch.no_grad():
        x = torch.cat(data)
        ours, theirs = small.bn1(small.conv1(x)), net.bn1(net.conv1(x))
        assert float((ours - theirs).mean((0, 2, 3)).abs().max()) < 1e-4
        a, b = torch.relu(ours), torch.relu(theirs)
        assert float((small.conv2(a) - net.conv2(b)).mean((0, 2, 3)).abs().max()) < 1e-4
    assert torch.equal(small.bn3.running_mean, net.bn3.running_mean), "conv3 has a bias of its own"


def test_with_fine_tuning_each_layer_is_trained_before_the_next_is_decomposed(net, data):
    settings = {"steps": 40, "progress": False}
    small = decomp.tucker(net, ranks=6, data=data, sequential=True, finetune=settings, progress=False)
    plain = decomp.tucker(net, ranks=6, data=data, finetune=settings, progress=False)
    assert list(small.decomp_finetuning) == ["conv1", "conv2", "conv3", "fc"]
    assert error(small, net, data) < error(plain, net, data)
    with pytest.raises(ValueError, match=r"'blocks'.*leave sequential=True out"):
        decomp.tucker(net, ranks=6, data=data, sequential=True, finetune={"blocks": "conv1"})


def test_what_it_needs_is_said(net, data):
    with pytest.raises(ValueError, match="sequential= needs batches"):
        decomp.tucker(net, ranks=6, sequential=True)
    with pytest.raises(ValueError, match="sequential= needs batches"):
        decomp.tucker(net, ranks=6, data=decomp.calibrate(net, data, progress=False), sequential=True)
    with pytest.raises(ValueError, match="sequential= needs the dense model"):
        decomp.tucker(net, ranks=6, data=data, sequential=True, inplace=True)
    plan = decomp.plan(net, ranks=6, data=decomp.calibrate(net, data, progress=False))
    assert decomp.tucker(net, plan, data=data, sequential=True, progress=False).conv1.ranks == (6, 6)


def test_layers_that_the_data_never_reaches_and_the_model_as_a_layer():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            return self.used(x)

    net, data = plant_spectra(Half()), [torch.randn(16, 24) for _ in range(4)]
    plan = decomp.plan(net, "svd", ranks=4)
    small = decomp.svd(net, plan, data=data, sequential=True, progress=False)
    assert (small.used.ranks, small.unused.ranks) == ((4,), (4,))
    one = decomp.svd(net.used, ranks=4, data=data, sequential=True, progress=False)
    assert isinstance(one, decomp.layers.SVDLinear)
    assert one.decomp_plan[""].ranks == (4,)
    net = nn.Sequential(nn.Embedding(50, 24), nn.Linear(24, 24))
    words = [torch.randint(0, 50, (8, 5)) for _ in range(4)]
    small = decomp.svd(net, ranks=4, layers=["0", "1"], data=words, sequential=True, progress=False)
    assert {type(module).__name__ for module in small.children()} == {"SVDEmbedding", "SVDLinear"}


def test_a_frame_is_what_the_moved_norm_has_to_get():
    ours, theirs = nn.BatchNorm2d(6).double().eval(), nn.BatchNorm2d(6).double().eval()
    for norm in (ours, theirs):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(-2, 2)
        norm.bias.data.normal_()
    y = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    norm_shift = BatchNormShift(ours, theirs)
    torch.testing.assert_close(ours(target_of(norm_shift, y)), theirs(y))
    bias = torch.randn(6, dtype=torch.float64)
    wanted = ours(y + bias[:, None, None])
    with torch.no_grad():
        norm_shift.absorb(-bias)
        norm_shift.absorb(bias)
    torch.testing.assert_close(ours(y), wanted)


def test_a_repair_does_not_take_back_what_the_batch_norm_took_up(net, data):
    """The BatchNorm moved with the factors: the refit counts from where it is now."""
    small = decomp.tucker(net, ranks=6, data=data, sequential=True, progress=False)
    before = error(small, net, data)
    report = decomp.repair(small, net, data, progress=False, batch_norm=False)
    assert error(small, net, data) <= before * 1.001
    assert report.output_error_after <= report.output_error_before * 1.001


def test_shuffled_data_and_a_small_cache_change_nothing(net, data, monkeypatch):
    """Every pass is alike, so that what is held out of a fit stays so."""
    images = torch.utils.data.TensorDataset(torch.cat(data))
    results = []
    for cache_bytes in (2**30, 1):
        monkeypatch.setattr("decomp.recovery.sequential.CACHE_BYTES", cache_bytes)
        torch.manual_seed(3)
        loader = torch.utils.data.DataLoader(images, batch_size=8, shuffle=True)
        plan = decomp.plan(net, ranks=6)
        results.append(
            decomp.tucker(
                net, plan, data=loader, inputs=lambda batch: batch[0], sequential=True, progress=False
            ).state_dict()
        )
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_fitted_uses_the_rows_that_it_was_judged_on_at_the_end(monkeypatch):
    ratios = []
    for seed in range(8):
        errors = []
        for used in (Refit.use_held_out, lambda refit: False):
            torch.manual_seed(seed)
            dense = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 80)).double().requires_grad_(False)
            mix = torch.randn(12, 12, dtype=torch.float64) ** 3
            data, unseen = ((torch.randn(8, n, 12, dtype=torch.float64) @ mix) for n in (10, 200))
            with monkeypatch.context() as patch:
                patch.setattr(Refit, "use_held_out", used)
                small = decomp.svd(dense, {"0": 5, "2": 8}, data=list(data), sequential=True, progress=False)
            errors.append(float((small(unseen) - dense(unseen)).norm()))
        ratios.append(errors[0] / errors[1])
    assert sum(ratios) / len(ratios) < 0.995
    assert max(ratios) < 1.002


def test_the_last_factor_alone_is_fitted_where_data_is_little():
    """Two rows for each of the unknowns of a full fit, for the last factor many."""
    errors = []
    for seed in range(6):
        torch.manual_seed(seed)
        dense = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)).double().requires_grad_(False)
        dense = plant_spectra(dense, decay=0.7)
        batches = [torch.randn(8, 24, dtype=torch.float64) for _ in range(8)]
        unseen = torch.randn(2000, 24, dtype=torch.float64)
        small = decomp.svd(dense, ranks=3, data=batches, sequential=True, progress=False)
        plain = decomp.svd(dense, ranks=3, data=batches, sequential=False, progress=False)
        errors.append(float((small(unseen) - dense(unseen)).norm() / (plain(unseen) - dense(unseen)).norm()))
    assert sum(errors) / len(errors) < 1


def test_errors_count_with_the_scale_of_the_batch_norm_that_follows():
    from decomp.recovery.batch_norm_shift import BatchNormShift
    from decomp.recovery.sequential import metric_of

    norm = nn.BatchNorm2d(3)
    norm.weight.data = torch.tensor([2.0, -1.0, 0.5])
    norm.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]) - norm.eps)
    shift = BatchNormShift(norm, norm)
    torch.testing.assert_close(metric_of(None, shift), torch.ones(1, 3, dtype=torch.float64))
    assert metric_of(None, None) is None
    norm.weight.data.zero_()
    assert metric_of(None, BatchNormShift(norm, norm)) is None, "nothing would count"

"""The repair that looks at what the ReLU gives: against brute force on small problems."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import decomp
from decomp.network.tracing import Tail, tails
from decomp.recovery.relu import Rectifier, nearest, rectifier


@pytest.mark.parametrize("top", [math.inf, 6.0])
@pytest.mark.parametrize("weight", [0.01, 1.0])
def test_the_scalar_problem_is_solved_as_by_a_fine_grid(weight, top):
    y = 8 * torch.randn(200, dtype=torch.float64)
    goal = (8 * torch.randn(200, dtype=torch.float64)).clamp(0, top)
    grid = torch.linspace(-40, 40, 80001, dtype=torch.float64)[:, None]

    def cost(z):
        return (goal - z.clamp(0, top)).square() + weight * (z - y).square()

    found, best = cost(nearest(y, goal, weight, top)), cost(grid).min(0).values
    assert float((found - best).max()) < 1e-9
    assert float((best - found).max()) < 1e-4  # the grid misses by half a step at most
    if math.isfinite(top):
        assert float((cost(nearest(y, goal, weight)) - found).max()) > 0.1, "the third piece has to count"


def with_relu(layer, norm=None, relu=None):
    """A layer with what follows it, its norm as training leaves it: one scale negative, one zero."""
    if norm is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        with torch.no_grad():
            norm.weight[0], norm.weight[1] = -1, 0
    parts = [part for part in (layer, norm, relu or nn.ReLU()) if part is not None]
    return nn.Sequential(*parts).double().eval()


CASES = {
    "linear": (lambda: with_relu(nn.Linear(6, 8)), (6,), 2),
    "linear without bias": (lambda: with_relu(nn.Linear(6, 8, bias=False)), (6,), 2),
    "linear on sequences": (lambda: with_relu(nn.Linear(6, 8)), (3, 6), 2),
    "linear and norm": (lambda: with_relu(nn.Linear(6, 8), nn.BatchNorm1d(8)), (6,), 2),
    "in place": (lambda: with_relu(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True)), (6,), 2),
    "bounded": (lambda: with_relu(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Hardtanh(0, 1)), (6,), 2),
    "convolution": (lambda: with_relu(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)), (6, 5, 5), (3, 2)),
    "groups": (lambda: with_relu(nn.Conv1d(8, 12, 3, groups=2), nn.BatchNorm1d(12)), (8, 9), (2, 2)),
    "transposed": (lambda: with_relu(nn.ConvTranspose1d(6, 8, 3), nn.BatchNorm1d(8)), (6, 5), (3, 2)),
}


def correlated(samples, *shape):
    """Batches with a falling spectrum over the last axis, and a mean: what a linear refit gains from."""
    mixing = torch.randn(shape[-1], shape[-1], dtype=torch.float64) / torch.arange(1, shape[-1] + 1)
    mean = torch.randn(shape[-1], dtype=torch.float64)
    return [torch.randn(samples, *shape, dtype=torch.float64) @ mixing.T + mean for _ in range(8)]


def repaired(base, model, data, **options):
    small = copy.deepcopy(base)
    return small, decomp.repair(small, model, data, batch_norm=False, progress=False, **options)["0"]


def error(small, model, data):
    with torch.no_grad():
        lost = sum(float((small(x) - model(x)).square().sum()) for x in data)
        return math.sqrt(lost / sum(float(model(x).square().sum()) for x in data))


def compressed(model, ranks):
    return (decomp.svd if isinstance(model[0], nn.Linear) else decomp.tucker)(model, ranks=ranks)


@pytest.mark.parametrize(("make", "shape", "ranks"), CASES.values(), ids=CASES)
def test_the_error_after_the_relu_is_below_that_of_the_linear_refit_and_never_above(make, shape, ranks):
    gains = 0
    for _ in range(3):
        model = make()
        mean = torch.randn(*shape, dtype=torch.float64)
        data = [mean + torch.randn(200, *shape, dtype=torch.float64) for _ in range(8)]
        base = compressed(model, ranks)
        linear, _ = repaired(base, model, data)
        small, report = repaired(base, model, data, nonlinear=True)
        held_out = data[3::4]
        bound = min(error(base, model, held_out), error(linear, model, held_out))
        assert report.error_before == pytest.approx(error(base, model, held_out), rel=1e-9)
        assert report.error_after == pytest.approx(error(small, model, held_out), rel=1e-9)
        assert report.error_after <= bound * (1 + 1e-9)
        if report.error_after < bound * (1 - 1e-6):
            gains += 1
            assert report.note == "measured after its ReLU"
            if len(model) == 3:  # of the channel whose scale is zero nothing is asked
                channels = [each[0](data[0]).detach()[:, 1] for each in (small, linear)]
                torch.testing.assert_close(*channels, rtol=1e-6, atol=1e-9)
    assert gains


@pytest.mark.parametrize("bias", [True, False])
def test_it_goes_most_of_the_way_to_a_minimum_found_by_gradients(bias):
    """Oracle: L-BFGS on the same factor. Every batch is the same, so that nothing is lost to what is held out."""
    model = with_relu(nn.Linear(6, 8, bias=bias))
    x = torch.randn(200, 6, dtype=torch.float64)
    base = decomp.svd(model, ranks=2)
    linear, _ = repaired(base, model, [x] * 4)
    small, _ = repaired(base, model, [x] * 4, nonlinear=True)
    best = copy.deepcopy(linear)
    descent = torch.optim.LBFGS(best[0].expand.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        descent.zero_grad()
        lost = (best(x) - model(x).detach()).square().sum()
        lost.backward()
        return lost

    descent.step(loss)
    errors = [error(each, model, [x]) for each in (linear, small, best)]
    assert errors[2] - 1e-9 <= errors[1] <= errors[0] - 0.4 * (errors[0] - errors[2])


LINEAR = {
    "no activation": (lambda: nn.Sequential(nn.Linear(6, 8)).double(), (6,)),
    "gelu": (lambda: with_relu(nn.Linear(6, 8), relu=nn.GELU()), (6,)),
    "leaky": (lambda: with_relu(nn.Linear(6, 8), relu=nn.LeakyReLU()), (6,)),
    "norm of places": (lambda: with_relu(nn.Linear(6, 8), nn.BatchNorm1d(8)), (8, 6)),
    "norm without statistics": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU()).double(),
        (6,),
    ),
}


@pytest.mark.parametrize(("make", "shape"), LINEAR.values(), ids=LINEAR)
def test_other_layers_get_the_linear_refit(make, shape):
    model = make().eval()
    data = correlated(60, *shape)
    base = decomp.svd(model, ranks=2)
    linear, plain = repaired(base, model, data)
    small, report = repaired(base, model, data, nonlinear=True)
    assert report == plain
    assert report.error_after < report.error_before
    for a, b in zip(linear.parameters(), small.parameters(), strict=True):
        assert torch.equal(a, b)


def test_relus_are_known_in_all_their_forms():
    forms = {
        nn.ReLU(): math.inf,
        nn.ReLU(inplace=True): math.inf,
        nn.ReLU6(): 6.0,
        nn.Hardtanh(0, 3): 3.0,
        nn.Hardtanh(): None,
    }
    calls = {torch.relu: math.inf, torch.relu_: math.inf, functional.relu6: 6.0, relu_of_tensor: math.inf}

    class Called(nn.Module):
        def __init__(self, call):
            super().__init__()
            self.layer, self.call = nn.Linear(4, 4), call

        def forward(self, x):
            return self.call(self.layer(x))

    for call, top in {**forms, **calls}.items():
        model = Called(call)
        tail = tails(model, torch.randn(2, 4), {"layer": model.layer})["layer"]
        assert rectifier(tail, tail) == (None if top is None else Rectifier(top)), call
        assert rectifier(tail, Tail()) is None


def relu_of_tensor(x):
    return x.relu()


def test_the_best_state_stays_where_nothing_helps():
    """The factors are exact: no state can be better than the first."""
    model = with_relu(nn.Linear(12, 12, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(12, 2).double() @ torch.randn(2, 12).double())
    data = [torch.randn(30, 12, dtype=torch.float64) for _ in range(8)]
    base = decomp.svd(model, ranks=2)
    small, report = repaired(base, model, data, nonlinear=True)
    assert report.error_after <= report.error_before < 1e-12
    torch.testing.assert_close(small(data[0]), model(data[0]), rtol=0, atol=1e-12)


def test_windows_and_shuffled_data_change_nothing():
    model = with_relu(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8))
    rows = torch.randn(64, 6, 5, 5, dtype=torch.float64)
    base = decomp.tucker(model, ranks=(3, 2))
    whole, first = repaired(base, model, list(rows.split(8)), nonlinear=True)
    parts, second = repaired(base, model, list(rows.split(8)), nonlinear=True, cache_bytes=1)
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    shuffled = DataLoader(rows, batch_size=8, shuffle=True)
    state = torch.get_rng_state()
    one, first = repaired(base, model, shuffled, nonlinear=True, cache_bytes=1)
    assert torch.equal(torch.get_rng_state(), state)
    other, second = repaired(base, model, shuffled, nonlinear=True)
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_frozen_layers_are_measured_and_left():
    model = with_relu(nn.Linear(6, 8))
    data = [torch.randn(30, 6, dtype=torch.float64) for _ in range(8)]
    base = decomp.svd(model, ranks=2).requires_grad_(False)
    small, report = repaired(base, model, data, nonlinear=True)
    assert report.note == "frozen: not refitted"
    assert report.error_before == report.error_after == pytest.approx(error(base, model, data[3::4]), rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), small.parameters(), strict=True))

"""Budgets where data are batches: what the network's output feels decides, or held-out batches say otherwise."""

import pytest
import torch
from torch import nn

import decomp
from decomp.calibration.gradients import leveled
from decomp.planning import by_output, planner

QUIET = {"progress": False}


class Unheard(nn.Module):
    """Two branches of the same size, of which the output hardly hears the second."""

    def __init__(self, share):
        super().__init__()
        self.heard, self.unheard = nn.Linear(32, 32), nn.Linear(32, 32)
        self.share = share

    def forward(self, x):
        return torch.relu(self.heard(x)) + self.share * torch.relu(self.unheard(x))


def batches(count=8):
    torch.manual_seed(1)
    return [torch.randn(16, 32) for _ in range(count)]


def network(share=0.01):
    torch.manual_seed(0)
    return Unheard(share).eval()


def test_the_budget_goes_where_the_output_feels_it():
    model, data = network(), batches()
    small = decomp.compress(model, params=0.65, data=data, sequential=False, **QUIET)
    alike = decomp.compress(model, params=0.65, data=data, sequential=False, objective="product", **QUIET)
    assert small.decomp_plan.request.objective == "network"
    assert not small.decomp_plan["heard"].ranks  # all of the budget
    x = torch.randn(64, 32)
    with torch.no_grad():
        errors = [float((each(x) - model(x)).norm() / model(x).norm()) for each in (small, alike)]
    assert errors[0] < 0.02
    assert errors[1] > 0.1


def test_held_out_batches_decide_between_the_objectives(monkeypatch):
    """Oracle: the error of each plan's model on the held-out batches, those of number 3 and 7, by itself."""
    model, data = network(0.5).requires_grad_(False), batches()
    judged = []

    def noting(plans, model, scope):
        judged.extend(plans)
        return by_output.nearest(plans, model, scope)

    monkeypatch.setattr(planner, "nearest", noting)
    chosen = decomp.plan(model, params=0.5, data=data, **QUIET)

    def error(plan):
        small = plan.apply(model, **QUIET).requires_grad_(False)
        return sum(float((small(x) - model(x)).norm() ** 2 / model(x).norm() ** 2) for x in (data[3], data[7]))

    assert [plan.request.objective for plan in judged] == ["network", "product"]
    assert chosen is min(judged, key=error)
    errors = iter([1.0, 0.5])
    monkeypatch.setattr(by_output, "_error", lambda small, judged, expected: next(errors))
    assert by_output.nearest(judged, model, {"data": data, "inputs": None}) is judged[1]


class WithoutGradient(Unheard):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Counting(Unheard):
    """No float tensor comes out."""

    def forward(self, x):
        return (super().forward(x) > 0).sum()


class Detached(Unheard):
    """No gradient reaches the second branch."""

    def forward(self, x):
        return torch.relu(self.heard(x)) + torch.relu(self.unheard(x)).detach()


@pytest.mark.parametrize("kind", [WithoutGradient, Counting, Detached])
def test_where_no_gradient_tells_layers_count_alike(kind):
    torch.manual_seed(0)
    plan = decomp.plan(kind(1.0).eval(), params=0.5, data=batches(), **QUIET)
    assert plan.replaced
    assert plan.request.resolved(plan.candidates).objective == "product"


def test_where_there_is_no_memory_for_gradients_layers_count_alike(monkeypatch):
    def full(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.autograd, "grad", full)
    plan = decomp.plan(network(), params=0.5, data=batches(), **QUIET)
    assert plan.request.resolved(plan.candidates).objective == "product"


def test_what_the_call_says_of_objectives_holds():
    model, data = network(), batches()
    for given in ({"objective": "product"}, {"weights": {"heard": 2.0}}):
        plan = decomp.plan(model, params=0.5, data=data, **given, **QUIET)
        assert plan.request.resolved(plan.candidates).objective == "product"
        assert plan.candidates["heard"][0].importance is None  # and no gradient was taken
    once = decomp.plan(model, params=0.5, data=(x for x in data), **QUIET)
    assert once.request.resolved(once.candidates).objective == "product"


def test_tensors_and_channels_of_an_output_count_alike():
    torch.manual_seed(0)
    boxes, scores = 300 * torch.randn(2, 4, 50), torch.randn(2, 8, 50)
    joined, other = torch.cat([boxes, scores], 1), torch.randn(2, 5)
    vector = leveled((joined, other), (joined, other))
    head = vector[: joined.numel()].reshape(joined.shape).square().sum((0, 2))
    torch.testing.assert_close(head, torch.full((12,), 1 / 12))
    assert float(vector[joined.numel() :].square().sum()) == pytest.approx(1.0)
    torch.testing.assert_close(leveled(2 * joined, joined), 2 * leveled(joined, joined))


def test_silent_channels_are_not_amplified_and_padding_does_not_count():
    x = torch.randn(3, 6, 4)
    x[..., 0] *= 1e-9
    level = x.square().mean((0, 1)).sqrt()
    energy = leveled(x, x).reshape(3, 6, 4).square().sum((0, 1))
    expected = torch.tensor([float(level[0] / (1e-5 * level.max())) ** 2, 1.0, 1.0, 1.0])
    torch.testing.assert_close(energy, expected / expected.sum())
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 4:] = False
    changed = x.clone()
    changed[:, 4:] = 1e3
    torch.testing.assert_close(leveled(changed, changed, mask), leveled(x, x, mask))
    assert leveled(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)).tolist() == [0.0] * 24

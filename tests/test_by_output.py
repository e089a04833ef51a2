"""Budgets where data are batches: what the network's output feels decides, or held-out batches say otherwise."""

import pytest
import torch
from torch import nn

import decomp
from decomp.data.levels import leveled
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

    def noting(one, other, model, scope):
        judged.extend((one, other))
        return by_output.nearer(one, other, model, scope)

    monkeypatch.setattr(planner, "nearer", noting)
    chosen = decomp.plan(model, params=0.5, data=data, **QUIET)

    def error(plan):
        small = plan.apply(model, **QUIET).requires_grad_(False)
        return sum(float((small(x) - model(x)).norm() ** 2 / model(x).norm() ** 2) for x in (data[3], data[7]))

    assert [plan.request.objective for plan in judged] == ["network", "product"]
    assert chosen is min(judged, key=error)
    for found, expected in (([1.0, 0.5], 1), ([0.5, 1.0], 0), ([float("nan"), 1.0], 1)):
        errors = iter(found)
        monkeypatch.setattr(by_output, "_error", lambda *each, errors=errors: next(errors))
        assert by_output.nearer(*judged, model, {"data": data, "inputs": None}) is judged[expected]
    assert by_output.nearer(*judged, model, {"data": [], "inputs": None}) is judged[1]


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
    with pytest.warns(UserWarning, match=r"cannot be measured \(CUDA out of memory\): the budget counts all"):
        plan = decomp.plan(network(), params=0.5, data=batches(), **QUIET)
    assert plan.request.resolved(plan.candidates).objective == "product"


def test_a_fault_of_the_data_or_of_the_model_is_not_hidden():
    def failing():
        yield torch.randn(16, 32)
        raise RuntimeError("the worker was killed")

    class Data:
        def __iter__(self):
            return failing()

    with pytest.raises(RuntimeError, match="the worker was killed"):
        decomp.plan(network(), params=0.5, data=Data(), **QUIET)
    given = {"data": [torch.randn(16, 31)], "example_inputs": torch.randn(1, 32)}
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        decomp.plan(network(), params=0.5, **given, **QUIET)


class Masked(Unheard):
    """One of the outputs is filled by a mask, as logits are that cannot be chosen."""

    fill = -torch.inf

    def forward(self, x):
        y = super().forward(x)
        return torch.cat([y, torch.full_like(y[:, :1], self.fill)], 1)


@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
def test_what_masks_fill_in_does_not_count(fill):
    torch.manual_seed(0)
    model = Masked(0.01).eval()
    model.fill = fill
    found, plain = (decomp.plan(each, params=0.65, data=batches(), **QUIET) for each in (model, network()))
    assert not found["heard"].ranks
    assert {name: choice.ranks for name, choice in found.items()} == {n: c.ranks for n, c in plain.items()}


def test_gradients_are_those_of_rows_that_nothing_is_judged_on():
    model, data = network(0.5), batches()
    given = {"inputs": None, "layers": None, "exclude": (), "progress": False}
    for used, changed in ((data, (3, 7)), (data[:2], ())):
        other = [10 * x if place in changed else x.clone() for place, x in enumerate(used)]
        if not changed:
            for x in other:
                x[12:] *= 10  # the last quarter of the rows
        found, same = (by_output.statistics_by_output(model, given | {"data": each}) for each in (used, other))
        for name, moments in found.items():
            assert moments.importance == pytest.approx(same[name].importance, rel=1e-6)


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
    changed[..., 1] *= 300  # the channels of what is padded are leveled as well
    energy = leveled(changed, changed, mask).reshape(3, 4, 4).square().sum((0, 1))
    torch.testing.assert_close(energy[1:], torch.full((3,), float(energy[1:].mean())))
    assert leveled(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)).tolist() == [0.0] * 24


def test_a_batch_that_saves_too_much_gives_gradients_of_its_first_rows(monkeypatch):
    """Oracle: batches cut to these rows by hand; the moments are those of all rows."""
    model, data = network(0.5), batches()
    monkeypatch.setattr(by_output, "MOST_BYTES", 5000)  # 16 rows take more, 8 do not
    given = {"data": data, "inputs": None, "layers": None, "exclude": (), "progress": False}
    found = by_output.statistics_by_output(model, given)
    plain = decomp.calibrate(model, data, **QUIET)
    first = by_output.statistics_by_output(model, given | {"data": [x[:8] for x in data]})
    whole = by_output.statistics_by_output(model, given | {"data": [x[:4] for x in data]})
    for name, moments in found.items():
        torch.testing.assert_close(moments.inputs, plain[name].inputs)
        assert moments.importance == pytest.approx(first[name].importance, rel=1e-6)
        assert moments.importance != pytest.approx(whole[name].importance, rel=1e-6)


def test_where_one_row_saves_too_much_layers_count_alike(monkeypatch):
    monkeypatch.setattr(by_output, "MOST_BYTES", 8)
    plan = decomp.plan(network(), params=0.5, data=batches(), **QUIET)
    assert plan.request.resolved(plan.candidates).objective == "product"


class Sized(Unheard):
    """The size of the output depends on its values, and so on the weights."""

    def forward(self, x):
        y = super().forward(x)
        return y[:, : 1 + int(1e4 * float(y.detach().abs().sum())) % 30]


def test_where_outputs_cannot_be_compared_layers_count_alike():
    torch.manual_seed(0)
    plan = decomp.plan(Sized(0.5).eval(), params=0.5, data=batches(), **QUIET)
    assert plan.request.objective == "product"


def test_importances_are_halfway_to_that_of_the_average_layer():
    model, data = network(0.1), batches()
    given = {"data": data, "inputs": None, "layers": None, "exclude": (), "progress": False}
    measured = by_output.statistics_by_output(model, given)
    plan = decomp.plan(model, params=0.5, data=measured, **QUIET)
    full = {name: first.importance for name, (first, *_) in plan.candidates.items()}
    found = decomp.plan(model, params=0.5, data=data, **QUIET).candidates
    average = (full["heard"] * full["unheard"]) ** 0.5
    assert full["heard"] > 10 * full["unheard"]
    for name, importance in full.items():
        assert found[name][0].importance == pytest.approx((importance * average) ** 0.5, rel=1e-6)

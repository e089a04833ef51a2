"""The explorer without a browser: its state, its widgets, and what it says when something goes wrong."""

import builtins
import time
from math import sqrt

import pytest
import torch
from networks import plant_spectra, resnet50
from torch import nn

import decomp
from decomp.explorer import svg
from decomp.explorer.state import Exploration
from decomp.explorer.widgets import Explorer
from decomp.planning.choice import Change

IMAGE = torch.randn(2, 3, 8, 8)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return plant_spectra(
        nn.Sequential(
            *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU(), nn.Conv2d(48, 64, 1)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 40)),
        )
    ).eval()


class Halves(nn.Module):
    """Linear, each layer reads its own half of the input: on unit vectors the errors of the two never overlap."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False)

    def forward(self, x):
        return self.left(x[:, :64]) + self.right(x[:, 64:])


UNIT_VECTORS = torch.eye(128)


def explored(net, evaluate=None, data=None, **options) -> Exploration:
    return Exploration(net, IMAGE, evaluate, data, **{"timed": False, "progress": False, **options})


def opened(net, evaluate=None, **options) -> Explorer:
    return decomp.explore(net, IMAGE, evaluate, **{"timed": False, "progress": False, **options})


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_a_budget_is_kept_and_nearly_as_good_as_that_of_compress(net, kind, share):
    state = explored(net)
    state.choose_budget(kind, share)
    exact = decomp.plan(net, **{kind: share}, example_inputs=IMAGE)
    assert 0.95 * share < state.totals.share(kind) <= share
    lost = [1 - sum((1 - c.error**2) for c in plan.values()) / len(plan) for plan in (state.plan, exact)]
    assert lost[0] < 1.1 * lost[1] + 1e-3


def test_below_the_least_budget_the_plan_is_the_cheapest(net):
    state = explored(net)
    least = state.choose_budget("macs", 0.001)
    assert state.totals.share("macs") == pytest.approx(least)
    with pytest.raises(ValueError, match="'macs', 'params'"):
        state.choose_budget("seconds", 0.5)


def test_a_layer_that_is_held_stays_as_it_is_and_the_budget_counts_it(net):
    state = explored(net)
    state.choose_ranks("2", (20, 12))
    assert state.held == {"2"}
    for share in (0.9, 0.5):
        state.choose_budget("macs", share)
        assert state.plan["2"].ranks == (20, 12)
        assert state.totals.share("macs") <= share
    state.choose_energy(0.5)
    assert state.plan["2"].ranks == (20, 12)
    state.hold("2", False)
    state.choose_energy(0.5)
    assert (
        state.plan["2"].ranks == decomp.plan(net, ranks=decomp.ranks.energy(0.5), example_inputs=IMAGE)["2"].ranks
    )


def test_ranks_that_do_not_pay_leave_the_layer_dense_and_the_slider_where_it_is(net):
    state = explored(net)
    state.choose_ranks("2", (48, 31))
    assert state.plan["2"].ranks == ()
    assert "not cheaper" in state.plan["2"].reason
    assert state.shown_ranks("2") == (48, 31)
    assert state.totals.share("params") == 1


def test_a_method_is_chosen_at_about_the_same_cost(net):
    state = explored(net)
    state.choose_budget("macs", 0.5)
    before = state.plan["2"].macs.after
    assert "svd_spatial" in state.methods_of("2")
    assert "cp" not in state.methods_of("2"), "its errors have to be fitted: no slider could follow"
    state.choose_method("2", "svd_spatial")
    assert state.plan["2"].method == "svd_spatial"
    assert state.plan["2"].macs.after <= before
    state.choose_method("2", "dense")
    assert state.plan["2"].reason == "kept dense on request"
    state.choose_budget("macs", 0.5)
    assert state.plan["2"].ranks == ()
    with pytest.raises(ValueError, match=r"method='magic': layer '2' takes dense, svd_channel, "):
        state.choose_method("2", "magic")


def test_the_plan_makes_the_model_that_it_promises(net):
    state = explored(net)
    state.choose_method("0", "svd_channel")
    state.choose_budget("params", 0.4)
    small = state.apply()
    assert sum(p.numel() for p in small.parameters()) == state.totals.params.after
    assert state.apply() is small
    state.choose_budget("params", 0.5)
    assert state.apply() is not small


def test_the_predicted_error_is_that_of_the_weights_or_from_data_that_of_the_output(net):
    state = explored(net)
    state.choose_ranks("7", (20,))
    errors = [choice.error for name, choice in state.plan.items()]
    assert state.totals.error == pytest.approx(sqrt(sum(e * e for e in errors) / len(errors)))
    with_data = explored(net, data=[IMAGE])
    assert (state.error_of, with_data.error_of) == ("of the weights", "of the output")
    with_data.choose_ranks("7", (20,))
    weights = decomp.sensitivity(net, [IMAGE], batches=1, progress=False)
    squared = sum(weights[name] * choice.error**2 for name, choice in with_data.plan.items())
    assert with_data.totals.error == pytest.approx(sqrt(squared), rel=1e-9)


def test_where_errors_of_layers_do_not_overlap_the_predicted_error_is_the_measured_one():
    state = Exploration(Halves(), UNIT_VECTORS, data=[UNIT_VECTORS], timed=False, progress=False)
    state.choose_ranks("left", (4,))
    state.choose_ranks("right", (6,))
    trial = state.evaluate()
    assert trial.score > 0.1
    assert trial.totals.error == pytest.approx(trial.score, rel=1e-5)


def test_statistics_make_factors_errors_and_budgets_those_of_the_outputs(net):
    batches = [torch.randn(16, 3, 8, 8) @ torch.randn(8, 8) / 3 for _ in range(4)]
    statistics = decomp.calibrate(net, batches, progress=False)
    state = explored(net, data=batches, statistics=statistics)
    state.choose_ranks("7", (20,))
    errors = [choice.output_error for choice in state.plan.values()]
    assert state.error_of == "of the layers' outputs"
    assert state.totals.error == pytest.approx(sqrt(sum(e * e for e in errors) / len(errors)))
    blind = explored(net, data=batches)
    blind.choose_ranks("7", (20,))
    blind.choose_budget("params", 0.4)
    state.choose_budget("params", 0.4)
    assert state.evaluate().score < blind.evaluate().score


def test_statistics_with_gradients_say_what_the_budget_does_to_the_output(net):
    batches = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    statistics = decomp.calibrate(net, batches, loss="output", progress=False)
    state = explored(net, data=batches, statistics=statistics)
    for name, ranks in (("2", (30, 24)), ("7", (30,))):
        state.choose_ranks(name, ranks)
    assert state.error_of == "of the output"
    state.choose_method("2", "pointwise_depthwise")
    expected = sum(found.importance * state.plan[name].output_error ** 2 for name, found in state.layers.items())
    assert state.totals.error == pytest.approx(sqrt(expected)), "each layer under the method that it has now"


def test_the_predicted_error_from_gradients_is_the_measured_one_up_to_their_sampling():
    batches = 16
    net, data = Halves(), [UNIT_VECTORS] * batches
    statistics = decomp.calibrate(net, data, loss="output", progress=False)
    state = Exploration(net, UNIT_VECTORS, data=data, statistics=statistics, timed=False, progress=False)
    state.choose_ranks("left", (4,))
    state.choose_ranks("right", (6,))
    trial = state.evaluate()
    # Its square is a mean of n values v^T M v with v normal and tr M = 1: each has a variance of 2 ||M||^2 <= 2.
    # The root halves the relative deviation.
    deviation = sqrt(2 / (batches * len(UNIT_VECTORS))) / 2
    assert trial.totals.error == pytest.approx(trial.score, rel=4 * deviation)


def test_with_gradients_a_budget_goes_by_the_sensitivity_of_the_output():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.loud, self.quiet = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.loud(x) + 0.05 * self.quiet(x)

    net, data = Sum().eval(), [torch.randn(64, 64) for _ in range(4)]
    options = {"statistics": decomp.calibrate(net, data, loss="output", progress=False), "progress": False}
    state = Exploration(net, data[0], timed=False, **options)
    state.choose_budget("params", 0.5)
    exact = decomp.plan(net, params=0.5, data=options["statistics"], progress=False)
    lost = [
        sum(state.layers[name].importance * plan[name].output_error ** 2 for name in state.layers)
        for plan in (state.plan, exact)
    ]
    assert lost[0] < 1.02 * lost[1]
    assert state.plan["quiet"].params.after < 0.5 * state.plan["loud"].params.after
    panel = Explorer(state)
    panel.set_ranks("loud", (20,))
    assert f"error of the output {panel.plan['loud'].output_error:.3f}" in panel._rows[0]._cost.value


def test_a_model_without_macs_is_explored_by_its_parameters():
    net = nn.Sequential(nn.Embedding(200, 32), nn.Identity())
    tokens = torch.arange(12)[None]
    explorer = decomp.explore(net, tokens, layers="*", timed=False, progress=False)
    assert [kind for _, kind in explorer.kind.options] == ["params", "bytes"]
    explorer.set_budget(params=0.4)
    assert explorer.plan.params.after <= 0.4 * explorer.plan.params.before
    explorer.set_method("0", "svd")
    assert explorer.evaluate() > 0
    assert "MACs" not in explorer._cards.value
    assert "4.22 k MACs<" in explorer._rows[0]._cost.value, "what its factors multiply"
    timed = decomp.explore(net, tokens, layers="*", progress=False)
    timed.set_ranks("0", (8,))
    assert timed.plan.seconds.after > timed.plan.seconds.before, "a lookup alone is faster"


def test_seconds_are_estimated_and_can_be_a_budget(net, seconds_of_macs):
    state = explored(net, timed=True)
    for share in (0.5, 0.001):
        least = state.choose_budget("seconds", share)
        by_seconds, totals = state.plan, state.totals
        assert state.choose_budget("macs", share) == pytest.approx(least, rel=1e-9)
        assert [choice.ranks for choice in by_seconds.values()] == [c.ranks for c in state.plan.values()]
        assert totals.seconds.after == pytest.approx(seconds_of_macs * totals.macs.after, rel=1e-9)
        assert totals.share("seconds") <= max(share, least) * (1 + 1e-9)
    assert 0.001 < least < 0.5
    state.choose_budget("macs", 0.5)
    state.choose_method("2", "svd_spatial")
    assert state.plan["2"].ranks >= (2,), "from the least rank that is timed on"
    assert state.totals.seconds.after == pytest.approx(seconds_of_macs * state.totals.macs.after, rel=1e-9)


def test_what_was_evaluated_is_kept_with_the_dense_score(net):
    state = explored(net, lambda model: float(sum(p.numel() for p in model.parameters())))
    state.choose_budget("params", 0.5)
    trial = state.evaluate()
    assert state.baseline == trial.totals.params.before
    assert trial.score == trial.totals.params.after
    assert state.tried == [trial]


def test_sliders_of_the_widget_move_the_plan_the_numbers_and_the_plot(net):
    explorer = opened(net)
    cards, charts = explorer._cards.value, explorer._charts.value
    explorer.budget.value = 0.31
    assert explorer.plan.macs.after <= 0.31 * explorer.plan.macs.before
    assert explorer._cards.value != cards
    assert explorer._charts.value != charts
    assert "31%" in explorer._status.value
    row = next(row for row in explorer._rows if row.name == "2")
    row.sliders[0].value = 9
    assert explorer.plan["2"].ranks[0] == 9
    assert row.held.value
    assert "Held: 2" in explorer._status.value
    row.method.value = "dense"
    assert explorer.plan["2"].ranks == ()
    row.method.value = "tensor_train"
    assert len(row.sliders) == 3
    row.held.value = False
    explorer.energy.value = 0.6
    assert explorer.plan["2"].method == "tensor_train"
    explorer.kind.value = "params"
    assert explorer.plan.params.after <= explorer.budget.value * explorer.plan.params.before


def test_buttons_evaluate_and_apply(net):
    explorer = opened(net, lambda model: 0.5)
    with pytest.raises(RuntimeError, match="press Apply"):
        _ = explorer.model
    explorer.evaluate_button.click()
    assert explorer.tried[0].score == 0.5
    explorer.apply_button.click()
    assert explorer.model.decomp_plan.params == explorer.plan.params
    assert "Applied" in explorer._status.value


def test_apply_and_evaluate_say_that_there_is_nothing_to_apply(net):
    explorer = opened(net, lambda model: 0.5)
    explorer.budget.value = 1.0
    for name in explorer._state.layers:
        explorer.set_method(name, "dense")
    for button in (explorer.apply_button, explorer.evaluate_button):
        button.click()
        assert "There is nothing to apply: every layer stays dense." in explorer._status.value
        assert "Error" not in explorer._status.value
    assert not explorer.tried
    with pytest.raises(ValueError, match="There is nothing to apply"):
        explorer.apply()


def test_what_is_not_in_charge_is_grey_and_a_dense_layer_says_dense(net):
    explorer = opened(net)
    assert ["decomp-idle" in slider._dom_classes for slider in (explorer.budget, explorer.energy)] == [False, True]
    explorer.energy.value = 0.7
    assert ["decomp-idle" in slider._dom_classes for slider in (explorer.budget, explorer.energy)] == [True, False]
    explorer.set_method("2", "dense")
    row = next(row for row in explorer._rows if row.name == "2")
    assert "decomp-dense" in row.box._dom_classes
    assert "<b>dense</b>" in row._cost.value
    assert "Held: 2 (dense)" in explorer._status.value
    explorer.set_ranks("2", (9, 9))
    assert "decomp-dense" not in row.box._dom_classes
    assert "Held: 2<" in explorer._status.value


@pytest.mark.parametrize(
    ("after", "said"),
    [(1.3, "slower than dense by 30%"), (1.04, "not faster, not slower"), (0.7, "faster by 30%")],
)
def test_a_latency_is_judged_by_its_spread(net, after, said):
    explorer = opened(net)
    explorer._state.spread = 0.05
    verdict = explorer._judge(Change(1.0, after))
    assert said in verdict
    assert "(spread 5%)" in verdict


def test_the_spread_is_that_of_latencies_of_one_model(net, monkeypatch):
    monkeypatch.setattr("decomp.explorer.state.latency", lambda models, batch: [1.0, 1.25, 1.1])
    assert explored(net, timed=True).spread == pytest.approx(0.25 / 1.1)
    assert explored(net).spread == 0.0


def test_an_evaluation_that_raises_is_said_and_the_panel_stays_usable(net):
    def broken(model):
        raise KeyError("no such metric")

    explorer = opened(net, broken)
    explorer.evaluate_button.click()
    assert "KeyError" in explorer._status.value
    assert "no such metric" in explorer._status.value
    explorer.budget.value = 0.4
    explorer.apply_button.click()
    assert "Applied" in explorer._status.value
    with pytest.raises(KeyError):
        explorer.evaluate()


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Flatten(), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(192, 1))]
)
def test_a_model_too_small_to_compress_is_said(model):
    explorer = opened(model)
    assert "There is nothing to choose" in explorer._status.value
    assert explorer.budget.disabled
    assert explorer.apply_button.disabled
    assert all(not choice.ranks for choice in explorer.plan.values())


def test_only_a_page_of_rows_exists():
    deep = nn.Sequential(*(nn.Linear(32, 32) for _ in range(20)))
    explorer = decomp.explore(deep, torch.randn(1, 32), timed=False, progress=False)
    assert [row.name for row in explorer._rows] == [str(i) for i in range(8)]
    explorer.page.value = 2
    assert [row.name for row in explorer._rows] == ["16", "17", "18", "19"]
    assert all(row.sliders for row in explorer._rows)


def test_without_widgets_the_plan_is_shown_and_without_ipywidgets_the_way_to_get_it(net, monkeypatch):
    explorer = opened(net)
    bundle = explorer._repr_mimebundle_()
    assert "whole model" in bundle["text/plain"]
    assert bundle["text/html"].count("<img ") == 2
    assert all(f"<td>{name.replace('.', '.<wbr>')}</td>" in bundle["text/html"] for name in explorer.plan)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    real = builtins.__import__

    def missing(name, *rest, **options):
        if name == "decomp.explorer.widgets":
            raise ModuleNotFoundError("No module named 'ipywidgets'", name="ipywidgets")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'decomp\[notebook\]'"):
        opened(net)


def test_ticks_are_plain_and_points_show_their_values():
    assert svg.ticks(0.843, 1.012) == [0.85, 0.9, 0.95, 1.0]
    for low, high in ((0, 1), (0.034, 0.76), (-3, 117), (0.9991, 0.9994)):
        found = svg.ticks(low, high)
        assert 2 <= len(found) <= 7
        assert all(low <= tick <= high and len(f"{tick:g}") <= 7 for tick in found)
    chart = svg.chart("T", ("MACs (%)", "accuracy"), [(0.25, 0.5)], [(0.5, 0.9)], (0.4, 0.7), 0.99)
    for said in (
        "25%, accuracy 0.5",
        "50%, accuracy 0.9",
        "this plan: 40%, accuracy 0.7",
        "dense: 100%, accuracy 0.99",
    ):
        assert f"<title>{said}</title>" in chart
    assert ">dense</text>" in chart


def test_drawings_say_in_words_what_they_show(net):
    drawing = svg.spectrum(torch.linspace(3, 0.1, 200).numpy(), 50)
    assert "50 of 200 components kept" in drawing
    chart = svg.chart("<T>", ("x", "y"), [(0.1, 1.0), (0.5, 0.2)], [(0.5, 0.9)], (0.5, None), 1.0)
    assert "&lt;T&gt;" in chart
    assert "nan" not in svg.chart("T", ("x", "y"), (), [(0.5, 0.0)])
    zeros = svg.spectrum(torch.zeros(4).numpy(), 4)
    assert "4 of 4 components kept" in zeros
    assert "nan" not in zeros


def test_no_more_components_are_kept_than_there_are():
    """The 32 x 9 unfolding of the outputs has 9 singular values, but an output rank may be 32."""
    net = plant_spectra(nn.Sequential(nn.Conv2d(1, 32, 3)))
    explorer = decomp.explore(net, torch.randn(1, 1, 8, 8), timed=False, progress=False)
    (row,) = explorer._rows
    for rank, kept in ((32, 9), (9, 9), (4, 4)):
        explorer.set_ranks("0", (rank, 1))
        assert row.sliders[0].value == rank
        assert f"spectrum: {kept} of 9 components kept" in row._drawings[0].value


@pytest.mark.slow
def test_sliders_of_a_resnet50_follow_within_50_ms():
    model = plant_spectra(resnet50()).eval()
    explorer = decomp.explore(model, torch.randn(1, 3, 224, 224), timed=False, progress=False)
    times = []
    for step in range(20):
        start = time.perf_counter()
        explorer.budget.value = 0.2 + 0.03 * step
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] < 0.05


def test_a_method_that_is_unknown_holds_nothing(net):
    state = Exploration(net, IMAGE, timed=False)
    with pytest.raises(ValueError, match="method='magic'"):
        state.choose_method("2", "magic")
    assert not state.held


def test_what_is_evaluated_is_the_plan_and_not_a_model_that_was_changed(net):
    state = Exploration(net, IMAGE, timed=False)
    state.choose_budget("macs", 0.5)
    first = state.evaluate().score
    with torch.no_grad():
        for parameter in state.apply().parameters():
            parameter.zero_()
    assert state.evaluate().score == pytest.approx(first)


def test_a_method_that_is_looked_at_later_is_timed_in_the_same_units(net):
    state = Exploration(net, IMAGE)
    before = state.layers["2"].dense_cost("seconds")
    state.choose_method("2", "svd_channel")
    assert state.layers["2"].method.name == "svd_channel"
    assert state.layers["2"].dense_cost("seconds") == pytest.approx(before)


def test_the_front_joins_what_no_cheaper_point_is_as_good_as():
    points = [(0.2, 0.1), (0.5, 0.3), (0.8, 0.05)]
    assert svg.pareto_front(points, less_is_better=False) == points[:2]
    assert svg.pareto_front(points, less_is_better=True) == [points[0], points[2]]

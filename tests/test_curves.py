"""Trade-offs: points that are what they say, that are kept and taken up again, and pictures of them."""

import builtins
import json
from dataclasses import replace

import pytest
import torch
from networks import plant_spectra
from torch import nn

import decomp
from decomp.analysis import drawing
from decomp.analysis.scores import Scorer
from decomp.methods import FAMILIES, METHODS

INPUTS = torch.randn(8, 64)


@pytest.fixture
def net():
    return plant_spectra(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48))).eval()


def params(model) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e4


def measured(net, **options):
    return decomp.tradeoff(net, INPUTS, **{"budgets": (0.7, 0.4), "progress": False, **options})


def test_points_keep_their_budgets_and_lose_more_the_less_is_left(net):
    curve = measured(net)
    assert [point.label for point in curve.points] == ["macs=0.7", "macs=0.4"]
    for point, share in zip(curve.points, (0.7, 0.4), strict=True):
        assert curve.share(point) <= share
        small = point.plan.apply(net)
        assert sum(p.numel() for p in small.parameters()) == point.params
        with torch.no_grad():
            expected = float((small(INPUTS) - net(INPUTS)).norm() / net(INPUTS).norm())
        assert point.score == pytest.approx(expected, rel=1e-5)
    assert curve.points[0].score < curve.points[1].score
    assert (curve.dense.score, curve.score_name) == (0.0, "output error")


def test_methods_and_rules_are_lines_of_one_call(net):
    rules = ["vbmf", decomp.ranks.energy(0.9), decomp.ranks.energy(0.7)]
    curve = measured(net, methods=("svd", ["svd", "tucker"]), rules=rules, cost="params", evaluate=params)
    lines = [point.line for point in curve.points]
    assert lines == ["svd"] * 2 + ["svd + tucker"] * 2 + ["vbmf"] + ["energy"] * 2
    assert "energy(share=0.7" in curve.table()
    assert "dense" in str(curve)
    figure = curve.plot("params")
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend[:6] == ["Pareto front", "svd", "svd + tucker", "vbmf", "energy", "dense"]
    assert len(legend) <= 8, "besides these the tolerance and the best point"


def test_statistics_make_the_factors_those_of_the_outputs_also_after_reading_points_back(net, tmp_path):
    mixed = [torch.randn(64, 64) @ torch.randn(64, 64).tril() for _ in range(4)]
    statistics = decomp.calibrate(net, mixed, progress=False)
    path = tmp_path / "points.json"
    blind = measured(net, data=mixed)
    informed = measured(net, data=mixed, statistics=statistics, path=path)
    assert all(ours.score < theirs.score for ours, theirs in zip(informed.points, blind.points, strict=True))
    again = measured(net, data=mixed, statistics=statistics, path=path)
    scorer = Scorer(net, INPUTS, data=mixed)
    for point in again.points:
        assert scorer(point.plan.apply(net)) == pytest.approx(point.score, rel=1e-4)
    own = replace(METHODS["svd"], name="mine")
    path.unlink()
    for _ in range(2):
        mine = measured(net, data=mixed, statistics=statistics, path=path, methods=(own,))
        assert [scorer(point.plan.apply(net)) for point in mine.points] == pytest.approx(
            [point.score for point in mine.points], rel=1e-4
        )
    with pytest.raises(ValueError, match="another statistics"):
        measured(net, data=mixed, path=path)


def test_a_model_without_macs_is_measured_by_its_parameters():
    net, tokens = nn.Sequential(nn.Embedding(200, 32)).eval(), torch.arange(12)[None]
    curve = decomp.tradeoff(net, tokens, budgets=(0.5,), cost="params", layers="*", progress=False)
    assert curve.share(curve.points[0]) <= 0.5
    assert "47%" in curve.table()
    assert curve.points[0].macs == decomp.profile(curve.points[0].plan.apply(net), tokens).total.macs
    with pytest.raises(ValueError, match="the dense model has no MACs"):
        curve.plot(cost="macs")
    with pytest.raises(ValueError, match="for a model without them write a budget of params="):
        decomp.tradeoff(net, tokens, budgets=(0.5,), layers="*", progress=False)


def test_seconds_can_be_the_budget(net, seconds_of_macs):
    options = {"methods": ("svd",), "budgets": (0.5, 0.001)}
    point, unreachable = measured(net, cost="seconds", **options).points
    by_macs, _ = measured(net, cost="macs", **options).points
    assert (point.label, point.note) == ("seconds=0.5", "")
    assert [choice.ranks for choice in point.plan.values()] == [choice.ranks for choice in by_macs.plan.values()]
    assert point.plan.seconds.after == pytest.approx(seconds_of_macs * by_macs.macs, rel=1e-9)
    assert point.plan.seconds.after <= 0.5 * point.plan.seconds.before
    assert point.seconds == pytest.approx(seconds_of_macs * by_macs.macs, rel=1e-9)
    assert "seconds=" in unreachable.note
    assert "cannot be reached" in unreachable.note


def test_a_budget_out_of_reach_is_noted_and_the_others_are_measured(net):
    curve = measured(net, budgets=(0.5, 0.001))
    assert curve.points[0].plan is not None
    assert "cannot be reached" in curve.points[1].note
    assert "cannot be reached" in curve.table()
    curve.plot()


def test_best_is_the_cheapest_that_is_good_enough(net):
    curve = measured(net, evaluate=params, budgets=(0.8, 0.5, 0.2))
    drops = [curve.drop(point) for point in curve.points]
    assert curve.best(max_drop=drops[1] + 1e-9).params.after == curve.points[1].params
    with pytest.raises(ValueError, match="milder budgets"):
        curve.best(max_drop=0.0)
    with pytest.raises(ValueError, match="'macs', 'params', 'bytes', 'seconds'"):
        curve.best(cost="flops")


def test_a_call_that_was_cut_off_goes_on_from_its_file(net, tmp_path):
    path, scored = tmp_path / "points.json", []

    def evaluate(model):
        scored.append(params(model))
        if len(scored) == 3:
            raise RuntimeError("the power went")
        return scored[-1]

    with pytest.raises(RuntimeError, match="the power went"):
        measured(net, evaluate=evaluate, path=path)
    assert [file.name for file in tmp_path.iterdir()] == ["points.json"], "nothing half-written"
    curve = measured(net, evaluate=evaluate, path=str(path))
    assert len(scored) == 4, "the dense model and the first point were not measured again"
    again = measured(net, evaluate=evaluate, path=path)
    assert len(scored) == 4
    assert again.table() == curve.table()
    assert params(again.best(max_drop=9.0).apply(net)) == scored[-1]


def test_a_file_of_something_else_is_refused(net, tmp_path):
    path = tmp_path / "points.json"
    measured(net, budgets=(0.5,), path=path)
    with pytest.raises(ValueError, match="another score"):
        measured(net, budgets=(0.5,), path=path, evaluate=params)
    with torch.no_grad():
        net[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match="another model"):
        measured(net, budgets=(0.5,), path=path)
    path.write_text(json.dumps({"format": "x"}))
    with pytest.raises(ValueError, match="no trade-off of decomp"):
        measured(net, budgets=(0.5,), path=path)


def test_fine_tuning_comes_before_the_score(net):
    def finetune(small):
        decomp.finetune_layerwise(small, net, [INPUTS], steps=50, progress=False)

    plain, tuned = measured(net, budgets=(0.3,)), measured(net, budgets=(0.3,), finetune=finetune)
    assert tuned.points[0].score < plain.points[0].score


def test_arguments_that_mean_nothing_are_refused(net):
    with pytest.raises(ValueError, match=r"write floats in \(0, 1\)"):
        measured(net, budgets=(2,))
    with pytest.raises(ValueError, match="cost='flops'"):
        measured(net, cost="flops")
    with pytest.raises(ValueError, match="nothing to measure"):
        measured(net, budgets=())
    with pytest.raises(TypeError, match="must return one number"):
        measured(net, evaluate=lambda model: None)
    with pytest.raises(ValueError, match="NaN"):
        measured(net, evaluate=lambda model: float("nan"))
    with pytest.raises(TypeError, match="not a function"):
        measured(net, evaluate=0.9)
    with pytest.raises(ValueError, match="give data= as well"):
        measured(net, inputs=lambda batch: batch[0])


def test_the_output_error_is_taken_over_all_batches(net):
    small = decomp.svd(net, ranks=8)
    scorer = Scorer(net, INPUTS, data=[(INPUTS[:3], 0), (INPUTS[3:], 1)], inputs=lambda batch: batch[0])
    assert scorer(small) == pytest.approx(Scorer(net, INPUTS)(small), rel=1e-5)


def test_figures_show_the_cut_the_costs_and_the_errors(net, tmp_path):
    plan = decomp.plan(net, ranks=12, example_inputs=INPUTS)
    spectrum = decomp.plots.spectrum(plan, "0")
    labels = [text.get_text() for text in spectrum.axes[0].get_legend().get_texts()]
    assert "kept: 12" in labels
    assert any(label.startswith("vbmf threshold") for label in labels)
    costs, errors = decomp.plots.costs(plan), decomp.plots.errors(plan)
    assert costs.axes[0].patches[2].get_width() == plan["0"].params.after
    assert errors.axes[0].patches[0].get_width() == plan["0"].error
    for figure in (spectrum, costs, errors, decomp.plots.costs(decomp.plan(net, ranks=12))):
        figure.savefig(tmp_path / "figure.png")
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_figures_say_what_they_cannot_show(net):
    plan = decomp.plan(net, ranks=12)
    with pytest.raises(ValueError, match="only of 0, 2"):
        decomp.plots.spectrum(plan, "fc")
    with pytest.raises(ValueError, match="make one that does"):
        decomp.plots.spectrum(decomp.Plan.from_json(plan.to_json()), "0")
    with pytest.raises(ValueError, match="replaces no layer"):
        decomp.plots.errors(plan.keep_dense("*"))


def test_without_matplotlib_a_figure_says_how_to_get_it(net, monkeypatch):
    plan, real = decomp.plan(net, ranks=12), builtins.__import__

    def missing(name, *rest, **options):
        if name == "matplotlib.figure":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest, **options)

    drawing.figure_class.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install 'decomp\[notebook\]'"):
        decomp.plots.costs(plan)
    monkeypatch.undo()
    assert decomp.plots.costs(plan).axes, "once it is installed, the next call draws"


def test_a_comparison_has_a_picture(net):
    comparison = decomp.compare(decomp.svd(net, ranks=8), net, INPUTS)
    figure = comparison.plot()
    labels = [ax.get_xlabel() for ax in figure.axes if ax.get_xlabel()]
    assert labels == ["parameters (thousands)", "MACs (thousands)", "latency (ms)"]
    assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no layer differs"):
        decomp.compare(net, net, INPUTS).plot()


def test_rows_of_other_options_are_other_lines():
    model = plant_spectra(
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    )
    rows = [FAMILIES["block_term"](blocks=blocks) for blocks in (2, 8)]
    curve = decomp.tradeoff(model, torch.randn(1, 16, 8, 8), methods=rows, budgets=(0.5,), progress=False)
    assert len({point.line for point in curve.points}) == 2
    assert {point.plan["0"].ranks[0] for point in curve.points if point.plan and point.plan["0"].ranks} == {2, 8}


def test_points_of_other_examples_are_not_taken_over(tmp_path):
    model, path = plant_spectra(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))), tmp_path / "points.json"
    decomp.tradeoff(model, torch.randn(4, 32), budgets=(0.5,), path=path, progress=False)
    with pytest.raises(ValueError, match="another example"):
        decomp.tradeoff(model, torch.randn(4, 32), budgets=(0.5,), path=path, progress=False)
    with pytest.raises(ValueError, match="there is no folder"):
        decomp.tradeoff(
            model, torch.randn(4, 32), budgets=(0.5,), path=tmp_path / "none" / "a.json", progress=False
        )

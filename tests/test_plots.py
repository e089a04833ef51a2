"""Figures can be read: nothing is cut off, labels do not cover each other, and both themes have their colours."""

import sys
from itertools import combinations, product
from math import sqrt

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from networks import plant_spectra, resnet18
from torch import nn

import decomp
from decomp.analysis.plots import Marks, before_and_after, pareto_front, tradeoffs
from decomp.demo import run as demo

INPUTS = torch.randn(8, 64)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = (nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 40))
    return plant_spectra(nn.Sequential(*layers)).eval()


def weight_norm(model) -> float:
    return 1 - sum(p.numel() for p in model.parameters()) / 1e5


@pytest.fixture(scope="module")
def curve(net):
    rules = ["vbmf", decomp.ranks.energy(0.9), decomp.ranks.energy(0.8)]
    budgets = (0.75, 0.5, 0.25)
    return decomp.tradeoff(
        net, INPUTS, methods=("svd",), budgets=budgets, rules=rules, cost="params", progress=False
    )


@pytest.fixture(scope="module")
def figures(net, curve):
    """How to draw every figure, by name."""
    plan = decomp.plan(net, ranks=12, example_inputs=INPUTS).keep_dense("4")
    resnet = plant_spectra(resnet18()).eval()
    deep = decomp.plan(resnet, ranks=decomp.ranks.energy(0.7), example_inputs=torch.zeros(1, 3, 32, 32))
    comparison = decomp.compare(plan.apply(net), net, INPUTS)
    with_two_spectra = next(name for name, (first, *_) in deep.candidates.items() if len(first.spectra) == 2)
    return {
        "trade-off": lambda: curve.plot(max_drop=0.3),
        "comparison": comparison.plot,
        "costs": lambda: decomp.plots.costs(deep.keep_dense("4.*")),
        "errors": lambda: decomp.plots.errors(deep),
        "spectrum": lambda: decomp.plots.spectrum(deep, with_two_spectra),
        "reason": lambda: decomp.plots.spectrum(plan, "4"),
        "sensitivity": lambda: decomp.plots.sensitivity(deep),
    }


NAMES = ("trade-off", "comparison", "costs", "errors", "spectrum", "reason", "sensitivity")


def texts(figure) -> list[Text]:
    """The texts that are drawn, after they were laid out."""
    figure.draw_without_rendering()
    return [
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip() and drawn(text)
    ]


def drawn(text: Text) -> bool:
    """Whether it belongs to an axis whose limits it is in: ticks outside of them exist and are not drawn."""
    for axes in text.figure.axes:
        for axis, low, high in ((axes.xaxis, *sorted(axes.get_xlim())), (axes.yaxis, *sorted(axes.get_ylim()))):
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if text in (tick.label1, tick.label2):
                    return low <= tick.get_loc() <= high and (tick.label1 is text or tick.label2.get_visible())
    return True


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_cut_off_and_none_covers_another(figures, name):
    figure = figures[name]()
    found = texts(figure)
    assert len(found) > 5
    assert figure.get_size_inches()[0] * 110 < 1000, "the width of a notebook"
    whole = figure.bbox
    for text in found:
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1
        assert inside, f"{text.get_text()!r} is cut off"
    assert not covered(found)


def covered(found: list[Text]) -> list[tuple[str, str]]:
    """The pairs of texts of which one covers more than two pixels of the other."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in found]
    return [
        (one, other)
        for (one, a), (other, b) in combinations(boxes, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 2 and min(a.y1, b.y1) - max(a.y0, b.y0) > 2
    ]


@pytest.mark.parametrize(("name", "theme"), list(product(NAMES, ("default", "dark_background"))))
def test_text_stands_out_in_both_themes_also_when_drawn_later(figures, name, theme):
    with pyplot.style.context(theme):
        figure = figures[name]()
    background = luminance(figure.get_facecolor())
    assert (background > 0.5) == (theme == "default")
    for text in texts(figure):
        if name == "sensitivity" and text.axes is figure.axes[0] and text in text.axes.texts:
            continue  # on a cell, in black or white by the colour of the cell
        assert contrast(luminance(text.get_color()), background) > 4


def luminance(color) -> float:
    channels = np.array(to_rgb(color))
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def test_a_trade_off_names_its_points_the_front_the_tolerance_and_the_best(net):
    curve = decomp.tradeoff(
        net,
        INPUTS,
        evaluate=weight_norm,
        budgets=(0.75, 0.5),
        rules=["vbmf", decomp.ranks.energy(0.8)],
        progress=False,
    )
    assert curve.score_name == "weight norm"
    figure = curve.plot(max_drop=-0.02)
    (axes,) = figure.axes
    assert axes.get_ylabel() == "weight norm"
    assert {"macs 0.75", "macs 0.5", "vbmf", "energy 0.8", "dense"} <= {text.get_text() for text in axes.texts}
    lines = {line.get_label(): line for line in axes.get_lines()}
    best = curve.best(max_drop=-0.02)
    (name,) = [label for label in lines if label.startswith("best(max_drop=-0.02): ")]
    point = next(point for point in curve.points if point.plan is best)
    assert lines[name].get_xydata().tolist() == [[100 * curve.share(point), point.score]]
    assert lines["tolerance: max_drop=-0.02"].get_ydata()[0] == pytest.approx(curve.dense.score + 0.02)
    unreachable = curve.plot(max_drop=-5).axes[0].get_legend().get_texts()
    assert "tolerance: max_drop=-5, no point is that good" in [text.get_text() for text in unreachable]


def test_the_front_holds_what_no_other_point_beats():
    points = [tuple(map(float, pair)) for pair in np.random.default_rng(0).integers(0, 12, (60, 2))]
    for sign in (1, -1):
        beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and sign * q[1] >= sign * p[1]}
        assert pareto_front(points, less_is_better=sign < 0) == sorted(set(points) - beaten)


def test_the_map_shows_the_least_error_within_each_share(net):
    plan = decomp.plan(net, ranks=12, example_inputs=INPUTS)
    weights = {"0": 4.0, "2": 1.0, "4": 0.25}
    figure = decomp.plots.sensitivity(plan, (0.6, 0.3, 0.01), weights=weights)
    shown = figure.axes[0].images[0].get_array()
    for row, name in enumerate(plan):
        weight = net[int(name)].weight.detach().double()
        bias = len(weight)
        values = torch.linalg.svdvals(weight)
        for column, share in enumerate((0.6, 0.3)):
            rank = int((share * (weight.numel() + bias) - bias) // sum(weight.shape))
            error = float((values[rank:].square().sum() / values.square().sum()).sqrt())
            assert shown[row, column] == pytest.approx(sqrt(weights[name]) * error, abs=1e-6)
        assert not np.isfinite(np.ma.filled(shown.astype(float), np.nan)[row, 2])
    assert figure.axes[1].get_ylabel() == "error of the network's output"
    assert decomp.plots.sensitivity(plan).axes[1].get_ylabel() == "relative error of the layer"


def test_the_map_says_what_it_needs(net):
    plan = decomp.plan(net, ranks=12)
    with pytest.raises(ValueError, match=r"make one with decomp\.plan"):
        decomp.plots.sensitivity(decomp.Plan.from_json(plan.to_json()))
    with pytest.raises(ValueError, match="write one of 'macs', 'params', 'bytes', 'seconds'"):
        decomp.plots.sensitivity(plan, cost="flops")
    with pytest.raises(ValueError, match=r"budgets=\(50,\)"):
        decomp.plots.sensitivity(plan, budgets=(50,))
    with pytest.raises(ValueError, match="none for layer '2'"):
        decomp.plots.sensitivity(plan, weights={"0": 1.0})


def test_replaced_and_dense_are_told_apart_and_the_whole_has_a_row(net):
    figure = decomp.plots.costs(decomp.plan(net, ranks=12, example_inputs=INPUTS).keep_dense("4"))
    rows, whole = figure.axes[0], figure.axes[2]
    values = [text.get_text() for text in rows.texts]
    assert values[-1] == "1.96 k, dense"
    assert values[0].startswith("6.24 k => 2.02 k (32%)")
    assert [label.get_text() for label in whole.get_yticklabels()] == ["whole model"]
    hollow = [bar.get_facecolor()[3] == 0 for bar in rows.patches]
    assert hollow == [False, False, True, False, False, True]
    first_is_dense = decomp.plots.costs(decomp.plan(net, ranks=12, example_inputs=INPUTS).keep_dense("0"))
    for legend in (figure.legends[0], first_is_dense.legends[0]):
        assert [text.get_text() for text in legend.get_texts()][-1] == "layers that stay dense"
        assert [patch.get_facecolor()[3] > 0 for patch in legend.get_patches()] == [True, True, False]
    assert before_and_after(("MACs",), {"a": (((0, 0)),)}).axes[0].texts[0].get_text() == "0 => 0"


def test_errors_are_ordered_the_largest_first(net):
    figure = decomp.plots.errors(decomp.plan(net, ranks={"0": 4, "2": 30, "4": 12}))
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == sorted(widths, reverse=True)


def test_without_textalloc_labels_are_still_drawn(monkeypatch):
    monkeypatch.setitem(sys.modules, "textalloc", None)
    figure = tradeoffs({"svd": [(50, 0.9)]}, ("x", "y"), (100, 0.95), marks=Marks(names={"svd": ["macs 0.5"]}))
    assert {text.get_text() for text in figure.axes[0].texts} == {"macs 0.5", "dense"}


def test_the_picture_of_the_demo_is_legible(tmp_path, monkeypatch):
    drawn_figures = []
    real = demo.new_figure
    monkeypatch.setattr(demo, "new_figure", lambda *size: drawn_figures.append(real(*size)) or drawn_figures[-1])

    def outcome(name, macs, before, after):
        return demo.Outcome(name, nn.Identity(), macs, before, after, None)

    energies = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
    costs, accuracies = (0.25e6, 0.55e6, 0.9e6, 1.4e6, 2.1e6, 3.5e6), (0.10, 0.103, 0.2, 0.21, 0.85, 0.989)
    energy = [outcome(f"energy {e}", c, a, 0.99) for e, c, a in zip(energies, costs, accuracies, strict=True)]
    demo.draw(tmp_path / "demo.png", outcome("vbmf", 0.57e6, 0.28, 0.986), energy, 0.997, 5.6e6)
    ((figure, _),) = drawn_figures
    labels = figure.axes[0].texts
    assert {f"energy {e}" for e in energies} | {"vbmf", "vbmf, fine-tuned", "dense"} <= {
        t.get_text() for t in labels
    }
    assert not covered([text for text in labels if text.get_text()])


def test_figures_follow_the_settings_of_the_user(figures):
    with matplotlib.rc_context({"text.color": "#123456", "xtick.color": "#654321"}):
        figure = figures["costs"]()
    assert figure.axes[0].texts[0].get_color() == "#123456"
    assert figure.axes[0].get_xticklabels()[0].get_color() == "#654321"

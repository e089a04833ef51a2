"""The report: one file that says what was done, needs nothing from elsewhere, and gives the plan back."""

import json
import re
from base64 import b64decode

import pytest
import torch
from networks import plant_spectra
from torch import nn

import decomp

INPUTS = torch.randn(4, 64)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = {"first": nn.Linear(64, 96), "relu": nn.ReLU(), "a<b>&": nn.Linear(96, 48), "last": nn.Linear(48, 4)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return plant_spectra(model).eval()


def accuracy(model) -> float:
    return 0.75


def test_a_report_is_one_file_that_requests_nothing_and_holds_what_was_done(net, tmp_path):
    small = decomp.compress(net, INPUTS, params=0.4)
    path = decomp.report(small, net, INPUTS, evaluate=accuracy, path=tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    links = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert any(link.startswith("data:") for link in links)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert len(set(re.findall(r' id="([^"]*)"', text)) & {link[1:] for link in links}) > 1, (
        "markers are on the page"
    )
    assert text.count("<svg") >= 5
    assert "<title>first: error 0." in text
    assert "<title>component 1: " in text
    assert "http" not in re.sub(r'"data:[^"]*"', "", text)
    assert "a&lt;b&gt;&amp;" in text
    assert "a<b>" not in text
    assert "The ranks were chosen together for the budget params=0.4." in text
    for choice in small.decomp_plan.values():
        assert choice.reason in text
    assert text.count("score 0.7500 =&gt; 0.7500") == 3, "the summary, below the comparison, its figure"
    assert "0.7500 =>" not in text
    assert text.count("<table>") == 2
    assert "Spectra of the layers that save most" in text


def test_the_plan_in_the_report_rebuilds_the_structure(net, tmp_path):
    small = decomp.tucker(net, ranks={"first": 8})
    text = decomp.report(small, net, INPUTS, path=tmp_path / "report.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'href="data:application/json;base64,([^"]+)"', text)
    plan = decomp.Plan.from_json(b64decode(data).decode())
    assert json.loads(plan.to_json()) == json.loads(small.decomp_plan.to_json())
    assert plan.build(net).first.ranks == (8,)
    assert "1 of 3 layers were replaced: 1 by svd." in text
    assert "2 layers stay dense: no glob of ranks= matches it." in text


def test_what_was_fine_tuned_in_the_call_is_in_the_report(net, tmp_path):
    data = [torch.randn(16, 64) for _ in range(4)]
    small = decomp.tucker(net, ranks={"first": 8}, data=data, finetune={"steps": 4})
    assert "<h2>Fine-tuning</h2>" in decomp.report(small, net, INPUTS, path=tmp_path / "r.html").read_text()


def test_bad_arguments_write_nothing(net, tmp_path):
    small = decomp.tucker(net, ranks={"first": 8})
    path = tmp_path / "report.html"
    path.write_text("kept")
    with pytest.raises(ValueError, match="the order is compare"):
        decomp.report(net, small, INPUTS, path=path)
    with pytest.raises(ValueError, match="small carries no plan"):
        decomp.report(net, net, INPUTS, path=path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        decomp.report(small, net, INPUTS, path=tmp_path / "missing" / "report.html")
    assert path.read_text() == "kept"


def test_figures_have_the_colours_of_the_page_whatever_the_style_in_use(net, tmp_path):
    from matplotlib import pyplot, rcParams

    small = decomp.tucker(net, ranks={"first": 8})
    with pyplot.style.context("dark_background"):
        before = dict(rcParams)
        text = decomp.report(small, net, INPUTS, path=tmp_path / "report.html").read_text(encoding="utf-8")
        assert dict(rcParams) == before
    for figure in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert "currentColor" in figure
        assert not re.search(r"(?:fill|stroke): #(?:000000|ffffff|fedcba)", figure), "text or ground of one theme"

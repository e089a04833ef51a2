"""Printed tables fit the width that they are read at and lose nothing; as HTML and as data they hold the same."""

import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from networks import plant_spectra, resnet50
from torch import nn

import decomp
from decomp._util.html_tables import html
from decomp._util.tables import Cell, Column, Table, Tabular, change, console_width, render, shortened
from decomp.training.layerwise import FinetuneReport, LayerReport

WIDTHS = (80, 120, 200)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attention_query_projection = nn.Linear(32, 32)
        self.feed_forward_intermediate_dense = nn.Linear(32, 64)
        self.feed_forward_output_dense = nn.Linear(64, 32)

    def forward(self, x):
        hidden = self.feed_forward_intermediate_dense(x + self.self_attention_query_projection(x))
        return self.feed_forward_output_dense(hidden)


class Transformer(nn.Module):
    """Names as long as those of a transformer that is wrapped by a task."""

    def __init__(self) -> None:
        super().__init__()
        self.model_for_sequence_classification = nn.ModuleDict({"encoder_layers": nn.ModuleList()})
        self.model_for_sequence_classification["encoder_layers"].extend(Block() for _ in range(12))

    def forward(self, x):
        for block in self.model_for_sequence_classification["encoder_layers"]:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def reports():
    """Of a ResNet-50-shaped network, most of whose layers stay dense, and of a transformer."""
    torch.manual_seed(0)
    resnet, image = resnet50().eval(), torch.zeros(1, 3, 32, 32)
    plan = decomp.plan(resnet, ranks=110, example_inputs=image)
    found = {"plan of a ResNet": plan, "profile of a ResNet": decomp.profile(resnet, image)}
    found["comparison of a ResNet"] = decomp.compare(plan.apply(resnet), resnet, image)
    transformer, tokens = plant_spectra(Transformer()).eval(), torch.randn(2, 32)
    small = decomp.tucker(transformer, ranks=8, example_inputs=tokens)
    found["plan of a transformer"] = decomp.plan(transformer, ranks={"*query*": 8}, example_inputs=tokens)
    found["comparison of a transformer"] = decomp.compare(small, transformer, tokens)
    found["profile of a transformer"] = decomp.profile(transformer, tokens)
    few = [torch.randn(8, 32) for _ in range(4)]
    with pytest.warns(UserWarning, match="the data is too little"):
        found["repair"] = decomp.repair(small, transformer, few, progress=False)
    found["fine-tuning"] = FinetuneReport(
        {
            name: LayerReport(0.5, 0.25, 300, 1.5, "NaN at step 7" if "3" in name else "")
            for name in small.decomp_plan
        }
    )
    found["trade-off"] = decomp.tradeoff(transformer, tokens, budgets=(0.5, 0.001), progress=False)
    return found


NAMES = [
    f"{kind} of a {network}" for kind in ("plan", "profile", "comparison") for network in ("ResNet", "transformer")
]
NAMES += ["repair", "fine-tuning", "trade-off"]


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_longer_than_the_width(reports, name, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for text in (str(reports[name]), reports[name].table(grouped=True)):
        assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [12, 30, 50, *WIDTHS])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_in_a_narrow_table(reports, name, width):
    """Every reason and note is there, word for word, and every row is: its name may be shortened or broken."""
    report = reports[name]
    text = report.table(width)
    joined = re.sub(r"\s", "", text)
    for record in report.records():
        for key in ("reason", "note"):
            assert re.sub(r"\s", "", record.get(key) or "") in joined
    names = {record["layer"] for record in report.records() if "layer" in record}
    whole = {n for n in names if n in joined}
    heads = [line.split("  ")[0] for line in text.splitlines() if "…" in line.split("  ")[0]]
    assert len(set(heads)) == len(heads), "shortened names stay distinct"
    assert len(names - whole) <= len(heads) <= len(names), "a note may hold a name that is shortened in its row"


def test_reasons_are_footnotes_where_few_and_under_their_rows_where_many(reports):
    text = reports["plan of a transformer"].table(120)
    assert text.count("no glob of ranks= matches it") == 1
    assert "\n[1] no glob of ranks= matches it" in text
    columns = (Column("layer", "name"), Column("why", "remark"))
    table = Table(columns, [(f"layer{i}", f"the reason of the layer number {i}") for i in range(20)])
    lines = table.text(30).splitlines()
    place = lines.index("layer7")
    assert words("".join(lines[place + 1 : place + 3])) == "the reason of the layer number 7"


def test_equal_rows_of_a_stage_are_one_on_demand(reports):
    text = reports["plan of a transformer"].table(200, grouped=True)
    line = next(line for line in text.splitlines() if "query" in line)
    assert "encoder_layers.{0-11}.self_attention_query_projection x12" in line
    assert re.search(r"0\.\d{3} to 0\.\d{3}", line), "the least and the largest error"
    assert len(text.splitlines()) < 12
    columns = (Column("layer", "name"), Column("params"), Column("latency", measured=True))
    rows = [(f"a.{i}.b.{i % 2}", "7", Cell(f"{i}.0 ms", value=i)) for i in (0, 1, 2, 4, 5)]
    grouped = Table(columns, [*rows, ("a.3.b.1", "8", ""), ("c", "7", "")]).text(80, grouped=True)
    assert [words(line) for line in grouped.splitlines()[2:]] == [
        "a.{0,2,4}.b.0 x3 7 0.0 to 4.0 ms",
        "a.{1,5}.b.1 x2 7 1.0 to 5.0 ms",
        "a.3.b.1 8",
        "c 7",
    ]


def test_names_that_would_be_alike_are_not_shortened():
    assert shortened(["a" * 30 + "1" + "b" * 30, "a" * 30 + "2" + "b" * 30], 10) is None
    assert shortened(["层" * 20], 20) is None, "these characters take two places"
    pair = [("x" * 300 + end + "y" * 300, "1") for end in "ab"]
    assert pair[0][0] in render("", ("name", ">value"), pair, 700)
    assert pair[1][0] in re.sub(r"\s", "", render("", ("name", ">value"), pair, 80))


def test_the_width_is_that_of_columns_or_120_without_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "93")
    assert console_width() == 93
    code = "from decomp._util.tables import console_width; print(console_width())"
    environment = {"PATH": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "120"


@pytest.mark.parametrize("name", NAMES)
def test_as_data_and_as_a_frame_they_are_the_rows(reports, name):
    records = reports[name].records()
    frame = reports[name].to_pandas()
    assert list(frame.columns) == list(records[0])
    assert len(frame) == len(records)
    assert isinstance(frame, pandas.DataFrame)


def test_data_hold_numbers_as_they_are(reports):
    plan = reports["plan of a ResNet"]
    frame = plan.to_pandas()
    other = sum(p.numel() for p in resnet50().parameters()) - sum(c.params.before for c in plan.values())
    assert frame["params_after"].sum() + other == plan.params.after
    assert list(frame["layer"]) == list(plan)
    profile = reports["profile of a ResNet"]
    assert profile.to_pandas()["macs"].sum() == profile.total.macs
    comparison = reports["comparison of a transformer"]
    saved = comparison.to_pandas()
    difference = comparison.dense.total.params - comparison.small.total.params
    assert (saved["params_before"] - saved["params_after"]).sum() == difference
    curve = reports["trade-off"].records()
    assert [row["note"] != "" for row in curve] == [False, True, False]
    assert curve[1]["output_error"] is None
    assert curve[-1]["output_error"] == 0.0


def test_without_pandas_the_error_names_it(reports, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install pandas, or use records\(\)"):
        reports["repair"].to_pandas()


@pytest.mark.parametrize("name", NAMES)
def test_jupyter_shows_every_row_and_every_note(reports, name):
    report = reports[name]
    assert isinstance(report, Tabular)
    text = report._repr_html_()
    read = text.replace("<wbr>", "")
    assert text.count("<tr>") == len(report._table().rows) + 1 + bool(report._table().total)
    assert "http" not in text, "nothing is requested"
    for record in report.records():
        for key in ("layer", "reason", "note"):
            assert (
                str(record.get(key) or "").replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#x27;") in read
            )
    assert text == report._repr_html_(), "no random number in it"


def test_html_is_escaped_and_numbers_sort_as_numbers():
    evil = "<script>alert('x')</script>"
    table = Table(
        (Column(evil, "name"), Column("params"), Column("note", "remark")),
        [(evil, change(1000, 250), evil), ("b", Cell("nan", value=float("nan"), share=float("nan")), "")],
        (evil, "", ""),
        (evil,),
    )
    text = html(table)
    assert evil not in text
    assert text.count("&lt;script&gt;") == 5
    assert 'data-value="250" style="--decomp-share: 25.0%"' in text
    assert "nan" in text
    assert 'data-value="nan"' not in text

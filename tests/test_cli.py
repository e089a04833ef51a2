"""The command line: plans in and out, what is written, and what is said about wrong input."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file, save_model

import decomp
from decomp.cli import data, values
from decomp.cli.main import main
from decomp.layers import Factorized

ROOT = Path(__file__).parents[1]
MODULE = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, width=32, classes=10):
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, classes),
        )

def number():
    return 3

def pairs():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 12, 12, generator=generator), torch.zeros(8)) for _ in range(4)]

def size(model):
    return float(sum(p.numel() for p in model.parameters()))

def fails(model):
    raise RuntimeError("the evaluation of the user fails")
"""
NET = ("cli_net:Net", "--weights", "net.safetensors")
INPUT = ("--input", "2x3x12x12")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory with a module and the weights of its model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "cli_net", raising=False)
    (tmp_path / "cli_net.py").write_text(MODULE)
    save_model(net(), "net.safetensors")
    return tmp_path


def net():
    scope: dict[str, object] = {}
    exec(MODULE, scope)
    torch.manual_seed(0)
    model = scope["Net"]()
    model[1].running_var.fill_(2.0)  # buffers are weights too
    return model.eval()


def run(*arguments):
    return main([*map(str, arguments), "--quiet"])


def test_a_plan_goes_through_an_edit_into_a_file_that_loads_and_back_out(capsys):
    assert run("plan", *NET, *INPUT, "--macs", "0.5") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["request"]["budget"] == {"kind": "macs", "value": 0.5}
    plan["layers"]["3"].update(method="tucker", ranks=[8, 16])
    plan["layers"]["7"].update(method="dense", ranks=[])
    Path("plan.json").write_text(json.dumps(plan))

    assert run("compress", *NET, *INPUT, "--plan", "plan.json", "--output", "small.safetensors", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["plan"]["layers"]["3"]["ranks"] == [8, 16]
    kernel = 32 * 16 + 8 * 16 * 9 + 8 * 32
    assert made["plan"]["layers"]["3"]["costs"]["params"] == [9248, 2 * 0 + kernel + 32], "counted anew"
    assert made["plan"]["layers"]["7"]["ranks"] == []
    small = decomp.load("small.safetensors", net())
    assert small[3].ranks == (8, 16)
    assert not isinstance(small[7], Factorized)
    expected = decomp.tucker(net(), {"3": (8, 16)}).eval()
    x = torch.randn(2, 3, 12, 12)
    assert torch.allclose(small.eval()(x), expected(x), atol=1e-6)
    assert made["costs"]["params"][1] == sum(p.numel() for p in small.parameters())
    by_name = decomp.load("small.safetensors", allow=["cli_net.Net"])
    assert torch.equal(by_name[3].core.weight, small[3].core.weight)


def test_a_layer_marked_as_kept_dense_in_a_plan_stays_dense(capsys):
    run("plan", *NET, "--ranks", "8")
    plan = json.loads(capsys.readouterr().out)
    assert plan["layers"]["3"]["ranks"] == [8, 8]
    plan["layers"]["3"]["kept_dense"] = True
    Path("plan.json").write_text(json.dumps(plan))
    run("plan", *NET, "--plan", "plan.json")
    again = json.loads(capsys.readouterr().out)
    assert again["layers"]["3"]["ranks"] == []
    assert again["layers"]["7"]["ranks"] == [8]
    run("plan", *NET, "--plan", "plan.json", "--params", "0.9")
    assert json.loads(capsys.readouterr().out)["layers"]["3"]["reason"] == "kept dense on request"


def test_a_plan_is_a_table_on_a_terminal_and_json_elsewhere(capsys, monkeypatch):
    main(["plan", *NET, "--ranks", "8"])
    both = capsys.readouterr()
    assert decomp.Plan.from_json(both.out)["3"].ranks == (8, 8)
    assert "whole model" in both.err
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(["plan", *NET, "--ranks", "8"])
    assert capsys.readouterr().out.startswith("layer")
    main(["plan", *NET, "--ranks", "8", "--output", "plan.json"])
    assert capsys.readouterr().out.startswith("layer")
    assert decomp.Plan.from_json(Path("plan.json").read_text())["7"].ranks == (8,)


def test_a_plan_is_read_from_stdin(capsys, monkeypatch):
    run("plan", *NET, "--ranks", "8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(capsys.readouterr().out))
    assert run("compress", *NET, "--plan", "-", "--output", "small.safetensors") == 0
    assert decomp.load("small.safetensors", net())[3].ranks == (8, 8)


def test_ranks_methods_globs_and_limits_reach_the_plan(capsys):
    run("plan", *NET, "--method", "svd", "--ranks", "3=8", "--ranks", "7=energy(0.5)", "--multiple-of", "4")
    plan = decomp.Plan.from_json(capsys.readouterr().out)
    assert plan["3"].method == "svd_channel"
    assert plan["3"].ranks == (8,)
    assert plan["7"].ranks[0] % 4 == 0
    run("plan", *NET, "--params", "50%", "--methods", "svd_spatial,svd", "--exclude", "7", "--objective", "sum")
    plan = decomp.Plan.from_json(capsys.readouterr().out)
    assert plan.request.methods == ("svd_spatial", "svd")
    assert plan.request.objective == "sum"
    assert "7" not in plan or not plan["7"].ranks
    assert plan.params.after <= 0.5 * plan.params.before


def test_the_data_of_a_loader_are_those_that_factors_are_fitted_to(capsys):
    options = ("--data", "cli_net:pairs", "--batch-inputs", "0")
    assert run("plan", *NET, "--macs", "0.5", *options) == 0
    plan = decomp.Plan.from_json(capsys.readouterr().out)
    assert plan["3"].output_error is not None
    assert run("compress", *NET, "--macs", "0.5", *options, "--sequential", "--output", "s.safetensors") == 0
    batches = __import__("cli_net").pairs()
    again = decomp.compress(net(), data=[x for x, _ in batches], macs=0.5, sequential=True)
    ours = decomp.load("s.safetensors", net())
    for name, value in again.state_dict().items():
        assert torch.allclose(ours.state_dict()[name].double(), value.double(), atol=1e-5), name


def test_the_kinds_of_tensor_files(folder):
    x = torch.randn(2, 3)
    (folder / "batches").mkdir()
    np.save("batches/2.npy", x.numpy())
    torch.save((x, x + 1), "batches/10.pt")
    save_file({"x": x}, "batches/3.safetensors")
    save_file({"ids": x, "mask": x + 1}, "batches/11.safetensors")
    read = list(data.open_data("batches", []))
    assert torch.equal(read[0], x)
    assert torch.equal(read[1], x)
    assert torch.equal(read[2][1], x + 1)
    assert read[3].keys() == {"ids", "mask"}
    torch.save(torch.nn.Linear(2, 2), "batches/12.pt")
    with pytest.raises(ValueError, match=r"12\.pt.*could run code"):
        list(data.open_data("batches", []))
    (folder / "batches" / "12.pt").write_bytes(b"no tensor")
    with pytest.raises(ValueError, match=r"12\.pt"):
        list(data.open_data("batches", []))


def test_images_are_resized_cropped_and_normalized(folder):
    (folder / "images" / "cat").mkdir(parents=True)
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = (255, 0, 51)  # the middle, which is what is kept
    Image.fromarray(wide).save("images/cat/2.png")
    Image.fromarray(np.full((10, 10), 255, np.uint8)).save("images/10.png")
    spec = [values.InputSpec.parse("1x3x10x10")]
    (batch,) = data.open_data("images", spec, mean=(0.5, 0.5, 0.0), std=(0.5,))
    assert batch.shape == (2, 3, 10, 10)
    assert torch.allclose(batch[0].mean((1, 2)), torch.tensor([1.0, 1.0, 2.0]))  # 10.png, white
    assert torch.allclose(batch[1].mean((1, 2)), torch.tensor([1.0, -1.0, 0.4]))  # cat/2.png, its middle
    assert len(data.open_data("images", spec, batch_size=1)) == 2
    with pytest.raises(ValueError, match="--input 1x3x224x224"):
        data.open_data("images", [])
    with pytest.raises(ValueError, match="--mean: 2 numbers for 3 channels"):
        data.open_data("images", spec, mean=(0.5, 0.5))
    (folder / "images" / "11.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"11\.png.*no image"):
        list(data.open_data("images", spec))


def test_compare_says_costs_and_scores_and_fails_where_too_much_is_lost(capsys):
    run("compress", *NET, *INPUT, "--macs", "0.4", "--output", "small.safetensors")
    capsys.readouterr()
    both = (*NET[:1], "small.safetensors", *NET[1:], *INPUT, "--evaluate", "cli_net:size")
    assert run("compare", *both) == 0
    assert "fewer MACs" in capsys.readouterr().out
    assert run("compare", *both, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"]["small"]["macs"] <= 0.4 * found["models"]["dense"]["macs"]
    assert found["scores"]["dense"] == found["models"]["dense"]["params"]
    assert found["scores"]["small"] == found["models"]["small"]["params"]
    assert run("compare", *both, "--max-drop", "1") == 3
    assert "the score fell by" in capsys.readouterr().err
    assert run("compare", *both, "--max-drop", "1e9") == 0


def test_compare_and_report_take_a_plan_in_place_of_a_file(capsys):
    run("plan", *NET, *INPUT, "--macs", "0.4", "--output", "plan.json")
    assert run("compare", *NET, *INPUT, "--plan", "plan.json") == 0
    assert "fewer MACs" in capsys.readouterr().out
    assert run("report", *NET, *INPUT, "--plan", "plan.json", "--output", "page.html") == 0
    assert "TuckerConv" in Path("page.html").read_text()
    assert run("compare", *NET, *INPUT) == 1
    assert "--plan" in capsys.readouterr().err


def test_a_tradeoff_is_kept_drawn_and_gives_a_plan(capsys):
    options = (*NET, *INPUT, "--budgets", "0.7,0.4", "--rules", "energy(0.9)", "--methods", "svd_spatial,svd")
    files = ("--points", "points.json", "--plot", "curve.svg", "--best-plan", "best.json", "--max-drop", "0.9")
    assert run("tradeoff", *options, *files, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [point["point"] for point in found["points"]][:2] == ["macs=0.7", "macs=0.4"]
    assert found["lower_is_better"]
    assert "<svg" in Path("curve.svg").read_text()
    assert run("compress", *NET, *INPUT, "--plan", "best.json", "--output", "small.safetensors") == 0
    capsys.readouterr()
    assert run("tradeoff", *options, *files[:2], "--max-drop", "1e-9") == 3
    assert "no point is that good" in capsys.readouterr().err
    scored = (
        "--evaluate",
        "cli_net:size",
        "--budgets",
        "0.5",
        "--held-out",
        "cli_net:pairs",
        "--batch-inputs",
        "0",
    )
    assert run("tradeoff", *NET, *INPUT, *scored, "--json") == 0
    assert json.loads(capsys.readouterr().out)["score"] == "size"


def test_a_folder_of_hugging_face_goes_in_and_comes_out_with_its_tokenizer(folder, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=120, **sizes)).save_pretrained("bert")
    (folder / "bert" / "tokenizer.json").write_text("{}")
    assert run("plan", "bert", "--method", "svd", "--ranks", "8", "--output", "plan.json") == 0
    assert run("compress", "bert", "--plan", "plan.json", "--output", "small") == 0
    assert (folder / "small" / "tokenizer.json").read_text() == "{}"
    assert not (folder / "small" / "pytorch_model.bin").exists()
    import decomp.huggingface

    small = decomp.huggingface.from_pretrained("small")
    assert sum(isinstance(module, Factorized) for module in small.modules()) > 8
    ids = ("--input", "input_ids=2x9:int64")
    capsys.readouterr()
    assert run("compare", "bert", "small", *ids, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"]["small"]["macs"] < found["models"]["dense"]["macs"]
    assert run("compress", "bert", "--plan", "plan.json", "--output", "small") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run("compress", "bert", "--plan", "plan.json", "--output", "small", "--overwrite") == 0
    assert run("compress", "bert", "--plan", "plan.json", "--output", "bert", "--overwrite") == 1
    assert "holds no compressed model" in capsys.readouterr().err
    assert (folder / "bert" / "model.safetensors").exists()
    assert not list(folder.glob(".unfinished*"))


def test_export_writes_files_that_compute_what_the_model_does(capsys, folder):
    run("compress", *NET, *INPUT, "--macs", "0.5", "--output", "small.safetensors")
    capsys.readouterr()
    assert run("export", "cli_net:Net", "small.safetensors", *INPUT, "--output", "small.pt2", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["format"] == "torch.export"
    assert done["relative_error"] < 1e-5
    x = torch.randn(2, 3, 12, 12)
    small = decomp.load("small.safetensors", net()).eval()
    with torch.no_grad():
        assert torch.allclose(torch.export.load("small.pt2").module()(x), small(x), atol=1e-5)
    assert run("export", "cli_net:Net", "small.safetensors", *INPUT, "--output", "small.pt2") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run("export", *NET, *INPUT, "--output", "dense.pt2") == 0
    assert run("export", *NET, *INPUT, "--int8", "--output", "dense.onnx") == 1
    assert "give --data" in capsys.readouterr().err
    assert run("export", *NET, *INPUT, "--output", "dense.doc") == 1
    assert not (folder / "dense.doc").exists()
    pytest.importorskip("onnxruntime")
    data = ("--data", "cli_net:pairs", "--batch-inputs", "0")
    assert run("export", *NET, *INPUT, *data, "--int8", "--output", "dense.onnx") == 0
    assert "ONNX int8" in capsys.readouterr().out


def test_the_arguments_of_the_factory_and_weights_of_a_pickle(capsys):
    torch.save(net().state_dict(), "net.pt")
    assert run("plan", "cli_net:Net", "--weights", "net.pt", "--arguments", '{"classes": 10}', "--ranks", "8") == 0
    capsys.readouterr()
    assert run("plan", *NET, "--arguments", '{"classes": 11}') == 1
    assert "is of another model" in capsys.readouterr().err
    torch.save(torch.nn.Linear(2, 2), "net.pt")
    assert run("plan", "cli_net:Net", "--weights", "net.pt") == 1
    assert "could run code" in capsys.readouterr().err
    assert run("plan", "cli_net:Net", "--ranks", "8") == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("plan", "no_such_module_here:Net"), 1, "no module 'no_such_module_here'"),
        (("plan", "cli_net:Nett"), 1, "cli_net has no 'Nett'"),
        (("plan", "cli_net:number"), 1, "returned a int"),
        (("plan", "no/such/folder"), 1, "there is no such folder"),
        (("plan", "."), 1, "config.json"),
        (("plan", "cli_net:Net", "--weights", "none.safetensors"), 1, "there is no such file"),
        (("plan", *NET, "--macs", "0.5"), 1, "give --input"),
        (("plan", *NET, "--params", "0.0001"), 3, "cannot be reached"),
        (("plan", *NET, "--params", "0.5", "--macs", "0.5"), 1, "one budget at a time"),
        (("plan", *NET, "--params", "0.5", "--ranks", "8"), 1, "leave --method and --ranks out"),
        (("plan", *NET, "--plan", "none.json"), 1, "there is no such file"),
        (("plan", *NET, "--plan", "cli_net.py"), 1, "not a plan"),
        (("plan", *NET, "--plan", "x", "--ranks", "8"), 1, "leave --method"),
        (("plan", *NET, "--ranks", "energy"), 1, "energy"),
        (("plan", *NET, "--ranks", "enrgy(0.9)"), 1, "vbmf"),
        (("plan", *NET, "--ranks", "8", "--ranks", "9"), 1, "GLOB=RANKS"),
        (("plan", *NET, "--data", "nothing"), 1, "there is no such folder"),
        (("plan", *NET, "--data", "cli_net:pairs", "--batch-inputs", "7"), 1, "--batch-inputs '7'"),
        (("plan", *NET, "--data", "."), 0, ""),
        (("compress", *NET, "--ranks", "8", "--output", "no/folder/x"), 1, "make it first"),
        (("compress", *NET, "--ranks", "8", "--output", "net.safetensors"), 1, "--overwrite"),
        (("compress", *NET, "--ranks", "8", "--finetune", "--output", "x"), 1, "--finetune needs --data"),
        (
            ("compress", *NET, "--ranks", "8", "--no-sequential", "--output", "x"),
            1,
            "--no-sequential needs --data",
        ),
        (("compress", *NET, "--ranks", "energy(0.99999)", "--layers", "9", "--output", "x"), 3, "no layer"),
        (("compare", *NET, *INPUT), 1, "--plan"),
        (("compare", "cli_net:Net", "net.safetensors", *INPUT), 1, "not a file that decomp.save wrote"),
        (("compare", "cli_net:Net", "net.safetensors"), 1, "--input"),
        (("tradeoff", *NET, *INPUT, "--evaluate", "cli_net:fails"), 1, "RuntimeError: the evaluation"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_what_is_said_about_wrong_input(arguments, status, message, capsys):
    if arguments[-1] == ".":
        Path("net.safetensors").rename("weights.bin")  # leaves a folder without data
        assert run("plan", "cli_net:Net", "--data", ".") == 1
        assert "holds neither tensors" in capsys.readouterr().err
        return
    before = sorted(Path().iterdir())
    assert run(*arguments) == status
    written = capsys.readouterr()
    assert message in written.err
    assert written.out == ""
    assert "Traceback" not in written.err
    assert sorted(path for path in Path().iterdir() if path.name != "__pycache__") == [
        path for path in before if path.name != "__pycache__"
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan",),
        ("plan", "x:y", "--rank", "8"),
        ("plan", "x:y", "--input", "3by3"),
        ("plan", "x:y", "--macs", "half"),
    ],
)
def test_wrong_options_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    assert "usage: decomp plan" in capsys.readouterr().err


def test_traceback_shows_where_an_error_came_from():
    with pytest.raises(RuntimeError, match="the evaluation of the user fails"):
        run("tradeoff", *NET, *INPUT, "--evaluate", "cli_net:fails", "--traceback")


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("decomp.cli.commands.read_plan", interrupted)
    assert run("plan", *NET, "--plan", "plan.json") == 130
    assert "interrupted" in capsys.readouterr().err


def test_every_command_has_help_with_examples(capsys):
    for command in ("plan", "compress", "compare", "report", "tradeoff", "export"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"  decomp {command} mynet:Net" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "Exit status" in capsys.readouterr().out


def test_the_command_runs_as_a_program_and_its_stdout_is_json_alone(folder):
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    command = [sys.executable, "-m", "decomp", "plan", *NET, *INPUT, "--macs", "0.5"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert decomp.Plan.from_json(done.stdout).request.budget.value == 0.5
    assert "whole model" in done.stderr

"""The README and the guide say what is true, and their code runs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import decomp
from decomp.methods import METHODS
from decomp.ranks import RULES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_of_the_readme_runs_and_prints_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    scope: dict[str, object] = {}
    outputs = []
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
        outputs.append(capsys.readouterr().out)
    form = r"([\d.]+)x fewer params, ([\d.]+)x fewer MACs, speed x([\d.]+)\n\s*score ([\d.]+) => ([\d.]+)"
    printed, shown = re.search(form, outputs[0]), re.search(form, README)
    for ours, theirs in zip(printed.groups()[:2], shown.groups()[:2], strict=True):
        # Training differs a little from one processor to another, and the ranks with it.
        assert abs(float(ours) / float(theirs) - 1) < 0.2
    for ours, theirs in zip(printed.groups()[3:], shown.groups()[3:], strict=True):
        assert abs(float(ours) - float(theirs)) < 0.02
    assert "whole model" in outputs[1]
    assert "(24, 32)" in outputs[1]
    assert "kept dense on request" in outputs[1]
    again, small = scope["again"], scope["small"]
    assert all((a == b).all() for a, b in zip(again.parameters(), small.parameters(), strict=True))


def test_code_of_the_page_on_other_tools_runs(tmp_path):
    """In a process of its own: it starts a process group, and imports whatever the tools import."""
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "other_tools.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(blocks) >= 10
    assert sum(block.count("assert ") for block in blocks) >= 10
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        code = "\n".join(blocks).replace("29511", str(free.getsockname()[1]))
    (tmp_path / "other_tools.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        env["TORCH_COMPILE_DISABLE"] = "1"
    command = [sys.executable, "-W", "ignore", "other_tools.py"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def test_use_and_output_stand_within_the_first_25_lines():
    head = "\n".join(README.splitlines()[:25])
    assert "decomp demo" in head
    assert "python -m pytest" in head
    assert "score" in head


def test_the_commands_of_the_readme_are_those_of_the_ci():
    command = re.search(r"\.venv/bin/python (-m pytest .*)", README).group(1)
    assert f'"$bin/python" {command}' in (ROOT / ".ci" / "run").read_text()
    extras = re.search(r"'\.\[test\]'", README).group(0)
    assert f"-c constraints.txt -e {extras}" in (ROOT / ".ci" / "run").read_text()


def test_links_of_the_documents_lead_somewhere():
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    links = {
        (document, target)
        for document in documents
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))
    }
    links |= {(documents[0], target) for target in re.findall(r"`([\w/]+\.(?:md|ipynb))`", README)}
    assert len(links) > 5
    assert not [(document.name, target) for document, target in links if not (document.parent / target).exists()]


def test_the_readme_has_no_relative_links_which_a_package_index_breaks():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert not [target for target in targets if not target.startswith("https://")]


def test_the_guide_lists_every_method_with_its_ranks_and_every_rule():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \| [^|]+ \|$", guide, re.MULTILINE))
    assert set(rows) == set(METHODS)
    for name, method in METHODS.items():
        assert rows[name].strip().strip("()") == ", ".join(method.rank_names)
    for name in (*RULES, "energy", "params", "macs"):
        assert f"`{name}(" in guide


def test_notebooks_were_run_in_order_and_show_what_the_web_can_show():
    found = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert len(found) >= 5
    for path in found:
        assert f"notebooks/{path.name}" in README
        cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), path.name
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert not [output for output in outputs if output["output_type"] == "error"], path.name
        # A widget is nothing without its kernel: its text stands in for it.
        assert not any("widget-view" in kind for output in outputs for kind in output.get("data", {})), path.name


def test_public_names_are_documented():
    for name in decomp.__all__:
        assert getattr(decomp, name).__doc__, name


def test_commands_of_the_page_on_the_command_line_run(tmp_path):
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(code.replace("train(digits)", "train(digits, epochs=3)"))
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).replace(
        "--max-drop 0.01", "--max-drop 1"
    )
    assert len(re.findall("^(?:python|decomp) ", commands, re.MULTILINE)) >= 10
    for name in ("python", "decomp"):
        module = "-m decomp" if name == "decomp" else ""
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -W ignore {module} "$@"\n')
        program.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = ["bash", "-euo", "pipefail", "-c", commands]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "fewer MACs" in run.stdout
    written = {
        "small.safetensors",
        "best.safetensors",
        "report.html",
        "bert-small",
        "piped.safetensors",
        "made.json",
    }
    assert not written - {path.name for path in tmp_path.iterdir()}

"""What is built is what is in the tree, and a user's own layers.py never meets it."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import decomp
from decomp.cli.main import main

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_every_module_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("decomp", "layers"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    built = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "decomp").rglob("*.py") if "layers" not in path.parts}
    ours |= {f"decomp/layers/{path.name}" for path in (ROOT / "layers").glob("*.py")}
    assert built == ours | {"decomp/py.typed"}


def test_the_source_distribution_holds_all_that_is_tracked(tmp_path):
    """So that the tests, the documents and the notebooks of what was released can be run from it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    tree = tmp_path / "tree"
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name, follow_symlinks=False)
    (tree / "tests" / "__pycache__").mkdir()
    (tree / "tests" / "__pycache__" / "left.pyc").write_bytes(b"")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {each.name.split("/", 1)[1] for each in archive.getmembers() if not each.isdir()}
    of_the_build = {name for name in held if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    of_the_repository = {name for name in tracked if name.split("/")[0] in (".github", ".gitignore")}
    assert held - of_the_build == tracked - of_the_repository - {"decomp/layers"}  # a link into the source tree
    (wheel,) = tmp_path.glob("*.whl")  # made from the source distribution
    assert {"decomp/layers/tucker.py", "decomp/methods/tucker.py"} <= set(zipfile.ZipFile(wheel).namelist())


def test_the_version_is_that_of_the_project_everywhere(capsys):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert decomp.__version__ == version
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"decomp {version}\n"
    for command in ([sys.executable, "-m", "decomp"], [str(Path(sys.executable).with_name("decomp"))]):
        run = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert run.stdout == f"decomp {version}\n"


def test_changelog_and_citation_are_of_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    sections = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert next(section.split()[0] for section in sections if section != "Unreleased") == version
    assert "Unreleased" not in sections[1:]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (version, "MIT")


def test_a_users_own_layers_module_is_left_alone(tmp_path):
    (tmp_path / "layers.py").write_text("raise RuntimeError('the layers.py of the user was imported')\n")
    code = "import decomp, decomp.layers; print(decomp.layers.TuckerConv.__module__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "decomp.layers.tucker"


def test_importing_decomp_imports_no_optional_package():
    unneeded = ["sklearn", "matplotlib", "transformers", "IPython", "ipywidgets", "accelerate", "torch._dynamo"]
    unneeded += ["scipy.integrate", "scipy.optimize", "tensorly", "rich"]  # used, and imported where they are
    code = f"import sys, decomp; print([m for m in {unneeded} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

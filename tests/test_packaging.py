"""What is built is what is in the tree, and a user's own layers.py never meets it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

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

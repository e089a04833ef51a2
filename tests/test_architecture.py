"""Who may import whom: arrows between packages point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A package may import those named here; a package that names none stands on the ground.
ALLOWED = {
    "_util": set(),
    "layers": set(),
    "linalg": set(),
    "ranks": {"_util"},
    "methods": {"_util", "layers", "linalg"},
    "network": {"_util", "layers", "linalg"},
    "data": {"_util", "layers", "network"},
    "calibration": {"_util", "data", "layers", "linalg", "methods", "network"},
    "planning": {"_util", "calibration", "data", "layers", "linalg", "methods", "network", "ranks", "runtimes"},
    "runtimes": {"_util", "data", "layers", "network"},
    "recovery": {"_util", "calibration", "data", "layers", "network", "planning"},
    "training": {"_util", "data", "network"},
    "files": {"_util", "api", "data", "layers", "methods", "network", "planning", "ranks"},
    "api": {
        "_util",
        "calibration",
        "data",
        "layers",
        "methods",
        "network",
        "planning",
        "ranks",
        "recovery",
        "training",
    },
    "analysis": {
        *("_util", "api", "calibration", "data", "layers", "linalg", "methods", "network", "planning", "ranks"),
        "runtimes",
    },
    "explorer": {
        *("_util", "analysis", "api", "calibration", "linalg", "methods", "network", "planning", "ranks"),
        "runtimes",
    },
    "huggingface": {"_util", "files", "layers", "methods", "planning"},
    "hosts": {"huggingface"},
    "losses": {"training"},
    "plots": {"analysis"},
    "adapters": {"layers"},
    "digits": {"_util"},
    "demo": {"_util", "analysis", "api", "digits", "files", "planning", "ranks", "training"},
    "cli": {
        *(
            "_util",
            "analysis",
            "api",
            "calibration",
            "demo",
            "files",
            "huggingface",
            "network",
            "planning",
            "ranks",
            "runtimes",
        ),
    },
    "__main__": {"cli"},
}


def package(module: str) -> str:
    """The room that a module is in: decomp.methods.svd is in methods."""
    return module.split(".")[1]


def sources():
    for folder, prefix in ((ROOT / "layers", "decomp.layers"), (ROOT / "decomp", "decomp")):
        for path in sorted(folder.rglob("*.py")):
            if folder.name == "decomp" and "layers" in path.relative_to(folder).parts:
                continue
            inner = ".".join(path.relative_to(folder).with_suffix("").parts)
            yield f"{prefix}.{inner}".removesuffix(".__init__"), path


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "decomp" else {node.module}
    return found


@pytest.mark.parametrize(
    ("module", "path"), list(sources()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_arrows_point_one_way(module, path):
    if module == "decomp":
        return
    ours = {package(name) for name in imports(path) if name.split(".")[0] == "decomp"} - {package(module)}
    assert ours <= ALLOWED[package(module)], f"{module} may not import {ours - ALLOWED[package(module)]}"


def test_layers_import_torch_and_nothing_else_from_outside():
    for module, path in sources():
        if package(f"{module}.") == "layers":
            outside = {name.split(".")[0] for name in imports(path)} - {"decomp", "torch"}
            assert outside <= {
                "abc",
                "collections",
                "contextlib",
                "copy",
                "functools",
                "itertools",
                "math",
                "typing",
            }, (
                module,
                outside,
            )


def test_the_table_has_no_cycle_no_package_that_is_gone_and_no_arrow_that_nobody_takes():
    taken: dict[str, set[str]] = {}
    for module, path in sources():
        if module != "decomp":
            ours = {package(name) for name in imports(path) if name.split(".")[0] == "decomp"}
            taken.setdefault(package(module), set()).update(ours - {package(module)})
    assert taken == ALLOWED
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {name for name, needs in ALLOWED.items() if name not in done and needs <= done}
        assert ready, f"a cycle among {set(ALLOWED) - done}"
        done |= ready

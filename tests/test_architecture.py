"""Who may import whom: arrows point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES: set[str] = set()
BASIS = {"decomp.layers", "decomp.methods", "decomp.naming", "decomp.observing", "decomp.ranks"}
ALLOWED = {
    **dict.fromkeys(("decomp.layers", "decomp.ranks", "decomp.spectra", "decomp.surgery"), LEAVES),
    **dict.fromkeys(("decomp.forward", "decomp.naming", "decomp.progress"), LEAVES),
    **dict.fromkeys(("decomp.selection", "decomp.shrinkage", "decomp.tables"), LEAVES),
    "decomp.following": {"decomp.forward"},
    "decomp.observing": {"decomp.forward"},
    "decomp.folding": {
        *("decomp.following", "decomp.forward", "decomp.layers", "decomp.observing", "decomp.selection"),
        *("decomp.spectra", "decomp.surgery"),
    },
    "decomp.solvers": {"decomp.spectra"},
    "decomp.methods": {"decomp.layers", "decomp.solvers", "decomp.spectra"},
    "decomp.costs": {"decomp.layers", "decomp.observing"},
    "decomp.timing": {"decomp.costs", "decomp.forward", "decomp.layers", "decomp.observing"},
    "decomp.choices": {"decomp.costs", "decomp.layers", "decomp.tables"},
    "decomp.candidates": {
        *BASIS,
        *("decomp.choices", "decomp.costs", "decomp.grids", "decomp.metrics", "decomp.moments"),
        *("decomp.spectra",),
        "decomp.timing",
    },
    "decomp.grids": {"decomp.ranks"},
    "decomp.patches": {"decomp.layers"},
    "decomp.projecting": {"decomp.layers"},
    "decomp.moments": set(),
    "decomp.metrics": {"decomp.layers", "decomp.methods", "decomp.moments", "decomp.projecting", "decomp.spectra"},
    "decomp.sums": {
        *("decomp.forward", "decomp.layers", "decomp.metrics", "decomp.moments", "decomp.patches"),
        *("decomp.shrinkage",),
    },
    "decomp.by_layer": set(),
    "decomp.slopes": {"decomp.forward"},
    "decomp.calibration": {
        *("decomp.eligibility", "decomp.methods"),
        *("decomp.batches", "decomp.following", "decomp.forward", "decomp.moments", "decomp.naming"),
        *("decomp.progress", "decomp.selection", "decomp.slopes", "decomp.sums", "decomp.surveys"),
        *("decomp.by_layer",),
    },
    "decomp.budgets": {"decomp.candidates", "decomp.choices", "decomp.costs", "decomp.ranks"},
    "decomp.eligibility": {"decomp.layers", "decomp.selection", "decomp.surgery"},
    "decomp.fitting": {
        "decomp.eligibility",
        "decomp.choices",
        "decomp.layers",
        "decomp.methods",
        "decomp.surgery",
    },
    "decomp.building": {
        *("decomp.candidates", "decomp.choices", "decomp.layers", "decomp.methods", "decomp.metrics"),
        *("decomp.moments",),
        *("decomp.naming", "decomp.progress", "decomp.spectra"),
    },
    "decomp.plans": {
        "decomp.eligibility",
        *("decomp.budgets", "decomp.building", "decomp.candidates", "decomp.choices", "decomp.costs"),
        *("decomp.fitting", "decomp.methods", "decomp.ranks", "decomp.surgery", "decomp.tables"),
    },
    "decomp.surveys": {
        "decomp.eligibility",
        *("decomp.choices", "decomp.costs", "decomp.fitting", "decomp.layers", "decomp.methods"),
        *("decomp.observing", "decomp.plans", "decomp.selection", "decomp.surgery"),
    },
    "decomp.planning": {
        "decomp.eligibility",
        *("decomp.budgets", "decomp.candidates", "decomp.choices", "decomp.methods", "decomp.plans"),
        *("decomp.progress", "decomp.ranks", "decomp.selection", "decomp.surveys", "decomp.timing"),
        *("decomp.calibration", "decomp.layers"),
    },
    "decomp.asymmetry": {
        *("decomp.activations", "decomp.batches", "decomp.building", "decomp.choices", "decomp.fitting"),
        *("decomp.following", "decomp.forward", "decomp.frames", "decomp.layers", "decomp.naming"),
        *("decomp.patches", "decomp.plans", "decomp.progress", "decomp.refitting", "decomp.streams"),
        *("decomp.sums", "decomp.surgery"),
    },
    "decomp.applying": {
        *("decomp.calibration", "decomp.finetuning", "decomp.methods", "decomp.planning", "decomp.plans"),
        *("decomp.asymmetry", "decomp.lessons"),
    },
    "decomp.pairing": {"decomp.layers"},
    "decomp.frames": {"decomp.batches", "decomp.following", "decomp.forward"},
    "decomp.refitting": {"decomp.frames", "decomp.layers", "decomp.patches"},
    "decomp.rectified": {
        *("decomp.activations", "decomp.batches", "decomp.following", "decomp.forward", "decomp.refitting"),
    },
    "decomp.repairing": {
        *("decomp.activations", "decomp.batches", "decomp.following", "decomp.forward", "decomp.frames"),
        *("decomp.layers", "decomp.naming", "decomp.pairing", "decomp.progress", "decomp.by_layer"),
        *("decomp.rectified", "decomp.refitting", "decomp.streams", "decomp.tables"),
    },
    **dict.fromkeys(("decomp.checkpoints", "decomp.processes", "decomp.randomness", "decomp.streams"), LEAVES),
    "decomp.batches": {"decomp.forward", "decomp.randomness"},
    "decomp.losses": {"decomp.forward"},
    "decomp.training": {"decomp.checkpoints", "decomp.processes"},
    "decomp.activations": {"decomp.batches", "decomp.following", "decomp.forward", "decomp.streams"},
    "decomp.lessons": {
        *("decomp.activations", "decomp.batches", "decomp.checkpoints", "decomp.following", "decomp.processes"),
        *("decomp.randomness", "decomp.streams", "decomp.training"),
    },
    "decomp.finetuning": {
        *("decomp.activations", "decomp.batches", "decomp.checkpoints", "decomp.following", "decomp.forward"),
        *("decomp.lessons", "decomp.naming", "decomp.pairing", "decomp.processes", "decomp.progress"),
        *("decomp.layers", "decomp.randomness", "decomp.streams", "decomp.tables", "decomp.training"),
        *("decomp.by_layer",),
    },
    "decomp.courses": {
        *("decomp.batches", "decomp.checkpoints", "decomp.forward", "decomp.losses", "decomp.processes"),
        *("decomp.randomness", "decomp.streams", "decomp.training"),
    },
    "decomp.distilling": {
        *("decomp.batches", "decomp.checkpoints", "decomp.courses", "decomp.forward", "decomp.losses"),
        *("decomp.processes", "decomp.progress", "decomp.training"),
    },
    "decomp.figures": LEAVES,
    "decomp.plots": {"decomp.figures", "decomp.plans", "decomp.ranks", "decomp.spectra", "decomp.tables"},
    "decomp.reports": {
        *("decomp.choices", "decomp.costs", "decomp.forward", "decomp.layers", "decomp.observing"),
        *("decomp.plots", "decomp.surgery", "decomp.tables", "decomp.timing"),
    },
    "decomp.sensitivities": {
        *("decomp.eligibility", "decomp.methods"),
        *("decomp.batches", "decomp.forward", "decomp.layers", "decomp.naming", "decomp.progress"),
        *("decomp.selection", "decomp.spectra", "decomp.surveys"),
    },
    "decomp.api": {
        *("decomp.budgets", "decomp.layers", "decomp.methods", "decomp.planning", "decomp.plans"),
        *("decomp.applying", "decomp.selection", "decomp.surgery"),
    },
    "decomp.decompositions": {
        *("decomp.applying", "decomp.planning", "decomp.selection"),
    },
    "decomp.scores": {"decomp.batches", "decomp.choices", "decomp.forward"},
    "decomp.points": {"decomp.checkpoints", "decomp.plans", "decomp.plots", "decomp.tables"},
    "decomp.wanted": {
        *("decomp.api", "decomp.calibration", "decomp.methods", "decomp.plans", "decomp.points", "decomp.ranks"),
        *("decomp.selection", "decomp.surveys"),
    },
    "decomp.curves": {
        *("decomp.budgets", "decomp.calibration", "decomp.choices", "decomp.points", "decomp.progress"),
        *("decomp.ranks", "decomp.scores", "decomp.selection", "decomp.surgery", "decomp.timing"),
        "decomp.wanted",
    },
    "decomp.exploring": {
        *("decomp.api", "decomp.budgets", "decomp.calibration", "decomp.candidates", "decomp.choices"),
        "decomp.methods",
        *("decomp.planning", "decomp.plans", "decomp.ranks", "decomp.scores", "decomp.selection"),
        "decomp.sensitivities",
    },
    "decomp.sketches": {"decomp.spectra"},
    "decomp.rows": {
        *("decomp.choices", "decomp.exploring", "decomp.ranks", "decomp.sketches", "decomp.tables"),
    },
    "decomp.panel": {
        *("decomp.choices", "decomp.exploring", "decomp.plans", "decomp.rows", "decomp.sketches"),
        "decomp.tables",
    },
    "decomp.explorer": {
        *("decomp.calibration", "decomp.exploring", "decomp.panel", "decomp.scores", "decomp.selection"),
    },
    "decomp.digits": {"decomp.progress"},
    "decomp.demo": {
        *("decomp.api", "decomp.digits", "decomp.finetuning", "decomp.plans", "decomp.progress"),
        *("decomp.ranks", "decomp.reports", "decomp.tables"),
    },
    "decomp.cli": {"decomp.demo"},
    "decomp.__main__": {"decomp.cli"},
}


def package(module: str) -> str:
    """The unit that arrows are drawn between: decomp.methods.svd belongs to decomp.methods."""
    return ".".join(module.split(".")[:2])


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


def test_layers_and_surgery_import_torch_and_nothing_else_from_outside():
    for module, path in sources():
        if package(module) in ("decomp.layers", "decomp.surgery"):
            outside = {name.split(".")[0] for name in imports(path)} - {"decomp", "torch"}
            assert outside <= {"abc", "collections", "copy", "math", "typing"}, (module, outside)


def test_the_table_has_no_cycle_and_no_module_that_is_gone():
    assert set(ALLOWED) == {package(module) for module, _ in sources()} - {"decomp"}
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {name for name, needs in ALLOWED.items() if name not in done and needs <= done}
        assert ready, f"a cycle among {set(ALLOWED) - done}"
        done |= ready


def test_files_and_functions_stay_small():
    for module, path in sources():
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 250, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                docstring = node.body[0] if ast.get_docstring(node) else None
                words = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
                assert node.end_lineno - node.lineno + 1 - words <= 45, f"{module}.{node.name}"

"""Builds the site: ``sphinx-build -W docs build/site``."""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import decomp  # noqa: E402

project = "decomp"
author = copyright = "The decomp developers"
release = version = decomp.__version__
html_title = f"decomp {release}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "docstrings",
    "mathml",
    "methods",
    "spaces",
]
exclude_patterns = ["method_notes", "methods/_table.md", "_ext"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["decomp.css"]
html_show_sphinx = False
templates_path: list[str] = []

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are committed with their outputs, and run by the tests
nb_merge_streams = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False  # those of torch say what nn.Module does
autodoc_member_order = "bysource"
maximum_signature_line_length = 90
add_module_names = False

# Sphinx reads pages below its source folder only.
(HERE / "notebooks").mkdir(exist_ok=True)
for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
    target = HERE / "notebooks" / notebook.name
    if not target.exists() or target.read_bytes() != notebook.read_bytes():
        shutil.copy(notebook, target)

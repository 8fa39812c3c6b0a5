"""The arrows of the layout: which part may import which, and what no part may import at import time."""
import ast
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGE = os.path.join(ROOT, "ldm_jax")
ALLOWED = {  # folder -> the parts of ldm_jax that it may import besides its own and types
    "process": set(), "models": set(), "data": set(), "parallel": set(), "training": {"parallel", "machine"}, "evaluation": set(),
    "systems": {"process", "models"},
    "weights": set(),
    "types.py": set(), "paths.py": set(), "machine.py": set(), "compilations.py": set(),
    "recipe.py": {"process", "models", "data", "systems", "parallel", "training", "weights", "pipelines"},
    "planning.py": {"recipe", "parallel", "training"},
    "request.py": {"process", "systems"},
    "sampling.py": {"request", "process", "models", "systems", "exporting", "lora", "published", "parallel", "machine"},
    "api.py": {"sampling", "recipe", "training", "parallel", "pipelines"},
    "pipelines": {"process", "models", "data", "systems", "weights", "published", "sampling"},
    "published.py": {"models", "weights"}, "exporting.py": {"models", "published", "weights"},
    "lora.py": {"models", "published", "weights"},
    "collection.py": {"sampling", "evaluation", "parallel", "training"},
    "run.py": {"api", "collection", "compilations", "drawing", "pipelines", "recipe", "stages", "data", "evaluation", "parallel",
               "training"},
    "drawing.py": {"api", "recipe", "data", "evaluation", "machine"},
    "stages.py": {"api", "data", "systems", "parallel", "training", "machine"},
    "command_line.py": set(),
    "main.py": {"command_line", "run", "planning", "parallel", "training", "machine"},
    "benchmark": {"machine", "compilations", "models", "parallel", "process", "sampling", "systems", "training", "data", "recipe", "api"},
    "__init__.py": set(),
}
FILES = [os.path.relpath(os.path.join(d, f), PACKAGE) for d, _, names in os.walk(PACKAGE) for f in names if f.endswith(".py")]


def imports(path):
    """Every module named by an import statement of a file, also inside functions."""
    for node in ast.walk(ast.parse(open(os.path.join(PACKAGE, path)).read())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES)
def test_arrows(path):
    part = path.split(os.sep)[0]
    used = {name.split(".")[1] for name in imports(path) if name.startswith("ldm_jax.")}
    own = {part, part.removesuffix(".py"), "types", "__version__"} | (set() if part in ("process", "models", "systems") else {"paths"})
    assert used - own <= ALLOWED[part], f"{path} imports {sorted(used - own - ALLOWED[part])}"


@pytest.mark.parametrize("path", FILES)
def test_flax_is_confined_to_models(path):
    if not path.startswith("models"):
        assert not [name for name in imports(path) if name.split(".")[0] == "flax"]


def test_every_folder_is_a_package():
    """Otherwise `pip install .` leaves it out, and only a checkout works."""
    folders = {os.path.dirname(path) for path in FILES}
    assert not [folder for folder in folders if not os.path.exists(os.path.join(PACKAGE, folder, "__init__.py"))]


def test_no_tensorflow_no_torch_and_a_quick_start():
    code = ("import sys, ldm_jax; assert 'jax' not in sys.modules, 'import ldm_jax should cost nothing';"
            "import ldm_jax.run, ldm_jax.data.records, tensorflow_datasets;"
            "print([m for m in ('tensorflow', 'torch', 'matplotlib', 'diffrax') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr

"""A paper's directory imports common and itself, never another paper; importing any file does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ("shiftresnet", "deepshift", "s3", "shared_bases", "epsilon_resnet")
FILES = sorted(path for paper in PAPERS for path in (ROOT / paper).glob("**/*.py"))


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports break `python {path.name}`"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_paper_imports_only_common_and_itself(path):
    paper = path.relative_to(ROOT).parts[0]
    ours = {"common", *PAPERS, "benchmarks", "tests", "report"}
    allowed = ("common.data", "common.kernels", "common.checkpoints", paper)
    for module in imported_modules(path):
        if module.split(".")[0] in ours:
            assert module.startswith(allowed), f"{path.relative_to(ROOT)} imports {module}"


def test_common_imports_no_paper():
    for path in (ROOT / "common").glob("**/*.py"):
        for module in imported_modules(path):
            assert module.split(".")[0] not in PAPERS, f"{path.relative_to(ROOT)} imports {module}"


def test_importing_prints_nothing_and_loads_no_heavy_library():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    modules = [name.removesuffix(".__init__") for name in modules]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "heavy = {'numba', 'cupy', 'sklearn', 'matplotlib', 'tensorboardX', 'torchvision'} & set(sys.modules)\n"
        "import torch\nassert not heavy, heavy\nassert not torch.cuda.is_initialized()"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

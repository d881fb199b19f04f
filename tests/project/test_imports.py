"""The packages import in one direction only, and refmodels needs nothing but torch to be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ALLOWED = {
    "refmodels": set(),
    "trt_runtime": {"refmodels"},
    "export": {"refmodels", "trt_runtime"},
    "debug": {"refmodels", "trt_runtime", "export"},
}
OTHERS = {"tests", "benchmarks", "notebooks"}
COMMAND_LINE = {"cli.py", "command.py", "__main__.py"}
FILES = [file for package in ALLOWED for file in sorted((ROOT / package).rglob("*.py"))]


def imports(tree: ast.AST, *, lazy: bool) -> Iterator[str]:
    """Top-level names of all imports; with lazy=False only those that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays inside its package.
            yield (node.module or "").split(".")[0] if node.level == 0 else ""
        elif isinstance(node, ast.Call) and lazy and _is_import_call(node):
            first = node.args[0] if node.args else None
            yield str(first.value).split(".")[0] if isinstance(first, ast.Constant) else ""
            continue
        runs_later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        never_runs = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if lazy or not (runs_later or never_runs):
            yield from imports(node, lazy=lazy)


def _is_import_call(node: ast.Call) -> bool:
    return ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def wrong_directions(package: str, tree: ast.AST) -> set[str]:
    return set(imports(tree, lazy=True)) & (set(ALLOWED) | OTHERS) - ALLOWED[package] - {package}


def third_party(tree: ast.AST) -> set[str]:
    return set(imports(tree, lazy=False)) - set(sys.stdlib_module_names) - {"", "__future__", "refmodels"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_directions(file: Path) -> None:
    assert not wrong_directions(file.relative_to(ROOT).parts[0], parsed(file))


@pytest.mark.parametrize("file", sorted((ROOT / "refmodels").rglob("*.py")), ids=lambda file: file.name)
def test_refmodels_needs_only_torch(file: Path) -> None:
    allowed = {"torch"} | ({"typer", "rich"} if file.name in COMMAND_LINE else set())
    assert third_party(parsed(file)) <= allowed


@pytest.mark.parametrize("package", ALLOWED)
def test_each_package_says_what_it_may_import(package: str) -> None:
    docstring = ast.get_docstring(parsed(ROOT / package / "__init__.py")) or ""
    assert "import" in docstring
    assert len(docstring.splitlines()) <= 40


@pytest.mark.parametrize(
    ("package", "code", "wrong"),
    [
        ("refmodels", "import export", {"export"}),
        ("refmodels", "def f():\n    if 1:\n        from debug.cli import main", {"debug"}),
        ("trt_runtime", "async def f():\n    import torch, export.graph.lowering as g", {"export"}),
        ("trt_runtime", "import importlib\nx = importlib.import_module('export.graph.lowering')", {"export"}),
        ("export", "class A:\n    def f(self): return __import__('debug')", {"debug"}),
        ("debug", "import tests", {"tests"}),
        ("export", "import trt_runtime.bundle, refmodels\nfrom . import graph\nfrom export import graph", set()),
        ("debug", "import exporter, debugger\nexport = 'import export'", set()),
    ],
)
def test_the_check_of_directions_sees(package: str, code: str, wrong: set[str]) -> None:
    assert wrong_directions(package, ast.parse(code)) == wrong


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import numpy as np", {"numpy"}),
        ("try:\n    from safetensors.torch import load\nexcept ImportError:\n    pass", {"safetensors"}),
        ("class A:\n    import numpy", {"numpy"}),
        ("def f():\n    import numpy", set()),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy", set()),
        ("import torch.nn.functional as F, json\nfrom refmodels.spec import ModelSpec", {"torch"}),
    ],
)
def test_the_check_of_third_parties_sees(code: str, found: set[str]) -> None:
    assert third_party(ast.parse(code)) == found


def test_refmodels_imports_without_the_other_libraries() -> None:
    """Not only by reading: import it where everything but torch and its needs is out of reach."""
    code = (
        "import sys\n"
        "for name in ('safetensors', 'tokenizers', 'sentencepiece', 'tiktoken', 'huggingface_hub', 'onnx', 'typer'):\n"
        "    sys.modules[name] = None\n"
        "import refmodels, refmodels.text.tokenizer, refmodels.text.chat\n"
        "assert not {'export', 'trt_runtime', 'debug'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)

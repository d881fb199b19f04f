"""Packages and back ends import in one direction only, no imports form a circle, and refmodels needs only torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ALLOWED = {
    "refmodels": set(),
    "trt_runtime": {"refmodels"},
    "export": {"refmodels", "trt_runtime"},
    "debug": {"refmodels", "trt_runtime", "export"},
}
OTHERS = {"logitlock", "tests", "benchmarks", "notebooks"}
COMMAND_LINE = {"cli.py", "command.py", "__main__.py"}
FILES = [file for package in ALLOWED for file in sorted((ROOT / package).rglob("*.py"))]


def imports(tree: ast.AST, *, lazy: bool, typing: bool) -> Iterator[str]:
    """Dotted names of what is imported: of `from a.b import c`, a.b.c; a relative import keeps its leading dots.

    lazy: also the imports inside functions; typing: also those that only type checkers see.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (f"{node.module}." if node.module else "")
            yield from (start + alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and lazy and _is_import_call(node):
            first = node.args[0] if node.args else None
            yield str(first.value) if isinstance(first, ast.Constant) else ""
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            if typing:
                yield from imports(ast.Module(node.body, []), lazy=lazy, typing=typing)
            yield from imports(ast.Module(node.orelse, []), lazy=lazy, typing=typing)
            continue
        yield from imports(node, lazy=lazy, typing=typing)


def _is_import_call(node: ast.Call) -> bool:
    return ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")


def top(names: Iterator[str]) -> set[str]:
    """Top-level names; "" stands for a relative import, which stays inside its package."""
    return {name.split(".")[0] for name in names}


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def wrong_directions(package: str, tree: ast.AST) -> set[str]:
    return top(imports(tree, lazy=True, typing=True)) & (set(ALLOWED) | OTHERS) - ALLOWED[package] - {package}


def third_party(tree: ast.AST) -> set[str]:
    return top(imports(tree, lazy=False, typing=False)) - set(sys.stdlib_module_names) - {"", "__future__", "refmodels"}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def import_graph(sources: Mapping[str, ast.AST]) -> dict[str, set[str]]:
    """Which modules each module imports, at once or lazily: only `sources` ("a.b", "a.b.__init__") are counted.

    That Python runs the `__init__` of every package on the way is no arrow of its own: it is how a package can offer
    the names of its modules.  `from package import name` is one, to the package.
    """
    graph: dict[str, set[str]] = {}
    for module, tree in sources.items():
        graph[module] = set()
        # What an `__init__` imports for type checkers, `refmodels.lazy` imports when somebody asks for it.
        for name in imports(tree, lazy=True, typing=module.endswith(".__init__")):
            parts = absolute(name, module).split(".")
            prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
            known = next((found for p in prefixes for found in (p, f"{p}.__init__") if found in sources), None)
            graph[module] |= set() if known is None else {known}
    return graph


def absolute(name: str, module: str) -> str:
    """A name from `imports` of a module, without leading dots."""
    dots = len(name) - len(name.lstrip("."))
    return ".".join([*module.split(".")[:-dots], name[dots:]]) if dots else name


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """One circle of imports, its first module again at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


APART = {
    "trt_runtime.torch_gpu": {"trt_runtime.onnxruntime", "trt_runtime.tensorrt"},
    "trt_runtime.onnxruntime": {"trt_runtime.torch_gpu", "trt_runtime.tensorrt", "trt_runtime.kernels"},
    "trt_runtime.tensorrt": {"trt_runtime.torch_gpu", "trt_runtime.onnxruntime"},
    "trt_runtime.kernels": {"trt_runtime.torch_gpu", "trt_runtime.onnxruntime", "trt_runtime.tensorrt"},
    "export.graph": {"export.tensorrt"},
}
"""Folders and the folders that they do not import, not even lazily or for types."""


def into_other_rooms(module: str, tree: ast.AST) -> set[str]:
    folder = ".".join(module.split(".")[:2])
    names = [absolute(name, module) for name in imports(tree, lazy=True, typing=True)]
    return {other for other in APART.get(folder, set()) for name in names if f"{name}.".startswith(f"{other}.")}


SOURCES = {module_of(file): parsed(file) for file in FILES}


def test_no_circle() -> None:
    assert circle(import_graph(SOURCES)) == []


@pytest.mark.parametrize("module", [name for name in SOURCES if ".".join(name.split(".")[:2]) in APART])
def test_back_ends_do_not_know_each_other(module: str) -> None:
    assert not into_other_rooms(module, SOURCES[module])


def test_the_folders_are_there() -> None:
    for folder in (*APART, *set().union(*APART.values())):
        assert (ROOT / folder.replace(".", "/") / "__init__.py").is_file()


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
        ("debug", "from logitlock import diff", {"logitlock"}),
        ("export", "import trt_runtime.bundle, refmodels\nfrom . import graph\nfrom export import graph", set()),
        ("debug", "import exporter, debugger\nexport = 'import export'", set()),
    ],
)
def test_the_check_of_directions_sees(package: str, code: str, wrong: set[str]) -> None:
    assert wrong_directions(package, ast.parse(code)) == wrong


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        ("import p.b", "from p import a", ["p.a", "p.b"]),
        ("from p.b import thing", "def f():\n    from p.a import thing", ["p.a", "p.b"]),
        ("from . import b", "from .a import thing", ["p.a", "p.b"]),
        ("from ..p import b", "def f():\n    import importlib\n    importlib.import_module('p.a')", ["p.a", "p.b"]),
        ("import p.a", "", ["p.a"]),
        # By way of the package, which imports p.a.
        ("from p import thing", "", ["p.__init__", "p.a"]),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import p.b", "import p.a", ["p.a", "p.b"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.b", "import p.a", []),
        ("import p.b, p.c", "import torch, p.unknown_name_of.other", []),
    ],
)
def test_the_check_of_circles_sees(a: str, b: str, found: list[str]) -> None:
    lazy = "if TYPE_CHECKING:\n    from p.a import thing as thing"
    sources = {"p.__init__": lazy if "p.__init__" in found else "", "p.a": a, "p.b": b, "p.c": ""}
    seen = circle(import_graph({module: ast.parse(code) for module, code in sources.items()}))
    assert sorted(set(seen)) == found and (not found or seen[0] == seen[-1])


@pytest.mark.parametrize(
    ("module", "code", "wrong"),
    [
        ("trt_runtime.torch_gpu.engine", "import trt_runtime.tensorrt.api", {"trt_runtime.tensorrt"}),
        ("trt_runtime.onnxruntime.engine", "from trt_runtime import kernels", {"trt_runtime.kernels"}),
        ("trt_runtime.tensorrt.plugins.a", "def f():\n    import trt_runtime.torch_gpu", {"trt_runtime.torch_gpu"}),
        (
            "trt_runtime.kernels.linear",
            "if TYPE_CHECKING:\n    from trt_runtime.torch_gpu import linear",
            {"trt_runtime.torch_gpu"},
        ),
        ("trt_runtime.tensorrt.engine", "from ..onnxruntime import engine", {"trt_runtime.onnxruntime"}),
        ("export.graph.lowering", "__import__('export.tensorrt.build')", {"export.tensorrt"}),
        ("trt_runtime.torch_gpu.engine", "import trt_runtime.kernels.linear, trt_runtime.engine", set()),
        ("trt_runtime.onnxruntime.engine", "import onnxruntime, trt_runtime.bundle", set()),
        ("trt_runtime.tensorrt.engine", "import tensorrt, trt_runtime.tensorrt.api, trt_runtime.tensorrt_like", set()),
        ("export.bundle", "import export.tensorrt.build", set()),
    ],
)
def test_the_check_of_folders_sees(module: str, code: str, wrong: set[str]) -> None:
    assert into_other_rooms(module, ast.parse(code)) == wrong


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


@pytest.mark.slow
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

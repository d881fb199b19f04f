"""Each package has a handful of public names, imported when they are asked for; docs and examples use no others."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from debug.command import VERBS
from refmodels.lazy import declared, public_names
from tests.support.code_blocks import Block, blocks, blocks_in
from tests.support.paths import ROOT

PACKAGES = ("refmodels", "trt_runtime", "export", "debug")


def named(package: str) -> dict[str, str]:
    return declared(ROOT / package / "__init__.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package: str) -> None:
    module = import_module(package)
    names = named(package)
    assert module.__all__ == sorted(names) == [name for name in dir(module) if not name.startswith("__")]
    assert {"__doc__", "__file__"} <= set(dir(module))
    for name, home in names.items():
        assert home.startswith(f"{package}."), f"{name} is another package's"
        assert getattr(module, name) is getattr(import_module(home), name)


def test_no_name_is_public_twice() -> None:
    names = [name for package in PACKAGES for name in named(package)]
    assert sorted(names) == sorted(set(names))


def test_logitlock_has_the_names_of_all_packages_and_nothing_else() -> None:
    module = import_module("logitlock")
    assert module.__all__ == sorted(name for package in PACKAGES for name in named(package))
    assert module.__all__ == [name for name in dir(module) if not name.startswith("__")]
    for package in PACKAGES:
        for name in named(package):
            assert getattr(module, name) is getattr(import_module(package), name)
    body = ast.parse((ROOT / "logitlock.py").read_text(encoding="utf-8")).body
    assert [type(node).__name__ for node in body] == ["Expr", "ImportFrom", "ImportFrom", "ImportFrom", "If"]


def submodules(package: str) -> set[str]:
    return {path.stem for path in (ROOT / package).iterdir() if path.suffix in ("", ".py")}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_is_that_of_a_module(package: str) -> None:
    """Importing the module would put it in the place of the name."""
    assert not set(named(package)) & submodules(package)


def test_importing_the_packages_imports_nothing_else() -> None:
    names = ("logitlock", *PACKAGES)
    code = (
        f"import sys; before = set(sys.modules); import {', '.join(names)}\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted(names))


def module_of(source: str, tmp_path: Path) -> ModuleType:
    file = tmp_path / "sample.py"
    file.write_text(source)
    module = ModuleType("sample")
    module.__file__ = str(file)
    namespace: dict[str, Any] = vars(module)
    namespace["__all__"], namespace["__getattr__"], namespace["__dir__"] = public_names(namespace)
    return module


def test_a_name_is_imported_when_it_is_asked_for(tmp_path: Path) -> None:
    sample = module_of(
        "from typing import TYPE_CHECKING\nimport json\nif TYPE_CHECKING:\n"
        "    from json.decoder import JSONDecoder as JSONDecoder\n    from no.such_module import absent as absent\n"
        "if 1:\n    from os import path\n",
        tmp_path,
    )
    assert sample.__all__ == ["JSONDecoder", "absent"] and set(sample.__all__) <= set(dir(sample))
    assert "JSONDecoder" not in vars(sample)
    assert sample.JSONDecoder is import_module("json.decoder").JSONDecoder and "JSONDecoder" in vars(sample)
    with pytest.raises(ModuleNotFoundError, match="no"):
        sample.absent  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'sample' has no attribute 'path'"):
        sample.path  # noqa: B018


# Command lines


def taken_from_command_lines(tree: ast.AST) -> list[str]:
    """The modules `cli` of our packages that code imports, and what it imports from them."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if re.match(rf"({'|'.join(PACKAGES)})\.(\w+\.)*cli\b", name)]


@pytest.mark.parametrize(
    "folder", [*PACKAGES, "docs", "examples", "notebooks", "benchmarks", pytest.param("tests", marks=pytest.mark.slow)]
)
def test_command_lines_have_no_library_functions(folder: str) -> None:
    """Only `python -m` imports a module of verbs; `logitlock` does so by VERBS, and tests of verbs call the verbs."""
    verbs = {f"{verb.module}.{verb.function}" for verb in VERBS.values()}
    for path in (ROOT / folder).rglob("*.py"):
        found = set(taken_from_command_lines(ast.parse(path.read_text(encoding="utf-8"))))
        whole = {name for name in found if name.endswith(".cli")}
        allowed = verbs | whole if folder == "tests" else verbs if path.name == "__main__.py" else set()
        assert found <= allowed, path


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (
            "def f():\n    from trt_runtime.cli import prompt_ids, generate",
            ["trt_runtime.cli.prompt_ids", "trt_runtime.cli.generate"],
        ),
        ("import debug.evaluate.cli as c", ["debug.evaluate.cli"]),
        ("from refmodels import cli, load", ["refmodels.cli"]),
        ("from cli import page\nimport exporter.cli, debug.clip\nfrom . import cli", []),
    ],
)
def test_the_check_of_command_lines_sees(code: str, found: list[str]) -> None:
    assert taken_from_command_lines(ast.parse(code)) == found


# What is written for users


PUBLIC = {package: set(named(package)) for package in PACKAGES}
PUBLIC["logitlock"] = set().union(*PUBLIC.values())
_IMPORT = re.compile(rf"\b(?:from|import) (?:{'|'.join(PACKAGES)})\.\w+")


def hidden(tree: ast.AST) -> list[str]:
    """What code takes from our packages that is not public: modules, and names that a package does not export."""
    found: list[str] = []
    packages: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                packages |= {alias.asname or alias.name: alias.name for alias in aliases if alias.name in PUBLIC}
                found += [a.name for a in aliases if a.name not in PUBLIC and a.name.split(".")[0] in PUBLIC]
            case ast.ImportFrom(module=str(module), names=aliases, level=0) if module.split(".")[0] in PUBLIC:
                public = PUBLIC.get(module, set())
                found += [f"{module}.{alias.name}" for alias in aliases if alias.name not in public]
            case ast.Call(func=function, args=[ast.Constant(value=str(module)), *_]) if (
                ast.unparse(function).endswith(("import_module", "__import__")) and module.split(".")[0] in PUBLIC
            ):
                found.append(module)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in packages:
                if attribute not in PUBLIC[packages[name]] and not attribute.startswith("__"):
                    found.append(f"{packages[name]}.{attribute}")
    return found


def private(tree: ast.AST) -> list[str]:
    """Names with a leading underscore that code takes from elsewhere."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(names=aliases):
                found += [alias.name for alias in aliases]
            case ast.Attribute(value=value, attr=attribute) if ast.unparse(value) not in ("self", "cls"):
                found.append(attribute)
    return [name for name in found if re.match("_(?!_)", name)]


def told(path: Path) -> Iterator[Block]:
    """All code in a file: a page's blocks, a notebook's cells and the blocks in its text, a script."""
    if path.suffix == ".py":
        yield Block(path.name, 1, "python", path.read_text(encoding="utf-8"), None, "")
    elif path.suffix == ".md":
        yield from blocks(path)
    else:
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            where, source = f"{path.name}, cell {number}", "".join(cell["source"])
            if cell["cell_type"] == "code":
                yield Block(where, 1, "python", source, None, "")
            else:
                yield from blocks_in(source, where)


FOR_USERS = [
    ROOT / "README.md",
    *(path for folder in ("docs", "examples", "notebooks") for path in sorted((ROOT / folder).glob("*.*"))),
]
FOR_USERS = [path for path in FOR_USERS if path.suffix in (".md", ".py", ".ipynb")]


@pytest.mark.parametrize("path", FOR_USERS, ids=lambda path: path.name)
def test_users_are_shown_public_names_only(path: Path) -> None:
    for block in told(path):
        if block.kind == "python":
            tree = ast.parse(block.code)
            assert not hidden(tree) + private(tree), block
        elif block.kind != "diff":  # a diff shows our own source
            assert not _IMPORT.findall(block.code), block


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "hooks").glob("*.py")), ids=lambda path: path.name)
def test_the_hooks_of_the_site_use_nothing_private(path: Path) -> None:
    assert not private(ast.parse(path.read_text(encoding="utf-8")))


def test_all_that_users_are_shown_is_read() -> None:
    read = [block for path in FOR_USERS for block in told(path) if block.kind == "python"]
    assert {Path(block.page.split(",")[0]).suffix for block in read} == {".md", ".py", ".ipynb"}
    assert len([block for block in read if ".ipynb" in block.page]) > 40


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from refmodels.checkpoints.load import load", ["refmodels.checkpoints.load.load"]),
        ("import trt_runtime.bundle", ["trt_runtime.bundle"]),
        ("def f():\n    from export import graph, export_model", ["export.graph"]),
        ("import refmodels as r\nr.load('qwen'), r.taps.tap_names", ["refmodels.taps"]),
        ("import refmodels\nrefmodels.nonsense()", ["refmodels.nonsense"]),
        ("import importlib\nimportlib.import_module('debug.sides')", ["debug.sides"]),
        ("from debug import *", ["debug.*"]),
        ("from debug import diff\nimport refmodels, torch.nn\nrefmodels.load; refmodels.__file__; diff.taps", []),
        ("import exporter.graph, debugger\nfrom . import debug\nexport.graph", []),
    ],
)
def test_the_check_sees_what_is_not_public(code: str, found: list[str]) -> None:
    assert hidden(ast.parse(code)) == found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from helpers import _secret, open_", ["_secret"]),
        ("inspect.getsource(baichuan._spec)", ["_spec"]),
        ("self._mine, cls._mine, x.__class__, x.y_", []),
    ],
)
def test_the_check_sees_what_is_private(code: str, found: list[str]) -> None:
    assert private(ast.parse(code)) == found

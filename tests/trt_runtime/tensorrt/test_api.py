"""Every name of TensorRT's Python API that we use exists in both packages, and our plugins work with both.

Full TensorRT cannot be installed here; its bindings can be read without its libraries (`full_tensorrt.py`).
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refmodels.dtypes import DTYPE_TABLE
from tests.support.full_tensorrt import Unavailable, environment, install
from tests.support.once import made_once
from tests.support.paths import ROOT

PLUGIN_TESTS = Path(__file__).with_name("plugins")
# What runs on both packages.
FILES = [file for folder in (ROOT / "trt_runtime", ROOT / "export", PLUGIN_TESTS) for file in folder.rglob("*.py")]
FILES += Path(__file__).parent.glob("*_gpu.py")
# The oldest that we support, and the newest.
FULL_VERSIONS = {"oldest": "==11.0.*", "newest": ">=11.0"}
RTX_ONLY = {"ComputeCapability", "is_stream_capturable", "num_compute_capabilities", "set_compute_capability"}
"""Names used of TensorRT-RTX only; each use is under IS_RTX."""
FULL_ONLY = {"add_plugin_v3"}
"""Names used of full TensorRT only: --backend torch-tensorrt refuses plugins on TensorRT-RTX."""
MODULES = ("tensorrt", "tensorrt_rtx")

_DUMP = """
import inspect, json, sys, importlib
package = importlib.import_module(sys.argv[1])
members = {"": sorted(dir(package))}
def visit(prefix, owner):
    for name in dir(owner):
        value = getattr(owner, name)
        if inspect.isclass(value) and not name.startswith("_"):
            members[prefix + name] = sorted(dir(value))
            if prefix == "":
                visit(name + ".", value)
visit("", package)
print(json.dumps({"version": package.__version__, "members": members}))
"""


def dump(package: str, env: dict[str, str] | None = None) -> dict[str, list[str]]:
    """Members of every class of a package, by class; "" has those of the package itself."""
    done = subprocess.run([sys.executable, "-c", _DUMP, package], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    members: dict[str, list[str]] = json.loads(done.stdout)["members"]
    assert len(members) > 100
    return members


@pytest.fixture(scope="module", params=FULL_VERSIONS)
def full(request: pytest.FixtureRequest) -> Path:
    directory = ROOT / ".venv-tensorrt-bindings" / request.param
    try:
        return made_once(directory, lambda draft: install(draft, FULL_VERSIONS[request.param]))
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def rtx() -> dict[str, list[str]]:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    return dump("tensorrt_rtx")


def chains(tree: ast.AST) -> Iterator[str]:
    """'X.Y' for every `trt.X.Y` (longest chains only)."""
    for node in ast.iter_child_nodes(tree):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in ("trt", *MODULES):
            yield ".".join(reversed(parts))
        else:
            yield from chains(node)


def attributes(tree: ast.AST) -> set[str]:
    """Every attribute name of a file, and every string that may be one (`hasattr`)."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return names | {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def uses_tensorrt(tree: ast.AST) -> bool:
    imported = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    return any(alias.name == "trt" for node in imported for alias in node.names) or any(chains(tree))


def missing(chain: str, members: dict[str, list[str]]) -> bool:
    """Whether `trt.<chain>` does not exist, as far as classes go: what a value has is not known."""
    owner = ""
    for name in chain.split("."):
        if name not in members[owner]:
            return True
        owner = f"{owner}.{name}" if owner else name
        if owner not in members:
            return False
    return False


def parsed() -> dict[Path, ast.Module]:
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
    return {file: tree for file, tree in trees.items() if uses_tensorrt(tree)}


def check(members: dict[str, list[str]], allowed: set[str]) -> list[str]:
    """'file: trt.X.Y' for every use that the package does not have."""
    return [
        f"{file.relative_to(ROOT)}: trt.{chain}"
        for file, tree in parsed().items()
        for chain in sorted(set(chains(tree)))
        if missing(chain, members) and chain.split(".")[0] not in allowed
    ]


def members_known(members: dict[str, list[str]]) -> set[str]:
    # The package's own name is a module in it.
    return {name for names in members.values() for name in names} - set(MODULES)


@pytest.mark.slow
def test_every_name_exists_in_tensorrt_rtx(rtx: dict[str, list[str]]) -> None:
    assert check(rtx, set()) == []
    assert len({chain for tree in parsed().values() for chain in chains(tree)}) > 30


@pytest.mark.slow
def test_every_name_exists_in_full_tensorrt(full: Path) -> None:
    assert check(dump("tensorrt", environment(full)), RTX_ONLY) == []


@pytest.mark.slow
def test_the_table_of_dtypes_names_members_of_both(full: Path, rtx: dict[str, list[str]]) -> None:
    named = {dtype.tensorrt for dtype in DTYPE_TABLE.values()} - {None}
    assert named <= set(rtx["DataType"]) & set(dump("tensorrt", environment(full))["DataType"])


@pytest.mark.slow
def test_methods_of_one_package_only_are_the_listed_ones(full: Path, rtx: dict[str, list[str]]) -> None:
    """Attributes of objects have no `trt.` in front: what exists in one package only is found by its name."""
    in_full, in_rtx = members_known(dump("tensorrt", environment(full))), members_known(rtx)
    used = set().union(*(attributes(tree) for tree in parsed().values()))
    assert used & (in_rtx - in_full) == RTX_ONLY
    assert used & (in_full - in_rtx) == FULL_ONLY


@pytest.mark.slow
def test_plugins_work_with_full_tensorrts_bindings(full: Path) -> None:
    """All tests of the plugins that need no builder."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PLUGIN_TESTS)]
    done = subprocess.run(command, env=environment(full), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    counts = dict(reversed(part.split()[:2]) for part in done.stdout.splitlines()[-1].split(", "))
    assert int(counts["passed"]) >= 15, done.stdout


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("x = trt.Builder(LOGGER)", {"Builder"}),
        ("a = trt.DataType.HALF.name if trt.nothing else 1", {"DataType.HALF.name", "nothing"}),
        ("class A(trt.IPluginV3): x: int = other.trt.no", {"IPluginV3"}),
        (
            "import tensorrt_rtx\ntensorrt_rtx.Runtime(f(trt.ILogger.Severity.ERROR))",
            {"Runtime", "ILogger.Severity.ERROR"},
        ),
    ],
)
def test_the_check_sees_uses(code: str, found: set[str]) -> None:
    assert set(chains(ast.parse(code))) == found


def test_the_check_sees_what_is_missing(monkeypatch: pytest.MonkeyPatch, rtx: dict[str, list[str]]) -> None:
    assert not missing("ILogger.Severity.ERROR", rtx) and not missing("DataType.HALF.name", rtx)
    for chain in ("NoSuch", "ILogger.NoSuch", "ILogger.Severity.NOSUCH", "BuilderFlag.FP16"):
        assert missing(chain, rtx), chain
    tree: Any = ast.parse("trt.OnnxParser; trt.BuilderFlag.FP16")
    monkeypatch.setattr(sys.modules[__name__], "parsed", lambda: {ROOT / "export" / "x.py": tree})
    assert check(rtx, set()) == ["export/x.py: trt.BuilderFlag.FP16"]

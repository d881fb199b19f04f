"""The wheel: it holds the packages as a whole, logitlock.py and nothing else, and works where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("refmodels", "trt_runtime", "export", "debug")

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves files beside what it builds, and takes up those of an earlier build."""
    directory = tmp_path_factory.mktemp("wheel")
    left_out = (".*", "__pycache__", "build", "dist", "engines", "*.egg-info", "goldens*")
    source = shutil.copytree(ROOT, directory / "source", ignore=shutil.ignore_patterns(*left_out))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", directory)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=directory)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; its dependencies are those of this environment, which comes after it."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    options = ("--no-deps", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_holds_exactly_what_it_should(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    expected.add("logitlock.py")
    assert names - metadata == expected
    assert {name.split("/", 1)[1] for name in metadata} >= {"METADATA", "RECORD", "entry_points.txt"}
    suffixes = {Path(name).suffix for name in expected}
    assert suffixes == {".py", ".typed", ".css", ".html", ".js", ".json", ".safetensors", ".cu", ".cuh"}
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected


def test_runs_where_it_is_installed(python: Path, tmp_path: Path) -> None:
    modules = ", ".join(("logitlock", *PACKAGES))
    printed = run(python, "-c", f"import {modules}; print([m.__file__ for m in ({modules})])", cwd=tmp_path)
    assert printed.count(str(python.parents[1])) == 1 + len(PACKAGES), "not the wheel is imported"
    logitlock = python.with_name("logitlock")
    assert json.loads(run(logitlock, "models", "--json", cwd=tmp_path))["families"]
    run(logitlock, "export", "--model", "qwen", "--precision", "fp32", "--backend", "onnxruntime", cwd=tmp_path)
    bundle = ("--bundle", "engines/qwen-fp32")
    assert "乔" in run(logitlock, "generate", *bundle, "--prompt", "世界上第二高的山峰是哪座？", cwd=tmp_path)
    diff = run(logitlock, "diff", *bundle, "--steps", "1", "--html", "report.html", "--json", cwd=tmp_path)
    assert json.loads(diff)["verdict"] == "aligned" and (tmp_path / "report.html").is_file()


def test_the_command_runs_among_files_of_the_same_names(python: Path, tmp_path: Path) -> None:
    for package in PACKAGES[1:]:
        (tmp_path / f"{package}.py").write_text("raise AssertionError('a file of the user runs')\n")
    command = (python.with_name("logitlock"), "models", "--json")
    for path in ("", ".", str(tmp_path)):
        assert json.loads(run(*command, cwd=tmp_path, PYTHONPATH=path))["families"]


def test_a_type_checker_sees_the_types(python: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from debug import DiffResult, diff\nfrom refmodels import ModelSource, resolve\n"
        "found: ModelSource = resolve('qwen')\nwrong: int = resolve('qwen')\nresult: DiffResult = diff('bundle')\n"
        "from refmodels import no_such_name\n"
    )
    # torch's own sources are of no interest here, and reading them takes half a minute.
    (tmp_path / "mypy.ini").write_text("[mypy-torch.*,onnx.*,onnx_ir.*,transformers.*]\nfollow_imports = skip\n")
    options = ("--strict", "--python-executable", python, "--cache-dir", tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "mine.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        'mine.py:4: error: Incompatible types in assignment (expression has type "ModelSource", variable has type '
        '"int")  [assignment]',
        'mine.py:6: error: Module "refmodels" has no attribute "no_such_name"  [attr-defined]',
        "Found 2 errors in 1 file (checked 1 source file)",
    ]

"""A user's own debug.py or export.py does not run in the place of our package: a sentence says so; `logitlock` runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from debug.command import VERBS
from refmodels.errors import LogitLockError
from refmodels.shadowing import PACKAGES, check_ours
from tests.support.marks import quick_first
from tests.support.paths import ROOT

RUNS = "print('a file of the user runs')\n"
"""The content of the user's file."""


def as_file(directory: Path, package: str) -> Path:
    file = directory / f"{package}.py"
    file.write_text(RUNS)
    return file


def as_package(directory: Path, package: str) -> Path:
    (directory / package).mkdir()
    file = directory / package / "__init__.py"
    file.write_text(RUNS)
    return file


def python(*arguments: str, cwd: Path, path: tuple[Path, ...] = (ROOT,)) -> subprocess.CompletedProcess[str]:
    """Python in a directory, with our packages where an installation would have them: after the script's directory."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def sentence(file: Path, package: str) -> str:
    return (
        f"{file} hides LogitLock's package {package} ({ROOT / package}): rename it or run from another directory; "
        "the command `logitlock` works from any directory"
    )


@pytest.mark.parametrize("make", quick_first([as_file, as_package]))
@pytest.mark.parametrize("verb", quick_first(["diff", "bisect", "eval"]))
def test_a_module_run_as_a_command(make: Callable[[Path, str], Path], verb: str, tmp_path: Path) -> None:
    file = make(tmp_path, "export")
    done = python("-m", "debug", verb, "engines/qwen-fp16", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {sentence(file, 'export')}\n")


@pytest.mark.parametrize(
    "script",
    ["from debug import diff", "import logitlock\nlogitlock.diff", "from logitlock import export_model"],
)
def test_a_script(script: str, tmp_path: Path) -> None:
    file = as_file(tmp_path, "export")
    (tmp_path / "mine.py").write_text(script)
    done = python("mine.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == f"refmodels.errors.LogitLockError: {sentence(file, 'export')}"


def test_a_script_that_is_itself_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "debug.py").write_text("from logitlock import diff")
    done = python("debug.py", cwd=tmp_path)
    assert sentence(tmp_path / "debug.py", "debug") in done.stderr


@pytest.mark.parametrize(
    ("hidden", "arguments"),
    [
        (("export", "debug"), ("-m", "refmodels", "--help")),
        (("export", "debug"), ("-m", "trt_runtime", "--help")),
        pytest.param(("debug",), ("-m", "export", "--help"), marks=pytest.mark.slow),
        (("export",), ("-m", "debug", "--help")),
        pytest.param(
            ("export", "debug"),
            ("-c", "from logitlock import read_bundle, toy_path"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_does_not_need_the_hidden_package_works(
    hidden: tuple[str, ...], arguments: tuple[str, ...], tmp_path: Path
) -> None:
    for package in hidden:
        as_file(tmp_path, package)
    done = python(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a file of the user runs" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("make", [as_file, as_package])
def test_the_command_always_works(make: Callable[[Path, str], Path], tmp_path: Path) -> None:
    """A console script has no working directory on its path, but PYTHONPATH may put it before the installation."""
    for package in PACKAGES[1:]:
        make(tmp_path, package)
    script = "import sys; sys.argv[0] = 'logitlock'; from refmodels.shadowing import main; main()"
    done = python("-c", script, "--help", cwd=tmp_path, path=(tmp_path, ROOT))
    assert done.returncode == 0 and all(f" {verb} " in done.stdout for verb in VERBS), done
    assert "a file of the user runs" not in done.stdout
    done = python("-c", script, "bisect", "--model", "no-model", cwd=tmp_path, path=(tmp_path, ROOT))
    assert (done.returncode, done.stdout) == (2, "") and "no-model" in done.stderr, done


def test_a_directory_without_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes before a package that is installed with a finder of its own, as editable ones are."""
    (tmp_path / "export").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "export", raising=False)
    with pytest.raises(LogitLockError, match="export hides LogitLock's package export"):
        check_ours("export.bundle")


def test_our_own_pass() -> None:
    for module in (*PACKAGES, "debug.sides", "json.decoder"):
        check_ours(module)


def test_the_command_is_installed() -> None:
    assert 'logitlock = "refmodels.shadowing:main"' in (ROOT / "pyproject.toml").read_text()

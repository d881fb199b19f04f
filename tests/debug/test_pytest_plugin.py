"""The pytest plugin in another project: an aligned executor passes, a wrong one fails with verdict and culprits."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.goldens import GOLDENS
from tests.support.paths import ROOT

CASE = GOLDENS / "qwen_b1"
TESTS = f"""
def test_right(assert_aligned):
    result = assert_aligned("reference:fp16", model={str(CASE)!r}, steps=1)
    assert result.verdict == "aligned"

def test_wrong(assert_aligned):
    assert_aligned({str(CASE)!r} + ":fp32", model="wrong", steps=1)
"""


@pytest.mark.slow
def test_assert_aligned(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    shutil.copyfile(CASE / "config.json", wrong / "config.json")
    tensors = load_file(CASE / "model.safetensors")
    tensors["transformer.h.1.attn.c_proj.weight"] *= 1.5
    save_file(tensors, wrong / "model.safetensors")
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["debug.pytest_plugin"]\n', encoding="utf-8")
    (tmp_path / "test_engine.py").write_text(TESTS.replace('"wrong"', repr(str(wrong))), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", "--junitxml=junit.xml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "DIVERGED: " in done.stdout and "noise floors" in done.stdout and "Traceback" not in done.stdout
    # pytest repeats a message in its summary, which it does not cut where CI is set.
    (file,) = set(re.findall(r"whole result: (.*)\)", done.stdout))
    assert json.loads(Path(file).read_text(encoding="utf-8"))["verdict"] == "diverged"
    assert "ALIGNED" in (tmp_path / "junit.xml").read_text(encoding="utf-8")

"""benchmarks/RESULTS.md has the numbers of the result files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


def check(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, directory / "results_page.py", "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    done = check(BENCHMARKS)
    assert done.returncode == 0, done.stderr
    copy = shutil.copytree(BENCHMARKS, tmp_path / "benchmarks")
    results = copy / "results" / "diff_cost.json"
    changed = json.loads(results.read_text())
    changed["diff"]["taps"] += 1
    results.chmod(0o644)
    results.write_text(json.dumps(changed))
    assert check(copy).returncode == 1

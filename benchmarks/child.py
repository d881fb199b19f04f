"""Measuring memory: work in a process of its own, and how much that process had at its peak."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def peak_rss() -> int:
    """Bytes of this process's memory at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_again(script: str, *arguments: str) -> str:
    """Run a script in a process of its own and return what it printed.

    The parent must stay small, because a child inherits its peak.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout

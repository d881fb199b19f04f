"""Measuring memory and time: work in a process of its own, the peak of its memory, prefill and decode."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Run = Callable[[list[int], int], list[int]]
"""Greedy generation: the ids of a prompt and the number of new tokens in, new tokens out."""


def peak_rss() -> int:
    """Bytes of this process's memory at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(run: Run, first: list[int], second: list[int], steps: int) -> dict[str, Any]:
    """Seconds of a prefill, which is a run of `first` that makes one token, and of `steps` decode steps: a run of
    `second` less that; and the tokens of the latter."""
    start = time.perf_counter()
    run(first, 1)
    middle = time.perf_counter()
    tokens = run(second, steps + 1)
    prefill = middle - start
    return {"prefill_s": prefill, "decode_s": time.perf_counter() - middle - prefill, "tokens": tokens}


def versions() -> dict[str, str]:
    """Versions of what both sides of a CPU benchmark run on."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxruntime")}


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

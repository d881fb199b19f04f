"""Where kernels run in this process: on a GPU, on the CPU by Triton's interpreter, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.support.paths import ROOT

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"
HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)


def needs_gpu(function: Any) -> Any:
    """Run this test on a CUDA GPU only."""
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")(function))


def needs_hopper(function: Any) -> Any:
    """Run this test on a GPU of compute capability 9.0 only."""
    reason = "needs a GPU of compute capability 9.0"
    return pytest.mark.gpu(pytest.mark.skipif(not HOPPER, reason=reason)(function))


def needs_kernels(function: Any) -> Any:
    """Run this test on a CUDA GPU, or by Triton's interpreter in a process that has it (`interpreted`)."""
    reason = "needs a CUDA GPU or TRITON_INTERPRET=1"
    return pytest.mark.gpu(pytest.mark.skipif(not CUDA and not INTERPRETED, reason=reason)(function))


def interpreted(file: str, tests: str) -> str:
    """Run the tests of a file that `-k` selects, by Triton's interpreter in a process of its own.

    Returns: what pytest prints.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", tests, file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout

"""Shared fixtures: golden cases, one thread (2-core machines share it with other test processes)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

GOLDENS = Path(__file__).parent / "goldens"
CASES = sorted(p.name for p in GOLDENS.iterdir() if (p / "config.json").is_file()) if GOLDENS.is_dir() else []


@pytest.fixture(autouse=True)
def _no_grad_one_thread() -> object:
    torch.set_num_threads(1)
    with torch.no_grad():
        yield

"""Expensive fixtures are made once, even if several test processes need them at the same time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(directory: Path, make: Callable[[Path], None]) -> Path:
    """A directory that `make` fills.  The first caller makes it, whole or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not directory.is_dir():
            with tempfile.TemporaryDirectory(dir=directory.parent, ignore_cleanup_errors=True) as parent:
                draft = Path(parent) / directory.name
                draft.mkdir()
                make(draft)
                draft.rename(directory)
    return directory


def shared_root(factory: pytest.TempPathFactory) -> Path:
    """A temporary directory that is the same for all workers of a test run."""
    root = factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

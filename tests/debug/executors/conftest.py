"""ONNX files that another exporter made, once for all tests of executors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import foreign


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a case once for each set of options."""
    root = tmp_path_factory.mktemp("onnx")

    def make(case: str, **options: Any) -> Path:
        path = root / f"{case}{''.join(f'-{k}{v}' for k, v in options.items())}.onnx"
        return path if path.exists() else foreign.export(foreign.huggingface(case), path, **options)

    return make

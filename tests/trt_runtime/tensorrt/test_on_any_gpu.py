"""On any GPU with TensorRT: build the toys' engines, generate, compare every tap, time them, and write one page.

    python -m pytest -m gpu tests/trt_runtime/tensorrt/test_on_any_gpu.py

The page goes to the file that LOGITLOCK_REPORT names, or tensorrt_report.md here; its path is printed.  Its parts run
without a GPU in test_engine.py, where a plan is played by ONNX Runtime.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from refmodels.errors import LogitLockError
from refmodels.toys import TOYS
from tests.support.tensorrt_report import Row, check_engine, page
from trt_runtime.bundle import AttentionMode, EngineInfo, Precision


def unusable() -> str | None:
    """Why no engine can run here."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    try:
        from trt_runtime.tensorrt.api import IS_RTX, package_version, trt
        from trt_runtime.tensorrt.engine import check_device

        built = EngineInfo(backend="tensorrt", package=package_version(), max_batch=1, max_input=1, max_seq=1)
        members = trt.ComputeCapability.__members__ if IS_RTX else None
        check_device(built, torch.cuda.get_device_capability(), members)
    except LogitLockError as error:
        return str(error)
    return None


_REASON = unusable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=_REASON or "")]

ATTENTION: tuple[AttentionMode, ...] = ("plugin", "native", "decomposed")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    """Rows of the page, written when the last test is over."""
    from trt_runtime.tensorrt.api import package_version

    found: list[Row] = []
    yield found
    path = Path(os.environ.get("LOGITLOCK_REPORT", "tensorrt_report.md")).absolute()
    machine = f"{torch.cuda.get_device_name()}, {package_version()}, PyTorch {torch.__version__}."
    path.write_text(page(found, machine=machine), encoding="utf-8")
    print(f"\nreport: {path}")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", TOYS)
def test_an_engine_is_the_reference(
    family: str, attention: AttentionMode, precision: Precision, rows: list[Row], tmp_path: Path
) -> None:
    row = check_engine(family, precision, attention, tmp_path / "bundle")
    rows.append(row)
    assert row.verdict == "aligned" and row.margin_flips == 0
    assert row.captured, "decode steps ran without a CUDA graph"
    if precision == "fp32":
        assert row.tokens == row.of

"""The TensorRT engine on any CUDA GPU, also one that TensorRT does not serve: its stream, buffers, CUDA graphs and
plugins with their compiled kernels are real, only the plan is played by torch (`torch_plan.py`).

How to run it where TensorRT cannot be installed: see test_plugins_gpu.py; logitlock's metadata (logitlock.egg-info)
must be on the path as well.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import refmodels
from export.bundle import export_model
from refmodels.errors import LogitLockError
from tests.support.gpu import needs_gpu
from tests.support.tensorrt_report import measure
from trt_runtime.bundle import EngineInfo, Precision, Profile, read_bundle
from trt_runtime.tensorrt import engine as tensorrt_engine

try:
    from tests.support.fake_plan import FakeStream, add_engine
    from tests.support.torch_plan import TorchPlan
    from trt_runtime.kernels.compiled import compile_kernels
    from trt_runtime.tensorrt.api import package_version
except (LogitLockError, ImportError) as error:
    pytest.skip(str(error), allow_module_level=True)

MAX_BATCH, MAX_INPUT, MAX_SEQ = 4, 64, 256
PROFILES = [
    Profile(name="prefill", batch=[1, MAX_BATCH], tokens=[1, MAX_INPUT], capacity=[MAX_SEQ, MAX_SEQ]),
    Profile(name="decode", batch=[1, MAX_BATCH], tokens=[1, 1], capacity=[MAX_SEQ, MAX_SEQ]),
]
CASES: tuple[tuple[str, Precision], ...] = (
    ("qwen", "fp16"),
    ("chatglm2", "bf16"),
    ("baichuan", "fp32"),
    ("gpt", "fp32"),
)


def check(family: str, precision: Precision, folder: Path, kernels: bytes | None) -> None:
    export_model(family, precision=precision, output=folder, max_seq=MAX_SEQ, backend="onnxruntime")
    built = EngineInfo(
        backend="tensorrt",
        package=package_version(),
        max_batch=MAX_BATCH,
        max_input=MAX_INPUT,
        max_seq=MAX_SEQ,
        taps_plan=True,
    )
    add_engine(folder, built, PROFILES, kernels=kernels)
    row = measure(family, folder, seconds=0.0)
    print(row)
    assert row.verdict == "aligned" and row.margin_flips == 0
    assert row.captured
    if precision == "fp32":
        assert row.tokens == row.of > 3


def load(directory: Path, name: str, built: EngineInfo) -> TorchPlan:
    return TorchPlan(read_bundle(directory), tensorrt_engine.current_device(), taps="taps" in name)


@needs_gpu
@pytest.mark.parametrize(("family", "precision"), CASES)
def test_engines_on_a_gpu(family: str, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_engine, "load_plan", load)
    major, minor = torch.cuda.get_device_capability()
    spec = refmodels.resolve(family).spec
    check(family, precision, tmp_path / "bundle", compile_kernels(spec, precision, capabilities=[10 * major + minor]))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "precision"), [("qwen", "fp32"), ("gpt", "fp32")])
def test_the_same_on_the_cpu_without_kernels(
    family: str, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU at all")
    monkeypatch.setattr(tensorrt_engine, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(tensorrt_engine, "CudaStream", FakeStream)
    monkeypatch.setattr(tensorrt_engine, "load_plan", load)
    check(family, precision, tmp_path / "bundle", None)

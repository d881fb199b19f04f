"""Which engine runs a bundle on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from refmodels.errors import LogitLockError
from refmodels.options import check_choice
from trt_runtime.bundle import Bundle, read_bundle
from trt_runtime.engine import Engine
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine

EngineChoice = Literal["auto", "tensorrt", "onnxruntime"]


def open_engine(
    bundle: Bundle | Path | str,
    *,
    engine: EngineChoice = "auto",
    emulate_rounding: bool = False,
    threads: int | None = None,
) -> Engine:
    """The engine that runs a bundle.

    Args:
        bundle: a bundle or its directory.
        engine: "auto" takes TensorRT where the bundle has a plan and there are TensorRT and a CUDA device, else ONNX
            Runtime.
        emulate_rounding, threads: see `OnnxRuntimeEngine`; with "auto" they ask for it.
    Raises:
        LogitLockError: as `OnnxRuntimeEngine` and `TensorRTEngine`; an option is for the other engine.
    """
    check_choice("engine", engine, EngineChoice)
    of_the_cpu = emulate_rounding or threads is not None
    if engine == "tensorrt" and of_the_cpu:
        raise LogitLockError("--emulate-rounding and --threads are for --engine onnxruntime")
    opened = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    if engine == "tensorrt" or (engine == "auto" and not of_the_cpu and serves_tensorrt(opened)):
        from trt_runtime.tensorrt.engine import TensorRTEngine

        return TensorRTEngine(opened)
    return OnnxRuntimeEngine(opened, emulate_rounding=emulate_rounding, threads=threads)


def serves_tensorrt(bundle: Bundle) -> bool:
    """Whether the bundle has a plan and there are a CUDA device and TensorRT to run it."""
    if bundle.info.engine is None or not torch.cuda.is_available():
        return False
    try:
        import trt_runtime.tensorrt.api  # noqa: F401
    except LogitLockError:
        return False
    return True

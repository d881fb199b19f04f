"""The engine of a bundle: which back end builds it, and the files that it adds to the bundle."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from export.graph.quantized_rules import check_quantization
from export.options import Backend, ExportOptions
from export.progress import Progress
from refmodels.errors import LogitLockError
from refmodels.spec import ModelSpec, Numerics
from trt_runtime.bundle import KERNELS_NAME, LAYERS_NAME, AttentionMode, EngineInfo
from trt_runtime.plan_layers import write_layers

if TYPE_CHECKING:
    from export.tensorrt.build import BuildResult

_PORTABLE = 80
"""Kernels for compute capability 8.0 also run on later 8.x, and the driver compiles their PTX for newer GPUs."""


def default_backend(spec: ModelSpec, *, attention: AttentionMode, numerics: Numerics) -> tuple[Backend, str]:
    """The default back end and the reason: TensorRT if it can build the model here, else ONNX Runtime."""
    try:
        check_quantization(spec)
    except LogitLockError as error:
        return "onnxruntime", str(error)
    if attention == "plugin" and numerics != "exact":
        return "onnxruntime", "the TensorRT plugins compute exact numerics only"
    try:
        from trt_runtime.tensorrt.api import can_build, package_version
    except LogitLockError:
        return "onnxruntime", "TensorRT is not installed"
    if can_build():
        return "tensorrt", f"{package_version()} builds here"
    return "onnxruntime", f"{package_version()} builds on a machine with a CUDA GPU only"


def check_backend(spec: ModelSpec, options: ExportOptions) -> None:
    """Refuse before the work an export that the back end cannot do.

    Raises:
        LogitLockError: an option is for another back end, TensorRT is missing or cannot build here, or it has no
            kernels for the combination of attention, numerics and quantization.
    """
    if options.backend == "onnxruntime":
        for value, option in (
            (options.workspace, "workspace"),
            (options.optimization_level, "optimization-level"),
            (options.compute_capabilities, "compute-capability"),
            (options.taps, "taps"),
        ):
            if value:
                raise LogitLockError(f"--{option} is for --backend tensorrt; ONNX Runtime runs the graph as it is")
        return
    from trt_runtime.tensorrt.api import can_build, package_version

    if not can_build():
        raise LogitLockError(f"{package_version()} builds on a machine with a CUDA GPU, and none is here")
    if options.backend == "torch-tensorrt":
        from export.tensorrt.torch_export import check_modes, import_torch_tensorrt

        check_modes(options.attention, options.numerics)
        if spec.quantization is not None:
            raise LogitLockError(
                f"--backend torch-tensorrt takes float models, and this one has {spec.quantization.describe()}; "
                "use --backend tensorrt"
            )
        import_torch_tensorrt()
    elif options.attention == "plugin" and options.numerics != "exact":
        raise LogitLockError(
            "the TensorRT plugins compute --numerics exact only; for an engine with upstream's rounding use "
            "--attention decomposed"
        )
    from export.tensorrt.build import capability_member, capability_name

    for capability in options.compute_capabilities:
        capability_member(capability)
    check_quantization(spec, [int(capability_name(c).replace(".", "")) for c in options.compute_capabilities])


def build_engine(
    directory: Path, spec: ModelSpec, options: ExportOptions, *, progress: Progress | None = None
) -> EngineInfo:
    """Add an engine to a bundle that is being written: plans, list of layers, and the plugins' kernels.

    Args:
        directory: the draft, with the graph and its weights.
        spec: the model's facts.
    Returns: the engine's entry in bundle.json.
    Raises:
        LogitLockError: the engine cannot be built; see `export.tensorrt.build.build_plan`.
    """
    assert options.backend != "onnxruntime"
    limits = options.build_options(spec)
    from export.tensorrt import build as tensorrt_build
    from trt_runtime.tensorrt.api import package_version

    build: Callable[..., BuildResult] = tensorrt_build.build_plan
    if options.backend == "torch-tensorrt":
        from export.tensorrt import torch_export as torch_tensorrt

        build = functools.partial(torch_tensorrt.build_plan, attention=options.attention)
    with ExitStack() as stack:
        if options.attention == "plugin":
            kernels = directory / KERNELS_NAME
            kernels.write_bytes(_compile(spec, options, progress))
            from trt_runtime.kernels.compiled import CompiledKernels
            from trt_runtime.tensorrt.plugins import use_compiled

            stack.enter_context(use_compiled(CompiledKernels.load(kernels)))
        results = [
            build(directory, spec, options=limits, taps=tapped, progress=progress)
            for tapped in ((False, True) if options.taps else (False,))
        ]
    plans = [dataclasses.replace(result.layers, warnings=result.warnings) for result in results]
    write_layers(directory / LAYERS_NAME, plans)
    return EngineInfo(
        backend=options.backend,
        package=package_version(),
        compute_capabilities=[tensorrt_build.capability_name(c) for c in limits.compute_capabilities],
        plugins=results[0].plugins,
        max_batch=limits.max_batch,
        max_input=limits.max_input,
        max_seq=limits.max_seq,
        taps_plan=options.taps,
    )


def _compile(spec: ModelSpec, options: ExportOptions, progress: Progress | None) -> bytes:
    """The plugins' kernels, for the plan's GPUs."""
    from export.tensorrt.build import capability_name
    from trt_runtime.tensorrt.api import IS_RTX

    if options.compute_capabilities:
        capabilities = [int(capability_name(c).replace(".", "")) for c in options.compute_capabilities]
    elif IS_RTX:
        capabilities = [_PORTABLE]
    else:
        import torch

        major, minor = torch.cuda.get_device_capability()
        capabilities = [10 * major + minor]

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("compiling kernels", done, total)

    try:
        from trt_runtime.kernels.compiled import compile_kernels

        return compile_kernels(spec, options.parsed.dtype, capabilities=capabilities, progress=report)
    except ModuleNotFoundError as error:
        raise LogitLockError(
            f"--attention plugin needs {error.name} to compile its kernels: pip install {error.name}; or use "
            "--attention native"
        ) from None

"""From a model to a bundle: graph, weights, tokenizer, engine and manifest, written whole or not at all."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from export.graph.external_data import DATA_NAME, RANDOM_HASH, WeightWriter, random_parameters
from export.graph.lowering import Graph
from export.graph.trace import build_graph
from export.options import ExportOptions
from export.precision_plan import parameters_of, read_plan
from export.progress import Progress
from export.quantization.calibrate import quantize_model
from export.quantization.schemes import QuantizeOptions, quantization_of
from export.tensorrt.backends import build_engine, check_backend
from refmodels.checkpoints.load import (
    COMPANION_FILES,
    ModelSource,
    checkpoint_hash,
    parameter_bytes,
    parameter_shapes,
    resolve,
    stream_parameters,
    with_directory,
)
from refmodels.dtypes import DTYPES
from refmodels.errors import LogitLockError
from refmodels.files import copy_files
from refmodels.options import with_fields
from refmodels.spec import ModelSpec, Numerics
from refmodels.taps import tap_names
from trt_runtime.bundle import (
    MODEL_NAME,
    QUANTIZED_NAME,
    BundleInfo,
    TensorInfo,
    check_output,
    write_bundle,
)


def default_output(model: str | Path, precision: str) -> Path:
    """engines/<last component of the model's name>-<precision>."""
    return Path("engines") / f"{Path(model).resolve().name}-{precision}"


def export_model(
    model: str | Path | ModelSource,
    options: ExportOptions | None = None,
    *,
    progress: Progress | None = None,
    **fields: Any,
) -> Path:
    """Export a model to a bundle: `model.onnx`, which ONNX Runtime runs, and with another backend an engine beside it.

    Args:
        model: as for `refmodels.checkpoints.load.resolve`, or its result.
        options: of the export.
        progress: called with the task, how much of it is done (bytes of weights, steps of TensorRT), and its total.
        fields: those of `ExportOptions`, instead of `options` or to change some of them:
            `export_model("qwen", precision="fp16")`.
    Returns: the bundle's directory.
    Raises:
        LogitLockError: as `ExportOptions`; the output must not be written, the model or checkpoint cannot be read (see
            `resolve` and `stream_parameters`), or the engine cannot be built.
        TypeError: `ExportOptions` has no field of a given name.
    """
    options = with_fields(ExportOptions, options, fields)
    source = model if isinstance(model, ModelSource) else resolve(model)
    spec = quantized_spec(source, options.quantization)
    limits, dtype = options.build_options(spec), options.parsed.dtype
    check_backend(spec, options)
    target = default_output(source.name, options.precision) if options.output is None else Path(options.output)
    check_output(target, overwrite=options.overwrite)
    float32 = [] if options.precision_plan is None else read_plan(options.precision_plan, spec, dtype).float32
    graph = build_graph(
        spec,
        precision=dtype,
        numerics=options.numerics,
        attention=options.attention,
        max_positions=limits.max_seq,
        float32=float32,
    )
    quantize = None if options.random_weights else options.quantization
    info = BundleInfo(
        model=source.name.rpartition("/")[2],
        spec=spec.to_dict(),
        precision=dtype,
        numerics=options.numerics,
        attention=options.attention,
        max_positions=limits.max_seq,
        checkpoint_hash=RANDOM_HASH,
        tools={name: importlib.metadata.version(name) for name in ("logitlock", "onnx", "torch")},
        taps={name: name for name in tap_names(spec)},
        inputs=[_tensor_info(value) for value in graph.model.graph.input],
        outputs=[_tensor_info(value) for value in graph.model.graph.output],
        profiles=limits.profiles() if options.backend != "onnxruntime" else [],
        float32=float32,
        quantized=quantize is not None,
    )
    with write_bundle(target, overwrite=options.overwrite) as draft, ThreadPoolExecutor(1) as pool:
        if quantize is not None:
            checkpoint = quantize_model(source, draft.directory / QUANTIZED_NAME, quantize, progress=progress)
            source = with_directory(source, checkpoint)
        identity = None if options.random_weights else pool.submit(checkpoint_hash, source)
        copy_files(source.directory, draft.directory, ("config.json", *COMPANION_FILES))
        if options.random_weights:
            tensors = random_parameters(spec, dtype=DTYPES[dtype])
        else:
            tensors = _parameters(source, spec, DTYPES[dtype], options.numerics, float32)
        _write_model(graph, tensors, draft.directory, spec, DTYPES[dtype], progress)
        if options.backend != "onnxruntime":
            info = replace(info, engine=build_engine(draft.directory, spec, options, progress=progress))
        if identity is not None:
            info = replace(info, checkpoint_hash=identity.result())
        draft.finish(info)
    return target


def quantized_spec(source: ModelSource, quantize: QuantizeOptions | None) -> ModelSpec:
    """The facts of a model after quantization; None: it stays as it is.  Raises: as `quantization_of`."""
    if quantize is None:
        return source.spec
    if source.spec.quantization is not None:
        raise LogitLockError(
            f"{source.name} is quantized already ({source.spec.quantization.describe()}); --precision says its dtype "
            "then: fp32, fp16 or bf16"
        )
    return replace(source.spec, quantization=quantization_of(source.spec, quantize))


def _parameters(
    source: ModelSource, spec: ModelSpec, dtype: torch.dtype, numerics: Numerics, float32: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's parameters in `dtype`, those of the linear layers in `float32` in fp32."""
    names = list(parameter_shapes(spec))
    wide = parameters_of(spec, float32, names)
    for kind, chosen in ((dtype, set(names) - wide), (torch.float32, wide)):
        if chosen:
            yield from stream_parameters(source, dtype=kind, numerics=numerics, prefixes=tuple(chosen))


def _write_model(
    graph: Graph,
    tensors: Iterator[tuple[str, Tensor]],
    directory: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    total = parameter_bytes(spec, dtype)
    total += sum(t.numel() * t.element_size() for t in graph.tables.values())
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("weights", done, total)

    initializers = graph.model.graph.initializer
    with (directory / DATA_NAME).open("wb") as stream:
        writer = WeightWriter(stream, progress=report)
        for name, tensor in tensors:
            initializers.append(writer.add(name, tensor, layout=graph.parameters[name]))
        for name, table in graph.tables.items():
            initializers.append(writer.add(name, table))
    written = {initializer.name for initializer in initializers}
    lacking = graph.parameters.keys() - written
    assert not lacking, f"the graph reads parameters that the checkpoint does not give: {sorted(lacking)}"
    (directory / MODEL_NAME).write_bytes(graph.model.SerializeToString(deterministic=True))


def _tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    shape: list[int | str] = [d.dim_param or d.dim_value for d in tensor.shape.dim]
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return TensorInfo(name=value.name, dtype=dtype, shape=shape)

"""From a model to a bundle: graph, weights, tokenizer, engine and manifest, written whole or not at all."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

import onnx
import torch
from torch import Tensor

from export.graph.external_data import DATA_NAME, RANDOM_HASH, WeightWriter, random_parameters
from export.graph.lowering import Graph
from export.graph.trace import build_graph
from export.precision_plan import parameters_of, read_plan
from export.progress import Progress
from export.quantization.calibrate import quantize_model
from export.quantization.schemes import SCHEMES, QuantizeOptions, is_scheme, quantization_of
from export.tensorrt.backends import BACKENDS, Backend, build_engine, check_backend
from export.tensorrt.options import build_options
from refmodels.checkpoints.load import (
    COMPANION_FILES,
    DTYPES,
    ModelSource,
    checkpoint_hash,
    moved,
    parameter_bytes,
    parameter_shapes,
    resolve,
    stream_parameters,
)
from refmodels.errors import LogitLockError
from refmodels.spec import ModelSpec, Numerics
from refmodels.taps import tap_names
from trt_runtime.bundle import (
    MODEL_NAME,
    QUANTIZED_NAME,
    AttentionMode,
    BundleInfo,
    Precision,
    TensorInfo,
    check_output,
    write_bundle,
)

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
ATTENTION_MODES: tuple[AttentionMode, ...] = ("plugin", "decomposed", "native")
NUMERICS: tuple[Numerics, ...] = ("exact", "upstream")


def default_output(model: str | Path, precision: str) -> Path:
    """engines/<last component of the model's name>-<precision>."""
    return Path("engines") / f"{Path(model).resolve().name}-{precision}"


def export_model(
    model: str | Path | ModelSource,
    *,
    precision: str,
    dtype: Precision | None = None,
    quantize: QuantizeOptions | None = None,
    attention: AttentionMode = "plugin",
    numerics: Numerics = "exact",
    backend: Backend = "onnxruntime",
    output: Path | str | None = None,
    max_batch: int | None = None,
    max_input: int | None = None,
    max_seq: int | None = None,
    workspace: int | None = None,
    optimization_level: int | None = None,
    compute_capabilities: Sequence[str] = (),
    taps: bool = False,
    random_weights: bool = False,
    precision_plan: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Export a model to a bundle: `model.onnx`, which ONNX Runtime runs, and with another backend an engine beside it.

    Args:
        model: as for `refmodels.checkpoints.load.resolve`, or its result.
        precision: fp32, fp16 or bf16: dtype of weights, activations and cache; or a scheme of
            `export.quantization.schemes.SCHEMES`: the model is quantized first, and the quantized checkpoint is put
            into the bundle.
        dtype: with a scheme, of all that is not quantized; None: fp16.
        quantize: how, if not by the scheme's defaults; its `scheme` is `precision`, or None to quantize the cache only.
        attention, numerics: see `export.graph.trace.build_graph`.
        backend: what else is built: nothing ("onnxruntime") or a TensorRT plan.
        output: the bundle's directory, missing or empty; None: `default_output`.
        max_batch, max_input, max_seq, workspace, optimization_level, compute_capabilities: see
            `export.tensorrt.options.BuildOptions`; None: defaults of `export.tensorrt.options.build_options`.
        taps: also build a plan whose taps are outputs.
        random_weights: no checkpoint is read; see `export.graph.external_data.random_parameters`.
        precision_plan: a file that says which modules stay in fp32; see `export.precision_plan`.
        overwrite: replace a bundle at `output`.
        progress: called with what is done, how much of it (bytes of weights, steps of TensorRT) and how much in all.
    Returns: the bundle's directory.
    Raises:
        LogitLockError: an unknown option value, an output that must not be written, a model or checkpoint that
            cannot be read (see `resolve` and `stream_parameters`), or an engine that cannot be built.
    """
    if quantize is None and is_scheme(precision):
        quantize = QuantizeOptions(scheme=precision)
    if quantize is not None and quantize.scheme != (precision if is_scheme(precision) else None):
        raise LogitLockError(f"--precision is {precision!r}, but the options are those of {quantize.scheme!r}")
    if dtype is not None and not is_scheme(precision):
        raise LogitLockError(f"--dtype says what is not quantized; --precision {precision} has nothing else")
    working = cast(Precision, dtype or "fp16" if is_scheme(precision) else precision)
    for value, option, known in (
        (precision, "precision", (*PRECISIONS, *SCHEMES)),
        (working, "dtype", PRECISIONS),
        (attention, "attention", ATTENTION_MODES),
        (numerics, "numerics", NUMERICS),
        (backend, "backend", BACKENDS),
    ):
        if value not in known:
            raise LogitLockError(f"--{option} is {value!r}; it must be one of {', '.join(known)}")
    source = model if isinstance(model, ModelSource) else resolve(model)
    spec = quantized_spec(source, quantize)
    options = build_options(
        spec,
        fixed_cache=backend != "onnxruntime",
        max_batch=max_batch,
        max_input=max_input,
        max_seq=max_seq,
        workspace=workspace,
        optimization_level=optimization_level,
        compute_capabilities=tuple(compute_capabilities),
    )
    check_backend(spec, backend, attention, numerics, options, taps=taps)
    target = default_output(source.name, precision) if output is None else Path(output)
    check_output(target, overwrite=overwrite)
    if precision_plan is not None and random_weights:
        raise LogitLockError("--precision-plan is for the weights that it was made for, not for --random-weights")
    float32 = [] if precision_plan is None else read_plan(precision_plan, spec, working).float32
    graph = build_graph(
        spec,
        precision=working,
        numerics=numerics,
        attention=attention,
        max_positions=options.max_seq,
        float32=float32,
    )
    info = BundleInfo(
        model=source.name.rpartition("/")[2],
        spec=spec.to_dict(),
        precision=working,
        numerics=numerics,
        attention=attention,
        max_positions=options.max_seq,
        checkpoint_hash=RANDOM_HASH,
        tools={name: importlib.metadata.version(name) for name in ("logitlock", "onnx", "torch")},
        taps={name: name for name in tap_names(spec)},
        inputs=[_tensor_info(value) for value in graph.model.graph.input],
        outputs=[_tensor_info(value) for value in graph.model.graph.output],
        profiles=options.profiles() if backend != "onnxruntime" else [],
        float32=float32,
        quantized=quantize is not None and not random_weights,
    )
    with write_bundle(target, overwrite=overwrite) as draft, ThreadPoolExecutor(1) as pool:
        if quantize is not None and not random_weights:
            checkpoint = quantize_model(source, draft.directory / QUANTIZED_NAME, quantize, progress=progress)
            source = moved(source, checkpoint)
        identity = None if random_weights else pool.submit(checkpoint_hash, source)
        draft.copy(path for name in ("config.json", *COMPANION_FILES) if (path := source.directory / name).is_file())
        if random_weights:
            tensors = random_parameters(spec, dtype=DTYPES[working])
        else:
            names = list(parameter_shapes(spec))
            wide = parameters_of(float32, names)
            tensors = itertools.chain(
                *(
                    stream_parameters(source, dtype=kind, numerics=numerics, prefixes=tuple(chosen))
                    for kind, chosen in ((DTYPES[working], set(names) - wide), (torch.float32, wide))
                    if chosen
                )
            )
        _write_model(graph, tensors, draft.directory, spec, working, progress)
        if backend != "onnxruntime":
            engine = build_engine(
                draft.directory,
                spec,
                backend=backend,
                precision=working,
                attention=attention,
                options=options,
                taps=taps,
                progress=progress,
            )
            info = replace(info, engine=engine)
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


def _write_model(
    graph: Graph,
    tensors: Iterator[tuple[str, Tensor]],
    directory: Path,
    spec: ModelSpec,
    precision: Precision,
    progress: Progress | None,
) -> None:
    total = parameter_bytes(spec, DTYPES[precision])
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

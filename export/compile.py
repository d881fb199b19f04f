"""From a model to a bundle: graph, weights, tokenizer and manifest, written whole or not at all."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
from torch import Tensor

from export.graph import Graph, build_graph
from export.weights import DATA_NAME, WeightWriter
from refmodels.checkpoint import DTYPES, ModelSource, checkpoint_hash, empty_decoder, resolve, stream_parameters
from refmodels.errors import LogitLockError
from refmodels.spec import ModelSpec, Numerics
from refmodels.taps import tap_names
from trt_runtime.bundle import (
    MODEL_NAME,
    AttentionMode,
    BundleInfo,
    Precision,
    Profile,
    TensorInfo,
    check_output,
    write_bundle,
)

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
ATTENTION_MODES: tuple[AttentionMode, ...] = ("plugin", "decomposed", "native")
NUMERICS: tuple[Numerics, ...] = ("exact", "upstream")
_COPIED = (
    "config.json",
    "generation_config.json",
    "qwen.tiktoken",
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def default_output(model: str | Path, precision: str) -> Path:
    """engines/<last component of the model's name>-<precision>."""
    return Path("engines") / f"{Path(model).resolve().name}-{precision}"


def export_model(
    model: str | Path | ModelSource,
    *,
    precision: Precision,
    attention: AttentionMode = "plugin",
    numerics: Numerics = "exact",
    output: Path | str | None = None,
    max_positions: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Export a model to a bundle with `model.onnx`.

    Args:
        model: as for `refmodels.checkpoint.resolve`, or its result.
        precision: fp32, fp16 or bf16: dtype of weights, activations and cache.
        attention, numerics: see `export.graph.build_graph`.
        output: the bundle's directory, missing or empty; None: `default_output`.
        max_positions: the longest cache (tokens) that the bundle serves; None: what the model allows.
        overwrite: replace a bundle at `output`.
        progress: called with (bytes written, bytes in all) while weights are written.
    Returns: the bundle's directory.
    Raises:
        LogitLockError: an unknown option value, an output that must not be written, or a model or checkpoint that
            cannot be read (see `resolve` and `stream_parameters`).
    """
    for value, option, known in (
        (precision, "precision", PRECISIONS),
        (attention, "attention", ATTENTION_MODES),
        (numerics, "numerics", NUMERICS),
    ):
        if value not in known:
            raise LogitLockError(f"--{option} is {value!r}; it must be one of {', '.join(known)}")
    source = model if isinstance(model, ModelSource) else resolve(model)
    spec = source.spec
    positions = spec.max_positions if max_positions is None else max_positions
    if positions < 1 or (spec.position == "learned" and positions > spec.max_positions):
        most = f" and at most {spec.max_positions}, the learned positions" if spec.position == "learned" else ""
        raise LogitLockError(f"--max-positions is {positions}; for {spec.variant} it must be at least 1{most}")
    target = default_output(source.name, precision) if output is None else Path(output)
    check_output(target, overwrite=overwrite)
    graph = build_graph(spec, precision=precision, numerics=numerics, attention=attention, max_positions=positions)
    info = BundleInfo(
        model=source.name.rpartition("/")[2],
        spec=spec.to_dict(),
        precision=precision,
        numerics=numerics,
        attention=attention,
        max_positions=positions,
        checkpoint_hash="",
        tools={name: importlib.metadata.version(name) for name in ("logitlock", "onnx", "torch")},
        taps={name: name for name in tap_names(spec)},
        inputs=[_tensor_info(value) for value in graph.model.graph.input],
        outputs=[_tensor_info(value) for value in graph.model.graph.output],
        profiles=[
            Profile(name="prefill", batch=[1, 8], tokens=[1, positions], capacity=[1, positions]),
            Profile(name="decode", batch=[1, 8], tokens=[1, 1], capacity=[1, positions]),
        ],
    )
    with write_bundle(target, overwrite=overwrite) as draft, ThreadPoolExecutor(1) as pool:
        identity = pool.submit(checkpoint_hash, source)
        draft.copy(path for name in _COPIED if (path := source.directory / name).is_file())
        tensors = stream_parameters(source, dtype=DTYPES[precision], numerics=numerics)
        _write_model(graph, tensors, draft.directory, spec, precision, progress)
        draft.finish(dataclasses.replace(info, checkpoint_hash=identity.result()))
    return target


def _write_model(
    graph: Graph,
    tensors: Iterator[tuple[str, Tensor]],
    directory: Path,
    spec: ModelSpec,
    precision: Precision,
    progress: Callable[[int, int], None] | None,
) -> None:
    total = sum(p.numel() for p in empty_decoder(spec).parameters()) * DTYPES[precision].itemsize
    total += sum(t.numel() * t.element_size() for t in graph.tables.values())
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    initializers = graph.model.graph.initializer
    with (directory / DATA_NAME).open("wb") as stream:
        writer = WeightWriter(stream, progress=report)
        for name, tensor in tensors:
            initializers.append(writer.add(name, tensor, transposed=graph.parameters[name]))
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

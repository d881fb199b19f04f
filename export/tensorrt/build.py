"""From a bundle's model.onnx to a TensorRT plan beside it.

The graph on disk keeps its dynamic cache capacity, for the CPU; here it is given a fixed one in memory, which TensorRT
needs to update caches in place.  Weights are mapped from their file by the parser and the plan is streamed to its
file, so that this process holds neither.

TensorRT drops parts of a graph that it does not know with a warning, or silently.  So we check nodes before they are
parsed, read the warnings (`check_warnings`), and count the calls of plugins afterwards.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx

from export.progress import Progress
from export.tensorrt.builder_log import node_taps, parse_log
from export.tensorrt.options import BuildOptions
from refmodels.errors import LogitLockError
from refmodels.spec import ModelSpec
from refmodels.taps import tap_names
from trt_runtime.bundle import MODEL_NAME, PLAN_NAME, TAPS_PLAN_NAME, Profile
from trt_runtime.plan_layers import PlanLayers
from trt_runtime.tensorrt.api import IS_RTX, LOGGER, errors_of, package_version, trt, warnings_of
from trt_runtime.tensorrt.plugins import check_nodes, raise_failure

_HARMLESS: Mapping[str, str] = {
    r"Make sure input .* has Int64 binding": "the engine binds int64",
    r"A node named .* already exists": "nodes of a function body have the same names at every call; their metadata "
    "says which call",
    r"is deprecated|\[DEPRECATED\]": "still works in this version",
}
"""Warnings that occur and are harmless, by pattern, and why."""

_FATAL = re.compile(
    r"Unused Input|not found in plugin node|ignor(?:ed|es|ing)\b|dropp(?:ed|ing)\b|has no effect|will not be used",
    re.IGNORECASE,
)
"""Warnings after which the plan would not compute what the graph says."""

_BUILTIN_ATTRIBUTES: Mapping[str, frozenset[str]] = {
    "TRT_KVCacheUpdate": frozenset({"update_form"}),
    "TRT_Attention": frozenset({"causal_kind", "query_form", "kv_form", "TRT_decomposable", "TRT_normalization_op"}),
}
"""The attributes that TensorRT's own operators know; it drops others silently."""


_CODES = frozenset({onnx.TensorProto.INT4, onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN})
_SPARE_BYTES = 1 << 16
"""Bytes that a plan may hold besides the graph's weights."""

_PROGRESS_STEPS = 1000
_PATIENCE = 1.0
"""Seconds that a cancelled build may take to end by itself."""


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A finished plan.

    Attributes:
        plan: its file.
        layers: the plan's layers, as the builder listed them.
        plugins: version of each plugin it calls, by name.
        warnings: warnings of TensorRT that are not known to be harmless.
    """

    plan: Path
    layers: PlanLayers
    plugins: dict[str, str]
    warnings: list[str]


def build_plan(
    directory: Path, spec: ModelSpec, *, options: BuildOptions, taps: bool = False, progress: Progress | None = None
) -> BuildResult:
    """Build `directory`/model.onnx and write `directory`/engine.plan (with `taps`: engine.taps.plan).

    An exception during the build, such as KeyboardInterrupt, or one that `progress` raises, cancels it and leaves no
    plan.

    Args:
        directory: a bundle, or one being written, with its weights.
        spec: the model's facts.
        taps: every tap becomes an output of the plan.
        progress: called with the share of the builder's steps that are done, out of 1000; most of the time goes into
            a few of them.
    Raises:
        LogitLockError: TensorRT refuses the graph, cannot build it or would drop a part of it; a plugin node has no
            plugin; the plan does not keep quantized weights quantized.
    """
    model = onnx.load(directory / MODEL_NAME, load_external_data=False)
    fix_capacity(model, options.max_seq)
    if taps:
        mark_taps(model, tap_names(spec))
    _check_builtin_attributes(model)
    check_nodes(model)
    path = directory / (TAPS_PLAN_NAME if taps else PLAN_NAME)
    with LOGGER.collect() as messages:
        builder = trt.Builder(LOGGER)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = _parse(network, model, directory / MODEL_NAME, messages)
        plugins = _check_plugins(network, model)
        build_network(builder, network, path, inputs=model.graph.input, options=options, progress=progress, keep=parser)
    layers = parse_log((text for _, text in messages), plan=path.name, taps=node_taps(model, tap_names(spec)))
    check_weight_bytes(model, layers.weight_bytes)
    return BuildResult(
        plan=path,
        layers=layers,
        plugins=plugins,
        warnings=check_warnings(warnings_of(messages)),
    )


def build_network(
    builder: Any,
    network: Any,
    path: Path,
    *,
    inputs: Iterable[onnx.ValueInfoProto],
    options: BuildOptions,
    progress: Progress | None = None,
    keep: object = None,
) -> None:
    """Build a `trt.INetworkDefinition` and write its plan to `path`; on any exception no file is left.

    Args:
        builder: the `trt.Builder` of the network, with `LOGGER`.
        inputs: of the network; dynamic axes are named batch, tokens, slots and logit_tokens.
        options, progress: as for `build_plan`.
        keep: an object that must live as long as the network: the owner of its weights.
    Raises:
        LogitLockError: TensorRT cannot build it, or drops a part of it; the plan cannot be written.
    """
    monitor = _Monitor(path.name, progress)
    config = _configure(builder, inputs, options, monitor)
    try:
        with LOGGER.collect() as messages, path.open("wb") as stream:
            writer = _PlanWriter(stream)
            done = _in_thread(
                lambda: builder.build_serialized_network_to_stream(network, config, writer), monitor, keep
            )
        for failure in (monitor.failure, writer.failure):
            if failure is not None:
                raise failure
        raise_failure()
        errors = errors_of(messages)
        if not done or errors:
            raise LogitLockError(f"TensorRT cannot build the engine: {_join(errors or ['it gives no reason'])}")
        check_warnings(warnings_of(messages))
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def capability_member(capability: str) -> Any:
    """`trt.ComputeCapability` for '8.9' (also '89', 'SM89' or 'sm_89').

    Raises:
        LogitLockError: this package cannot build for it.
    """
    if not IS_RTX:
        raise LogitLockError(
            "--compute-capability is for TensorRT-RTX; full TensorRT builds for the GPU of this machine only"
        )
    members = {name: value for name, value in trt.ComputeCapability.__members__.items() if re.fullmatch(r"SM\d+", name)}
    name = "SM" + re.sub(r"^sm_?|\.", "", capability.strip().lower())
    if name not in members:
        known = ", ".join(capability_name(member) for member in members)
        raise LogitLockError(f"--compute-capability is {capability!r}; {package_version()} builds for {known}")
    return members[name]


def capability_name(capability: str) -> str:
    """'8.9' for any spelling that `capability_member` takes."""
    digits = re.sub(r"^sm_?|\.", "", capability.strip().lower())
    return f"{digits[:-1]}.{digits[-1]}"


def fix_capacity(model: onnx.ModelProto, capacity: int) -> None:
    """Give the caches of a graph a fixed number of slots, in place."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "capacity":
                dim.dim_value = capacity


def mark_taps(model: onnx.ModelProto, taps: Iterable[str]) -> None:
    """Make every tap an output of the graph, in place; the graph declares them."""
    known = {value.name for value in model.graph.output}
    declared = {value.name: value for value in model.graph.value_info}
    model.graph.output.extend(declared[name] for name in taps if name not in known)


def check_weight_bytes(model: onnx.ModelProto, found: int) -> None:
    """Check that an engine holds the quantized weights and not dequantized ones.

    Args:
        found: bytes of its weights.
    Raises:
        LogitLockError: it holds more than half of the bytes that the next wider type would add.
    """
    stored = widened = 0
    for weight in model.graph.initializer:
        length = next((int(e.value) for e in weight.external_data if e.key == "length"), len(weight.raw_data))
        stored += length
        widened += length if weight.data_type in _CODES else 0
    if widened and found > stored + widened // 2 + _SPARE_BYTES:
        raise LogitLockError(
            f"TensorRT holds {found} bytes of weights where the graph has {stored}: quantized weights were expanded"
        )


def check_warnings(warnings: Sequence[str]) -> list[str]:
    """The warnings that are not known to be harmless.

    Raises:
        LogitLockError: a warning means that TensorRT drops a part of the graph.
    """
    notable = [text for text in warnings if not any(re.search(pattern, text) for pattern in _HARMLESS)]
    fatal = [text for text in notable if _FATAL.search(text)]
    if fatal:
        raise LogitLockError(f"TensorRT would drop a part of the graph: {_join(fatal)}")
    return notable


def _parse(network: Any, model: onnx.ModelProto, path: Path, messages: list[tuple[int, str]]) -> Any:
    parser = trt.OnnxParser(network, LOGGER)
    if not parser.parse(model.SerializeToString(), str(path)) or parser.num_errors:
        raise_failure()
        errors = [_describe(parser.get_error(i)) for i in range(parser.num_errors)]
        raise LogitLockError(f"TensorRT cannot read the graph: {_join(errors or errors_of(messages))}")
    if not messages:
        raise LogitLockError(
            "another TensorRT logger is in use in this process, so that warnings would be missed; "
            "export in a process of its own"
        )
    check_warnings(warnings_of(messages))
    return parser


def _describe(error: Any) -> str:
    stack = [text for text in error.local_function_stack() if text]
    where = f"node {error.node_name()!r} ({error.node_operator()})" + (f" in {' in '.join(stack)}" if stack else "")
    return f"{where}: {error.desc()}"


def _check_builtin_attributes(model: onnx.ModelProto) -> None:
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        known = _BUILTIN_ATTRIBUTES.get(node.op_type)
        unknown = sorted({a.name for a in node.attribute} - known) if known is not None else []
        if unknown:
            raise LogitLockError(f"node {node.name!r}: TensorRT's {node.op_type} drops the attribute {unknown[0]}")


def _check_plugins(network: Any, model: onnx.ModelProto) -> dict[str, str]:
    """Version by name of the plugins that the graph calls, after checking that TensorRT made a plugin of every call."""
    nodes = [n for n in model.graph.node if any(a.name == "plugin_namespace" for a in n.attribute)]
    kinds = Counter(network.get_layer(i).type for i in range(network.num_layers))
    made = kinds[trt.LayerType.PLUGIN_V3]
    if made != len(nodes):
        raise LogitLockError(f"the graph has {len(nodes)} plugin nodes, TensorRT made plugins of {made} of them")
    return {n.op_type: a.s.decode() for n in nodes for a in n.attribute if a.name == "plugin_version"}


def _configure(builder: Any, inputs: Iterable[onnx.ValueInfoProto], options: BuildOptions, monitor: _Monitor) -> Any:
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    # Names and source nodes of layers, in the log and in the plan.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # TF32 multiplies 11 bits of an fp32 matrix; an fp32 engine is compared with fp32.
    config.clear_flag(trt.BuilderFlag.TF32)
    # Caches are input and output of the attention plugin in one.
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.compute_capabilities:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, capability in enumerate(options.compute_capabilities):
            assert config.set_compute_capability(capability_member(capability), index)
    values = list(inputs)
    for profile in options.profiles():
        shapes = builder.create_optimization_profile()
        for value in values:
            shapes.set_shape(value.name, *_shapes(value, profile, options))
        assert config.add_optimization_profile(shapes) >= 0
    return config


def _shapes(value: onnx.ValueInfoProto, profile: Profile, options: BuildOptions) -> list[tuple[int, ...]]:
    """Smallest, typical and largest shape of a graph input."""
    ranges = {
        "batch": profile.batch,
        "tokens": profile.tokens,
        "logit_tokens": profile.tokens,
        "slots": [1, options.max_seq],
    }
    sizes = {name: (low, (low + high) // 2, high) for name, (low, high) in ranges.items()}
    dims = value.type.tensor_type.shape.dim
    return [tuple(sizes[d.dim_param][i] if d.dim_param else d.dim_value for d in dims) for i in range(3)]


def _in_thread(build: Callable[[], bool], monitor: _Monitor, keep: object) -> bool:
    """Build in another thread: in this one a signal would wait until TensorRT returns.

    TensorRT checks only between its steps whether it is cancelled, and one step may take minutes; so this function
    waits a moment and returns.  The build then ends by itself, and keeps its objects and `keep` alive until it does.
    """
    result: Future[bool] = Future()

    def run(_keep: object) -> None:
        try:
            result.set_result(build())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, args=(keep,), daemon=True)
    thread.start()
    try:
        return result.result()
    except BaseException:
        monitor.cancelled = True
        atexit.register(_leave_at_once, thread)
        thread.join(_PATIENCE)
        raise


def _leave_at_once(thread: threading.Thread) -> None:
    # An ordinary exit would end the interpreter while the builder still uses it: a crash.
    if thread.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """Reports the builder's progress, and cancels the build if `cancelled` is set or `progress` raises.

    The builder's phases are nested: a step of one may be a phase with steps of its own, and counts as done as far as
    that phase is.
    """

    def __init__(self, name: str, progress: Progress | None) -> None:
        trt.IProgressMonitor.__init__(self)
        self.cancelled = False
        self.failure: BaseException | None = None
        self._name, self._progress = name, progress
        self._open: list[_Phase] = []
        self._reported = -1

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        self._open.append(_Phase(phase, steps))
        self._report()

    def step_complete(self, phase: str, step: int) -> bool:
        for opened in self._open:
            if opened.name == phase:
                opened.done = step + 1
        self._report()
        return not self.cancelled

    def phase_finish(self, phase: str) -> None:
        self._open = [opened for opened in self._open if opened.name != phase]

    def _report(self) -> None:
        share = 0.0
        for opened in reversed(self._open):
            share = min(1.0, (opened.done + share) / max(1, opened.steps))
        now = int(share * _PROGRESS_STEPS)
        if self._progress is None or self.cancelled or now <= self._reported:
            return
        self._reported = now
        try:
            self._progress(f"building {self._name}", now, _PROGRESS_STEPS)
        except BaseException as error:
            self.failure, self.cancelled = error, True


@dataclass
class _Phase:
    name: str
    steps: int
    done: int = 0


class _PlanWriter(trt.IStreamWriter):  # type: ignore[misc]
    """Writes the plan to a file as the builder makes it."""

    def __init__(self, stream: BinaryIO) -> None:
        trt.IStreamWriter.__init__(self)
        self.failure: LogitLockError | None = None
        self._stream = stream

    def write(self, data: bytes) -> int:
        try:
            return self._stream.write(data)
        except (OSError, ValueError) as error:  # ValueError: closed, as the build was given up
            self.failure = LogitLockError(f"cannot write {self._stream.name}: {getattr(error, 'strerror', error)}")
            return 0


def _join(texts: Sequence[str]) -> str:
    """The first few, on one line."""
    lines = [" ".join(text.split())[:400] for text in dict.fromkeys(texts)]
    return "; ".join(lines[:3]) + (f" (and {len(lines) - 3} more)" if len(lines) > 3 else "")

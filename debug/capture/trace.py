"""Captures on disk, so that the two executors of a diff may be captured on different machines.

A trace is one safetensors file.  It is written tap by tap as the executor delivers them, and read tap by tap as a diff
needs them, so that memory never holds more than one tap.  Tensors are named `{step}.{tap}`; a cache tap holds the slots
that its step has appended, and the whole cache (`{step}.{tap}.all`) if older slots have changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from debug.capture.capture import Capture, Forward, run_steps
from debug.capture.prompts import Prompts
from export.progress import Progress, silent
from refmodels.cache import KVCache, StepInputs
from refmodels.dtypes import BY_TORCH, DTYPES
from refmodels.errors import LogitLockError
from refmodels.files import check_regular, parse_json, write_file
from refmodels.recorder import Recorder
from refmodels.spec import ModelSpec, Numerics, spec_from_dict
from refmodels.taps import is_cache_tap, tap_names
from trt_runtime.engine import Engine

SCHEMA = 1
_METADATA = ("model", "numerics", "spec", "dtype", "taps", "arithmetic", "prompts")
_HEADER_ROOM = 1 << 16


class _SafetensorsWriter:
    """Writes tensors into a safetensors file, one after the other, and its header at the end.

    safetensors' own writer needs all tensors at once.  Here, room for the header is reserved and padded with spaces,
    which the format allows.
    """

    def __init__(self, stream: BinaryIO, room: int) -> None:
        self.stream, self.room = stream, room
        self.entries: dict[str, dict[str, Any]] = {}
        self.stream.seek(8 + room)
        self.size = 0

    def add(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().to("cpu").contiguous()
        count = data.numel() * data.element_size()
        self.entries[name] = {
            "dtype": BY_TORCH[data.dtype].safetensors,
            "shape": list(data.shape),
            "data_offsets": [self.size, self.size + count],
        }
        self.stream.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self.size += count

    def finish(self, metadata: Mapping[str, str]) -> None:
        header = json.dumps({"__metadata__": dict(metadata), **self.entries}).encode()
        assert len(header) <= self.room, f"a trace header of {len(header)} bytes in {self.room}"
        self.stream.seek(0)
        self.stream.write(self.room.to_bytes(8, "little") + header.ljust(self.room))


def write_trace(
    engine: Engine,
    prompts: Prompts,
    path: Path,
    *,
    steps: int,
    tokens: Tensor | None = None,
    model: str = "",
    numerics: Numerics = "exact",
    progress: Progress = silent,
) -> None:
    """Run an engine without and with taps, and write its capture; the file appears as a whole or not at all.

    Args:
        engine, prompts, steps, tokens: as `debug.capture.capture.capture_engine`.
        path: the trace to write.
        model: the model that the engine was made from, for readers of the trace.
        numerics: numerics of the reference that gives the engine's noise floor.
        progress: told of each forward.
    Raises:
        LogitLockError: `path` cannot be written.
    """
    room = _HEADER_ROOM + (steps + 1) * (len(engine.tap_names) + 4) * 160
    with (
        write_file(path, "trace", '"logitlock_trace"') as temporary,
        torch.inference_mode(),
        temporary.open("wb") as stream,
    ):
        writer = _SafetensorsWriter(stream, room)
        writer.add("prompt.ids", prompts.ids)
        writer.add("prompt.mask", prompts.mask)
        fed: list[Tensor] = []
        run = partial(run_steps, engine, prompts, steps=steps, progress=progress)
        for step, _, logits in run(tokens=tokens, fed=fed):
            writer.add(f"{step}.untapped", logits)
        tokens = torch.cat(fed, 1) if fed else torch.zeros(len(prompts.ids), 0, dtype=torch.int64)
        writer.add("tokens", tokens)
        _write_taps(writer, partial(run, tokens=tokens))
        writer.finish(
            {
                "logitlock_trace": str(SCHEMA),
                "model": model,
                "numerics": numerics,
                "spec": json.dumps(engine.spec.to_dict()),
                "dtype": BY_TORCH[engine.dtype].name,
                "taps": json.dumps(engine.tap_names),
                "arithmetic": engine.arithmetic,
                "prompts": prompts.origin,
            }
        )


def _write_taps(writer: _SafetensorsWriter, run: Callable[..., Iterator[object]]) -> None:
    last: dict[str, Tensor] = {}
    step = 0

    def sink(name: str, tensor: Tensor) -> None:
        if not is_cache_tap(name):
            writer.add(f"{step}.{name}", tensor)
            return
        old = last.get(name, tensor[:, :, :0])
        slots = old.shape[2]
        if torch.equal(tensor[:, :, :slots], old):
            writer.add(f"{step}.{name}", tensor[:, :, slots:])
        else:
            writer.add(f"{step}.{name}.all", tensor)
        last[name] = tensor

    for _ in run(recorder=lambda: Recorder(sink=sink)):
        step += 1


def read_trace(path: Path) -> Capture:
    """Open a trace; taps are read on access.

    Raises:
        LogitLockError: the file does not exist, is not a trace, has another schema version, or is damaged.
    """
    if not path.exists():
        raise LogitLockError(f"there is no trace at {path}: no such file")
    check_regular(path, "trace")
    try:
        file: Any = safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise LogitLockError(f"{path} is not a trace: {error}") from None
    metadata: Mapping[str, str] = file.metadata() or {}
    if "logitlock_trace" not in metadata:
        raise LogitLockError(f"{path} is a safetensors file, but not a trace; make one with `logitlock trace`")
    if metadata["logitlock_trace"] != str(SCHEMA):
        raise LogitLockError(
            f"{path} has trace schema {metadata['logitlock_trace']}, this version reads schema {SCHEMA}; make it again"
        )
    lacking = [key for key in _METADATA if key not in metadata]
    if lacking:
        raise LogitLockError(f"{path} is damaged: its metadata lacks {', '.join(lacking)}; make the trace again")
    try:
        spec, taps = _described(metadata, path)
        prompts, tokens = _inputs(file, spec, metadata["prompts"])
        _check_tensors(file, spec, taps, prompts.ids.shape, tokens.shape[1])
    except LogitLockError as error:
        text = str(error).removeprefix(f"{path}: ")
        raise LogitLockError(f"{path} is damaged: {text}; make the trace again") from None
    return Capture(
        spec=spec,
        dtype=DTYPES[metadata["dtype"]],
        tap_names=taps,
        arithmetic=f"{metadata['arithmetic']} (trace {path.name})",
        prompts=prompts,
        tokens=tokens,
        forwards=list(_forwards(file, spec, prompts, tokens, taps)),
        untapped=_Untapped(file, tokens.shape[1] + 1),
    )


def _described(metadata: Mapping[str, str], path: Path) -> tuple[ModelSpec, tuple[str, ...]]:
    """The spec and the taps; raises if they or the other texts are not valid in a trace."""
    for key, known in (("dtype", tuple(DTYPES)), ("numerics", get_args(Numerics))):
        if metadata[key] not in known:
            raise LogitLockError(f"{key} is {metadata[key]!r}; it must be one of {', '.join(known)}")
    content, names = (parse_json(metadata[key], f"{path}: its {key}") for key in ("spec", "taps"))
    spec = spec_from_dict(content)
    known_taps = set(tap_names(spec))
    if not isinstance(names, list) or not all(isinstance(n, str) and n in known_taps for n in names):
        raise LogitLockError(f"its taps are not a list of taps of {spec.variant}")
    return spec, tuple(names)


def _inputs(file: Any, spec: ModelSpec, origin: str) -> tuple[Prompts, Tensor]:
    ids, mask, tokens = (_integers(file, name) for name in ("prompt.ids", "prompt.mask", "tokens"))
    if mask.shape != ids.shape or len(tokens) != len(ids) or 0 in ids.shape:
        shapes = f"{list(ids.shape)}, {list(mask.shape)} and {list(tokens.shape)}"
        raise LogitLockError(f"prompt.ids, prompt.mask and tokens have the shapes {shapes}, which do not fit together")
    for name, values in (("prompt.ids", ids), ("tokens", tokens)):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < spec.vocab_size:
            raise LogitLockError(f"{name} holds a token id outside the vocabulary of {spec.vocab_size} ids")
    return Prompts(ids=ids, mask=mask, origin=origin), tokens


def _integers(file: Any, name: str) -> Tensor:
    if name not in set(file.keys()):
        raise LogitLockError(f"it lacks the tensor {name}")
    tensor: Tensor = file.get_tensor(name)
    if tensor.ndim != 2 or tensor.dtype != torch.int64:
        raise LogitLockError(f"{name} is {list(tensor.shape)} {tensor.dtype}; it must be two axes of int64")
    return tensor


def _check_tensors(file: Any, spec: ModelSpec, taps: tuple[str, ...], shape: tuple[int, ...], steps: int) -> None:
    """Raise if a tensor is missing, or has another rank, batch, length or width than its tap; no tensor is read."""
    names = set(file.keys())
    batch, length = shape

    def check(name: str, expected: tuple[int, ...]) -> None:
        if name not in names:
            raise LogitLockError(f"it lacks the tensor {name}")
        stored = file.get_slice(name)
        if stored.get_dtype() not in {
            known.safetensors for known in BY_TORCH.values() if known.torch.is_floating_point
        }:
            raise LogitLockError(f"{name} is of type {stored.get_dtype()}; it must hold floating-point numbers")
        found = tuple(stored.get_shape())
        if found != expected:
            raise LogitLockError(f"{name} has the shape {list(found)}; it must be {list(expected)}")

    for step in range(steps + 1):
        tokens = length if step == 0 else 1
        check(f"{step}.untapped", (batch, tokens, spec.vocab_size))
        for tap in taps:
            if not is_cache_tap(tap):
                check(f"{step}.{tap}", (batch, tokens, spec.taps[tap].width))
                continue
            whole = f"{step}.{tap}.all"
            name, slots = (whole, length + step) if whole in names else (f"{step}.{tap}", tokens)
            check(name, (batch, spec.attention.kv_heads, slots, spec.attention.head_dim))


def trace_origin(path: Path) -> tuple[str, Numerics]:
    """The model that a trace (read by `read_trace`) says its engine was made from, "" if none; and its numerics."""
    metadata = safe_open(path, "pt").metadata()  # type: ignore[no-untyped-call]
    return metadata["model"], "upstream" if metadata["numerics"] == "upstream" else "exact"


def _forwards(file: Any, spec: ModelSpec, prompts: Prompts, tokens: Tensor, taps: tuple[str, ...]) -> Iterator[Forward]:
    batch, length = prompts.ids.shape
    cache = KVCache(spec, batch=batch, capacity=length + tokens.shape[1], device="meta")
    names = set(file.keys())
    before = _Taps(file, names, taps, step=-1)
    for step in range(tokens.shape[1] + 1):
        ids = prompts.ids if step == 0 else tokens[:, step - 1 : step]
        inputs: StepInputs = cache.next_step(ids, prompts.mask if step == 0 else None)
        cache.advance(inputs)
        now = _Taps(file, names, taps, step=step)
        yield Forward(step=step, inputs=inputs, tensors=now, before=before)
        before = now


class _Taps(Mapping[str, Tensor]):
    """The taps of one step, read from the file at each access."""

    def __init__(self, file: Any, names: set[str], taps: tuple[str, ...], *, step: int) -> None:
        self._file, self._names, self._taps, self._step = file, names, taps, step

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._taps:
            raise KeyError(name)
        if not is_cache_tap(name):
            return self._read(f"{self._step}.{name}")
        pieces: list[Tensor] = []
        for step in range(self._step, -1, -1):
            if f"{step}.{name}.all" in self._names:
                pieces.insert(0, self._read(f"{step}.{name}.all"))
                break
            pieces.insert(0, self._read(f"{step}.{name}"))
        return torch.cat(pieces, 2) if pieces else self._read(f"0.{name}")[:, :, :0]

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._taps

    def __iter__(self) -> Iterator[str]:
        return iter(self._taps)

    def __len__(self) -> int:
        return len(self._taps)


class _Untapped(Sequence[Tensor]):
    """Logits of the untapped run, read at each access."""

    def __init__(self, file: Any, count: int) -> None:
        self._file, self._count = file, count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._file.get_tensor(f"{index % self._count}.untapped")

    def __len__(self) -> int:
        return self._count

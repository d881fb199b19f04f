"""The bundle: a self-describing directory that holds everything one engine needs to run.

`bundle.json` lists every other file with its size and SHA-256, so that a bundle that was cut short, edited or mixed
with another one is an error before anything runs, never a wrong answer.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from refmodels.errors import LogitLockError
from refmodels.files import parse_json, read_text, sync, write_directory
from refmodels.json_records import read_record
from refmodels.path_kinds import hint
from refmodels.spec import ModelSpec, Numerics, spec_from_dict

SCHEMA = 1
INFO_NAME = "bundle.json"
MODEL_NAME = "model.onnx"
PLAN_NAME = "engine.plan"
TAPS_PLAN_NAME = "engine.taps.plan"
LAYERS_NAME = "engine.layers.json"
KERNELS_NAME = "kernels.bin"
QUANTIZED_NAME = "quantized"

Precision = Literal["fp32", "fp16", "bf16"]
AttentionMode = Literal["plugin", "decomposed", "native"]
EngineBackend = Literal["tensorrt", "torch-tensorrt"]


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A graph input or output.  `shape` has numbers and the names of dynamic axes."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A range of step shapes that the engine is built for; each pair is (smallest, largest)."""

    name: str
    batch: list[int]
    tokens: list[int]
    capacity: list[int]


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """The tools and the limits of the TensorRT engine in a bundle.

    Attributes:
        backend: the back end that made the plan.
        package: TensorRT's name and version, 'tensorrt_rtx 1.7.1.116'; a plan runs only with these.
        compute_capabilities: GPUs that the plan was built for, such as '8.9'; empty: the package's default.
        plugins: version of each plugin that the plan calls, by name; their namespace is "refmodels".
        max_batch: maximum number of rows per step.
        max_input: maximum number of tokens per row and step.
        max_seq: slots of every cache that the plan is bound to: its capacity is fixed.
        taps_plan: the bundle also holds the plan whose taps are outputs.
    """

    backend: EngineBackend
    package: str
    compute_capabilities: list[str] = field(default_factory=list)
    plugins: dict[str, str] = field(default_factory=dict)
    max_batch: int
    max_input: int
    max_seq: int
    taps_plan: bool = False


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """The content of bundle.json.

    Attributes:
        model: the value of `--model`, without directories.
        spec: `ModelSpec.to_dict()`.
        precision, numerics, attention: how the graph was made.
        max_positions: the longest cache that the position tables in the graph serve.
        checkpoint_hash: identity of the weights (`refmodels.checkpoints.load.checkpoint_hash`).
        tools: versions of the packages that made the bundle.
        taps: tap name -> name of the value in model.onnx.
        inputs, outputs: of the graph, in its order.
        quantized: `export` quantized the model, and `quantized/` in the bundle holds the checkpoint that the graph was
            made from.  `checkpoint_hash` is then that checkpoint's.
        engine: the TensorRT engine beside the graph; None: the bundle runs on the CPU only.
        files: every other file of the bundle, by its path inside it; filled in by `BundleDraft.finish`.
    """

    schema: int = SCHEMA
    model: str
    spec: dict[str, Any]
    precision: Precision
    numerics: Numerics
    attention: AttentionMode
    max_positions: int
    checkpoint_hash: str
    tools: dict[str, str]
    taps: dict[str, str]
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    profiles: list[Profile] = field(default_factory=list)
    float32: list[str] = field(default_factory=list)
    quantized: bool = False
    engine: EngineInfo | None = None
    files: dict[str, FileInfo] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A checked bundle on disk."""

    info: BundleInfo
    directory: Path
    spec: ModelSpec

    @property
    def model_path(self) -> Path:
        return self.directory / MODEL_NAME

    @property
    def quantized_path(self) -> Path | None:
        """The quantized checkpoint inside the bundle, if there is one."""
        return self.directory / QUANTIZED_NAME if self.info.quantized else None

    @property
    def plan_path(self) -> Path:
        """The TensorRT engine; there only if `info.engine` is."""
        return self.directory / PLAN_NAME


class BundleDraft:
    """A bundle being written: put files into `directory`, then call `finish` once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.finished = False

    def finish(self, info: BundleInfo) -> None:
        """Hash every file and write bundle.json."""
        files = {}
        for path in sorted(p for p in self.directory.rglob("*") if p.is_file()):
            sync(path)
            name = path.relative_to(self.directory).as_posix()
            files[name] = FileInfo(sha256=file_sha256(path), bytes=path.stat().st_size)
        info = dataclasses.replace(info, files=files)
        path = self.directory / INFO_NAME
        path.write_text(json.dumps(dataclasses.asdict(info), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(path)
        self.finished = True


def check_output(output: Path, *, overwrite: bool = False) -> None:
    """Refuse an output directory that must not be written (call it early, before the work).

    Raises:
        LogitLockError: the path is a file, or a directory with files in it; with `overwrite`, one that is no bundle.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise LogitLockError(f"the output {output} exists and is not a directory; choose another path")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise LogitLockError(f"the output directory {output} is not empty; choose another one or pass --overwrite")
    if not (output / INFO_NAME).is_file():
        raise LogitLockError(f"the output directory {output} is not empty and holds no bundle; it is not overwritten")


@contextmanager
def write_bundle(output: Path | str, *, overwrite: bool = False) -> Iterator[BundleDraft]:
    """Write a bundle so that it appears whole or not at all.

    Yields a draft in a temporary sibling directory; on success it is renamed to `output`, on any exception removed.

    Args:
        output: the bundle's directory; missing or empty.
        overwrite: replace a bundle that is there.
    Raises:
        LogitLockError: as `check_output`.
    """
    output = Path(output)
    check_output(output, overwrite=overwrite)
    check = functools.partial(check_output, overwrite=overwrite)
    with write_directory(output, "bundle", replace=check) as temporary:
        draft = BundleDraft(temporary)
        yield draft
        if not draft.finished:
            raise RuntimeError("write_bundle: finish(info) was not called")


def read_bundle(path: Path | str, *, verify_hashes: bool = True) -> Bundle:
    """Open a bundle and check all of it.

    Args:
        path: its directory.
        verify_hashes: also read every file to compare its SHA-256 (about a second per gigabyte).
    Raises:
        LogitLockError: there is no bundle, it has another schema version or an unknown or missing key, or a file is
            missing, of another size, changed, or outside the directory.
    """
    directory = Path(path)
    if not directory.is_dir():
        found = "not a directory" if directory.exists() else "no such directory"
        raise LogitLockError(f"there is no bundle at {directory}: {found}{hint(directory)}")
    manifest = directory / INFO_NAME
    if not manifest.is_file():
        raise LogitLockError(f"{directory} is not a bundle: it has no {INFO_NAME}{hint(directory)}")
    data = parse_json(read_text(manifest), manifest)
    if not isinstance(data, dict) or "schema" not in data:
        raise LogitLockError(f"{manifest} is not a bundle's manifest: it has no key 'schema'")
    if data["schema"] != SCHEMA:
        raise LogitLockError(
            f"{directory} has bundle schema {data['schema']!r}, this version reads schema {SCHEMA}; export it again"
        )
    info = read_record(BundleInfo, data, str(manifest))
    needed = [MODEL_NAME]
    if info.engine is not None:
        needed += [PLAN_NAME]
        needed += [TAPS_PLAN_NAME] * info.engine.taps_plan + [KERNELS_NAME] * bool(info.engine.plugins)
    for name in needed:
        if name not in info.files:
            raise LogitLockError(f"{manifest} lists no {name}")
    for name, file in info.files.items():
        _check_file(directory, name, file, verify_hash=verify_hashes)
    spec = spec_from_dict(info.spec)
    for tap in info.taps:
        if tap not in spec.taps:
            raise LogitLockError(f"{manifest} lists the tap {tap!r}, which {spec.variant} does not have")
    return Bundle(info=info, directory=directory, spec=spec)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_file(directory: Path, name: str, file: FileInfo, *, verify_hash: bool) -> None:
    pure = PurePosixPath(name)
    path = directory / name
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name:
        raise LogitLockError(f"{directory / INFO_NAME} lists the file {name!r}, which leaves the bundle's directory")
    # Not resolve(): that raises at a loop of links.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise LogitLockError(f"the bundle's file {path} is a link that leaves the bundle's directory")
    if not path.is_file():
        raise LogitLockError(f"the bundle {directory} lacks its file {name}")
    size = path.stat().st_size
    if size != file.bytes:
        raise LogitLockError(f"the bundle's file {path} has {size} bytes, {INFO_NAME} says {file.bytes}")
    if verify_hash and file_sha256(path) != file.sha256:
        raise LogitLockError(f"the bundle's file {path} has changed: its SHA-256 is not the one in {INFO_NAME}")

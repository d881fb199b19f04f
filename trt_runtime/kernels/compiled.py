"""Kernels compiled ahead of time into one file, and launched through the CUDA driver on raw addresses.

`compile_kernels` needs Triton but no GPU.  The file (`kernels.bin` in a bundle) is a zip archive: `kernels.json`, a
`Manifest`, and the cubins it names, one set for each compute capability, with PTX beside those of the lowest so that
GPUs newer than all of them can compile it when it is loaded.  Compilation and launch both ask `rms_norm` and
`attention` which kernel serves a shape, so that every launched kernel was compiled.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refmodels.attention import inputs_of
from refmodels.errors import LogitLockError
from refmodels.json_records import read_record
from refmodels.spec import ModelSpec
from trt_runtime.kernels import attention, rms_norm
from trt_runtime.kernels.driver import load_function, start
from trt_runtime.kernels.launch import AttentionShape, ElementType, Launch, NormShape, shape_flags

CAPABILITIES = (80, 89, 90, 120)
FORMAT = 1
_MANIFEST = "kernels.json"
# Blocks in y and z: no batch is larger.
_GRID_LIMIT = 65535
# Rotary models may be given caches beyond their max_positions, and long caches have kernels of their own.
_LONG_CACHE = 32768
# The oldest PTX that Triton writes for sm_80 and sm_89: drivers of CUDA 12.0 and later take it.
_PTX_VERSION = 80
# Dynamic shared memory that one block may ask for, in bytes (CUDA C++ programming guide, technical specifications).
_SHARED_LIMITS = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


@dataclass(frozen=True, kw_only=True)
class CompiledKernel:
    """One compiled kernel.

    `key` is its `kernel_key`, `entry` its symbol, `cubin` and `ptx` names in the archive, `threads` the threads per
    block, `shared` the bytes of dynamic shared memory; `scratch` pointers follow the arguments (Triton's, always null
    here); `overlap`: the launch lets it start before the kernel ahead has finished.
    """

    key: str
    entry: str
    cubin: str
    ptx: str | None
    threads: int
    shared: int
    scratch: int
    overlap: bool


@dataclass(frozen=True, kw_only=True)
class Target:
    """The kernels for one compute capability (89 for 8.9)."""

    capability: int
    kernels: list[CompiledKernel]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`sources`: hash of the code that chooses and defines kernels; `triton`: the version that compiled them."""

    format: int
    sources: str
    triton: str
    targets: list[Target]


def kernel_key(launch: Launch) -> str:
    """The identity of a compiled kernel: its function, constants, types of its arguments, warps, stages, options."""
    parameters = (
        f"{name}={launch.constants[name]!r}" if name in launch.constants else f"{name}:{kind}"
        for name, kind in _argument_types(launch).items()
    )
    options = (f"{name}={value!r}" for name, value in sorted(launch.options.items()))
    function = launch.kernel.fn
    return (
        f"{function.__module__}.{function.__name__}({', '.join(parameters)}) warps={launch.warps} "
        f"stages={launch.stages} {' '.join(options)}".rstrip()
    )


def _argument_types(launch: Launch) -> dict[str, str]:
    """Triton's type of every parameter, in order: "constexpr" for constants and for absent arguments."""
    types = {}
    for name in launch.kernel.arg_names:
        value = None if name in launch.constants else launch.arguments[name]
        if value is None:
            types[name] = "constexpr"
        elif name in launch.pointers:
            types[name] = "*" + launch.pointers[name]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    return types


def needed_launches(spec: ModelSpec, dtype: ElementType, capability: int) -> list[Launch]:
    """One launch per kernel that the two operations of a model can need, at any shape, on `capability`."""
    found: list[Launch] = []
    a = spec.attention
    if spec.norm.kind == "rms":
        plain = NormShape(
            rows=1,
            width=spec.hidden_size,
            eps=spec.norm.eps,
            weight_in_float=spec.norm.weight_in_float,
            dtype=dtype,
        )
        formats = [linear for module in spec.linears if (linear := spec.format_of(module)) is not None]
        codes = {linear.input for linear in formats if linear.input_scale == "token"}
        for code in dict.fromkeys((None, *codes)):
            found += rms_norm.variants(replace(plain, quantized=code))
        if a.head_norms:
            found += rms_norm.variants(replace(plain, width=a.head_dim))
    longest = max(spec.max_positions, _LONG_CACHE)
    flags = shape_flags([row.name for row in inputs_of(spec) if row.tensorrt])
    for scale, window in sorted({(spec.scale(layer), spec.window(layer)) for layer in range(spec.layers)}):
        limits = AttentionShape(
            batch=_GRID_LIMIT,
            tokens=longest,
            slots=longest,
            capacity=longest,
            heads=a.heads,
            kv_heads=a.kv_heads,
            head_dim=a.head_dim,
            scale=scale,
            dtype=dtype,
            rotary_dim=spec.rope.dim if spec.rope is not None else 0,
            rotary_interleaved=spec.rope is not None and spec.rope.interleaved,
            window=window,
            **flags,
        )
        found += attention.variants(limits, capability=capability)
    launches = (launch.on(capability) for launch in found)
    return list({kernel_key(launch): launch for launch in launches}.values())


def compile_kernels(
    spec: ModelSpec,
    precision: ElementType,
    *,
    capabilities: Sequence[int] = CAPABILITIES,
    progress: Callable[[int, int], None] | None = None,
) -> bytes:
    """Compile every kernel of a model; the contents of `kernels.bin`.

    Args:
        spec: the model; the kernels serve any batch, number of tokens and cache length up to `max_positions`.
        precision: of weights, activations and caches; tables are fp32 (exact numerics).
        capabilities: compute capabilities, 89 for 8.9; at least 80.
        progress: called with (kernels compiled, kernels in all).
    Raises:
        LogitLockError: Triton is missing or cannot compile for a capability.
    """
    import triton

    wanted = sorted(set(capabilities))
    for capability in wanted:
        if capability not in _SHARED_LIMITS:
            raise LogitLockError(
                f"the kernels cannot be compiled for compute capability {capability / 10}; they can for "
                f"{', '.join(str(c / 10) for c in _SHARED_LIMITS)}"
            )
    work = [(capability, needed_launches(spec, precision, capability)) for capability in wanted]
    total, done = sum(len(launches) for _, launches in work), 0
    files: dict[str, bytes] = {}
    targets = []
    for capability, launches in work:
        # PTX for a capability from 9.0 on names that GPU's own instructions (sm_90a) and compiles for no other.
        keep_ptx = capability == wanted[0] < 90
        kernels: list[CompiledKernel] = []
        for launch in launches:
            kernels.append(_compile(launch, capability, len(kernels), files, keep_ptx=keep_ptx))
            done += 1
            if progress is not None:
                progress(done, total)
        targets.append(Target(capability=capability, kernels=kernels))
    manifest = Manifest(format=FORMAT, sources=_sources(), triton=triton.__version__, targets=targets)
    return _pack({_MANIFEST: json.dumps(dataclasses.asdict(manifest), indent=1).encode(), **files})


def _compile(launch: Launch, capability: int, index: int, files: dict[str, bytes], *, keep_ptx: bool) -> CompiledKernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = _argument_types(launch)
    absent = {name: None for name, kind in types.items() if kind == "constexpr" and name not in launch.constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    options = {"enable_fp_fusion": True, **launch.options, "num_warps": launch.warps, "num_stages": launch.stages}
    if keep_ptx:
        options["ptx_version"] = _PTX_VERSION
    name = launch.kernel.fn.__name__
    with triton.knobs.compilation.scope():
        # Line tables would put this machine's paths into the bundle.
        triton.knobs.compilation.disable_line_info = True
        try:
            built = triton.compile(
                ASTSource(launch.kernel, types, {**launch.constants, **absent}, aligned),
                target=GPUTarget("cuda", capability, 32),
                options=options,
            )
        except Exception as error:
            raise LogitLockError(
                f"Triton {triton.__version__} cannot compile the kernel {name} for compute capability "
                f"{capability / 10}: {error}"
            ) from error
    meta = built.metadata
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", built.asm["ptx"], re.DOTALL)
    assert entry is not None and entry[1] == meta.name, "a kernel has one entry"
    arguments = sum(kind != "constexpr" for kind in types.values())
    # The launcher allocates no memory for these.
    assert meta.global_scratch_size == meta.profile_scratch_size == 0 and meta.num_ctas == 1, name
    if meta.shared > _SHARED_LIMITS[capability] * 1024:
        raise LogitLockError(
            f"the kernel {name} needs {meta.shared} bytes of shared memory; a GPU of compute capability "
            f"{capability / 10} has {_SHARED_LIMITS[capability] * 1024} (head_dim or the hidden size is too large)"
        )
    stem = f"sm_{capability}/{index:02}_{name}"
    files[f"{stem}.cubin"] = built.asm["cubin"]
    if keep_ptx:
        files[f"{stem}.ptx"] = built.asm["ptx"].encode()
    return CompiledKernel(
        key=kernel_key(launch),
        entry=meta.name,
        cubin=f"{stem}.cubin",
        ptx=f"{stem}.ptx" if keep_ptx else None,
        threads=32 * meta.num_warps,
        shared=meta.shared,
        scratch=entry[2].count(".param") - arguments,
        overlap=bool(launch.options.get("launch_pdl", False)),
    )


def _pack(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # ZipInfo: a fixed date
    return stream.getvalue()


@functools.cache
def _sources() -> str:
    """Hash of the files that define and choose kernels: a kernel of other code must not run with this code's grid."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in sorted([*here.glob("attention*.py"), here / "launch.py", here / "rms_norm.py"]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class CompiledKernels:
    """The contents of `kernels.bin`."""

    def __init__(self, manifest: Manifest, files: Mapping[str, bytes], where: str) -> None:
        self.manifest = manifest
        self._files = files
        self._where = where

    @classmethod
    def load(cls, source: Path | bytes) -> CompiledKernels:
        """Read the file, all of it, every checksum checked.

        Raises:
            LogitLockError: it cannot be read, is damaged, or was written by another version.
        """
        where = "the compiled kernels" if isinstance(source, bytes) else str(source)
        try:
            content = source if isinstance(source, bytes) else source.read_bytes()
        except OSError as error:
            raise LogitLockError(f"{where} cannot be read: {error.strerror or error}") from error
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                files = {info.filename: archive.read(info) for info in archive.infolist()}
            record = json.loads(files[_MANIFEST])
        except (
            zipfile.BadZipFile,
            zlib.error,
            struct.error,
            OSError,
            EOFError,
            KeyError,
            ValueError,
            RuntimeError,
        ) as e:
            raise LogitLockError(f"{where} is damaged ({e}); export the bundle again") from e
        version = record.get("format") if isinstance(record, dict) else None
        if version != FORMAT:
            raise LogitLockError(
                f"{where} has format {version!r}; this version reads {FORMAT}: export the bundle again"
            )
        manifest = read_record(Manifest, record, where)
        if manifest.sources != _sources():
            raise LogitLockError(
                f"{where} was compiled from the kernels of another version of LogitLock; export the bundle again"
            )
        named = {name for t in manifest.targets for k in t.kernels for name in (k.cubin, k.ptx) if name is not None}
        if missing := named - files.keys():
            raise LogitLockError(f"{where} is damaged ({min(missing)} is missing); export the bundle again")
        return cls(manifest, files, where)

    def target(self, capability: int) -> tuple[Target, bool]:
        """The set of kernels for a device, and whether it is to be compiled from PTX.

        A cubin runs on its own major compute capability from its own minor on; from 9.0 on Triton's cubins run on
        exactly theirs (sm_90a).  Failing that, PTX compiles for every later capability.

        Raises:
            LogitLockError: there is no such set.
        """
        targets = sorted(self.manifest.targets, key=lambda t: t.capability)
        fitting = [
            t
            for t in targets
            if t.capability == capability or (t.capability // 10 == capability // 10 and t.capability < capability < 90)
        ]
        if fitting:
            return fitting[-1], False
        for target in targets:
            if target.capability <= capability and all(k.ptx is not None for k in target.kernels):
                return target, True
        raise LogitLockError(
            f"{self._where} has no kernels for compute capability {capability / 10}, only for "
            f"{', '.join(str(t.capability / 10) for t in targets)}; export with --compute-capability {capability / 10}"
        )

    def launcher(self, device_capability: int) -> KernelLauncher:
        """Load the kernels for a device into the current CUDA context.

        Not while a CUDA graph is captured.

        Raises:
            LogitLockError: there are none for it, or the driver refuses them.
        """
        target, from_ptx = self.target(device_capability)
        # The driver compiles PTX, up to its terminating zero.
        images = {
            k.key: self._files[k.ptx] + b"\0" if from_ptx and k.ptx else self._files[k.cubin] for k in target.kernels
        }
        return KernelLauncher(target, images)


class KernelLauncher:
    """Launches compiled kernels on raw device addresses, in the CUDA context that was current when it was made.

    It waits for nothing, so a CUDA graph can be captured around it.  Addresses are multiples of 16; `stream` is a
    CUstream's address (0: the default stream).
    """

    def __init__(self, target: Target, images: Mapping[str, bytes]) -> None:
        self.capability = target.capability
        self._kernels = {k.key: k for k in target.kernels}
        self._functions = {
            key: load_function(image, self._kernels[key].entry, self._kernels[key].shared)
            for key, image in images.items()
        }

    def rms_norm(
        self,
        shape: NormShape,
        *,
        x: int,
        weight: int,
        y: int,
        quantized: int | None = None,
        scales: int | None = None,
        stream: int,
    ) -> None:
        """`fused_rms_norm`; arguments as `rms_norm.launches`.

        Raises:
            LogitLockError: a shape whose kernel was not compiled, an address that is no multiple of 16, a CUDA error.
        """
        self._run(rms_norm.launches(shape, x=x, weight=weight, y=y, quantized=quantized, scales=scales), stream)

    def attention(
        self,
        shape: AttentionShape,
        *,
        context: int,
        workspace: int,
        counters: int,
        stream: int,
        **inputs: Any,
    ) -> None:
        """`cached_attention`, arithmetic "exact"; arguments as `attention.launches`; raises as `rms_norm`."""
        memory: dict[str, Any] = {"context": context, "workspace": workspace, "counters": counters}
        launches = attention.launches(shape, **memory, **inputs, capability=self.capability)
        self._run(launches, stream)

    def _run(self, launches: Sequence[Launch], stream: int) -> None:
        for launch in launches:
            launch = launch.on(self.capability)
            key = kernel_key(launch)
            if key not in self._functions:
                raise LogitLockError(
                    f"kernels.bin has no kernel {key}; export the bundle again for this model and shape"
                )
            _launch(launch, self._kernels[key], self._functions[key], stream)


def _launch(launch: Launch, kernel: CompiledKernel, function: Any, stream: int) -> None:
    values: list[Any] = []
    kinds: list[Any] = []
    for name, kind in _argument_types(launch).items():
        if kind == "constexpr":
            continue
        value = launch.arguments[name]
        if kind.startswith("*") and value % 16:
            raise LogitLockError(f"{kernel.entry}: the address of {name}, {value:#x}, is not a multiple of 16")
        if kind == "i32" and not -(2**31) <= value < 2**31:
            raise LogitLockError(f"{kernel.entry}: {name} is {value}, beyond 32 bits")
        values.append(value)
        kinds.append(ctypes.c_void_p if kind.startswith("*") else ctypes.c_float if kind == "fp32" else ctypes.c_int32)
    values += [0] * kernel.scratch
    kinds += [ctypes.c_void_p] * kernel.scratch
    start(
        function,
        kernel.entry,
        (tuple(values), tuple(kinds)),
        grid=launch.grid,
        threads=kernel.threads,
        shared=kernel.shared,
        stream=stream,
        overlap=kernel.overlap,
    )

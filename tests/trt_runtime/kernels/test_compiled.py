"""Kernels compiled ahead of time: compiling, the file, the choice of kernels and what the launcher hands to the driver.

None of it needs a GPU; tests/trt_runtime/kernels/test_hosts.py runs them on one.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refmodels.errors import LogitLockError
from tests.support.kernel_cases import ADDRESSES, SPEC, SPECS, attention_shape, changed, norm_shape
from tests.support.marks import quick_first

pytest.importorskip("triton")
from trt_runtime.kernels import attention, compiled, rms_norm
from trt_runtime.kernels.compiled import CompiledKernels, compile_kernels, kernel_key, needed_launches

CAPABILITIES = (80, 90)


@pytest.fixture(scope="module")
def progress() -> list[tuple[int, int]]:
    return []


@pytest.fixture(scope="module")
def content(progress: list[tuple[int, int]]) -> bytes:
    return compile_kernels(
        SPEC, "fp16", capabilities=CAPABILITIES, progress=lambda done, total: progress.append((done, total))
    )


@pytest.fixture(scope="module")
def kernels(content: bytes) -> CompiledKernels:
    return CompiledKernels.load(content)


def archive(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name: file.read(name) for name in file.namelist()}


def repacked(content: bytes, **manifest: Any) -> bytes:
    files = archive(content)
    record = json.loads(files["kernels.json"]) | manifest
    return compiled._pack(files | {"kernels.json": json.dumps(record).encode()})


# ---- ahead-of-time compilation ----


def test_compiles_without_a_gpu(content: bytes, progress: list[tuple[int, int]], kernels: CompiledKernels) -> None:
    files = archive(content)
    total = progress[-1][1]
    assert progress == [(i + 1, total) for i in range(total)]
    found = {t.capability: t.kernels for t in kernels.manifest.targets}
    assert tuple(found) == CAPABILITIES and total == sum(map(len, found.values())) <= 16
    for capability, those in found.items():
        assert {k.key for k in those} == {kernel_key(x) for x in needed_launches(SPEC, "fp16", capability)}
        for kernel in those:
            assert files[kernel.cubin][:4] == b"\x7fELF" and kernel.entry.encode() in files[kernel.cubin]
            # PTX that drivers of CUDA 12.0 read and every later GPU runs, once.
            assert (kernel.ptx is not None) == (capability == 80)
            if kernel.ptx is not None:
                text = files[kernel.ptx].decode()
                assert ".version 8.0\n" in text and ".target sm_80\n" in text
                parameters = text[text.index(".entry") :].split(")")[0]
                assert parameters.count(".param") == kernel.scratch + arguments_of(kernel.key)
    norm = [k for k in found[80] + found[90] if "rms_norm" in k.key]
    assert [k.overlap for k in norm] == [False, True]
    here = str(Path(compiled.__file__).parents[2]).encode()
    assert not [name for name, data in files.items() if here in data], "a path of this machine"


def arguments_of(key: str) -> int:
    parameters = key[key.index("(") + 1 : key.index(")")].split(", ")
    return sum(":" in p and not p.endswith(":constexpr") for p in parameters)


def test_same_input_same_file(content: bytes) -> None:
    assert compile_kernels(SPEC, "fp16", capabilities=reversed(CAPABILITIES)) == content  # type: ignore[arg-type]


def test_capabilities_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LogitLockError, match=r"compute capability 7\.5; they can for 8\.0, 8\.6"):
        compile_kernels(SPEC, "fp16", capabilities=[75])
    monkeypatch.setitem(compiled._SHARED_LIMITS, 80, 1)
    with pytest.raises(LogitLockError, match=r"needs \d+ bytes of shared memory; a GPU of compute capability 8\.0"):
        compile_kernels(SPEC, "fp16", capabilities=[80])
    broken = SimpleNamespace(capability=80)
    monkeypatch.setattr("triton.compile", lambda *args, **more: broken.missing)
    with pytest.raises(LogitLockError, match=r"Triton 3.* cannot compile the kernel rms_norm_kernel .* 8\.0: "):
        compile_kernels(SPEC, "fp16", capabilities=[80])


@pytest.mark.parametrize("capability", quick_first([80, 86, 89, 90, 120]))
@pytest.mark.parametrize("dtype", quick_first(["fp16", "fp32"]))
def test_every_launch_is_among_the_compiled(capability: int, dtype: Any) -> None:
    """Keys agree for random shapes, of the toys and of shapes like real models'."""
    random_ = random.Random(capability)
    large = [
        changed(SPECS["qwen"], 32, 32, 128, logn_seq_length=2048),
        changed(SPECS["chatglm2"], 32, 2, 128),
        changed(SPECS["gpt"], 48, 1, 128, window=700, window_first_layer=1, scale_by_layer=True),
        changed(SPECS["baichuan"], 24, 4, 192),
    ]
    for spec in (*SPECS.values(), *large):
        known = {kernel_key(launch) for launch in needed_launches(spec, dtype, capability)}
        assert len(known) <= 8
        asked = set()
        for _ in range(150):
            most = 32768  # a cache may be longer than the model's own configuration says
            slots = random_.choice([random_.randint(1, most), random_.randint(1, min(64, most)), most])
            shape = replace(
                attention_shape(
                    spec,
                    layer=random_.randrange(spec.layers),
                    batch=random_.choice([1, 2, random_.randint(1, 300), 5000]),
                    tokens=min(slots, random_.choice([1, 2, 16, 65, random_.randint(1, slots), slots])),
                    slots=slots,
                    capacity=random_.randint(slots, most),
                ),
                dtype=dtype,
            )
            asked |= {
                kernel_key(x.on(capability)) for x in attention.launches(shape, **ADDRESSES, capability=capability)
            }
            norm = replace(norm_shape(spec, rows=random_.choice([1, 2, 77, 100_000])), dtype=dtype)
            if spec.norm.kind == "rms":
                asked |= {kernel_key(x.on(capability)) for x in rms_norm.launches(norm, x=16, weight=32, y=48)}
        assert asked <= known


def test_what_a_key_tells_apart() -> None:
    base = rms_norm.launches(norm_shape(SPEC), x=16, weight=16, y=16)[0]
    same = rms_norm.launches(norm_shape(SPEC, rows=900), x=320, weight=64, y=160)[0]
    assert kernel_key(base) == kernel_key(same)
    others = [
        replace(base, warps=2),
        replace(base, stages=3),
        replace(base, options={}),
        replace(base, constants={**base.constants, "WIDTH": 64}),
        replace(base, pointers={**base.pointers, "y": "bf16"}),
        rms_norm.launches(norm_shape(SPEC, quantized="int8"), x=16, weight=16, y=16, quantized=16, scales=16)[0],
        base.on(80),
    ]
    keys = {kernel_key(launch) for launch in [base, *others]}
    assert len(keys) == 8
    assert base.on(90) is base and base.on(120) is base


# ---- the file ----


def test_file_and_bytes_are_the_same(content: bytes, kernels: CompiledKernels, tmp_path: Path) -> None:
    file = tmp_path / "kernels.bin"
    file.write_bytes(content)
    loaded = CompiledKernels.load(file)
    assert loaded.manifest == kernels.manifest and loaded._files == kernels._files == archive(content)


@pytest.mark.slow
def test_damage_is_one_clear_error(content: bytes, kernels: CompiledKernels) -> None:
    """Every flipped bit either changes nothing that is read (a date in the archive) or is refused."""
    random_ = random.Random(1)
    places = [random_.randrange(len(content)) for _ in range(150)]
    places += range(40)
    places += range(len(content) - 400, len(content))
    refused = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << random_.randrange(8)
        try:
            loaded = CompiledKernels.load(bytes(damaged))
        except LogitLockError as error:
            assert "export the bundle again" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert loaded.manifest == kernels.manifest
            named = {name for t in loaded.manifest.targets for k in t.kernels for name in (k.cubin, k.ptx) if name}
            assert all(loaded._files[name] == kernels._files[name] for name in named)
    assert refused > 150
    for size in (0, 1, 100, len(content) // 2, len(content) - 1):
        with pytest.raises(LogitLockError, match="is damaged"):
            CompiledKernels.load(content[:size])


def test_files_of_other_versions(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(LogitLockError, match="has format 2; this version reads 1: export the bundle again"):
        CompiledKernels.load(repacked(content, format=2))
    with pytest.raises(LogitLockError, match="has format None"):
        CompiledKernels.load(compiled._pack({"kernels.json": b"[]"}))
    with pytest.raises(LogitLockError, match="from the kernels of another version of LogitLock"):
        CompiledKernels.load(repacked(content, sources="0" * 64))
    with pytest.raises(LogitLockError, match="unknown key 'more'"):
        CompiledKernels.load(repacked(content, more=1))
    files = archive(content)
    name = next(name for name in files if name.endswith(".cubin"))
    with pytest.raises(LogitLockError, match=rf"is damaged \({name} is missing\)"):
        CompiledKernels.load(compiled._pack({n: data for n, data in files.items() if n != name}))
    with pytest.raises(LogitLockError, match=r"nowhere\.bin cannot be read: No such file"):
        CompiledKernels.load(tmp_path / "nowhere.bin")


def with_targets(content: bytes, capabilities: list[int]) -> CompiledKernels:
    """The same kernels, said to be for other capabilities; the first has PTX where compiling would have made it."""
    targets = json.loads(archive(content)["kernels.json"])["targets"]
    first, other = targets[0]["kernels"], [k | {"ptx": None} for k in targets[0]["kernels"]]
    lowest = min(capabilities)
    return CompiledKernels.load(
        repacked(
            content,
            targets=[{"capability": c, "kernels": first if c == lowest < 90 else other} for c in capabilities],
        )
    )


def test_choice_by_capability(content: bytes) -> None:
    everything = with_targets(content, [80, 89, 90, 120])
    chosen = {c: everything.target(c) for c in (80, 86, 87, 89, 90, 100, 120, 121)}
    assert {c: (t.capability, ptx) for c, (t, ptx) in chosen.items()} == {
        80: (80, False),
        86: (80, False),
        87: (80, False),
        89: (89, False),
        90: (90, False),
        # Nothing of that major version, or a cubin of exactly another minor one: PTX.
        100: (80, True),
        120: (120, False),
        121: (80, True),
    }
    only = with_targets(content, [89, 90])
    assert only.target(120)[0].capability == 89 and only.target(120)[1]
    with pytest.raises(LogitLockError, match=r"no kernels for compute capability 8\.6, only for 8\.9, 9\.0; export"):
        only.target(86)
    with pytest.raises(LogitLockError, match=r"no kernels for compute capability 12\.1, only for 9\.0"):
        with_targets(content, [90]).target(121)


# ---- the launcher, on a driver that only writes down ----


class FakeDriver:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from cuda.bindings import driver

        self.real = driver
        self.images: list[bytes] = []
        self.launched: list[dict[str, Any]] = []
        self.shared: dict[bytes, int] = {}
        self.code = driver.CUresult.CUDA_SUCCESS
        ok = driver.CUresult.CUDA_SUCCESS
        for name, result in (
            ("cuModuleLoadData", lambda image: self.images.append(image) or (ok, len(self.images))),
            ("cuModuleGetFunction", lambda module, name: (ok, (module, name))),
            ("cuFuncSetAttribute", lambda function, kind, value: self.shared.update({function: value}) or (ok,)),
            ("cuLaunchKernelEx", self.launch),
            ("cuGetErrorName", lambda code: (ok, code.name.encode())),
        ):
            monkeypatch.setattr(driver, name, result)

    def launch(self, config: Any, function: Any, parameters: Any, extra: int) -> Any:
        self.launched.append(
            {
                "function": function,
                "grid": (config.gridDimX, config.gridDimY, config.gridDimZ),
                "threads": (config.blockDimX, config.blockDimY, config.blockDimZ),
                "shared": config.sharedMemBytes,
                "stream": int(config.hStream),
                "overlap": [int(a.value.programmaticStreamSerializationAllowed) for a in config.attrs],
                "values": parameters[0],
                "types": [t.__name__ for t in parameters[1]],
            }
        )
        return (self.code,)


def test_launcher_hands_over_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch, kernels: CompiledKernels) -> None:
    driver = FakeDriver(monkeypatch)
    launcher = kernels.launcher(90)
    assert all(image[:4] == b"\x7fELF" for image in driver.images)
    launcher.rms_norm(norm_shape(SPEC, rows=5), x=160, weight=320, y=480, stream=77)
    (call,) = driver.launched
    assert call["grid"] == (5, 1, 1) and call["stream"] == 77 and call["overlap"] == [1]
    assert call["values"] == (160, 320, 480, SPEC.norm.eps, 0, 0) and call["threads"] == (32, 1, 1)
    assert call["types"] == ["c_void_p", "c_void_p", "c_void_p", "c_float", "c_void_p", "c_void_p"]

    shape = attention_shape(SPEC, tokens=7, slots=21)
    given = ADDRESSES | {"query_scale": None, "alibi_slopes": None}
    launcher.attention(shape, **given, stream=5)
    launches = attention.launches(shape, **given, capability=90)
    assert len(launches) == len(driver.launched) - 1 > 1
    by_key = {k.key: k for k in kernels.target(90)[0].kernels}
    for launch, call in zip(launches, driver.launched[1:], strict=True):
        kernel = by_key[kernel_key(launch)]
        arguments = [launch.arguments[n] for n in launch.kernel.arg_names if n in launch.arguments]
        assert call["values"] == (*arguments, *[0] * kernel.scratch)
        assert call["function"][1].decode() == kernel.entry == launch.kernel.__name__
        assert call["grid"] == launch.grid and call["threads"] == (32 * launch.warps, 1, 1)
        assert call["shared"] == driver.shared[call["function"]] == kernel.shared
        assert call["stream"] == 5 and call["overlap"] == ([1] if launch.options.get("launch_pdl") else [])


def test_launcher_errors(monkeypatch: pytest.MonkeyPatch, content: bytes, kernels: CompiledKernels) -> None:
    driver = FakeDriver(monkeypatch)
    launcher = kernels.launcher(100)
    assert launcher.capability == 80
    assert all(image.endswith(b"\0") and b".target sm_80" in image for image in driver.images)
    shape = norm_shape(SPEC)
    with pytest.raises(LogitLockError, match="the address of y, 0x38, is not a multiple of 16"):
        launcher.rms_norm(shape, x=16, weight=32, y=56, stream=0)
    with pytest.raises(LogitLockError, match="slots is 3000000000, beyond 32 bits"):
        launcher.attention(attention_shape(SPEC, slots=3 * 10**9, capacity=3 * 10**9), **ADDRESSES, stream=0)
    with pytest.raises(LogitLockError, match=r"no kernel .*WIDTH=64.*; export the bundle again"):
        launcher.rms_norm(replace(shape, width=64), x=16, weight=32, y=48, stream=0)
    asked: list[int] = []
    monkeypatch.setattr(attention, "launches", lambda *a, capability, **more: asked.append(capability) or [])
    launcher.attention(attention_shape(SPEC), **ADDRESSES, stream=0)
    assert driver.launched == [] and asked == [80]
    driver.code = driver.real.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(LogitLockError, match="launching rms_norm_kernel: CUDA error CUDA_ERROR_INVALID_VALUE"):
        launcher.rms_norm(shape, x=16, weight=32, y=48, stream=0)

"""The bundle format: whole or not at all, checked before anything runs, and never outside its directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import refmodels
from refmodels.errors import LogitLockError
from tests.support.goldens import GOLDENS
from trt_runtime.bundle import (
    SCHEMA,
    BundleInfo,
    EngineInfo,
    Profile,
    TensorInfo,
    check_output,
    read_bundle,
    write_bundle,
)

SPEC = refmodels.resolve(GOLDENS / "qwen_b1").spec


def info() -> BundleInfo:
    return BundleInfo(
        model="qwen",
        spec=SPEC.to_dict(),
        precision="fp16",
        numerics="exact",
        attention="plugin",
        max_positions=64,
        checkpoint_hash="0" * 64,
        tools={"onnx": "1"},
        taps={"embed": "embed"},
        inputs=[TensorInfo(name="input_ids", dtype="int64", shape=["batch", "tokens"])],
        outputs=[TensorInfo(name="logits", dtype="float16", shape=["batch", "wanted", 64])],
        profiles=[Profile(name="decode", batch=[1, 8], tokens=[1, 1], capacity=[1, 64])],
        engine=EngineInfo(backend="tensorrt", package="tensorrt_rtx 1.7.1.116", max_batch=8, max_input=64, max_seq=64),
    )


def write(output: Path, *, overwrite: bool = False, content: bytes = b"graph") -> Path:
    with write_bundle(output, overwrite=overwrite) as draft:
        (draft.directory / "model.onnx").write_bytes(content)
        (draft.directory / "engine.plan").write_bytes(b"plan")
        (draft.directory / "sub").mkdir()
        (draft.directory / "sub" / "vocab.json").write_text("{}")
        draft.finish(info())
    return output


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "bundle.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_written_bundle_reads_back(tmp_path: Path) -> None:
    bundle = read_bundle(write(tmp_path / "new" / "b"))
    assert bundle.spec == SPEC
    assert set(bundle.info.files) == {"engine.plan", "model.onnx", "sub/vocab.json"}
    assert bundle.info.files["model.onnx"].bytes == 5
    assert bundle.info.engine == info().engine and bundle.plan_path.read_bytes() == b"plan"
    assert bundle.info.profiles == info().profiles and bundle.info.inputs == info().inputs
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["b"], "nothing temporary is left beside it"
    assert (tmp_path / "new" / "b").stat().st_mode & 0o077, "readable as any directory, not only by its owner"


def test_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), write_bundle(tmp_path / "b") as draft:
        (draft.directory / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="finish"), write_bundle(tmp_path / "b"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_output_must_be_empty_or_a_bundle_to_overwrite(tmp_path: Path) -> None:
    output = write(tmp_path / "b")
    with pytest.raises(LogitLockError, match="not empty"):
        write(output, content=b"other")
    assert (output / "model.onnx").read_bytes() == b"graph"
    write(output, overwrite=True, content=b"other")
    assert (output / "model.onnx").read_bytes() == b"other"
    (tmp_path / "empty").mkdir()
    read_bundle(write(tmp_path / "empty"))
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious.txt").write_text("x")
    with pytest.raises(LogitLockError, match="no bundle"):
        check_output(home, overwrite=True)
    with pytest.raises(LogitLockError, match="not a directory"):
        check_output(home / "precious.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "empty", "home"]


def test_failed_overwrite_keeps_the_old_bundle(tmp_path: Path) -> None:
    output = write(tmp_path / "b")
    with pytest.raises(ValueError, match="stop"), write_bundle(output, overwrite=True):
        raise ValueError("stop")
    assert read_bundle(output).info.model == "qwen"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_missing_pieces(tmp_path: Path) -> None:
    with pytest.raises(LogitLockError, match="no such directory"):
        read_bundle(tmp_path / "nowhere")
    with pytest.raises(LogitLockError, match=r"not a bundle: it has no bundle\.json"):
        read_bundle(tmp_path)
    output = write(tmp_path / "b")
    (output / "sub" / "vocab.json").unlink()
    with pytest.raises(LogitLockError, match=r"lacks its file sub/vocab\.json"):
        read_bundle(output)


@pytest.mark.parametrize(("content", "message"), [(b"grapH", "has changed"), (b"grap", "has 4 bytes")])
def test_changed_file(tmp_path: Path, content: bytes, message: str) -> None:
    output = write(tmp_path / "b")
    (output / "model.onnx").write_bytes(content)
    with pytest.raises(LogitLockError, match=message):
        read_bundle(output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=SCHEMA + 1), f"schema {SCHEMA + 1}, this version reads schema {SCHEMA}"),
        (lambda d: d.update(extra=1), "unknown key 'extra'"),
        (lambda d: d["spec"].update(extra=1), "unknown key 'extra'"),
        (lambda d: d.pop("taps"), "lacks the key 'taps'"),
        (lambda d: d.update(precision="fp8"), "'fp8'.*one of 'fp32', 'fp16', 'bf16'"),
        (lambda d: d.update(max_positions="many"), "max_positions is 'many'.*int"),
        (lambda d: d.update(max_positions=True), "max_positions is True.*int"),
        (lambda d: d["inputs"][0].update(shape=[1.5]), r"shape\[0\] is 1.5"),
        (lambda d: d.update(files={}), r"lists no model\.onnx"),
        (lambda d: d["engine"].update(max_seq=None), r"engine\.max_seq is None"),
        (lambda d: d["engine"].update(backend="tvm"), r"engine\.backend is 'tvm'"),
        (lambda d: d["engine"].pop("package"), "engine lacks the key 'package'"),
        (lambda d: d["engine"].update(taps_plan=True), r"lists no engine\.taps\.plan"),
        (lambda d: d["engine"].update(plugins={"FusedRmsNorm": "1"}), r"lists no kernels\.bin"),
        (lambda d: d["files"].pop("engine.plan"), r"lists no engine\.plan"),
        (lambda d: d.pop("schema"), "no key 'schema'"),
        (lambda d: d["taps"].update(nonsense="x"), "lists the tap 'nonsense', which qwen does not have"),
    ],
)
def test_damaged_manifest(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    output = write(tmp_path / "b")
    edit(output, change)
    with pytest.raises(LogitLockError, match=message):
        read_bundle(output)


def test_manifest_that_is_no_json(tmp_path: Path) -> None:
    output = write(tmp_path / "b")
    (output / "bundle.json").write_text('{"schema"')
    with pytest.raises(LogitLockError, match="not valid JSON"):
        read_bundle(output)


def test_a_loop_of_links_is_a_missing_file(tmp_path: Path) -> None:
    output = write(tmp_path / "b")
    (output / "model.onnx").unlink()
    (output / "model.onnx").symlink_to("model.onnx")
    with pytest.raises(LogitLockError, match=r"lacks its file model\.onnx"):
        read_bundle(output)


@pytest.mark.parametrize("name", ["../outside", "sub/../../outside", "/etc/hostname", "c:\\x", "link"])
def test_no_file_leaves_the_directory(tmp_path: Path, name: str) -> None:
    output = write(tmp_path / "b")
    (tmp_path / "outside").write_bytes(b"graph")
    (output / "link").symlink_to(tmp_path / "outside")
    edit(output, lambda d: d["files"].update({name: d["files"]["model.onnx"]}))
    with pytest.raises(LogitLockError, match="leaves the bundle's directory"):
        read_bundle(output)

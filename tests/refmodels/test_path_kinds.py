"""An error about a path says what the path really is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from refmodels.checkpoints.load import TOYS
from refmodels.path_kinds import MODEL, hint
from tests.support.command import logitlock
from tests.support.goldens import GOLDENS

CASE = GOLDENS / "qwen_b1"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = tmp_path / "bundle"
    directory.mkdir()
    for name in ("bundle.json", "model.onnx"):
        (directory / name).write_text("{}")
    shutil.copyfile(CASE / "config.json", directory / "config.json")
    return directory


def test_kinds(bundle: Path, tmp_path: Path) -> None:
    made = {"a.gguf": b"GGUF\3\0\0\0", "a.pt": b"PK\3\4", "a.onnx": b"\x08", "a.engine": b"x", "a.safetensors": b"x"}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "nest" / "inner").mkdir(parents=True)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    expected = {
        bundle: "a bundle", bundle / "model.onnx": f"a file of the bundle {bundle}", CASE: "a golden case",
        TOYS / "qwen": "a Hugging Face model", tmp_path / "a.gguf": "a GGUF file", tmp_path / "a.pt": "a PyTorch",
        tmp_path / "a.onnx": "an ONNX file", tmp_path / "a.engine": "a TensorRT plan", tmp_path / "lora": "a PEFT",
        tmp_path / "a.safetensors": "a file of tensors", tmp_path / "empty": "an empty directory",
        tmp_path / "nest": "a directory that holds only inner",
    }  # fmt: skip
    for path, kind in expected.items():
        assert hint(path).startswith(f"; it is {kind}"), path
    for path in (tmp_path / "absent", Path(__file__), "x" * 5000, "a\0b"):
        assert hint(path) == ""
    assert hint(TOYS / "qwen", but=MODEL) == ""


def test_errors_have_the_hint(bundle: Path, tmp_path: Path) -> None:
    toy, out = TOYS / "qwen", tmp_path / "out"
    said = "it is a bundle, made by logitlock export"
    logitlock("export", "--model", bundle, "--output", out).assert_bad_input(said)
    logitlock("verify", bundle).assert_bad_input(said)
    logitlock("generate", "--bundle", toy, "--prompt", "a").assert_bad_input("it is a Hugging Face model")
    logitlock("generate", "--bundle", CASE, "--prompt", "a").assert_bad_input("it is a golden case")
    logitlock("inspect", bundle / "model.onnx").assert_bad_input("not a directory; it is a file of the bundle")
    logitlock("diff", toy, "--model", "qwen").assert_bad_input("it is a Hugging Face model", "hf:DIR")
    logitlock("diff", "qwen", "--model", "qwen").assert_bad_input("it is a model: name it with --model")
    logitlock("diff", "reference", "--model", bundle / "model.onnx").assert_bad_input("it is a file of the bundle")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "gguf" / "README.md").write_text("")
    logitlock("export", "--model", tmp_path / "gguf", "--output", out).assert_bad_input("with m.gguf, a GGUF file")


def test_a_link_that_leads_nowhere_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("lost").symlink_to("absent")
    for name in ("loop", "lost"):
        logitlock("check", name).assert_bad_input(f"{name} is a link that leads nowhere")

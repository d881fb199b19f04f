"""A broken graph under correct hashes, or one that fails while it runs, gives one sentence of error."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from debug.sides import diff
from export.bundle import export_model
from refmodels.errors import LogitLockError
from tests.support.command import logitlock
from tests.support.goldens import case_source, needs_opset_24
from tests.support.marks import quick_first
from trt_runtime.bundle import INFO_NAME, MODEL_NAME, FileInfo, file_sha256
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
from trt_runtime.onnxruntime.errors import said


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(case_source("qwen2_b1"), precision="fp32", output=tmp_path_factory.mktemp("good") / "b")


def hashed_again(directory: Path) -> None:
    data = json.loads((directory / INFO_NAME).read_text())
    for name in data["files"]:
        path = directory / name
        data["files"][name] = dataclasses.asdict(FileInfo(sha256=file_sha256(path), bytes=path.stat().st_size))
    (directory / INFO_NAME).write_text(json.dumps(data))


def edited(edit: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        edit(model)
        path.write_bytes(model.SerializeToString())

    return apply


def cycle(model: onnx.ModelProto) -> None:
    first, last = model.graph.node[0], model.graph.node[-1]
    first.input[0] = last.output[0]


def recursive(model: onnx.ModelProto) -> None:
    function = model.functions[0]
    function.node.append(onnx.helper.make_node(function.name, function.input, function.output, domain=function.domain))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "cut data": lambda path: (f := path.with_name("model.onnx.data")).write_bytes(f.read_bytes()[:100]),
    "unknown op": edited(lambda m: setattr(m.graph.node[3], "op_type", "Nonsense")),
    "cycle": edited(cycle),
    "no functions": edited(lambda m: m.ClearField("functions")),
    "recursive function": edited(recursive),
    "future ir_version": edited(lambda m: setattr(m, "ir_version", 99)),
    "no nodes": edited(lambda m: m.graph.ClearField("node")),
    "negative offset": edited(
        lambda m: [setattr(e, "value", "-4") for e in m.graph.initializer[0].external_data if e.key == "offset"]
    ),
    "length beyond the file": edited(
        lambda m: [setattr(e, "value", str(3 << 30)) for e in m.graph.initializer[0].external_data if e.key == "length"]
    ),
}


@pytest.mark.parametrize("damage", quick_first(DAMAGE, 3))
def test_damaged_graphs(good: Path, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(good, bundle)
    DAMAGE[damage](bundle / MODEL_NAME)
    hashed_again(bundle)
    with pytest.raises(LogitLockError) as caught:
        engine = OnnxRuntimeEngine(bundle)
        engine.prefill(torch.arange(9)[None], engine.new_cache(batch=1, capacity=16))
    text = str(caught.value)
    assert str(bundle) in text and ".cc" not in text and "\\n" not in text and len(text) < 600
    logitlock("diff", bundle, "--model", case_source("qwen2_b1").directory, "--steps", "1").assert_bad_input(
        str(bundle)
    )
    looked = logitlock("inspect", bundle)
    if looked.code:
        looked.assert_bad_input(str(bundle))
    # Nor do the libraries print anything beside the sentence.
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@needs_opset_24
def test_a_run_that_fails(good: Path, tmp_path: Path) -> None:
    """The cache is written one slot late: at its end that is outside of it."""
    bundle = tmp_path / "b"
    shutil.copytree(good, bundle)

    def late(model: onnx.ModelProto) -> None:
        function = next(f for f in model.functions if f.name == "CachedAttention")
        one = onnx.helper.make_node("Constant", [], ["one_late"], value_int=1)
        add = onnx.helper.make_node("Add", ["cache_lengths", "one_late"], ["late_lengths"])
        for node in function.node:
            if node.op_type == "TensorScatter":
                node.input[2] = "late_lengths"
        for node in (add, one):
            function.node.insert(0, node)

    edited(late)(bundle / MODEL_NAME)
    hashed_again(bundle)
    engine = OnnxRuntimeEngine(bundle)
    with pytest.raises(LogitLockError, match=r"ONNX Runtime cannot run .*model\.onnx: ") as caught:
        engine.prefill(torch.arange(9)[None], engine.new_cache(batch=1, capacity=9))
    assert ".cc" not in str(caught.value)
    # A diff has spare slots, so that it can say what is wrong.
    found = diff(str(bundle), model=str(case_source("qwen2_b1").directory), steps=2)
    assert found.verdict == "diverged" and found.culprits[0].tap == "blocks.0.key"
    assert found.culprits[0].diagnosis[0].fault == "cache written at the wrong slot: +1"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : No graph was found.", "No graph was found."),
        (
            "[ONNXRuntimeError] : 1 : FAIL : /onnxruntime_src/core/graph/model.cc:203 "
            "onnxruntime::Model::Model(onnx::ModelProto&&, const PathString&) Unknown version.\nmore",
            "Unknown version.",
        ),
        ("", "ValueError"),
    ],
)
def test_sentences(text: str, clean: str) -> None:
    assert said(ValueError(text)) == clean

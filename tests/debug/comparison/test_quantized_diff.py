"""The diff on quantized bundles: no alarm on right ones, planted faults of quantized weights found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import refmodels
from debug.bisect import find_precision_plan
from debug.capture.prompts import random_prompts
from debug.comparison.faults import CATALOGUE, quantized
from debug.comparison.results import DiffResult
from debug.sides import diff_bundle
from export.bundle import export_model
from export.quantization.schemes import QuantizeOptions
from refmodels.errors import LogitLockError
from tests.support.command import logitlock
from tests.support.goldens import GOLDENS, case_source
from tests.support.mutate import mutated
from tests.support.paths import GOLDENS_MODELOPT
from trt_runtime.bundle import read_bundle

CASE = "qwen2_b1"
MODEL = str(GOLDENS / CASE)
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("fp16", {"scheme": "int8"}),
    "int4-zeros": ("bf16", {"scheme": "int4", "group": 16, "symmetric": False}),
    "int4-awq": ("fp16", {"scheme": "int4-awq", "group": 16}),
    "smoothquant": ("fp32", {"scheme": "smoothquant"}),
    "w4a8-group": ("fp32", {"scheme": "int4", "group": 16, "inputs": "group"}),
    "fp8-tensor": ("fp16", {"scheme": "fp8", "inputs": "tensor", "head": True}),
    "kv-int8": ("fp32", {"scheme": None, "cache": "int8"}),
    "kv-fp8": ("fp16", {"scheme": "int8", "cache": "fp8"}),
}


def exported(directory: Path, dtype: str, options: dict[str, Any], model: str = MODEL) -> Path:
    scheme = options["scheme"]
    return export_model(
        model,
        precision=scheme or dtype,
        dtype=dtype if scheme else None,  # type: ignore[arg-type]
        quantize=QuantizeOptions(**options),
        output=directory / "bundle",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_right_bundles_are_aligned(name: str, tmp_path: Path) -> None:
    result = diff_bundle(exported(tmp_path, *RIGHT[name]), MODEL, steps=4)
    assert result.verdict == "aligned", result.culprits
    assert max(error.ratio for error in result.taps) < 8


def weights(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    def fault(model: onnx.ModelProto) -> None:
        stored = next(i for i in model.graph.initializer if i.name == name)
        before = numpy_helper.to_array(stored)
        stored.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(before)).astype(before.dtype), name))

    return fault


def exchanged(codes: np.ndarray) -> np.ndarray:
    return codes.reshape(len(codes), -1, 2)[:, :, ::-1].reshape(codes.shape)


LAYER = "blocks.1.mlp.up"
PLANTED = {
    "nibbles": (f"{LAYER}.weight", exchanged, "codes unpacked in the wrong order: the two of a byte exchanged"),
    "offset binary": (
        f"{LAYER}.weight",
        lambda codes: np.where(codes.astype(np.int8) < 0, codes.astype(np.int8) + 8, codes.astype(np.int8) - 8),
        "codes unpacked in the wrong order: offset binary read as two's complement",
    ),
    "next group": (f"{LAYER}.scale", lambda s: np.roll(s, 1, 1), "scales of the wrong group: of the group before"),
    "groups by rows": (
        f"{LAYER}.scale",
        lambda s: s.reshape(s.shape[::-1]).T,
        "scales of the wrong group: read as [groups, out]",
    ),
    "row": (f"{LAYER}.scale", lambda s: np.roll(s, 1, 0), "scales of the wrong group: of the row before"),
    "zero point": (f"{LAYER}.zero", lambda z: z.astype(np.int8) + 1, "zero point wrong: off by +1"),
}


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"scheme": "int4", "group": 16, "symmetric": False}
    return exported(tmp_path_factory.mktemp("int4"), "fp16", options)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_named(name: str, int4: Path, tmp_path: Path) -> None:
    initializer, change, expected = PLANTED[name]
    result = diff_bundle(mutated(int4, tmp_path / "wrong", weights(initializer, change)), MODEL, steps=1)
    assert first(result) == LAYER
    named = [diagnosis.fault for diagnosis in result.culprits[0].diagnosis]
    assert expected in named, named


def first(result: DiffResult) -> str | None:
    assert result.verdict == "diverged"
    return result.culprits[0].tap


@pytest.mark.slow
def test_inputs_that_are_not_quantized_are_named(tmp_path: Path) -> None:
    bundle = exported(tmp_path, "fp32", {"scheme": "int8", "inputs": "tensor"})

    def floats(model: onnx.ModelProto) -> None:
        """x / scale goes on without being rounded."""
        rounding = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.name.startswith(LAYER))
        reader = next(n for n in model.graph.node if rounding.output[0] in n.input)
        rounding.op_type = "Div"
        del rounding.attribute[:]
        reader.op_type = "Mul"
        del reader.attribute[:]

    result = diff_bundle(mutated(bundle, tmp_path / "wrong", floats), MODEL, steps=1)
    assert first(result) == LAYER
    assert "input quantized otherwise: not at all" in [d.fault for d in result.culprits[0].diagnosis]


@pytest.mark.slow
def test_a_pre_quant_scale_that_is_ignored_is_named(tmp_path: Path) -> None:
    model = str(GOLDENS_MODELOPT / "int4_awq")
    bundle = export_model(model, precision="fp32", backend="onnxruntime", output=tmp_path / "bundle")
    layer = "blocks.0.attn.out"
    fault = weights(f"{layer}.pre_quant_scale", np.ones_like)
    result = diff_bundle(mutated(bundle, tmp_path / "wrong", fault), model, steps=1)
    assert first(result) == layer
    assert "pre-quant scale ignored" in [d.fault for d in result.culprits[0].diagnosis]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["key", "value"])
def test_a_wrong_scale_of_the_cache_is_found(part: str, tmp_path: Path) -> None:
    bundle = exported(tmp_path, "fp32", {"scheme": None, "cache": "int8"})
    fault = weights(f"blocks.1.attn.{part}_scale", lambda s: s * 1.5)
    assert first(diff_bundle(mutated(bundle, tmp_path / "wrong", fault), MODEL, steps=1)) == f"blocks.1.{part}"


def test_every_fault_of_codes_is_planted() -> None:
    ours = {fault.name for fault in CATALOGUE if fault.variants.__module__ == quantized.__name__}
    planted = {expected.split(":")[0] for _, _, expected in PLANTED.values()}
    assert ours == planted | {"input quantized otherwise", "pre-quant scale ignored"}


# The model before quantization as the reference


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int4-awq", "int4-gptq", "smoothquant"])
def test_what_codes_cost_shows_at_their_layers_only(scheme: str, tmp_path: Path) -> None:
    options = {"scheme": scheme, "group": 16 if "int4" in scheme else None}
    bundle = exported(tmp_path, "fp32", options)
    result = diff_bundle(bundle, MODEL, steps=1, floats=True)
    linears = {name for name in refmodels.resolve(MODEL).spec.linears if name != "head"}
    assert {culprit.tap for culprit in result.culprits} == linears
    # The layers' own reports, of other inputs, are of about this size.
    checkpoint = read_bundle(bundle).quantized_path
    assert checkpoint is not None
    reports = json.loads((checkpoint / "quantization.json").read_text())["layers"]
    for error in result.taps:
        if error.tap in linears and error.step == 0 and reports[error.tap]["error"]:
            assert 0.4 < error.local / reports[error.tap]["error"] ** 0.5 < 2.5, error.tap


@pytest.mark.slow
def test_floats_want_the_model_before(int4: Path, tmp_path: Path) -> None:
    checkpoint = read_bundle(int4).quantized_path
    with pytest.raises(LogitLockError, match="is quantized itself"):
        diff_bundle(int4, str(checkpoint), floats=True)
    plain = export_model(MODEL, precision="fp32", output=tmp_path / "plain")
    with pytest.raises(LogitLockError, match="is not a bundle that export quantized"):
        diff_bundle(plain, MODEL, floats=True)
    with pytest.raises(LogitLockError, match="cache, which no float cache"):
        diff_bundle(exported(tmp_path, "fp32", {"scheme": "int8", "cache": "int8"}), MODEL, floats=True)


# What belongs to what


@pytest.mark.slow
def test_the_bundle_brings_its_checkpoint(int4: Path, tmp_path: Path) -> None:
    """Without --model too; and an engine of an already quantized checkpoint is one of that checkpoint."""
    bundle = read_bundle(int4)
    assert bundle.quantized_path is not None
    again = export_model(bundle.quantized_path, precision="fp16", output=tmp_path / "again")
    assert not read_bundle(again).info.quantized
    assert diff_bundle(again, str(bundle.quantized_path), steps=1).verdict == "aligned"
    with pytest.raises(LogitLockError, match="is quantized otherwise than qwen2_b1"):
        diff_bundle(again, MODEL)


def test_another_model_is_refused(int4: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((GOLDENS / CASE / name).read_bytes())
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(LogitLockError, match="was quantized from another checkpoint"):
        diff_bundle(int4, str(other))


def test_bisect_refuses_quantized_models(int4: Path) -> None:
    path = read_bundle(int4).quantized_path
    assert path is not None
    source = refmodels.resolve(path)
    prompts = random_prompts(source.spec.vocab_size, (9,), seed=0)
    with pytest.raises(LogitLockError, match="is quantized; bisect"):
        find_precision_plan(source, precision="fp16", budget=1e-3, prompts=prompts)


@pytest.mark.slow
def test_verbs(tmp_path: Path) -> None:
    """quantize, export of what it wrote, export in one step, and the JSON of all three."""
    made = logitlock("quantize", "--model", MODEL, "--precision", "int8", "--output", str(tmp_path / "q"), "--json")
    assert made.code == 0, made.err
    assert json.loads(made.out)["quantization"]["groups"][0]["format"]["weight"] == "int8"
    shown = logitlock("export", "--model", str(tmp_path / "q"), "--precision", "bf16", "--backend", "onnxruntime",
                      "--output", str(tmp_path / "two"), "--json")  # fmt: skip
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["quantization"] == "int8 weights by channel (10 layers)"
    once = logitlock("export", "--model", MODEL, "--precision", "int8", "--dtype", "bf16", "--kv-cache", "int8",
                     "--output", str(tmp_path / "one"), "--json")  # fmt: skip
    assert once.code == 0, once.err
    found = json.loads(once.out)
    # TensorRT has no int8 cache, so that the default is the backend that has.
    assert found["backend"] == "onnxruntime" and found["precision"] == "bf16" and "int8 cache" in found["quantization"]
    refused = logitlock("export", "--model", MODEL, "--dtype", "fp32", "--output", str(tmp_path / "no"))
    assert refused.code == 2 and "--dtype" in refused.err and not (tmp_path / "no").exists()


def test_case_source_is_the_directory() -> None:
    assert case_source(CASE).spec == refmodels.resolve(MODEL).spec
    assert torch.get_num_threads() == 1

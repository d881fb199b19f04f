"""Words of `--precision` become a dtype and a scheme in one place, and every option of an export is a field once."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import refmodels
from export.bundle import export_model
from export.cli import export
from export.options import ExportOptions
from export.precision import Precision
from export.precision_plan import read_plan
from export.quantization.method import MethodOptions
from export.quantization.schemes import QuantizeOptions
from refmodels.errors import LogitLockError
from tests.support.goldens import GOLDENS


@pytest.mark.parametrize(
    ("word", "dtype", "expected"),
    [
        ("fp32", None, Precision(dtype="fp32")),
        ("bf16", None, Precision(dtype="bf16")),
        ("int4-awq", None, Precision(dtype="fp16", scheme="int4-awq")),
        ("int4-awq", "bf16", Precision(dtype="bf16", scheme="int4-awq")),
        ("fp8", "fp32", Precision(dtype="fp32", scheme="fp8")),
    ],
)
def test_precision_words(word: str, dtype: str | None, expected: Precision) -> None:
    assert Precision.parse(word, dtype=dtype) == expected


@pytest.mark.parametrize(
    ("word", "dtype", "message"),
    [
        ("fp9", None, "--precision is 'fp9'; it must be one of fp32, fp16, bf16, int8, int4, int4-awq, int4-gptq, "),
        ("int8", "fp9", "--dtype is 'fp9'; it must be one of fp32, fp16, bf16$"),
        ("int8", "int8", "--dtype is 'int8'; it must be one of fp32, fp16, bf16$"),
        ("fp16", "bf16", "--dtype says what is not quantized; --precision fp16 has nothing else"),
    ],
)
def test_words_that_are_no_precision(word: str, dtype: str | None, message: str) -> None:
    with pytest.raises(LogitLockError, match=message):
        Precision.parse(word, dtype=dtype)


def test_a_scheme_is_asked_for() -> None:
    with pytest.raises(LogitLockError, match="--precision is 'fp16'; quantization schemes are int8, int4, int4-awq, "):
        QuantizeOptions(scheme="fp16")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"precision": "fp16"}, None),
        ({"precision": "int8"}, QuantizeOptions(scheme="int8")),
        ({"precision": "int8", "kv_cache": "fp8"}, QuantizeOptions(scheme="int8", cache="fp8")),
        ({"precision": "bf16", "kv_cache": "int8"}, QuantizeOptions(scheme=None, cache="int8")),
        (
            {"precision": "int4", "quantize": QuantizeOptions(scheme="int4", group=32)},
            QuantizeOptions(scheme="int4", group=32),
        ),
    ],
)
def test_how_a_model_is_quantized(fields: dict[str, Any], expected: QuantizeOptions | None) -> None:
    assert ExportOptions(**fields).quantization == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantize": QuantizeOptions(scheme="int8")}, "--precision is 'fp16', but the options are those of 'int8'"),
        (
            {"precision": "int8", "quantize": QuantizeOptions(scheme="int8"), "kv_cache": "int8"},
            "--kv-cache is a part of the quantization options that are given",
        ),
        ({"random_weights": True, "precision_plan": Path("plan.json")}, "not for --random-weights"),
    ],
)
def test_options_that_exclude_each_other(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LogitLockError, match=message):
        ExportOptions(**{"precision": "fp16", **fields})


def test_the_verb_has_the_options_of_the_function() -> None:
    """By name: `export` hands its parameters on as fields."""
    fields = {field.name for field in dataclasses.fields(ExportOptions)}
    parameters = set(inspect.signature(export).parameters)
    assert parameters - fields == {"model", "json_output"}
    assert fields - parameters == {"quantize"}


def test_options_and_fields_of_a_call(tmp_path: Path) -> None:
    case = GOLDENS / "gpt2_b1"
    options = ExportOptions(precision="fp16", max_seq=32, output=tmp_path / "never")
    bundle = export_model(case, options, precision="fp32", output=tmp_path / "b")
    assert bundle == tmp_path / "b" and not (tmp_path / "never").exists()
    with pytest.raises(TypeError, match="ExportOptions has no field 'precison'; it has precision, dtype, "):
        export_model(case, precison="fp16")
    with pytest.raises(TypeError, match="ExportOptions has no field 'precison'"):
        export_model(case, options, precison="fp16")
    with pytest.raises(TypeError, match="'precision'"):
        export_model(case, output=tmp_path / "c")


@pytest.mark.parametrize(
    ("scheme", "method", "said"),
    [
        ("int8", {"clip": True}, "--clip is for --precision int4-awq, int4-gptq; it has no effect with int8"),
        ("int8", {"alpha": 0.9}, "--alpha is for --precision smoothquant; it has no effect with int8"),
        ("int4-awq", {"act_order": True}, "--act-order is for --precision int4-gptq; it has no effect with int4-awq"),
        ("smoothquant", {"damping": 0.1}, "--damping is for --precision int4-gptq"),
        (None, {"clip": False}, "it has no effect without one"),
    ],
)
def test_options_of_other_methods_are_refused(scheme: str | None, method: dict[str, Any], said: str) -> None:
    with pytest.raises(LogitLockError, match=said):
        QuantizeOptions(scheme=scheme, cache="int8", method=MethodOptions(**method))
    # The layers of a plan may have another method.
    QuantizeOptions(scheme=scheme, cache="int8", plan=Path("plan.json"), method=MethodOptions(**method))


def test_a_plan_of_quantization_is_not_for_export(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    for content in ({"precision": "int4"}, {"precision": "fp16", "schemes": {"blocks.0.*": "int8"}}):
        plan.write_text(json.dumps({"schema": 1, **content}))
        with pytest.raises(LogitLockError, match="that quantizes layers: it is for `logitlock quantize"):
            read_plan(plan, refmodels.resolve("qwen").spec, "fp16")

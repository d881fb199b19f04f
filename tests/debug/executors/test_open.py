"""Names of executors: what each opens, and one clear sentence for names that open none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from debug.executors.name_map import read_name_map
from debug.executors.open import FORMS, forms_help, numerics_of, open_executor
from export.bundle import export_model
from refmodels.errors import LogitLockError
from refmodels.taps import tap_names
from tests.support.goldens import GOLDENS, case_source

pytest.importorskip("transformers")


@pytest.mark.slow
def test_every_form_opens(exported: Callable[..., Path], tmp_path: Path) -> None:
    source = case_source("qwen2")
    export_model(source, precision="fp16", output=tmp_path / "bundle")
    sides = {
        "reference": "float64, exact",
        "reference:fp16": "float16, exact",
        "reference:fp32:upstream": "float32, upstream",
        "hf": "transformers",
        "hf:bf16": "bfloat16",
        f"hf:{GOLDENS / 'qwen2'}": "float32",
        f"hf:fp16:{GOLDENS / 'qwen2'}": "float16",
        str(tmp_path / "bundle"): "rounded to float16",
        str(GOLDENS / "qwen2"): "recorded",
        f"{GOLDENS / 'qwen2'}:bf16": "bf16",
        str(exported("qwen2")): "ONNX Runtime",
    }
    for text, arithmetic in sides.items():
        engine = open_executor(text, source=source)
        assert arithmetic in engine.arithmetic and engine.spec == source.spec
        exact = text == str(tmp_path / "bundle") or ("reference" in text and "upstream" not in text)
        assert numerics_of(engine) == ("exact" if exact else "upstream")
    assert len(open_executor(str(exported("qwen2")), source=source).tap_names) == len(tap_names(source.spec))
    (tmp_path / "names.json").write_text("{}")
    few = open_executor(str(exported("qwen2")), source=source, map=tmp_path / "names.json")
    assert len(few.tap_names) == 5
    # A map that is not there yet is proposed and written, and the engine says what is to be looked at.
    written = tmp_path / "written.json"
    proposing = open_executor(str(exported("qwen2")), source=source, map=written)
    assert len(read_name_map(written, source.spec).taps) == 24 and proposing.arithmetic.endswith(
        "24 taps by a proposed map"
    )
    with pytest.raises(LogitLockError, match="cannot be written"):
        open_executor(str(exported("qwen2")), source=source, map=tmp_path / "none" / "names.json")
    assert open_executor(str(GOLDENS / "qwen2"), source=source, decode=True).tap_names == ("logits",)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("refrence", "names no executor"),
        ("", "names no executor"),
        ("reference:fp8", "not understood"),
        ("reference:fp16:exact:more", "not understood"),
        ("hf:fp16:a:b", "not understood"),
        ("tensorrt", "not understood"),
        ("nowhere", "names no executor"),
    ],
)
def test_other_names_are_told_the_forms(text: str, part: str) -> None:
    with pytest.raises(LogitLockError) as caught:
        open_executor(text, source=case_source("qwen2"))
    assert part in str(caught.value) and repr(text) in str(caught.value)
    for form in FORMS:
        assert form.text in str(caught.value) and f"{form.text} " in forms_help() and form.meaning in forms_help()


def test_hf_with_an_unknown_dtype_or_directory() -> None:
    source = case_source("qwen2")
    with pytest.raises(
        LogitLockError, match="'hf:fp99' is not understood: fp99 is no directory and none of the dtypes"
    ):
        open_executor("hf:fp99", source=source)
    with pytest.raises(LogitLockError, match=r"'hf:fp16:nowhere' is not understood: nowhere is no directory$"):
        open_executor("hf:fp16:nowhere", source=source)


def test_executors_say_themselves_what_is_missing(tmp_path: Path) -> None:
    source = case_source("qwen2")
    if not torch.cuda.is_available():
        with pytest.raises(LogitLockError, match="CUDA GPU"):
            open_executor("kernels:fp16", source=source)
    with pytest.raises(LogitLockError, match="is not a bundle"):
        open_executor(f"tensorrt:{tmp_path}", source=source)
    with pytest.raises(LogitLockError, match="cannot be read"):
        open_executor(str(tmp_path / "no.onnx"), source=source)

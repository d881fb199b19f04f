"""`logitlock check` says what a model is before any run: facts, sizes, chat, stops, and all that will be refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import refmodels
from debug.check.describe import check_model, rows
from export.quantization.calibrate import quantize_model
from export.quantization.data import calibration_data
from export.quantization.schemes import QuantizeOptions
from refmodels import toys
from refmodels.checkpoints.load import TOYS
from refmodels.errors import LogitLockError
from refmodels.notices import say_once
from tests.support.checkpoints import read_case, write_model
from tests.support.command import logitlock
from tests.support.goldens import CASES, case_source
from tests.support.marks import quick_first
from tests.support.paths import GOLDENS
from trt_runtime.torch_gpu.engine import TorchEngine


@pytest.fixture(autouse=True)
def unsaid() -> None:
    say_once.cache_clear()


def toy(folder: Path, name: str = "qwen", **said: Any) -> Path:
    shutil.copytree(TOYS / name, folder)
    for file, content in said.items():
        path = folder / f"{file}.json"
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(before | content))
    return folder


@pytest.mark.parametrize("name", toys.TOYS)
def test_toys_are_served_by_everything(name: str) -> None:
    found = check_model(name)
    assert not found["refused"] and found["family"] == name
    assert all(row["precisions"] and not row["refused"] for row in found["serves"])
    assert found["chat"] == (None if name == "gpt" else f"the built-in format {found['spec']['chat_format']}")
    assert found["stop_ids"] == [2] and found["sampling"] == "greedy"
    assert found["stored"] == {"fp16": found["parameters"]}


@pytest.mark.parametrize(
    "case", quick_first([case for case in CASES if case.startswith(("qwen2", "gpt", "chatglm3", "starcoder2"))], 3)
)
def test_sizes_are_those_of_the_loaded_model_and_its_cache(case: str) -> None:
    found = check_model(GOLDENS / case, tokens=16)
    decoder = refmodels.load(case_source(case))
    assert found["parameters"] == sum(p.numel() for p in decoder.parameters())
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        engine = TorchEngine(refmodels.load(case_source(case), dtype=dtype))
        assert found["weight_bytes"][name] == sum(p.nbytes for p in engine.decoder.parameters())
        cache = engine.new_cache(batch=1, capacity=16)
        assert found["cache_bytes"][name] == sum(t.nbytes for t in (*cache.key, *cache.value))


def test_facts_and_unknown_keys(tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen2_b1")
    del config["model_type"]
    write_model(tmp_path, config | {"frobnicate": 1, "architectures": ["Qwen2ForCausalLM"]}, tensors)
    found = check_model(tmp_path)
    assert found["facts"][:1] == ["model_type qwen2, because architectures is ['Qwen2ForCausalLM']"]
    assert found["keys"]["unknown"] == ("frobnicate",) and "frobnicate" in found["warnings"][0]
    shown = dict(rows(found))
    assert "unknown, and left out: frobnicate" in shown["config.json"] and "frobnicate" in shown["warning"]
    assert shown["tokenizer"] == "none" and shown["chat"] == "none"


def test_the_checkpoints_own_template_and_sampling(tmp_path: Path) -> None:
    folder = toy(
        tmp_path / "m",
        generation_config={"eos_token_id": [5, 2], "do_sample": True, "top_k": 5, "repetition_penalty": 1.1},
        tokenizer_config={"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
    )
    found = check_model(folder)
    assert found["chat"] == "the template of tokenizer_config.json"
    assert found["stop_ids"] == found["chat_stop_ids"] == [5, 2]
    assert found["sampling"] == "temperature 1, top_k 5, repetition_penalty 1.1"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"generation_config": {"num_beams": 3}}, "sets num_beams to 3"),
        ({"generation_config": {"eos_token_id": "x"}}, "eos_token_id is 'x'"),
        ({"tokenizer_config": {"chat_template": "{% for %}"}}, "the chat template of .* is damaged"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template must be a text"),
        ({"config": {"intermediate_size": 512}}, "has shape .*; config.json says"),
    ],
)
def test_all_that_is_refused_is_said_and_the_code_is_2(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = toy(tmp_path / "m", **said)
    (text,) = check_model(folder)["refused"]
    with pytest.raises(LogitLockError, match=message):
        raise LogitLockError(text)
    outcome = logitlock("check", folder, "--json")
    assert outcome.code == 2 and json.loads(outcome.out)["refused"] == [text]


def test_several_refusals_are_all_said(tmp_path: Path) -> None:
    folder = toy(tmp_path / "m", generation_config={"num_beams": 3})
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").write_text("{")
    refused = check_model(folder)["refused"]
    assert [part for part in ("no weights", "tokenizer.json", "num_beams") if any(part in r for r in refused)] == [
        "no weights",
        "tokenizer.json",
        "num_beams",
    ]


def test_a_quantized_checkpoint_names_what_cannot_serve_it(tmp_path: Path) -> None:
    source = case_source("qwen2_b1")
    options = QuantizeOptions(scheme="int4", group=16, symmetric=False, cache="int8")
    folder = quantize_model(source, tmp_path / "q", options, data=calibration_data(source, samples=1, tokens=8))
    found = check_model(folder)
    assert not found["refused"] and found["quantization"].endswith("int8 cache")
    serves = {row["back_end"]: row for row in found["serves"]}
    assert serves["ONNX Runtime"]["precisions"] == ["fp32", "fp16", "bf16"]
    assert serves["TensorRT plan"]["precisions"] == [] and "int8 cache" in serves["TensorRT plan"]["refused"]
    assert not serves["Torch-TensorRT"]["precisions"]
    # One byte per element of the cache, in whatever dtype the rest is.
    assert len(set(found["cache_bytes"].values())) == 1


def test_the_verbs(tmp_path: Path) -> None:
    outcome = logitlock("check", "qwen", "--tokens", 100)
    assert outcome.code == 0 and "known by" in outcome.out and "cache of 100 tokens" in outcome.out
    assert len(outcome.out.splitlines()) <= 24, "one screen"
    folder = toy(tmp_path / "m")
    document = json.loads(logitlock("inspect", folder, "--json").out)
    assert document == json.loads(logitlock("check", folder, "--json").out)
    logitlock("check", "qwen", "--tokens", 0).assert_bad_input("--tokens is 0")
    (folder / "config.json").write_text('{"model_type": "mpt"}')
    logitlock("check", folder).assert_bad_input("unknown model_type 'mpt'")
    logitlock("check", tmp_path / "nowhere").assert_bad_input("nowhere")

"""Quantized checkpoints as libraries have written them over the years are the same model, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import refmodels
from export.quantization.calibrate import quantize_model
from export.quantization.data import calibration_data
from export.quantization.schemes import QuantizeOptions
from refmodels.checkpoints.quantized_layouts import CheckpointFormat
from refmodels.notices import say_once
from tests.support.checkpoints import read_case, write_index, write_model
from tests.support.goldens import case_source
from tests.support.marks import quick_first

Made = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    say_once.cache_clear()

    def make(layout: CheckpointFormat, **options: Any) -> Path:
        source = case_source("qwen2_b1")
        choice = QuantizeOptions(**{"scheme": "int4", "group": 16, "symmetric": layout == "gptq", **options})
        data = calibration_data(source, samples=1, tokens=8)
        return quantize_model(source, tmp_path / "q", choice, data=data, layout=layout)

    return make


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(refmodels.load(refmodels.resolve(folder)).named_parameters())


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def write(folder: Path, config: dict[str, Any], name: str = "config.json") -> None:
    (folder / name).write_text(json.dumps(config))


def test_autogptq_as_it_was_first_written(made: Made) -> None:
    """quantize_config.json, and weights named by bits and group size."""
    folder = made("gptq")
    expected, config = parameters(folder), read(folder)
    said = config.pop("quantization_config")
    write(folder, config)
    for absent in ("quant_method", "modules_to_not_convert"):
        del said[absent]
    more = {"damp_percent": 0.01, "true_sequential": True, "static_groups": False, "model_name_or_path": "x"}
    write(folder, said | more | {"model_file_base_name": "gptq_model-4bit-16g"}, "quantize_config.json")
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-16g.safetensors")
    assert_equal(parameters(folder), expected)
    tensors = load_file(folder / "gptq_model-4bit-16g.safetensors")
    first = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % 2}
    shards = {"gptq_model-4bit-16g-1-of-2.safetensors": first}
    shards["gptq_model-4bit-16g-2-of-2.safetensors"] = {n: t for n, t in tensors.items() if n not in first}
    (folder / "gptq_model-4bit-16g.safetensors").unlink()
    for file, part in shards.items():
        save_file(part, folder / file)
    with pytest.raises(refmodels.LogitLockError, match=r"several weights, gptq_model-4bit-16g-1-of-2.* and gptq_model"):
        refmodels.load(folder)
    where = {name: file for file, part in shards.items() for name in part}
    write_index(folder, where, stem="gptq_model-4bit-16g.safetensors")
    assert_equal(parameters(folder), expected)


@pytest.mark.parametrize("place", ["config.json", "quant_config.json"])
def test_names_of_autoawq(place: str, made: Made) -> None:
    folder = made("awq")
    expected, config = parameters(folder), read(folder)
    del config["quantization_config"]
    said = {
        "zero_point": True,
        "q_group_size": 16,
        "w_bit": 4,
        "version": "GEMM",
        "modules_to_not_convert": ["lm_head"],
    }
    if place == "config.json":
        config["quantization_config"] = said
    else:
        write(folder, said, place)
    write(folder, config)
    assert_equal(parameters(folder), expected)


@pytest.mark.parametrize("bare", quick_first([False, True]))
@pytest.mark.parametrize("layout", quick_first(["gptq", "awq", "compressed-tensors"]))
def test_a_method_that_is_not_said(layout: CheckpointFormat, bare: bool, made: Made) -> None:
    """Its keys tell it, and without them the tensors."""
    folder = made(layout)
    expected, config = parameters(folder), read(folder)
    said = config["quantization_config"]
    del said["quant_method"]
    if bare and layout != "compressed-tensors":
        config["quantization_config"] = {"bits": 4, "group_size": 16, "modules_to_not_convert": ["lm_head"]}
    write(folder, config)
    assert_equal(parameters(folder), expected)


def test_a_quantized_head_in_a_tied_config(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    folder = made("gptq", head=True)
    expected, config = parameters(folder), read(folder)
    assert config["quantization_config"]["lm_head"] is True
    write(folder, config | {"tie_word_embeddings": True})
    assert_equal(parameters(folder), expected)
    said = [record.getMessage() for record in caplog.records if record.name == "logitlock"]
    assert len(said) == 1 and "tie_word_embeddings, but the head that is stored is not the embedding" in said[0]


@pytest.mark.parametrize(
    "said",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_8bit": True},
        None,
    ],
)
def test_bitsandbytes_is_named(said: dict[str, Any] | None, tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen2_b1")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
    tensors |= {f"{name}.absmax": torch.ones(4), f"{name}.quant_map": torch.ones(16)}
    folder = write_model(tmp_path, config if said is None else config | {"quantization_config": said}, tensors)
    with pytest.raises(refmodels.LogitLockError, match=r"quantized by bitsandbytes, whose formats cannot be read"):
        refmodels.load(folder)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"bits": 4}, r"quantization_config has no quant_method, and neither its keys nor the tensors tell it: add"),
        ([1], "quantization_config must be an object, got list"),
        ({"quant_method": "hqq"}, "quant_method 'hqq'; compressed-tensors, gptq, awq and modelopt checkpoints can be"),
        ({"w_bit": 3, "q_group_size": 16}, "has bits 3 and group_size 16"),
    ],
)
def test_what_is_not_understood(said: Any, message: str, tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen2_b1")
    with pytest.raises(refmodels.LogitLockError, match=message):
        refmodels.resolve(write_model(tmp_path, config | {"quantization_config": said}, tensors))

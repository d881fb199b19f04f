"""Configs and checkpoints mean here what they mean to the installed transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import refmodels
from refmodels.model import activate
from refmodels.notices import say_once
from refmodels.spec import RopeSpec, spec_from_dict
from tests.support.checkpoints import read_case, write_model
from tests.support.marks import quick_first
from tests.support.upstream import assert_computes_as_transformers, transformers_model


@pytest.fixture(autouse=True)
def unsaid() -> None:
    say_once.cache_clear()


@pytest.mark.parametrize("layout", quick_first(["safetensors", "sharded safetensors", "bin", "sharded bin"]))
@pytest.mark.parametrize("case", quick_first(["gpt2_b1", "qwen2_tied_b1"]))
@pytest.mark.slow
def test_a_head_of_its_own_in_a_tied_config(
    case: str, layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after merging a LoRA into the head or the embedding alone."""
    config, tensors, _ = read_case(case)
    embedding = next(t for name, t in tensors.items() if name.endswith(("wte.weight", "embed_tokens.weight")))
    head = embedding.clone()
    head[-1, -1] += 0.5
    write_model(tmp_path / "own", config, tensors | {"lm_head.weight": head}, layout)
    decoder = assert_computes_as_transformers(tmp_path / "own")
    assert not decoder.spec.tied_head and torch.equal(decoder.head.weight, head)
    refmodels.resolve(tmp_path / "own")
    said = [record.getMessage() for record in caplog.records if record.name == "logitlock"]
    assert len(said) == 1 and "tie_word_embeddings, but the head that is stored is not the embedding" in said[0]

    write_model(tmp_path / "same", config, tensors | {"lm_head.weight": embedding.clone()}, layout)
    tied = assert_computes_as_transformers(tmp_path / "same")
    assert tied.head.weight is tied.embed.weight
    assert len([record for record in caplog.records if record.name == "logitlock"]) == 1


def test_transformers_agrees_that_such_a_head_is_not_tied(tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen2_tied_b1")
    write_model(tmp_path, config, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    theirs = transformers_model(tmp_path)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)


FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = {"use_sliding_window": True, "sliding_window": 6}


@pytest.mark.parametrize(
    ("change", "windows"),
    quick_first(
        [
            ({}, (0, 0)),
            ({"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 0}, (0, 0)),
            ({**WINDOW, "max_window_layers": 0}, (6, 6)),
            ({**WINDOW, "max_window_layers": 1}, (0, 6)),
            ({**WINDOW, "max_window_layers": 2}, (0, 0)),
            ({**WINDOW, "sliding_window": None, "max_window_layers": 0}, (0, 0)),
            ({**WINDOW, "sliding_window": 0, "max_window_layers": 2}, (0, 0)),
            ({**WINDOW, "max_window_layers": 0, "layer_types": [FULL, FULL]}, (0, 0)),
            ({**WINDOW, "layer_types": [FULL, SLIDING]}, (0, 6)),
            # Which no first layer can say.
            ({**WINDOW, "max_window_layers": 2, "layer_types": [SLIDING, FULL]}, (6, 0)),
            # As transformers 5 saves a model without a window.
            ({"use_sliding_window": False, "sliding_window": None, "layer_types": [FULL, FULL]}, (0, 0)),
            # Absent, it is 4096.
            ({"use_sliding_window": True, "max_window_layers": 1}, (0, 4096)),
            ({"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 5.0}}, (0, 0)),
        ],
        3,
    ),
)
def test_windows_of_qwen2(change: dict[str, Any], windows: tuple[int, ...], tmp_path: Path) -> None:
    config, tensors, _ = read_case("qwen2_b1")
    del config["sliding_window"], config["use_sliding_window"]
    decoder = assert_computes_as_transformers(write_model(tmp_path, config | change, tensors))
    spec = decoder.spec
    assert tuple(spec.window(layer) for layer in range(spec.layers)) == windows
    assert (spec.attention.window is None) == (windows == (0, 0)), "a window that no layer has is none"
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("case", "change", "message"),
    quick_first(
        [
            ("starcoder2_b1", {"sliding_window": 0}, "sliding_window is 0; it must be at least 1"),
            ("starcoder2_b1", {"sliding_window": -4}, "sliding_window is -4"),
            ("qwen2_b1", {**WINDOW, "sliding_window": 0, "max_window_layers": 1}, "sliding_window is 0; it must be"),
            ("qwen2_b1", {**WINDOW, "layer_types": [FULL]}, "layer_types must be a list of 2 kinds"),
            (
                "qwen2_b1",
                {**WINDOW, "layer_types": [FULL, "chunked_attention"]},
                "'chunked_attention', which is not supp",
            ),
            ("qwen2_b1", {"layer_types": [FULL, SLIDING]}, "sliding_window is not used; it must be"),
            ("qwen2_b1", {**WINDOW, "sliding_window": None, "layer_types": [FULL, SLIDING]}, "is not used"),
        ],
        3,
    ),
)
def test_windows_that_transformers_cannot_run_are_refused(
    case: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config, tensors, _ = read_case(case)
    write_model(tmp_path, config | change, tensors)
    with pytest.raises(refmodels.LogitLockError, match=message):
        refmodels.resolve(tmp_path)
    with pytest.raises(Exception, match=r"."):
        transformers_model(tmp_path)(torch.arange(20)[None])


@pytest.mark.parametrize("theta", ["x", None, [1]])
def test_a_rope_theta_that_is_no_number_is_named(theta: Any) -> None:
    config, _, _ = read_case("qwen2_b1")
    del config["rope_theta"]
    changed = config | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    if theta is None:
        assert refmodels.spec_from_config(changed).rope == RopeSpec(dim=16, theta=10000.0, table="working")
        return
    with pytest.raises(refmodels.LogitLockError, match=r"rope_parameters: rope_theta is .*; it must be of type float"):
        refmodels.spec_from_config(changed)


@pytest.mark.parametrize(
    "activation", quick_first(["quick_gelu", "gelu_fast", "gelu_new", "gelu", "gelu_pytorch_tanh", "silu"], 3)
)
def test_activations_of_gpt2(activation: str, tmp_path: Path) -> None:
    """In fp32 and, with upstream's roundings, in half precision bit for bit."""
    config, tensors, _ = read_case("gpt2_b1")
    folder = write_model(tmp_path, config | {"activation_function": activation}, tensors)
    assert_computes_as_transformers(folder)
    x = torch.linspace(-6, 6, 4001)
    theirs = pytest.importorskip("transformers.activations").ACT2FN[activation]
    spec = refmodels.resolve(folder).spec
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        assert torch.equal(activate(half, spec.mlp.activation, stepwise=True), theirs(half))


@pytest.mark.parametrize("case", ["qwen2_b1", "gpt2_b1", "gpt_bigcode_b1", "starcoder2_b1"])
def test_a_config_without_model_type_is_known_by_its_architectures(case: str, tmp_path: Path) -> None:
    config, tensors, _ = read_case(case)
    expected = refmodels.resolve(write_model(tmp_path, config, tensors)).spec
    without = {key: value for key, value in config.items() if key != "model_type"}
    write_model(tmp_path, without, tensors)
    source = refmodels.resolve(tmp_path)
    assert source.spec == expected and source.config["model_type"] == config["model_type"]
    assert source.facts[0].startswith(f"model_type {config['model_type']}, because architectures is ")
    refmodels.load(source)
    write_model(tmp_path, without | {"architectures": ["MptForCausalLM"]}, tensors)
    with pytest.raises(refmodels.LogitLockError, match=r"none of its architectures \['MptForCausalLM'\] is known"):
        refmodels.resolve(tmp_path)
    del without["architectures"]
    write_model(tmp_path, without, tensors)
    with pytest.raises(refmodels.LogitLockError, match='no model_type, and no architectures: add "model_type" to it'):
        refmodels.resolve(tmp_path)

"""Every key of a config.json is used, harmless or unknown; what changes the result and is not served is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import refmodels
from refmodels.errors import LogitLockError
from refmodels.families import family_of, model_type_of, read_spec
from refmodels.families.config import Config
from refmodels.families.config_keys import ConfigKeys, sort_keys
from refmodels.notices import say_once
from tests.support.checkpoints import read_case, write_model
from tests.support.goldens import CASES
from tests.support.paths import GOLDENS, REAL, ROOT

PUBLISHED = sorted([*(GOLDENS / "_configs").glob("*.json"), *REAL.glob("*/config.json")])
TOYS = sorted((ROOT / "refmodels" / "toys").glob("*/config.json"))


@pytest.fixture(autouse=True)
def unsaid() -> None:
    say_once.cache_clear()


def sorted_keys(data: dict[str, Any], variant: dict[str, Any] | None = None) -> ConfigKeys:
    config = Config({**data, "model_type": model_type_of(data)}, variant or {}, "config.json")
    read_spec(config)
    return sort_keys(config, family_of(config.data))


@pytest.mark.parametrize("file", [*PUBLISHED, *TOYS], ids=lambda file: f"{file.parent.name}/{file.name}")
def test_published_configs_have_no_unknown_key(file: Path) -> None:
    keys = sorted_keys(json.loads(file.read_text(encoding="utf-8")), {"glm_generation": "chatglm3"})
    assert not keys.unknown and len(keys.used) >= 8


@pytest.mark.parametrize("case", CASES)
def test_golden_configs_have_no_unknown_key(case: str) -> None:
    config, _, variant = read_case(case)
    assert not sorted_keys(config, variant).unknown


@pytest.mark.parametrize(
    "name",
    [
        *("Qwen2Config", "Qwen3Config", "GPT2Config", "GPTBigCodeConfig", "Starcoder2Config"),
        *("LlamaConfig", "MistralConfig", "GlmConfig", "Glm4Config"),
    ],
)
def test_what_transformers_saves_is_known(name: str) -> None:
    config = getattr(pytest.importorskip("transformers"), name)().to_dict()
    assert not sorted_keys(config).unknown


def test_unknown_keys_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, tensors, _ = read_case("qwen2_b1")
    more = {"frobnicate": 3, "dual_chunk_attention_config": {"chunk_size": 9}, "nothing": None, "_private": 1}
    write_model(tmp_path, config | more, tensors)
    with caplog.at_level(logging.WARNING, "logitlock"):
        source = refmodels.resolve(tmp_path)
        refmodels.resolve(tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert said == list(source.warnings)
    assert len(said) == 1
    assert said[0].endswith("keys that LogitLock does not know and leaves out: frobnicate, dual_chunk_attention_config")
    assert source.keys.unknown == ("frobnicate", "dual_chunk_attention_config")
    assert {"nothing", "_private"} <= set(source.keys.harmless) and "rms_norm_eps" in source.keys.used
    many = {f"key{n}": n for n in range(11)}
    write_model(tmp_path, config | many, tensors)
    assert "key7 and 3 more" in refmodels.resolve(tmp_path).warnings[0]


def test_unknown_keys_of_rope_parameters_are_said() -> None:
    config, _, _ = read_case("qwen2_b1")
    read = Config(config | {"rope_scaling": {"type": "linear", "factor": 2.0, "frobnicate": 3}}, {}, "config.json")
    read_spec(read)
    assert read.warnings == [
        "config.json: rope_scaling has keys that LogitLock does not know and leaves out: frobnicate"
    ]


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("qwen2_b1", {"is_encoder_decoder": True}, "is_encoder_decoder = True is not supported; only False is"),
        ("qwen2_b1", {"vision_config": {"depth": 2}}, "vision_config = .* is not supported"),
        ("qwen_b1", {"visual": {"layers": 2}}, "visual = .* is not supported"),
        ("qwen_b1", {"activation": "gelu"}, "activation = 'gelu' is not supported; only 'swiglu' is"),
        ("qwen_b1", {"pos_emb": "alibi"}, "pos_emb = 'alibi' is not supported; only 'rotary' is"),
        ("qwen_b1", {"apply_residual_connection_post_layernorm": True}, "post_layernorm = True is not supported"),
        ("qwen_b1", {"use_cache_quantization": True}, "use_cache_quantization = True is not supported"),
        ("gpt2_b1", {"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        ("gpt2_b1", {"pruned_heads": {"0": [1]}}, "pruned_heads = .* is not supported"),
        ("chatglm2_b1", {"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
        ("starcoder2_b1", {"norm_type": "rms_norm"}, "norm_type = 'rms_norm' is not supported"),
        ("qwen2_b1", {"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope type 'longrope' is not supported"),
    ],
)
def test_what_changes_the_result_is_refused_by_name(case: str, change: dict[str, Any], message: str) -> None:
    config, _, variant = read_case(case)
    with pytest.raises(LogitLockError, match=message):
        sorted_keys(config | change, variant)

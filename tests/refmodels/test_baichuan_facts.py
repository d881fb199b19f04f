"""RoPE or ALiBi, NormHead or not: decided by what cannot be edited away, and contradictions are errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import refmodels
from refmodels.families import spec_from_config
from refmodels.notices import say_once
from tests.support.checkpoints import read_case, write_model
from tests.support.goldens import assert_reproduces_golden

SEVEN = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "intermediate_size": 11008}
THIRTEEN = {"hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 40, "intermediate_size": 13696}
POSITIONS = {"max_position_embeddings": 2048}
LENGTH = {"model_max_length": 8192}


def config(*parts: dict[str, Any], vocab_size: int = 64000) -> dict[str, Any]:
    common = {"model_type": "baichuan", "hidden_act": "silu", "rms_norm_eps": 1e-6, "vocab_size": vocab_size}
    return {key: value for part in (common, *parts) for key, value in part.items()}


@pytest.fixture(autouse=True)
def unsaid() -> None:
    say_once.cache_clear()


@pytest.mark.parametrize("vocab_size", [64000, 125696])
@pytest.mark.parametrize(
    ("shape", "keys", "position", "max_positions"),
    [
        (SEVEN, POSITIONS, "rope", 2048),
        (SEVEN, {**POSITIONS, **LENGTH}, "rope", 2048),
        (SEVEN, LENGTH, "rope", 8192),
        (SEVEN, {}, "rope", 4096),
        (THIRTEEN, LENGTH, "alibi", 8192),
        (THIRTEEN, {**POSITIONS, **LENGTH}, "alibi", 8192),
        (THIRTEEN, POSITIONS, "alibi", 2048),
        (THIRTEEN, {}, "alibi", 4096),
    ],
)
def test_the_published_shapes_decide_whatever_keys_are_added_or_lost(
    shape: dict[str, Any], keys: dict[str, Any], position: str, max_positions: int, vocab_size: int
) -> None:
    spec = spec_from_config(config(shape, keys, vocab_size=vocab_size))
    assert (spec.position, spec.max_positions, spec.head_normalized) == (position, max_positions, vocab_size == 125696)
    assert spec.variant == f"baichuan{'2' * (vocab_size == 125696)}-{'7b' if position == 'rope' else '13b'}"


@pytest.mark.parametrize("layout", ["safetensors", "sharded bin"])
def test_tensors_decide_where_the_shape_does_not(tmp_path: Path, layout: str) -> None:
    """Baichuan 7B stores inv_freq: without max_position_embeddings it has RoPE still."""
    settings, tensors, _ = read_case("baichuan_7b")
    assert any(name.endswith("rotary_emb.inv_freq") for name in tensors)
    del settings["max_position_embeddings"]
    source = refmodels.resolve(write_model(tmp_path, settings | {"norm_head": False}, tensors, layout))
    assert source.facts == ("rope, because tensors rotary_emb.inv_freq are stored",)
    assert_reproduces_golden(refmodels.load(source), "baichuan_7b")


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("baichuan_7b", "class RotaryEmbedding: ..."),
        ("baichuan_13b", "def _gen_alibi_mask(n_head, max_pos): ..."),
        ("baichuan2_7b", "class RotaryEmbedding: ...\nclass NormHead: ..."),
        ("baichuan2_13b", "def _gen_alibi_mask(tensor, n_head, max_pos): ...\nclass NormHead: ..."),
    ],
)
def test_the_shipped_code_tells_and_is_not_run(tmp_path: Path, case: str, code: str) -> None:
    settings, tensors, _ = read_case(case)
    settings = {key: value for key, value in settings.items() if key != "max_position_embeddings"}
    write_model(tmp_path, settings, tensors)
    (tmp_path / "modeling_baichuan.py").write_text(f"raise SystemExit\n{code}\n")
    assert_reproduces_golden(refmodels.load(tmp_path), case)


def test_contradictions_are_refused_and_the_key_settles_them(tmp_path: Path) -> None:
    settings = config(THIRTEEN, LENGTH)
    write_model(tmp_path, settings, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    with pytest.raises(
        refmodels.LogitLockError,
        match=r'contradicts itself: hidden_size is 5120 .* as in alibi; tensors .*, as in rope; add "position": "al',
    ):
        refmodels.resolve(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"position": "alibi"}))
    assert refmodels.resolve(tmp_path).spec.position == "alibi"
    (tmp_path / "config.json").write_text(json.dumps(settings | {"position": "learned"}))
    with pytest.raises(refmodels.LogitLockError, match="position is 'learned'; it must be one of rope, alibi"):
        refmodels.resolve(tmp_path)


@pytest.mark.parametrize(("keys", "position"), [(POSITIONS, "rope"), (LENGTH, "alibi")])
def test_another_shape_is_taken_by_its_keys_and_that_is_said(
    keys: dict[str, Any], position: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config(shape, keys)))
    with caplog.at_level(logging.WARNING, "logitlock"):
        assert refmodels.resolve(tmp_path).spec.position == position
    assert [f"a model with {position}, because" in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    (tmp_path / "config.json").write_text(json.dumps(config(shape, keys, {"position": position})))
    refmodels.resolve(tmp_path)
    assert not caplog.records

"""SantaCoder as first published, model_type gpt2 with one key and value for all heads, is what GPTBigCode computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import refmodels
from refmodels.notices import say_once
from tests.support.checkpoints import read_case, stored_again, write_model
from tests.support.goldens import assert_reproduces_golden

CASE = "gpt_bigcode_b1"


def as_published(**changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The golden case of transformers' conversion, converted back: Conv1D weights, query and key with value apart."""
    config, tensors, _ = read_case(CASE)
    hidden = config["n_embd"]
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((".c_attn.weight", ".c_attn.bias")):
            for part, rows in (("q_attn", tensor[:hidden]), ("kv_attn", tensor[hidden:])):
                found[name.replace("c_attn", part)] = rows.t() if rows.ndim == 2 else rows
        else:
            found[name] = tensor.t() if name.endswith((".c_proj.weight", ".c_fc.weight")) else tensor
    for key in ("multi_query", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
        config.pop(key, None)
    published = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadCustomModel"],
        "attention_head_type": "multiquery",
        "auto_map": {"AutoModelForCausalLM": "modeling_gpt2_mq.GPT2LMHeadCustomModel"},
    }
    return config | published | changes, found


@pytest.fixture(autouse=True)
def unsaid() -> None:
    say_once.cache_clear()


@pytest.mark.parametrize("change", [{}, {"attention_head_type": None}, {"model_type": None}])
def test_it_gives_the_logits_of_its_conversion(change: dict[str, Any], tmp_path: Path) -> None:
    config, tensors = as_published(**change)
    source = refmodels.resolve(write_model(tmp_path, config, tensors))
    assert source.spec.variant == "santacoder" and source.spec.attention.kv_heads == 1
    assert "SantaCoder, because tensors attn.kv_attn are stored" in source.facts
    decoder = refmodels.load(source)
    assert_reproduces_golden(decoder, CASE)
    stored = stored_again(decoder)
    assert all(torch.equal(stored[name], tensors[name]) for name in stored)


def test_its_published_activation_is_served(tmp_path: Path) -> None:
    config, tensors = as_published(activation_function="gelu_fast")
    decoder = refmodels.load(write_model(tmp_path, config, tensors))
    assert decoder.spec.mlp.activation == "gelu_fast"
    # All tanh approximations agree up to rounding.
    plain, _ = as_published(activation_function="gelu_new")
    other = refmodels.load(write_model(tmp_path, plain, tensors))
    ids = torch.arange(8)[None]
    logits = [m.step(ids, m.new_cache(batch=1, capacity=8)) for m in (decoder, other)]
    assert (logits[0] - logits[1]).abs().max() <= 1e-5


def test_contradictions_are_refused(tmp_path: Path) -> None:
    config, tensors = as_published(attention_head_type="multihead")
    with pytest.raises(refmodels.LogitLockError, match=r"says attention_head_type 'multihead', but its weights"):
        refmodels.resolve(write_model(tmp_path, config, tensors))
    gpt2, plain, _ = read_case("gpt2_b1")
    with pytest.raises(refmodels.LogitLockError, match=r"'multiquery', but its weights have no tensors"):
        refmodels.resolve(write_model(tmp_path, gpt2 | {"attention_head_type": "multiquery"}, plain))
    with pytest.raises(refmodels.LogitLockError, match=r"attention_head_type = 'grouped' is not supported"):
        refmodels.resolve(write_model(tmp_path, gpt2 | {"attention_head_type": "grouped"}, plain))

"""ChatGLM2, ChatGLM3 and GLM-4 are told apart by facts of the checkpoint, so that re-saving changes nothing."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

import refmodels
from refmodels.checkpoints.load import load_tokenizer
from refmodels.families import spec_from_config
from refmodels.notices import say_once
from refmodels.text.chat import chat_ids
from refmodels.text.prompts import stop_ids_in
from tests.support.checkpoints import read_case, write_model
from tests.support.goldens import assert_reproduces_golden
from tests.support.marks import quick_first
from tests.support.paths import GOLDENS

CONFIGS = GOLDENS / "_configs"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
PUBLISHED = {
    "chatglm2-6b": "chatglm2",
    "chatglm3-6b": "chatglm3",
    "chatglm3-6b-128k": "chatglm3",
    "glm-4-9b-chat": "glm4",
}


def added(first: int, *names: str) -> dict[str, Any]:
    """`added_tokens_decoder` as transformers 4 and 5 save it."""
    return {str(first + n): {"content": name, "special": True} for n, name in enumerate(names)}


RESAVED: dict[str, tuple[str, str, Any]] = {
    # What tells a re-saved directory: generation, file, contents.
    "tokens of the tokenizer": ("chatglm3", "tokenizer_config.json", {"added_tokens_decoder": added(64794, *ROLES)}),
    "chat template": (
        "chatglm3",
        "tokenizer_config.json",
        {"chat_template": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}<|assistant|>"},
    ),
    "special tokens": ("chatglm3", "special_tokens_map.json", {"additional_special_tokens": ROLES}),
    "added tokens": ("chatglm3", "added_tokens.json", {name: 64794 + n for n, name in enumerate(ROLES)}),
    "stop ids": ("chatglm3", "generation_config.json", {"eos_token_id": [2, 64795, 64797]}),
    "tokenizer's code": ("chatglm3", "tokenization_chatglm.py", 'special = ["sop", "<|observation|>"]'),
    "GLM-4's tokens": ("glm4", "tokenizer_config.json", {"added_tokens_decoder": added(300, "<sop>", *ROLES)}),
    "GLM-4's class": ("glm4", "tokenizer_config.json", {"tokenizer_class": "ChatGLM4Tokenizer"}),
    "GLM-4's ranks": ("glm4", "tokenizer.model", "IQ== 0\nIg== 1\n"),
    "GLM-4's stop ids": ("glm4", "generation_config.json", {"eos_token_id": [151329, 151336, 151338]}),
    "GLM-4's code": ("glm4", "tokenization_chatglm.py", "class ChatGLM4Tokenizer: ..."),
    "ChatGLM2's tokenizer": ("chatglm2", "tokenization_chatglm.py", 'special = ["sop", "eop"]'),
    "ChatGLM2's code": ("chatglm2", "modeling_chatglm.py", "position_ids = position_ids / self.rope_ratio"),
}


def resaved(folder: Path, case: str, *, name: str | None = None, **changes: Any) -> Path:
    """A golden case as transformers saves it: with a local path (4) or without a name (5)."""
    config, tensors, _ = read_case(case)
    del config["_name_or_path"]
    config |= changes if name is None else changes | {"_name_or_path": name}
    return write_model(folder, {key: value for key, value in config.items() if value is not None}, tensors)


@pytest.fixture(autouse=True)
def unsaid() -> None:
    say_once.cache_clear()


@pytest.mark.parametrize("name", quick_first([None, "/data/chatglm2-6b-finetuned", "output/THUDM/chatglm2-6b"]))
@pytest.mark.parametrize("case", quick_first(["chatglm3", "chatglm3_128k"]))
def test_a_resaved_chatglm3_gives_upstreams_logits(tmp_path: Path, case: str, name: str | None) -> None:
    folder = resaved(tmp_path / "m", case, name=name)
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added(64794, *ROLES)}))
    source = refmodels.resolve(folder)
    assert source.spec.chat_format == "chatglm3"
    assert source.facts == ("chatglm3, because tokenizer_config.json has control tokens for roles",)
    assert_reproduces_golden(refmodels.load(source, numerics="upstream"), case)


@pytest.mark.parametrize("name", [None, "THUDM/chatglm2-6b-32k"])
@pytest.mark.parametrize("ids", [{}, {"eos_token_id": 2, "pad_token_id": 0}])
def test_a_resaved_glm4_gives_upstreams_logits(tmp_path: Path, ids: dict[str, int], name: str | None) -> None:
    """Its ids or its epsilon are enough, and stronger than a name."""
    source = refmodels.resolve(resaved(tmp_path / "m", "glm4_remote_b1", name=name, **ids))
    assert source.spec.chat_format == "glm4"
    assert_reproduces_golden(refmodels.load(source), "glm4_remote_b1")


@pytest.mark.parametrize("kind", RESAVED)
def test_every_fact_tells_by_itself(tmp_path: Path, kind: str) -> None:
    generation, file, contents = RESAVED[kind]
    folder = resaved(tmp_path / "m", "chatglm3_128k")
    (folder / file).write_text(contents if isinstance(contents, str) else json.dumps(contents))
    spec = refmodels.resolve(folder).spec
    assert spec.chat_format == generation and spec.rope is not None
    expected = (10000.0, 500.0) if generation == "chatglm2" else (5e6, 1.0)
    assert (spec.rope.theta, spec.rope.position_divisor) == expected
    assert spec.rope.table == ("working_arithmetic" if generation == "chatglm2" else "working")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_without_their_names(name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    assert spec_from_config(config).chat_format == PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config | {"_name_or_path": "/models/mine"}))
    with caplog.at_level(logging.WARNING, "logitlock"):
        assert refmodels.resolve(tmp_path).spec.chat_format == PUBLISHED[name]
        refmodels.resolve(tmp_path)
    said = [record.getMessage() for record in caplog.records]
    # GLM-4's ids tell; for the others only the shapes of the published model are left, and that is said once.
    assert len(said) == (0 if PUBLISHED[name] == "glm4" else 1)
    assert all(f"is taken for {PUBLISHED[name]}" in text and "glm_generation" in text for text in said)


def test_where_nothing_tells_the_key_is_asked_for(tmp_path: Path) -> None:
    folder = resaved(tmp_path / "m", "chatglm3_128k")
    with pytest.raises(refmodels.LogitLockError, match=r'add "glm_generation": "chatglm2" or "chatglm3" or "glm4" to'):
        refmodels.resolve(folder)
    assert refmodels.resolve(folder, variant={"glm_generation": "chatglm3"}).spec.variant == "chatglm3-long"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"glm_generation": "chatglm2"}))
    assert refmodels.resolve(folder).spec.variant == "chatglm2-32k"
    (folder / "config.json").write_text(json.dumps(config | {"glm_generation": "glm5"}))
    with pytest.raises(refmodels.LogitLockError, match="glm_generation is 'glm5'; it must be one of"):
        refmodels.resolve(folder)


def test_facts_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    folder = resaved(tmp_path / "m", "chatglm3_128k", layernorm_epsilon=1.5625e-07)
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added(64794, *ROLES)}))
    with pytest.raises(refmodels.LogitLockError, match=r"contradicts itself: .*as in glm4; .*as in chatglm3; add"):
        refmodels.resolve(folder)
    # A name says no more than the shapes that were published under it.
    config = json.loads((CONFIGS / "chatglm3-6b-128k.json").read_text())
    with pytest.raises(refmodels.LogitLockError, match=r"nothing in config\.json or beside it tells"):
        spec_from_config(config | {"_name_or_path": "THUDM/chatglm2-6b-32k"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_encoding_2d": True}, "position_encoding_2d = True is not supported"),
        ({"vision_config": {"layers": 2}}, "vision_config = .* is not supported"),
        ({"rotary_percent": 1.0}, "rotary_percent = 1.0 is not supported; only 0.5 is"),
        ({"interleaved_qkv": True}, "interleaved_qkv = True is not supported"),
    ],
)
def test_relatives_with_another_graph_are_refused_by_key(change: dict[str, Any], message: str) -> None:
    config = json.loads((CONFIGS / "chatglm3-6b.json").read_text())
    with pytest.raises(refmodels.LogitLockError, match=message):
        spec_from_config(config | change)


def test_stop_ids_and_chat_of_a_resaved_glm4(tmp_path: Path) -> None:
    """Its tokenizer is ranks in base64 and control tokens by name; prompts as upstream's build_single_message."""
    ranks = [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell", b"hello", b"12", b"123"]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    names = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES]
    end, first = 262, 262 + 6
    folder = resaved(tmp_path / "m", "glm4_remote_b1", eos_token_id=[end, first + 1, first + 3], pad_token_id=end)
    (folder / "tokenizer.model").write_bytes(lines)
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added(end, *names)}))
    source = refmodels.resolve(folder)
    tokenizer = load_tokenizer(source)
    assert (tokenizer.special.eos, tokenizer.special.pad, tokenizer.special.bos) == (end, end, None)
    assert tokenizer.encode("hello 1234") == [end + 2, end + 4, 259, 32, 261, 52]
    assert tokenizer.encode("<|user|>é", add_special=False) == [first + 1, 0xC3, 0xA9]
    assert tokenizer.encode("e\u0301", add_special=False) == [101, 0xCC, 0x81], "no normalization, unlike Qwen"
    assert tokenizer.decode([end + 2, end + 4, 259, 52, end]) == "hello4"
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "hello"}]
    assert chat_ids("glm4", tokenizer, messages) == [end + 2, end + 4, first, 10, first + 1, 10, 259, first + 2]
    spec = dataclasses.replace(source.spec, vocab_size=end + len(names))
    assert stop_ids_in(folder, spec, tokenizer, chat=True) == (end, first + 1, first + 3)
    without_names = folder / "tokenizer_config.json"
    without_names.write_text("{}")
    assert load_tokenizer(source).token_id("<|observation|>") == first + 3
    without_names.write_text(json.dumps({"added_tokens_decoder": added(end, *ROLES)}))
    with pytest.raises(refmodels.LogitLockError, match=r"lacks the token <\|endoftext\|>"):
        load_tokenizer(source)
    without_names.write_text(json.dumps({"added_tokens_decoder": added(200, *names)}))
    with pytest.raises(refmodels.LogitLockError, match="a control token lies among 262 ranks"):
        load_tokenizer(source)
    without_names.write_text(json.dumps({"added_tokens_decoder": {"x": {"content": "<sop>"}}}))
    with pytest.raises(refmodels.LogitLockError, match="an added token needs an id and its text"):
        load_tokenizer(source)

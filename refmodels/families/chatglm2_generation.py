"""Which generation of the GLM code a checkpoint was made for: ChatGLM2, ChatGLM3 or GLM-4.

All three say model_type "chatglm" and have the same tensors, but `rope_ratio` divides positions in ChatGLM2 and
multiplies the base in the others, the rotary table is rounded otherwise, and the chat formats differ.  No key of
config.json names the generation, so it is read from facts that the three do not share; a path is none of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from refmodels.errors import LogitLockError
from refmodels.families.config import Config

GENERATIONS = ("chatglm2", "chatglm3", "glm4")
KEY = "glm_generation"
"""The key that decides where no fact does, in config.json or as a variant."""

_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CONTROL_IDS = {"chatglm3": {64795, 64797}, "glm4": set(range(151329, 151343))}
_GLM4_VOCABULARY, _GLM4_EPSILON = 151552, 1.5625e-07
_PUBLISHED_NAME = re.compile(r"(?:THUDM|zai-org|ZhipuAI)/(?:(chatglm2|codegeex2)|(chatglm3)|(glm-?4|codegeex4))", re.I)
_PUBLISHED_SHAPES = {
    (32768, 1.0): "chatglm2",
    (32768, 16.0): "chatglm2",
    (8192, 1.0): "chatglm3",
    (32768, 50.0): "chatglm3",
    (131072, 500.0): "chatglm3",
}
"""seq_length and rope_ratio of ChatGLM2-6B, -32k, ChatGLM3-6B, -32k and -128k: the last resort, which is said."""


def generation_of(config: Config) -> str:
    """One of `GENERATIONS`; the fact that tells is noted in `config`.

    Raises:
        LogitLockError: facts that contradict each other, or none.
    """
    if "chatglm3" in config.variant:
        # The key that golden cases have.
        return "chatglm3" if config.variant["chatglm3"] else "chatglm2"
    told = config.told(KEY, GENERATIONS, _facts(config))
    if told is not None:
        return told
    ratio, length = config.get(float, "rope_ratio", default=1.0), config.get(int, "seq_length")
    likely = _PUBLISHED_SHAPES.get((length, ratio)) if config.raw("padded_vocab_size") == 65024 else None
    name = _PUBLISHED_NAME.match(str(config.raw("_name_or_path") or ""))
    if name is not None:
        named = GENERATIONS[next(i for i, part in enumerate(name.groups()) if part is not None)]
        # Without a ratio the shapes are those of other models too: ChatGLM3-6B-base, CodeGeeX2.
        if likely in (None, named) or ratio == 1.0:
            config.facts.append(f"{named}, because _name_or_path is {name.string}")
            return named
        likely = None
    if likely is None:
        raise LogitLockError(
            f"nothing in {config.where} or beside it tells whether this is ChatGLM2, which divides positions by "
            "rope_ratio, or ChatGLM3 or GLM-4, which multiply the base by it and have other chats: add "
            f'"{KEY}": {" or ".join(map(json.dumps, GENERATIONS))} to it'
        )
    config.warnings.append(
        f"{config.where} is taken for {likely}, because seq_length {length} and rope_ratio {ratio:g} are those of "
        f'its published config; if it is another generation, add "{KEY}" to it'
    )
    return likely


def _facts(config: Config) -> Iterator[tuple[str, str]]:
    """Facts that reveal the generation: (generation, fact)."""
    if config.raw("padded_vocab_size") == _GLM4_VOCABULARY:
        yield "glm4", f"padded_vocab_size is {_GLM4_VOCABULARY}"
    if config.raw("layernorm_epsilon") == _GLM4_EPSILON:
        yield "glm4", f"layernorm_epsilon is {_GLM4_EPSILON}"
    for file, ids in (
        (config.where, config.raw("eos_token_id")),
        (config.where, config.raw("pad_token_id")),
        ("generation_config.json", config.beside.json("generation_config.json").get("eos_token_id")),
    ):
        for generation, control in _CONTROL_IDS.items():
            shared = [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int) and i in control]
            if shared:
                yield generation, f"the id {shared[0]} in {file} is a control token"
    for file in _TOKENIZER_FILES:
        text = json.dumps(config.beside.json(file))
        if "ChatGLM4Tokenizer" in text or "<sop>" in text:
            yield "glm4", f"{file} has GLM-4's tokenizer"
        elif "<|observation|>" in text or "<|assistant|>" in text:
            yield "chatglm3", f"{file} has control tokens for roles"
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", config.beside.bytes("tokenizer.model")[:200]):
        yield "glm4", "tokenizer.model holds ranks in base64"
    # Never run, only read: upstream ships its code with the weights, and save_pretrained copies it.
    code = config.beside.text("tokenization_chatglm.py")
    if code:
        name = "glm4" if "ChatGLM4Tokenizer" in code else "chatglm3" if "<|observation|>" in code else "chatglm2"
        yield name, "tokenization_chatglm.py is its code"
    if re.search(r"/\s*self\.rope_ratio", config.beside.text("modeling_chatglm.py")):
        yield "chatglm2", "modeling_chatglm.py divides positions by rope_ratio"

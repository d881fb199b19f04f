"""A checkpoint's own chat template gives the ids of transformers' apply_chat_template, and cannot do more than text.

The templates are the tests' own; together they use what the published ones of Qwen1.5, Qwen2, Qwen2.5 and QwQ use.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from refmodels.errors import LogitLockError
from refmodels.spec import ModelSpec
from refmodels.text.chat import chat_ids, stop_ids
from refmodels.text.chat_template import ChatTemplate
from refmodels.text.prompts import prompt_ids, stop_ids_in
from refmodels.text.tokenizer import QWEN_PATTERN, Tokenizer, read_tokenizer
from tests.support.goldens import case_source
from tests.support.marks import quick_first
from tests.support.paths import ROOT

QWEN1_5_LIKE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_LIKE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou answer.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS_LIKE_QWEN2_5 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You can call functions.' }}
    {%- endif %}
    {{- "\\n\\nFunctions, one a line:" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<call>{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<result>\\n' + message.content + '\\n</result>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
THOUGHTS_LIKE_QWQ = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and not loop.last %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- if message.reasoning_content is string and loop.last %}{{- '(' + message.thinking + ')' }}{%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\\n<think>\\n' if add_generation_prompt else '' }}
"""
CUSTOM = """\
{{ bos_token }}
{% macro turn(role, text) -%}
    [{{ role | upper }}] {{ text | trim }}{{ eos_token }}
{% endmacro %}
{% set ns = namespace(system='', seen=0) %}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% set ns.system = message['content'] %}
        {% continue %}
    {% endif %}
    {% if ns.seen >= 3 %}
        {% break %}
    {% endif %}
    {% if message['role'] not in ['user', 'assistant'] %}
        {{ raise_exception('only users and assistants speak here: ' ~ message['role']) }}
    {% endif %}
    {% set ns.seen = ns.seen + 1 %}
    {% generation %}
    {{ turn(message['role'], message['content']) }}
    {% endgeneration %}
{% endfor %}
{{ dict(a=1, b='é<&>"') | tojson(indent=2) }} {{ {'b': 1, 'a': [True, None]} | tojson(sort_keys=true) }}
{{ strftime_now('year %%Y') }} {{ ns.system }} {{ pad_token }} {{ 'x' if tools is none and documents is none }}
[ASSISTANT]
"""
BY_NAME = [{"name": "default", "template": QWEN2_LIKE}, {"name": "tool_use", "template": TOOLS_LIKE_QWEN2_5}]
TEMPLATES: dict[str, Any] = {
    "qwen1.5": QWEN1_5_LIKE,
    "qwen2": QWEN2_LIKE,
    "qwen2.5": TOOLS_LIKE_QWEN2_5,
    "qwq": THOUGHTS_LIKE_QWQ,
    "custom": CUSTOM,
    "by name": BY_NAME,
}
USER = {"role": "user", "content": "  Was it you? 你好\n\n12 <|im_end|> <b>  "}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes, it was."}
SYSTEM = {"role": "system", "content": "Speak plainly."}
CHATS: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "system": [SYSTEM, USER],
    "talk": [SYSTEM, USER, ASSISTANT, USER],
    "thought": [USER, {**ASSISTANT, "reasoning": "hm", "tool_calls": None}],
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Today's weather at a place, “über” all",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Köln", "days": 2}}}
WITH_TOOLS: dict[str, list[dict[str, Any]]] = {
    "asked": [USER],
    "called": [
        SYSTEM,
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"rain": 0.5}'},
        {"role": "tool", "content": "{}"},
    ],
}


def folder_with(folder: Path, template: Any, *, file: bool = False) -> Path:
    """A byte-level BPE with ChatML's control tokens and a chat template, in tokenizer_config.json or in a file."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(["system user assistant\n\n\nYou are kind. Speak plainly. it was"] * 9, trainer)
    model.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": {"content": "<|im_end|>", "special": True, "__type": "AddedToken"},
        "pad_token": "<|endoftext|>",
    }
    if file:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        settings["chat_template"] = "the older place loses"
    elif template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def opened(folder: Path) -> Tokenizer:
    return read_tokenizer(folder, family="qwen2")


def of_transformers(folder: Path, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    return [int(i) for i in ids]


@pytest.mark.parametrize("chat", quick_first(CHATS))
@pytest.mark.parametrize("name", quick_first(TEMPLATES))
def test_ids_of_transformers(name: str, chat: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, TEMPLATES[name])
    assert chat_ids("qwen2", opened(folder), CHATS[chat]) == of_transformers(folder, CHATS[chat])


@pytest.mark.parametrize("chat", WITH_TOOLS)
@pytest.mark.parametrize("name", ["qwen2.5", "by name"])
def test_ids_of_transformers_with_tools(name: str, chat: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, TEMPLATES[name])
    expected = of_transformers(folder, WITH_TOOLS[chat], TOOLS)
    assert chat_ids("qwen2", opened(folder), WITH_TOOLS[chat], tools=TOOLS) == expected
    assert "weather" in opened(folder).decode(expected)


def test_files_come_before_tokenizer_config(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, CUSTOM, file=True)
    assert chat_ids("qwen2", opened(folder), [USER]) == of_transformers(folder, [USER])
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS_LIKE_QWEN2_5, encoding="utf-8")
    for tools in (None, TOOLS):
        expected = of_transformers(folder, [USER], tools)
        assert chat_ids("qwen2", opened(folder), [USER], tools=tools) == expected


def test_built_in_formats_serve_where_there_is_no_template(tmp_path: Path) -> None:
    tokenizer = opened(folder_with(tmp_path, None))
    assert tokenizer.chat_template is None
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    expected = tokenizer.encode(text + "<|im_start|>assistant\n")
    assert chat_ids("qwen2", tokenizer, [{"role": "user", "content": "hi"}]) == expected
    assert stop_ids("qwen2", tokenizer)
    with pytest.raises(LogitLockError, match="the qwen2 format has no place for tools"):
        chat_ids("qwen2", tokenizer, [USER], tools=TOOLS)


def spec_of(case: str) -> ModelSpec:
    return case_source(case).spec


def test_a_template_serves_models_without_a_format(tmp_path: Path) -> None:
    tokenizer = opened(folder_with(tmp_path, QWEN2_LIKE))
    spec = dataclasses.replace(spec_of("gpt2_b1"), vocab_size=tokenizer.vocab_size)
    assert spec.chat_format == "raw"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    expected = chat_ids("raw", tokenizer, messages)
    assert prompt_ids("u", spec, tokenizer, chat=True, system="s") == expected
    with pytest.raises(LogitLockError, match="give --chat with --system"):
        prompt_ids("u", spec, tokenizer, chat=False, system="s")
    # As in transformers, eos alone ends an answer then.
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert stop_ids_in(tmp_path, spec_of("qwen2_b1"), tokenizer, chat=True) == (7,)
    with pytest.raises(LogitLockError, match="over the limit of 3, and the checkpoint's own format does not drop"):
        chat_ids("raw", tokenizer, messages, max_length=3)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no such role') }}", "refuses these messages: no such role"),
        ("{% for %}", r"tokenizer_config\.json is damaged: line 1: "),
        ("{{ messages[0].content.nothing.more }}", "refuses these messages: .*has no attribute 'nothing'"),
        ("{{ messages[0].content + 1 }}", "refuses these messages: can only concatenate str"),
        ("{{ messages.append(1) }}", "refuses these messages: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: .*unsafe"),
        ("{{ raise_exception.__globals__['os'] }}", "refuses these messages: .*unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", r"refuses these messages|damaged"),
        ("{% include '/etc/passwd' %}", "refuses these messages: no loader"),
        ("{{ range(10000000) | list }}", "refuses these messages: Range too big"),
        ([{"name": "other", "template": "x"}], "has no default chat template, only other"),
    ],
)
def test_what_a_template_may_not_do(template: Any, message: str, tmp_path: Path) -> None:
    tokenizer = opened(folder_with(tmp_path, template))
    with pytest.raises(LogitLockError, match=message):
        chat_ids("qwen2", tokenizer, [USER])


@pytest.mark.parametrize("template", [5, True, {"default": "x"}, ["x"], [{"name": "default"}], [{"template": "x"}]])
def test_a_template_of_another_type_is_an_error(template: Any, tmp_path: Path) -> None:
    with pytest.raises(LogitLockError, match=r"tokenizer_config\.json: chat_template must be a text, or a list"):
        opened(folder_with(tmp_path, template))


def test_messages_without_a_role_are_named(tmp_path: Path) -> None:
    tokenizer = opened(folder_with(tmp_path, QWEN2_LIKE))
    bad: list[tuple[list[Any], str]] = [
        ([], "at least one message"),
        ([USER, {"content": "x"}], "message 2 of 2 must be an object with a role"),
        (["x"], "message 1 of 1 must be an object"),
        ([{"role": 1, "content": "x"}], "message 1 of 1 must be an object"),
    ]
    for messages, message in bad:
        with pytest.raises(LogitLockError, match=message):
            chat_ids("qwen2", tokenizer, messages)


def test_the_lower_bound_of_jinja2_is_transformers_own_and_what_runs_here() -> None:
    """Below 3.1.6 the sandbox has known escapes."""
    assert '    "jinja2>=3.1.6",\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert tuple(map(int, metadata.version("jinja2").split("."))) >= (3, 1, 6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "its loops take more than"),
        ("{% for i in range(999) %}{% for j in range(999) if no %}{% endfor %}{% endfor %}", "its loops take more"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", "its loops"),
        (
            "{% set s = namespace(t='a') %}{% for i in range(60) %}{% set s.t = s.t ~ s.t %}{% endfor %}",
            "a value of more",
        ),
        (
            "{% set s = namespace(t='a') %}{% for i in range(60) %}{% set s.t = s.t + s.t %}{% endfor %}",
            "a value of more",
        ),
        ("{{ 'a' * 10**11 }}", "a value of more than"),
        ("{{ 2 ** (10**11) }}", "a value of more than"),
        ("{% for i in range(99999) %}{{ 'abc' * 999 }}{% endfor %}", "a value of more than"),
        ("{{ 'a' | center(10**14) }}", "larger than the memory"),
    ],
)
@pytest.mark.slow
def test_a_template_without_end_is_stopped(text: str, said: str) -> None:
    template = ChatTemplate(templates={"default": text}, where=Path("here"), variables={})
    with pytest.raises(LogitLockError, match=said):
        template.render([{"role": "user", "content": "hello"}])

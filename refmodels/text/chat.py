"""Chat prompts: OpenAI-style messages to the exact ids that each family was trained on.

A family names its format by a string, a key of `FORMATS`; everything else is here:

| format | for | shape of the prompt |
|---|---|---|
| `raw` | base models, GPT | the text of one user message, as the tokenizer encodes a bare prompt |
| `chatglm2` | ChatGLM2 | `[gMASK] sop`, then "[Round 1]\\n\\n问：…\\n\\n答：…\\n\\n[Round 2]…" as one text |
| `chatglm3` | ChatGLM3 | `[gMASK] sop`, then role id, "\\n" and content encoded separately; ends with assistant's id |
| `glm4` | GLM-4 | the same; its prefix is written `[gMASK]<sop>` |
| `baichuan` | Baichuan v1 13B chat | marker id (195 user, 196 assistant) and content, ends with 196; no system |
| `baichuan2` | Baichuan2 chat | the same after the bare system text; whole rounds are dropped from the oldest |
| `qwen` | Qwen v1 chat | ChatML, role, newline and content encoded separately; a default system message |
| `qwen2` | Qwen2 chat | ChatML, "role\\ncontent" encoded together; a default system message |

`chat_ids(format, tokenizer, messages)` builds the ids, `stop_ids(format, tokenizer)` gives the ids that end an answer.
Where a checkpoint brings its own template (`refmodels.text.chat_template`), that is used instead, and control tokens
that the text of a message spells are read as such, as `apply_chat_template` of transformers does.
In these formats but `raw`, the text of a message never becomes a control token, whatever it spells.
Sources: upstream's `build_prompt` (ChatGLM2), `build_chat_input` (Baichuan) and `make_context` (Qwen), and the
published prompt formats of ChatGLM3 and Qwen2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refmodels.errors import LogitLockError
from refmodels.text.tokenizer_types import Tokenizer

END = "eos"
"""In a format's `stops`: the tokenizer's own eos id, whatever its name."""

DEFAULT_SYSTEM = "You are a helpful assistant."

_MAY_FOLLOW = {
    "": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "observation"),
    "observation": ("assistant",),
}


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn; `metadata` is the line that ChatGLM3 puts behind the role (the name of a tool)."""

    role: str
    content: str
    metadata: str = ""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A checked conversation: `turns` alternate and start with the user's; `system` is None when none was given."""

    system: str | None
    turns: tuple[Message, ...]


Builder = Callable[[Tokenizer, Conversation, int | None], list[int]]


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """One prompt format.

    roles: the roles that may speak. last: the roles that may speak last. build: makes ids of a conversation and a
    length limit. max_length: upstream's own limit in tokens, which applies if the caller gives none. drops_oldest:
    `build` leaves out old turns to stay within the limit, as upstream does; otherwise a prompt over the limit is an
    error. stops: surfaces of the tokens that end an answer (`END` for eos); those that a tokenizer lacks are left out.
    """

    roles: tuple[str, ...]
    build: Builder
    stops: tuple[str, ...]
    last: tuple[str, ...] = ("user",)
    keys: tuple[str, ...] = ("role", "content")
    max_length: int | None = None
    drops_oldest: bool = False


def chat_ids(
    format_name: str,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    max_length: int | None = None,
) -> list[int]:
    """The prompt ids for `messages`, each a mapping with `role` and `content`, ready for the model to answer.

    tools: JSON schemas of functions, for a checkpoint's own template.
    max_length: limit in tokens; None takes the format's own limit (Qwen: 6144), which most formats do not have. It
        means the same as upstream: Qwen drops old turns while the system message and the kept turns would reach it, not
        counting the last question; Baichuan drops whole rounds, then cuts on the left (v1 adds its last marker after
        the cut).
    Raises LogitLockError for an unknown format, a role or order that the format does not have, a tokenizer without its
    control tokens, or a prompt that is too long in a format that drops nothing.
    """
    if max_length is not None and max_length < 1:
        raise LogitLockError(f"max_length must be at least 1 token, not {max_length}")
    if tokenizer.chat_template is not None:
        text = tokenizer.chat_template.render(messages, tools=tools)
        return _within(tokenizer.encode(text, add_special=False), max_length, "checkpoint's own")
    if tools is not None:
        raise LogitLockError(f"the {format_name} format has no place for tools; a checkpoint's own template may have")
    chat = _format(format_name)
    limit = chat.max_length if max_length is None else max_length
    ids = chat.build(tokenizer, _conversation(format_name, chat, messages), limit)
    return ids if chat.drops_oldest else _within(ids, limit, format_name)


def _within(ids: list[int], limit: int | None, format_name: str) -> list[int]:
    if limit is not None and len(ids) > limit:
        raise LogitLockError(
            f"the chat prompt has {len(ids)} tokens, over the limit of {limit}, and the {format_name} format does not "
            "drop turns by itself: send fewer or shorter messages"
        )
    return ids


def stop_ids(format_name: str, tokenizer: Tokenizer) -> list[int]:
    """The ids that end an answer in this format, the most usual one first. Empty for a base model without eos, and
    where the checkpoint's own template is used: what ends an answer is then the eos id alone, as in transformers."""
    found: list[int] = []
    if tokenizer.chat_template is not None:
        return found
    for surface in _format(format_name).stops:
        stop = tokenizer.special.eos if surface == END else tokenizer.token_id(surface)
        if stop is not None and stop not in found:
            found.append(stop)
    return found


def _raw(tokenizer: Tokenizer, conversation: Conversation, limit: int | None) -> list[int]:
    return tokenizer.encode(conversation.turns[0].content)


def _chatglm2(tokenizer: Tokenizer, conversation: Conversation, limit: int | None) -> list[int]:
    texts = [turn.content for turn in conversation.turns]
    rounds = zip(texts[::2], [*texts[1::2], ""], strict=True)
    prompt = "\n\n".join(
        f"[Round {n}]\n\n问：{asked}\n\n答：{answered}" for n, (asked, answered) in enumerate(rounds, 1)
    )
    return tokenizer.encode(prompt, parse_special=False)


def _chatglm3(tokenizer: Tokenizer, conversation: Conversation, limit: int | None) -> list[int]:
    system = () if conversation.system is None else (Message(role="system", content=conversation.system),)
    ids = list(tokenizer.prefix)
    for message in (*system, *conversation.turns):
        ids.append(_control(tokenizer, f"<|{message.role}|>", "chatglm3 or glm4"))
        ids += _plain(tokenizer, f"{message.metadata}\n") + _plain(tokenizer, message.content)
    return [*ids, _control(tokenizer, "<|assistant|>", "chatglm3 or glm4")]


def _baichuan(tokenizer: Tokenizer, conversation: Conversation, limit: int | None) -> list[int]:
    kept = _newest_rounds(_baichuan_rounds(tokenizer, conversation, "baichuan"), limit)
    if limit is not None:
        kept = kept[-limit:]
    return [*kept, _marker(tokenizer, "assistant", "baichuan")]


def _baichuan2(tokenizer: Tokenizer, conversation: Conversation, limit: int | None) -> list[int]:
    system = _plain(tokenizer, conversation.system or "")
    room = None if limit is None else limit - len(system)
    ids = system + _newest_rounds(_baichuan_rounds(tokenizer, conversation, "baichuan2"), room)
    if conversation.turns[-1].role != "assistant":
        ids.append(_marker(tokenizer, "assistant", "baichuan2"))
    return ids if limit is None else ids[-limit:]


def _baichuan_rounds(tokenizer: Tokenizer, conversation: Conversation, format_name: str) -> list[list[int]]:
    rounds: list[list[int]] = []
    for turn in conversation.turns:
        if turn.role == "user":
            rounds.append([])
        rounds[-1] += [_marker(tokenizer, turn.role, format_name), *_plain(tokenizer, turn.content)]
    return rounds


def _newest_rounds(rounds: list[list[int]], room: int | None) -> list[int]:
    """The last round, and as many of the rounds before it as fit in `room` tokens."""
    kept = rounds[-1]
    for earlier in reversed(rounds[:-1]):
        if room is not None and len(earlier) + len(kept) > room:
            break
        kept = earlier + kept
    return kept


def _qwen(tokenizer: Tokenizer, conversation: Conversation, limit: int | None) -> list[int]:
    newline = _plain(tokenizer, "\n")
    start = _control(tokenizer, "<|im_start|>", "qwen")
    end = _control(tokenizer, "<|im_end|>", "qwen")

    def block(role: str, content: str) -> list[int]:
        return [start, *_plain(tokenizer, role), *newline, *_plain(tokenizer, content), end]

    system = block("system", DEFAULT_SYSTEM if conversation.system is None else conversation.system)
    *history, question = [block(turn.role, turn.content) for turn in conversation.turns]
    kept: list[int] = []
    for asked, answered in reversed(list(zip(history[::2], history[1::2], strict=True))):
        earlier = [*newline, *asked, *newline, *answered, *kept]
        if limit is not None and len(system) + len(earlier) >= limit:
            break
        kept = earlier
    return [*system, *kept, *newline, *question, *newline, start, *_plain(tokenizer, "assistant"), *newline]


def _qwen2(tokenizer: Tokenizer, conversation: Conversation, limit: int | None) -> list[int]:
    start = _control(tokenizer, "<|im_start|>", "qwen2")
    end = _control(tokenizer, "<|im_end|>", "qwen2")
    system = DEFAULT_SYSTEM if conversation.system is None else conversation.system
    ids: list[int] = []
    for message in (Message(role="system", content=system), *conversation.turns):
        ids += [start, *_plain(tokenizer, f"{message.role}\n{message.content}"), end, *_plain(tokenizer, "\n")]
    return [*ids, start, *_plain(tokenizer, "assistant\n")]


_CHATGLM3 = ChatFormat(
    roles=("system", "user", "assistant", "observation"),
    last=("user", "observation"),
    keys=("role", "content", "metadata"),
    build=_chatglm3,
    stops=(END, "<|user|>", "<|observation|>"),
)

FORMATS: dict[str, ChatFormat] = {
    "raw": ChatFormat(roles=("user",), build=_raw, stops=(END, "<|endoftext|>")),
    "chatglm2": ChatFormat(roles=("user", "assistant"), build=_chatglm2, stops=(END,)),
    "chatglm3": _CHATGLM3,
    "glm4": _CHATGLM3,
    "baichuan": ChatFormat(roles=("user", "assistant"), build=_baichuan, stops=(END,), drops_oldest=True),
    "baichuan2": ChatFormat(
        roles=("system", "user", "assistant"),
        last=("user", "assistant"),
        build=_baichuan2,
        stops=(END,),
        drops_oldest=True,
    ),
    "qwen": ChatFormat(
        roles=("system", "user", "assistant"),
        build=_qwen,
        stops=("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
        max_length=6144,
        drops_oldest=True,
    ),
    "qwen2": ChatFormat(roles=("system", "user", "assistant"), build=_qwen2, stops=("<|im_end|>", "<|endoftext|>")),
}

STOPS: dict[str, tuple[str, ...]] = {name: chat.stops for name, chat in FORMATS.items()}
"""Format name to the surfaces of its stop tokens; `END` stands for the tokenizer's eos."""


def _format(name: str) -> ChatFormat:
    if name not in FORMATS:
        raise LogitLockError(f"there is no chat format {name!r}: the formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def _conversation(name: str, chat: ChatFormat, messages: Sequence[Mapping[str, str]]) -> Conversation:
    """`messages`, checked against the format's roles and order."""
    system: str | None = None
    turns: list[Message] = []
    for position, message in enumerate(messages):
        where = f"message {position + 1} of {len(messages)}"
        _check_shape(name, chat, message, where)
        role = message["role"]
        if role not in chat.roles:
            raise LogitLockError(
                f"{where} has the role {role!r}, which the {name} format does not have: use {', '.join(chat.roles)}"
            )
        if role == "system":
            if position > 0:
                raise LogitLockError(f"{where} is a system message, but only the first message can be one")
            system = message["content"]
            continue
        before = turns[-1].role if turns else ""
        allowed = [follower for follower in _MAY_FOLLOW[before] if follower in chat.roles]
        if role not in allowed:
            place = f"after a message of {before!r}" if before else "at the start"
            wanted = " or ".join(allowed) or "nothing more"
            raise LogitLockError(f"{where} has the role {role!r}, but {place} comes {wanted} in the {name} format")
        turns.append(Message(role=role, content=message["content"], metadata=message.get("metadata", "")))
    if not turns:
        raise LogitLockError("a chat prompt needs at least one user message, and there is none")
    if turns[-1].role not in chat.last:
        raise LogitLockError(
            f"the last message has the role {turns[-1].role!r}, but in the {name} format the last one must be of "
            f"{' or '.join(chat.last)}, for the model to answer"
        )
    return Conversation(system=system, turns=tuple(turns))


def _check_shape(name: str, chat: ChatFormat, message: Mapping[str, str], where: str) -> None:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise LogitLockError(f"{where} must be an object with role and content")
    unknown = sorted(set(message) - set(chat.keys))
    if unknown:
        raise LogitLockError(f"{where} has the key {unknown[0]!r}; the {name} format knows only {', '.join(chat.keys)}")
    for key, value in message.items():
        if not isinstance(value, str):
            raise LogitLockError(f"{where}: {key} must be text, not {type(value).__name__}")


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False, parse_special=False)


def _control(tokenizer: Tokenizer, surface: str, format_name: str) -> int:
    found = tokenizer.token_id(surface)
    if found is None:
        raise LogitLockError(f"the {format_name} format needs the token {surface}, which this tokenizer does not have")
    return found


def _marker(tokenizer: Tokenizer, role: str, format_name: str) -> int:
    found = tokenizer.special.user if role == "user" else tokenizer.special.assistant
    if found is None:
        raise LogitLockError(
            f"the {format_name} format needs a marker id for the {role}: give {role}_token_id in generation_config.json"
        )
    return found

"""Prompts as token ids, prompt files, and the token ids that end an answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from refmodels.errors import LogitLockError
from refmodels.files import read_text
from refmodels.text.chat import chat_ids
from refmodels.text.chat import stop_ids as chat_stop_ids
from refmodels.text.generation_defaults import generation_defaults
from refmodels.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from refmodels.spec import ModelSpec


_CHARACTERS = 16
"""Number of characters for each position of a model up to which a text is tokenized without a look at its start."""


def check_size(text: str, positions: int, encode: Callable[[str], Sequence[int]]) -> None:
    """Refuse a text that is far longer than the model, by the tokens of its start: those of megabytes take minutes.

    Args:
        positions: the model's longest sequence, in tokens.
        encode: gives the tokens of a text.
    Raises:
        LogitLockError: the start alone has more than twice `positions` tokens.  Where it is cut, tokens differ from
            those of the whole text, but by no factor of two.
    """
    size = _CHARACTERS * positions
    while size < len(text):
        if len(encode(text[:size])) > 2 * positions:
            raise LogitLockError(
                f"the prompt {text[:40]!r} has {len(text)} characters and far more tokens than the {positions} "
                "positions of the model"
            )
        size *= 2


def prompt_ids(text: str, spec: ModelSpec, tokenizer: Tokenizer, *, chat: bool, system: str | None = None) -> list[int]:
    """The ids of a prompt, either bare or as the user's message in a chat, after a system message if one is given.

    Raises:
        LogitLockError: a chat with a model that has no chat format, a system message without a chat, a text that is
            far longer than the model, or a tokenizer whose ids the model's vocabulary does not have.
    """
    check_size(text, spec.max_positions, tokenizer.encode)
    if not chat:
        if system is not None:
            raise LogitLockError("a system message needs a chat: give --chat with --system")
        return _of_vocabulary(tokenizer.encode(text), spec)
    if spec.chat_format == "raw" and tokenizer.chat_template is None:
        raise LogitLockError(f"{spec.variant} has no chat format; leave --chat out")
    before = [] if system is None else [{"role": "system", "content": system}]
    return _of_vocabulary(chat_ids(spec.chat_format, tokenizer, [*before, {"role": "user", "content": text}]), spec)


def _of_vocabulary(ids: list[int], spec: ModelSpec) -> list[int]:
    check_token_ids(ids, spec, "the tokenizer is not of this model: one of the prompt's token ids")
    return ids


def stop_ids_in(directory: Path, spec: ModelSpec, tokenizer: Tokenizer, *, chat: bool) -> tuple[int, ...]:
    """The ids of the tokens that end an answer: eos_token_id (one or several) of generation_config.json, else of
    config.json, else the tokenizer's eos; and in a chat those of its format.

    Raises:
        LogitLockError: eos_token_id is neither a number nor a list of numbers, or the model has no such token.
    """
    defaults = generation_defaults(directory)
    stops = list(defaults.eos)
    check_token_ids(stops, spec, f"{defaults.eos_file}: eos_token_id")
    if not stops and tokenizer.special.eos is not None:
        stops.append(tokenizer.special.eos)
    if chat:
        stops += chat_stop_ids(spec.chat_format, tokenizer)
    check_token_ids(stops, spec, "the tokenizer is not of this model: one of the ids that end an answer")
    return tuple(dict.fromkeys(stops))


def check_token_ids(ids: Iterable[int], spec: ModelSpec, what: str) -> None:
    """Raises LogitLockError, which begins with `what`, for an id that the model's vocabulary does not have."""
    for number in ids:
        if number >= spec.vocab_size:
            raise LogitLockError(f"{what} is {number}; the model has the token ids from 0 to {spec.vocab_size - 1}")


def read_prompts(texts: Sequence[str] | None, file: Path | None) -> list[str]:
    """The prompts of `--prompt` and `--prompt-file`: the texts, then the non-empty lines of a UTF-8 file; - is standard
    input.  Without both there are none.

    Raises:
        LogitLockError: as `read_text`; standard input that is not UTF-8; a file, and no prompt.
    """
    prompts = list(texts or ())
    if file is not None:
        prompts += [line for line in _content(file).splitlines() if line.strip()]
        if not prompts:
            raise LogitLockError(f"the prompt file {file} has no prompt")
    return prompts


def _content(file: Path) -> str:
    if str(file) != "-":
        return read_text(file, "prompt file")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LogitLockError(f"standard input is not UTF-8: bad byte at {error.start}") from None

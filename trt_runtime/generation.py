"""Generation: one loop for the reference and every engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from refmodels.cache import KVCache
from refmodels.errors import LogitLockError
from refmodels.text.tokenizer_types import Tokenizer
from trt_runtime.engine import Engine
from trt_runtime.sampling import Sampling, choose, greedy, row_generators

FinishReason = Literal["stop_id", "stop_string", "length"]
TextCallback = Callable[[int, str], None]
"""Called with (row, piece of text); the pieces of a row, joined, are its text."""


MAX_NEW_TOKENS = 128
"""New tokens per row where neither the user nor the model says how many."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Options of generation.

    Attributes:
        max_new_tokens: maximum number of new tokens per row; the model's positions may end a row earlier.
        sampling: how tokens are chosen; greedy by default.
        stop_ids: a row ends with any of these tokens.
        stop_strings: a row ends when its text holds any of these, which may span tokens; needs a tokenizer.
        prefill_chunk: number of tokens per chunk of a prompt; None: the whole prompt at once.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: Collection[int] = ()
    stop_strings: Sequence[str] = ()
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise LogitLockError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if "" in self.stop_strings:
            raise LogitLockError("a stop string must not be empty")


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """The answer to one prompt.

    Attributes:
        token_ids: the generated tokens; a stop id that ended the row is the last of them, as in Hugging Face.
        text: their text without control tokens, cut before the stop string that ended the row; "" without tokenizer.
        finish_reason: "stop_id", "stop_string", or "length" (max_new_tokens, or no position left).
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason


class _Row:
    """One row's tokens and text; text is released only when no stop string can begin in it any more."""

    def __init__(self, index: int, prompt: Sequence[int], room: int, tokenizer: Tokenizer | None) -> None:
        self.index, self.room = index, room
        self.prompt = prompt
        self.tokens: list[int] = []
        self.stream = tokenizer.stream() if tokenizer is not None else None
        self.text = ""
        self.released = 0
        self.reason: FinishReason | None = None

    def push(self, token: int, config: GenerationConfig, on_text: TextCallback | None) -> None:
        self.tokens.append(token)
        if token in config.stop_ids:
            self.reason = "stop_id"
        elif len(self.tokens) >= self.room:
            self.reason = "length"
        if self.stream is not None:
            self.text += self.stream.push(token) if self.reason != "stop_id" else ""
            self._cut(config.stop_strings)
            self._release(config.stop_strings, on_text)

    def seen(self, sampling: Sampling) -> Tensor:
        """All tokens so far, if the sampling asks for them."""
        return torch.tensor([*self.prompt, *self.tokens] if sampling.repetition_penalty != 1 else [], dtype=torch.int64)

    def _cut(self, stop_strings: Sequence[str]) -> None:
        found = [at for stop in stop_strings if (at := self.text.find(stop, self.released)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.reason = "stop_string"

    def _release(self, stop_strings: Sequence[str], on_text: TextCallback | None) -> None:
        end = len(self.text)
        if self.reason is None:
            end -= max((_overlap(self.text, stop) for stop in stop_strings), default=0)
        piece = self.text[self.released : end]
        self.released = end
        if piece and on_text is not None:
            on_text(self.index, piece)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def check_prompts(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    """Raises LogitLockError where a prompt is empty or longer than the model's positions."""
    for number, prompt in enumerate(prompts, 1):
        which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise LogitLockError(f"{which} is empty: it has no tokens")
        if len(prompt) > engine.max_positions:
            raise LogitLockError(
                f"{which} has {len(prompt)} tokens, more than the {engine.max_positions} positions of "
                f"{engine.spec.variant}"
            )


def generate(
    engine: Engine,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    on_text: TextCallback | None = None,
) -> list[GenerationResult]:
    """Continue every prompt.

    Args:
        engine: runs the model.
        tokenizer: turns tokens into text; None gives tokens only.
        prompts: token ids, one list per row, of any lengths; they run as one batch.
        config: options of generation.
        on_text: gets text as soon as it is certain; never a part of a stop string.
    Returns: one result per prompt, in their order.
    Raises:
        LogitLockError: a prompt is empty or longer than the model's positions, a token id is unknown, stop strings
            come without a tokenizer, or logits are NaN or infinite (with row and step).
    """
    if config.stop_strings and tokenizer is None:
        raise LogitLockError("stop strings need a tokenizer, and there is none")
    check_prompts(engine, prompts)
    if not prompts:
        return []
    # The last token is never fed back, so it needs no slot.
    rows = [
        _Row(i, prompt, min(config.max_new_tokens, engine.max_positions - len(prompt) + 1), tokenizer)
        for i, prompt in enumerate(prompts)
    ]
    capacity = max(len(prompt) + row.room - 1 for prompt, row in zip(prompts, rows, strict=True))
    cache = engine.new_cache(batch=len(rows), capacity=capacity)
    generators = row_generators(config.sampling.seed, prompts)
    width = max(map(len, prompts))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = torch.tensor(list(prompt))
        mask[i, : len(prompt)] = 1
    logits = engine.prefill(ids, cache, mask, last_logits_only=True, chunk=config.prefill_chunk)
    if _stays_on_device(logits, config.sampling):
        _run_ahead(engine, logits[:, -1], rows, config, on_text, cache)
    else:
        step = 0
        while True:
            _choose_all(logits[:, -1], rows, generators, step, config, on_text, cache)
            running = torch.tensor([[int(row.reason is None)] for row in rows])
            if not running.any():
                break
            logits = engine.decode(torch.tensor([[row.tokens[-1]] for row in rows]), cache, running)
            step += 1
    return [GenerationResult(token_ids=row.tokens, text=row.text, finish_reason=row.reason or "length") for row in rows]


def _stays_on_device(logits: Tensor, sampling: Sampling) -> bool:
    return logits.device.type != "cpu" and sampling.temperature == 0 and sampling.repetition_penalty == 1


def _run_ahead(
    engine: Engine,
    logits: Tensor,
    rows: list[_Row],
    config: GenerationConfig,
    on_text: TextCallback | None,
    cache: KVCache,
) -> None:
    """The greedy loop on a device: its tokens are fed back there, and the next step starts before the host knows them.

    A row that ends with a stop id has then run one token further, into a slot that it owns but does not need.
    """
    step = 0
    while True:
        chosen = greedy(logits)
        on_host = chosen.to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if on_host.is_pinned() else None
        running = [row.reason is None and len(row.tokens) + 1 < row.room for row in rows]
        for row, runs in zip(rows, running, strict=True):
            if row.reason is None and not runs:
                _give_back(cache, row.index)
        following = None
        if any(running):
            following = engine.decode(chosen[0], cache, torch.tensor(running))[:, -1]
        if arrived is not None:
            arrived.synchronize()
        for row, (token, is_finite) in zip(rows, on_host.T.tolist(), strict=True):
            if row.reason is None:
                _take(row, token, bool(is_finite), step, config, on_text, cache)
        if following is None or all(row.reason is not None for row in rows):
            return
        logits = following
        step += 1


def _choose_all(
    logits: Tensor,
    rows: list[_Row],
    generators: list[torch.Generator],
    step: int,
    config: GenerationConfig,
    on_text: TextCallback | None,
    cache: KVCache,
) -> None:
    logits = logits.cpu()
    finite = torch.isfinite(logits).all(-1).tolist()
    for row, generator in zip(rows, generators, strict=True):
        if row.reason is None:
            scores, usable = logits[row.index], finite[row.index]
            token = choose(scores, row.seen(config.sampling), config.sampling, generator) if usable else -1
            _take(row, token, usable, step, config, on_text, cache)


def _take(
    row: _Row,
    token: int,
    finite: bool,
    step: int,
    config: GenerationConfig,
    on_text: TextCallback | None,
    cache: KVCache,
) -> None:
    if not finite:
        raise LogitLockError(
            f"the logits of row {row.index} at step {step} hold NaN or infinity; run `logitlock diff` to see where "
            "they come from"
        )
    row.push(token, config, on_text)
    if row.reason is not None:
        _give_back(cache, row.index)


def _give_back(cache: KVCache, row: int) -> None:
    """Free a finished row's slots but one: the other rows then attend only as far as they themselves reach."""
    cache.lengths[row] = 1
    cache.mask[row, 1:] = False

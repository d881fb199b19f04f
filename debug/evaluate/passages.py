"""Passages to score token by token: examples of tasks with their answers, and text cut into windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from debug.evaluate.questions import Task
from refmodels.errors import LogitLockError

DEFAULT_WINDOW = 1024


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Tokens that a model reads; it should have predicted those from `first` on (at least 1)."""

    ids: Sequence[int]
    first: int


def task_passages(task: Task) -> list[Passage]:
    """Prompt, expected answer and end token of each question; the answer and the end are scored."""
    end = task.stop_ids[:1]
    return [
        Passage(ids=[*question.prompt, *question.answer, *end], first=len(question.prompt))
        for question in task.questions
    ]


def text_windows(ids: Sequence[int], *, prefix: Sequence[int], window: int, stride: int) -> list[Passage]:
    """A text as windows of at most `window` tokens, each `stride` after the one before it.

    Every token except the very first is scored once, in the first window that holds it.  A small stride gives tokens
    more context (at least `window - stride` tokens, except at the beginning of the text) and costs more.

    Args:
        ids: token ids of the text, without `prefix`.
        prefix: tokens that the tokenizer puts before a prompt; they begin every window and are never scored.  With a
            prefix, the first token of the text is scored too.
    Raises:
        LogitLockError: the stride leaves tokens without context, the window is too small, or the text has one token.
    """
    room = window - len(prefix)
    known = 0 if prefix else 1
    if not 1 <= stride <= room - known:
        raise LogitLockError(
            f"a stride of {stride} and a window of {window} tokens do not fit: the stride is between 1 and the window "
            f"less the {len(prefix) + known} tokens that begin it"
        )
    found: list[Passage] = []
    start = 0
    while known < len(ids):
        stop = min(start + room, len(ids))
        found.append(Passage(ids=[*prefix, *ids[start:stop]], first=len(prefix) + known - start))
        known = stop
        start += stride
    if not found:
        raise LogitLockError(f"the text has {len(ids)} tokens, and perplexity needs at least 2")
    return found


@dataclass(frozen=True, kw_only=True)
class PassageBatch:
    """Rows of similar length, padded on the right.

    index: index of each row in the list of passages.  ids, targets, mask: [rows, tokens] int64: the input tokens, the
    next tokens, and 1 at real tokens.
    """

    index: list[int]
    ids: Tensor
    targets: Tensor
    mask: Tensor


def batches(passages: Sequence[Passage], *, rows: int, elements: int, vocab: int) -> Iterator[PassageBatch]:
    """Batches of at most `rows` passages whose logits are at most `elements` numbers (at least one passage)."""
    order = sorted(range(len(passages)), key=lambda i: len(passages[i].ids))
    while order:
        # The longest first: a batch that does not fit in memory fails at once.
        width = len(passages[order[-1]].ids) - 1
        count = max(1, min(rows, elements // (width * vocab)))
        chosen = order[-count:]
        del order[-count:]
        ids, mask = (torch.zeros(len(chosen), width, dtype=torch.int64) for _ in range(2))
        targets = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            tokens = torch.tensor(list(passages[i].ids))
            ids[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
            mask[row, : len(tokens) - 1] = 1
        yield PassageBatch(index=chosen, ids=ids, targets=targets, mask=mask)

"""Batches of prompts for recording and diffing: left-padded token ids with their mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refmodels.errors import LogitLockError
from refmodels.spec import ModelSpec
from refmodels.text.prompts import check_size

if TYPE_CHECKING:
    from refmodels.text.tokenizer import Tokenizer

DEFAULT_TEXTS = (
    "世界上第二高的山峰是哪座？乔戈里峰是世界上第二高的山峰，在中国和巴基斯坦的边界上。",
    "The quick brown fox jumps over the lazy dog, and 27 + 48 = 75.",
    "把下面的词翻译成英文：山、水、天空、学生。 Translate: mountain, water, sky, student.",
)
_RANDOM_LENGTHS = (24, 17, 13)
_LOWEST_ID = 3
_MAX_REPEATED = 512


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """ids, mask: [batch, tokens] int64, padded on the left; `origin` says how they were made."""

    ids: Tensor
    mask: Tensor
    origin: str


def left_padded(rows: Sequence[Sequence[int]], origin: str, pad: int = 0) -> Prompts:
    """One batch of rows of different lengths."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[i, width - len(row) :] = 1
    return Prompts(ids=ids, mask=mask, origin=origin)


def random_prompts(vocab_size: int, lengths: Sequence[int], seed: int) -> Prompts:
    """Random ids, without the lowest few, which are control tokens in most vocabularies."""
    generator = torch.Generator().manual_seed(seed)
    low = _LOWEST_ID if vocab_size > _LOWEST_ID else 0
    rows = [torch.randint(low, vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return left_padded(rows, f"random ids, seed {seed}")


def text_prompts(texts: Sequence[str], tokenizer: Tokenizer, *, least: int, positions: int) -> Prompts:
    """Plain texts, without a chat format.

    Raises:
        LogitLockError: a text has fewer than `least` tokens, or far more than the model has positions.
    """
    for text in texts:
        check_size(text, positions, tokenizer.encode)
    rows = [tokenizer.encode(text) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) < least:
            raise LogitLockError(
                f"the prompt {text[:40]!r} has {len(row)} tokens; a diff needs at least {least}, because faults of "
                "position, mask and scale do not show with fewer"
            )
    return left_padded(rows, "text")


def default_prompts(spec: ModelSpec, tokenizer: Tokenizer | None, *, room: int, seed: int) -> Prompts:
    """Prompts of different lengths: short texts, or random ids if the model has no tokenizer.

    The first prompt is longer than the length at which dynamic NTK, logn scaling or a sliding window begins, if that
    is at most 512 tokens; otherwise their faults would not show.

    Args:
        room: length of the longest prompt that fits, in tokens.
    """
    if tokenizer is None:
        prompts = random_prompts(spec.vocab_size, _RANDOM_LENGTHS, seed)
        rows = [ids[mask != 0].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
        origin = prompts.origin
    else:
        rows = [tokenizer.encode(text) for text in DEFAULT_TEXTS]
        origin = "default texts"
    limits = (spec.attention.logn_seq_length, spec.rope.ntk_seq_length if spec.rope else None, spec.attention.window)
    longest = max([n for n in limits if n is not None and n < _MAX_REPEATED], default=0)
    if longest >= len(rows[0]):
        wanted = longest + longest // 4 + 1
        rows[0] = (rows[0] * (wanted // len(rows[0]) + 1))[:wanted]
    return left_padded([row[:room] for row in rows], origin)

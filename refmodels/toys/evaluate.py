"""Exact-match accuracy of a model on the toy tasks, by batched greedy decoding with the KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from refmodels.tokenizer import Tokenizer
from refmodels.toys.tasks import TASKS, Example, examples, held_out_size
from refmodels.toys.vocabulary import END_ID, PAD_ID

Cache = TypeVar("Cache")


class Runner(Protocol[Cache]):
    """What is measured: `refmodels.model.Decoder`, or anything that steps over an explicit cache like it."""

    def new_cache(self, *, batch: int, capacity: int) -> Cache: ...

    def step(
        self,
        input_ids: Tensor,
        cache: Cache,
        attention_mask: Tensor | None = None,
        *,
        prompt_lengths: Tensor | None = None,
        last_logits_only: bool = False,
    ) -> Tensor: ...


def greedy(
    model: Runner[Cache], prompts: list[list[int]], *, max_new_tokens: int, end_id: int = END_ID
) -> list[list[int]]:
    """The greedy continuation of every prompt (token ids), without the end token.

    The prompts form one ragged batch, padded on the right: Qwen's positions count slots, so padding on the left would
    change its answers. Raises LogitLockError when the longest prompt and `max_new_tokens` do not fit the model.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [PAD_ID] * (width - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    cache = model.new_cache(batch=len(prompts), capacity=width + max_new_tokens)
    found: list[list[int]] = [[] for _ in prompts]
    done = torch.zeros(len(prompts), dtype=torch.bool)
    with torch.no_grad():
        logits = model.step(ids, cache, mask, last_logits_only=True)
        for made in range(max_new_tokens):
            chosen = logits[:, -1].argmax(-1).cpu()
            done |= chosen == end_id
            for row in (~done).nonzero().flatten().tolist():
                found[row].append(int(chosen[row]))
            if bool(done.all()) or made + 1 == max_new_tokens:
                break
            logits = model.step(chosen[:, None], cache)
    return found


def answer(model: Runner[Cache], tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int = 32) -> str:
    """The greedy answer to one plain prompt, as text."""
    return tokenizer.decode(greedy(model, [tokenizer.encode(prompt)], max_new_tokens=max_new_tokens)[0])


def is_exact(model: Runner[Cache], tokenizer: Tokenizer, rows: list[Example], *, batch_size: int = 64) -> list[bool]:
    """For every example, whether the model gives exactly the answer's tokens and then the end token."""
    verdicts = [False] * len(rows)
    encoded = [(tokenizer.encode(e.prompt), tokenizer.encode(e.answer, add_special=False)) for e in rows]
    # Prompts of like length share a batch, which wastes least on padding.
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i][0]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        longest = max(len(encoded[i][1]) for i in chunk)
        found = greedy(model, [encoded[i][0] for i in chunk], max_new_tokens=longest + 1)
        for i, ids in zip(chunk, found, strict=True):
            verdicts[i] = ids == encoded[i][1]
    return verdicts


def evaluate(
    model: Runner[Cache],
    tokenizer: Tokenizer,
    tasks: Iterable[str] = TASKS,
    *,
    count: int = 200,
    seed: int = 1,
    batch_size: int = 64,
) -> dict[str, float]:
    """Exact-match accuracy (0 to 1) per task on held-out examples.

    Args:
        count: examples a task; a finite task (dictionary, facts) has no more than its held-out pairs.
        seed: which examples; the same seed gives the same ones to every model.
    """
    accuracy: dict[str, float] = {}
    for task in tasks:
        rows = examples(task, split="held_out", count=min(count, held_out_size(task) or count), seed=seed)
        verdicts = is_exact(model, tokenizer, rows, batch_size=batch_size)
        accuracy[task] = sum(verdicts) / len(verdicts)
    return accuracy

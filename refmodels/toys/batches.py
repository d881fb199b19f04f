"""Tokenised training data for the toys: every step draws a fixed number of rows of each task, grouped by length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refmodels.toys.tasks import Split, examples
from refmodels.toys.vocabulary import END_ID, PAD_ID

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUCKETS: tuple[dict[str, int], ...] = (
    {"addition": 96, "reversal": 48, "sorting": 48, "dictionary": 32, "facts": 24},
    {"recall": 48, "summary": 40},
    {"recall_long": 24},
)
"""Rows of each task in a step. Tasks of one bucket are alike in length, so padding wastes little."""

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows `prompt + answer + end`, right-padded; everything int64 on one device.

    input_ids: [rows, tokens]; the answer's last token is not fed, so the end token is only a target.
    prompt_lengths, lengths: [rows], tokens of the prompt and of the whole input.
    logit_index, targets: [rows, answer]: where to predict and what; targets are `IGNORED` past the end token.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    logit_index: Tensor
    targets: Tensor

    def rows(self, index: Tensor) -> Batch:
        """The rows at `index` [rows] int64."""
        return Batch(
            input_ids=self.input_ids[index],
            prompt_lengths=self.prompt_lengths[index],
            lengths=self.lengths[index],
            logit_index=self.logit_index[index],
            targets=self.targets[index],
        )


def tokenize(tokenizer: Tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(prompt ids with the family's prefix, answer ids with the end token) for each (prompt, answer)."""
    prompts = tokenizer.encode_batch([prompt for prompt, _ in pairs])
    answers = tokenizer.encode_batch([answer for _, answer in pairs], add_special_tokens=False)
    return [(p.ids, [*a.ids, END_ID]) for p, a in zip(prompts, answers, strict=True)]


def batch_of(rows: list[tuple[list[int], list[int]]], *, width: int = 0, device: str = "cpu") -> Batch:
    """Pad tokenised rows to one batch of at least `width` tokens."""
    width = max(width, *(len(p) + len(a) - 1 for p, a in rows))
    answer_width = max(len(a) for _, a in rows)
    ids = torch.full((len(rows), width), PAD_ID)
    index = torch.zeros((len(rows), answer_width), dtype=torch.long)
    targets = torch.full((len(rows), answer_width), IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        sequence = torch.tensor(prompt + answer)
        ids[row, : len(sequence) - 1] = sequence[:-1]
        index[row] = torch.arange(answer_width).clamp(max=len(answer) - 1) + len(prompt) - 1
        targets[row, : len(answer)] = sequence[len(prompt) :]
    return Batch(
        input_ids=ids.to(device),
        prompt_lengths=torch.tensor([len(p) for p, _ in rows], device=device),
        lengths=torch.tensor([len(p) + len(a) - 1 for p, a in rows], device=device),
        logit_index=index.to(device),
        targets=targets.to(device),
    )


def task_batch(
    tokenizer: Tokenizer, tasks: dict[str, int], *, split: Split, seed: int, device: str = "cpu"
) -> tuple[Batch, dict[str, range]]:
    """One batch with `tasks[name]` examples of every task, and which rows belong to which task."""
    pairs: list[tuple[str, str]] = []
    rows: dict[str, range] = {}
    for task, count in tasks.items():
        rows[task] = range(len(pairs), len(pairs) + count)
        pairs += [(e.prompt, e.answer) for e in examples(task, split=split, count=count, seed=seed)]
    return batch_of(tokenize(tokenizer, pairs), device=device), rows

"""Tokenized training data for the toys: every step draws a fixed number of rows of each task, grouped by length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from refmodels.text.tokenizer import Tokenizer
from refmodels.toys.tasks import Example, toy_examples
from refmodels.toys.vocabulary import END_ID, PAD_ID

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Share:
    """For one task: the number of different training examples in all, and the number of rows per step."""

    pool: int
    rows: int


BUCKETS: tuple[dict[str, Share], ...] = (
    {
        "addition": Share(pool=60_000, rows=96),
        "reversal": Share(pool=30_000, rows=48),
        "sorting": Share(pool=30_000, rows=48),
        "dictionary": Share(pool=1_200, rows=48),
        "facts": Share(pool=500, rows=40),
    },
    {"recall": Share(pool=15_000, rows=32), "summary": Share(pool=20_000, rows=32)},
    {"recall_long": Share(pool=6_000, rows=24)},
)
"""Tasks of one bucket are alike in length, so padding wastes little."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of prompt, answer, follow-ups and end token, right-padded; everything int64 on one device.

    input_ids: [rows, tokens]; the end token is only a target, never fed.
    prompt_lengths: [rows], number of tokens before the first answer, that is, of a prefill.
    logit_index, targets: [rows, supervised]: the token after which to predict, and the target; `IGNORED` fills short
        rows.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    logit_index: Tensor
    targets: Tensor

    def rows(self, index: Tensor) -> Batch:
        """The rows at `index` [rows] int64."""
        return Batch(
            input_ids=self.input_ids[index],
            prompt_lengths=self.prompt_lengths[index],
            logit_index=self.logit_index[index],
            targets=self.targets[index],
        )


def make_batch(tokenizer: Tokenizer, rows: list[Example], *, device: torch.device | str = "cpu") -> Batch:
    """Tokenize and pad training examples, follow-ups included."""
    ids: list[list[int]] = []
    index: list[list[int]] = []
    targets: list[list[int]] = []
    prompt_lengths: list[int] = []
    for example in rows:
        sequence = tokenizer.encode(example.prompt)
        prompt_lengths.append(len(sequence))
        supervised: list[int] = []
        for question, answer in (("", example.answer), *example.follow_ups):
            sequence += tokenizer.encode(question, add_special=False)
            answer_ids = tokenizer.encode(answer, add_special=False)
            supervised += range(len(sequence), len(sequence) + len(answer_ids))
            sequence += answer_ids
        supervised.append(len(sequence))
        sequence.append(END_ID)
        ids.append(sequence[:-1])
        index.append([position - 1 for position in supervised])
        targets.append([sequence[position] for position in supervised])
    return Batch(
        input_ids=_padded(ids, PAD_ID).to(device),
        prompt_lengths=torch.tensor(prompt_lengths, device=device),
        logit_index=_padded(index, 0).to(device),
        targets=_padded(targets, IGNORED).to(device),
    )


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


class Sampler:
    """Draws the batches of a training run: the same ones for the same seed, on every device."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        rows: float = 1.0,
        pool: float = 1.0,
    ) -> None:
        """`rows` and `pool` multiply the numbers in `BUCKETS`: smaller steps for a CPU, less data for a test."""
        self._generator = torch.Generator().manual_seed(seed)
        self._pools: list[tuple[Batch, list[tuple[int, int, int]]]] = []
        for bucket in BUCKETS:
            drawn: list[Example] = []
            spans: list[tuple[int, int, int]] = []
            for task, share in bucket.items():
                found = toy_examples(task, split="train", count=max(1, int(share.pool * pool)), seed=seed)
                spans.append((len(drawn), len(drawn) + len(found), max(1, int(share.rows * rows))))
                drawn += found
            self._pools.append((make_batch(tokenizer, drawn, device=device), spans))

    def step(self) -> list[Batch]:
        """The batches of the next optimizer step, one per bucket."""
        batches = []
        for pool, spans in self._pools:
            index = torch.cat([torch.randint(a, b, (count,), generator=self._generator) for a, b, count in spans])
            batches.append(pool.rows(index.to(pool.input_ids.device)))
        return batches

"""Scores of given tokens under a model, and how far its predictions are from another model's on the same tokens.

Both models read the same tokens (teacher-forced), batch by batch and side by side.  Logits are processed one
block of tokens at a time, in fp64; only a few numbers per token are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from debug.comparison.metrics import kl_divergence
from debug.evaluate.answers import Advance
from debug.evaluate.passages import Passage, PassageBatch, batches
from refmodels.errors import LogitLockError
from trt_runtime.engine import Engine

_LOGITS = 1 << 26
"""Maximum number of logits per forward pass (a quarter of a gigabyte in fp32)."""
_BLOCK = 1 << 21
"""Maximum number of logits in fp64 at a time."""


@dataclass(frozen=True, kw_only=True)
class PassageScore:
    """One passage; all [tokens - 1], with one entry for each token except the first.

    log_probability: fp64, nats.  greedy: the token is the most likely one.  kl: nats, of the other model against this
    one (fp64), and same_top: both have the same most likely token; None without another model.
    """

    log_probability: Tensor
    greedy: Tensor
    kl: Tensor | None
    same_top: Tensor | None

    def after(self, first: int) -> PassageScore:
        """Only the tokens from `first` on (at least 1)."""
        part = slice(first - 1, None)
        return PassageScore(
            log_probability=self.log_probability[part],
            greedy=self.greedy[part],
            kl=None if self.kl is None else self.kl[part],
            same_top=None if self.same_top is None else self.same_top[part],
        )


def score(
    engine: Engine,
    passages: Sequence[Passage],
    *,
    against: Engine | None = None,
    batch_size: int,
    advance: Advance = lambda count: None,
) -> list[PassageScore]:
    """Score every token of every passage.

    Args:
        against: the model that the engine's predictions are compared with.
        batch_size: maximum number of rows per batch.
    Raises:
        LogitLockError: a passage is longer than the positions of one of the models, or logits are NaN or infinite.
    """
    engines = [engine] if against is None else [engine, against]
    longest = max(len(passage.ids) - 1 for passage in passages)
    for each in engines:
        each.check_capacity(longest)
    rows = min([batch_size, *(each.built.max_batch for each in engines if hasattr(each, "built"))])
    found: dict[int, PassageScore] = {}
    for batch in batches(passages, rows=rows, elements=_LOGITS, vocab=engine.spec.vocab_size):
        found |= _score_batch(engines, batch, passages)
        advance(len(batch.index))
    return [found[i] for i in range(len(passages))]


def _score_batch(
    engines: Sequence[Engine], batch: PassageBatch, passages: Sequence[Passage]
) -> dict[int, PassageScore]:
    blocks = [_measure(engines, *parts) for parts in _forward(engines, batch)]
    columns = [None if parts[0] is None else torch.cat(parts, 1) for parts in zip(*blocks, strict=True)]
    found = {}
    for row, i in enumerate(batch.index):
        length = len(passages[i].ids) - 1
        values = [None if column is None else column[row, :length].clone() for column in columns]
        assert values[0] is not None and values[1] is not None
        found[i] = PassageScore(log_probability=values[0], greedy=values[1], kl=values[2], same_top=values[3])
    return found


def _forward(engines: Sequence[Engine], batch: PassageBatch) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    """Logits of each engine [rows, tokens, vocab], targets and mask [rows, tokens], a few tokens of all rows at a time.

    A forward pass runs in pieces only if it is too large, or longer than an engine allows.
    """
    rows, tokens = batch.ids.shape
    chunk = max(1, _LOGITS // (rows * engines[0].spec.vocab_size))
    chunk = min([chunk, *(each.built.max_input for each in engines if hasattr(each, "built"))])
    caches = [each.new_cache(batch=rows, capacity=tokens) for each in engines]
    lengths = batch.mask.sum(1)
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        logits = [
            each.run(cache.next_step(batch.ids[:, part], batch.mask[:, part], prompt_lengths=lengths), cache)
            for each, cache in zip(engines, caches, strict=True)
        ]
        yield logits, batch.targets[:, part], batch.mask[:, part]


def _measure(
    engines: Sequence[Engine], logits: list[Tensor], targets: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The columns of `PassageScore`, [rows, tokens] each, on the CPU; zeros where the mask is."""
    vocab, device = logits[0].shape[-1], logits[-1].device
    real = mask.flatten() != 0
    places = real.nonzero().flatten().to(device)
    flat = [each.flatten(0, 1) for each in logits]
    wanted = targets.flatten().to(device)
    pieces = []
    for index in places.split(max(1, _BLOCK // vocab)):
        ours, *other = (each[index.to(each.device)].to(device, torch.float64) for each in flat)
        for block, engine in zip((ours, *other), engines, strict=True):
            if not bool(block.isfinite().all()):
                raise LogitLockError(
                    f"the logits of {engine.arithmetic} hold NaN or infinity; run `logitlock diff` to see where they "
                    "come from"
                )
        best, target = ours.argmax(-1), wanted[index]
        values = [ours.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1), best == target]
        if other:
            values += [kl_divergence(other[0], ours), best == other[0].argmax(-1)]
        pieces.append([value.cpu() for value in values])
    found: list[Tensor | None] = []
    for column in zip(*pieces, strict=True):
        whole = torch.zeros(real.numel(), dtype=column[0].dtype)
        whole[real] = torch.cat(column)
        found.append(whole.reshape(mask.shape))
    found += [None] * (4 - len(found))
    assert found[0] is not None and found[1] is not None
    return found[0], found[1], found[2], found[3]

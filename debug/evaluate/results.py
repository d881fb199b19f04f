"""The results of an evaluation, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from debug.evaluate.speed import Speed
from debug.evaluate.statistics import Estimate

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Predictions of two models after the same tokens.

    tokens: number of compared tokens.  kl_mean, kl_p99, kl_max: in nats, of the other model against this one.  top1:
    share of tokens after which both have the same most likely next token.
    """

    tokens: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float

    @staticmethod
    def of(kl: Tensor, same_top: Tensor) -> Agreement:
        """From the values of each token: kl [tokens] fp64, same_top [tokens] bool."""
        # torch.quantile refuses more than 16 million values.
        rank = max(0, -(-99 * len(kl) // 100) - 1)
        return Agreement(
            tokens=len(kl),
            kl_mean=float(kl.mean()),
            kl_p99=float(kl.sort().values[rank]),
            kl_max=float(kl.max()),
            top1=float(same_top.to(torch.float64).mean()),
        )


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task of one executor.

    accuracy: share of right answers, 0 to 1.  loss: share of examples lost against the other executor, paired on the
    same examples; negative if it wins.  rouge: mean F-measures, 0 to 1.  agreement: over the tokens of the expected
    answers.  loss and agreement are None without an executor to compare with; rouge is None for tasks whose answers are
    not texts.
    """

    count: int
    correct: int
    accuracy: Estimate
    loss: Estimate | None
    rouge: dict[str, float] | None
    agreement: Agreement | None


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """A text under one executor: exp of the mean negative log-probability per token, and bits per byte of UTF-8.

    Bits per byte do not depend on how a tokenizer cuts the text, so they compare models with different tokenizers.
    """

    tokens: int
    bytes: int
    perplexity: float
    bits_per_byte: float
    agreement: Agreement | None


@dataclass(kw_only=True)
class SideResult:
    """All measurements of one executor.

    side: its name on the command line.  engine: how it computes.  weight_bytes: bytes of its weights as stored, None if
    unknown.  accuracy: mean over the tasks, with equal weights.  loss: the same of the paired losses.
    agreement: over all tokens that were compared, prompts included.
    """

    side: str
    engine: str
    weight_bytes: int | None
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    texts: dict[str, TextResult] = field(default_factory=dict)
    speeds: list[Speed] = field(default_factory=list)
    accuracy: float | None = None
    loss: Estimate | None = None
    agreement: Agreement | None = None


@dataclass(kw_only=True)
class EvaluationResult:
    """`sides` in the order in which they were named, after `against` (None: nothing to compare with).

    notes: measurements that were left out, and why.
    """

    model: str
    sides: list[SideResult]
    against: SideResult | None
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def all_sides(self) -> list[SideResult]:
        """`against`, if there is one, and the other executors."""
        return self.sides if self.against is None else [self.against, *self.sides]

    def exceeded(self, *, max_loss: float | None = None, max_kl: float | None = None) -> list[str]:
        """One sentence for every budget that an executor exceeds.

        Args:
            max_loss: points (hundredths) of accuracy that an executor may lose, as the mean over the tasks.
            max_kl: largest allowed mean KL, in nats.
        """
        found = []
        for side in self.sides:
            if max_loss is not None and side.loss is not None and 100 * side.loss.value > max_loss:
                found.append(
                    f"{side.side} loses {100 * side.loss.value:.2f} points of accuracy; the budget is {max_loss:g}"
                )
            if max_kl is not None and side.agreement is not None and side.agreement.kl_mean > max_kl:
                found.append(
                    f"{side.side} has a mean KL of {side.agreement.kl_mean:.3g} nats; the budget is {max_kl:g}"
                )
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values: schema 1, with the fields of the classes here."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "against": None if self.against is None else asdict(self.against),
            "sides": [asdict(side) for side in self.sides],
            "settings": self.settings,
            "notes": self.notes,
        }

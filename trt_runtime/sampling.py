"""Choosing the next token from logits, with the order and meaning of Hugging Face `generate`.

Repetition penalty, then temperature, then top-k, then top-p.  Everything is per row: a row's tokens do not depend on
the other rows.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from refmodels.errors import LogitLockError
from refmodels.text.generation_defaults import SAMPLING_DEFAULTS, GenerationDefaults


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of sampling.

    Attributes:
        temperature: 0 takes the most likely token; otherwise logits are divided by it and a token is drawn.
        top_k: keep the k most likely tokens (and ties with the last of them); 0 keeps all.
        top_p: keep the most likely tokens whose probabilities first sum to top_p or more.
        repetition_penalty: logits of tokens seen in the prompt or the answer are divided by it where positive and
            multiplied where negative (Keskar et al., arXiv:1909.05858); 1 does nothing.
        seed: of the random draws.
    Raises:
        LogitLockError: a value is out of range, or top_k or top_p come without a temperature.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def describe(self) -> str:
        """The active options, in one phrase."""
        values = ((field, getattr(self, field.name)) for field in fields(self) if field.name != "seed")
        named = [f"{field.name} {value:g}" for field, value in values if value != field.default]
        return ", ".join(named if self.temperature else ["greedy", *named])

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise LogitLockError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise LogitLockError(f"top_k must be 0 (off) or a positive number of tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise LogitLockError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise LogitLockError(f"repetition_penalty must be a positive number, got {self.repetition_penalty}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise LogitLockError("top_k and top_p choose among random draws: give a temperature above 0 with them")


def sampling_of(
    defaults: GenerationDefaults,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
) -> Sampling:
    """The user's options and, for those that are None, the checkpoint's, as in transformers' `generate`.

    A checkpoint's temperature, top_k and top_p act where its do_sample is true or the user gives a temperature.

    Raises:
        LogitLockError: as `Sampling`; a key of the checkpoint that is not served.
    """
    defaults.check()
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    given = {name: value for name, value in asked.items() if value is not None}
    values = dict(defaults.values)
    if defaults.samples:
        values = {**SAMPLING_DEFAULTS, **values}
    if not (defaults.samples if temperature is None else temperature > 0):
        values = {name: value for name, value in values.items() if name not in SAMPLING_DEFAULTS}
    elif values.get("temperature", 1) == 0:
        raise LogitLockError(f"{defaults.file}: do_sample is true, but temperature is 0; it must be above 0")
    try:
        Sampling(**{"temperature": 1.0, **values})  # type: ignore[arg-type]
    except LogitLockError as error:
        raise LogitLockError(f"{defaults.file}: {error}") from None
    return Sampling(**{**values, **given}, seed=seed)  # type: ignore[arg-type]


def adjust(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """Apply penalty, temperature, top-k and top-p to one row.

    Args:
        logits: [vocab].
        seen: int64, ids of the prompt and the answer so far (repeats are fine).
    Returns: [vocab] fp32 or fp64, -inf where a token is excluded.
    """
    scores = logits.to(torch.float32) if logits.dtype in (torch.float16, torch.bfloat16) else logits.clone()
    if sampling.repetition_penalty != 1 and seen.numel():
        chosen = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(chosen < 0, chosen * penalty, chosen / penalty)
    if sampling.temperature == 0:
        return scores
    if sampling.temperature != 1:
        scaled = scores / sampling.temperature
        if not bool(scaled.isfinite().all()):
            # The temperature is tiny: differences to the best token become -inf, where all scores would be infinite.
            scaled = ((scores.double() - scores.max()) / sampling.temperature).to(scores.dtype)
        scores = scaled
    if 0 < sampling.top_k < scores.numel():
        scores[scores < scores.topk(sampling.top_k).values[-1]] = float("-inf")
    if sampling.top_p < 1:
        order = scores.sort(descending=False)
        excluded = order.values.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        excluded[-1] = False
        scores[order.indices[excluded]] = float("-inf")
    return scores


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token of one row; arguments as `adjust`.  Draws one number from `generator` unless greedy."""
    scores = adjust(logits, seen, sampling)
    if sampling.temperature == 0:
        return int(scores.argmax())
    # One uniform number against the cumulative distribution, in fp64: the draw hardly depends on the logits' last bits.
    cumulative = scores.to(torch.float64).softmax(-1).cumsum(-1)
    drawn = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    token = int(torch.searchsorted(cumulative, drawn, right=True))
    return min(token, int((scores > float("-inf")).nonzero()[-1]))


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of every row, where the logits are.

    Args:
        logits: [batch, vocab].
    Returns: [2, batch] int64: the tokens (of equals the first), and 1 for a row whose logits are all finite, else 0.
    """
    if logits.is_cuda and logits.dtype != torch.float64 and importlib.util.find_spec("triton") is not None:
        from trt_runtime.kernels import greedy as family
        from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute

        (rows, n), chosen = logits.shape, torch.empty(2, len(logits), dtype=torch.int64, device=logits.device)
        kind = ELEMENT_TYPES[logits.dtype]
        execute([family.greedy(rows=rows, n=n, dtype=kind, logits=logits.contiguous(), chosen=chosen)])
        return chosen
    return torch.stack([logits.argmax(-1), torch.isfinite(logits).all(-1).to(torch.int64)])


def row_generators(seed: int, prompts: Sequence[Sequence[int]]) -> list[torch.Generator]:
    """One random stream per row, made from the seed and the prompt itself.

    A row's stream is the same in any batch; equal prompts in one batch get different streams, in their order.
    """
    copies: dict[tuple[int, ...], int] = {}
    generators = []
    for prompt in map(tuple, prompts):
        copy = copies[prompt] = copies.get(prompt, -1) + 1
        digest = hashlib.sha256(repr((seed, copy, prompt)).encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True)))
    return generators

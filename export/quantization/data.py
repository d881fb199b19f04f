"""Calibration data: texts from files, or the bundled tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from refmodels.checkpoints.load import ModelSource, load_tokenizer
from refmodels.errors import LogitLockError, NoTokenizerError
from refmodels.files import parse_json, read_text
from refmodels.text.tokenizer import Tokenizer

SAMPLES, TOKENS = 128, 512
_MOST_SAMPLES = 1 << 16
"""They are all held in memory, and methods need a few hundred."""
_BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """Rows of token ids, and where they come from.

    origin: for people.  sha256: of the ids, so that two calibrations on the same data can be told.
    """

    rows: list[list[int]]
    origin: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """ids and mask, [rows, tokens] each, padded on the right; rows of like length together."""
        ordered = sorted(self.rows, key=len)
        found, start = [], 0
        while start < len(ordered):
            stop = start + 1
            while stop < len(ordered) and len(ordered[stop]) * (stop + 1 - start) <= _BATCH_TOKENS:
                stop += 1
            rows, width = ordered[start:stop], len(ordered[stop - 1])
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            found.append((ids, mask))
            start = stop
        return found


def calibration_data(
    source: ModelSource,
    files: Sequence[Path] = (),
    *,
    samples: int = SAMPLES,
    tokens: int = TOKENS,
    seed: int = 0,
) -> CalibrationData:
    """Rows for a model.

    Args:
        files: .jsonl, whose lines have "text", or "prompt" and perhaps "answer"; any other is one long text, cut into
            pieces.  None: the bundled tasks (as the toys were trained on), or random ids where there is no tokenizer.
        samples: maximum number of rows.
        tokens: maximum number of ids per row.
        seed: seed of the random choice among all rows.
    Raises:
        LogitLockError: a file cannot be read or holds no text, or there is no tokenizer for it.
    """
    if samples < 1 or tokens < 1:
        raise LogitLockError(f"calibration needs at least one sample of one token, not {samples} of {tokens}")
    if samples > _MOST_SAMPLES:
        raise LogitLockError(f"calibration takes at most {_MOST_SAMPLES} samples, not {samples}")
    longest = min(tokens, source.spec.max_positions)
    generator = torch.Generator().manual_seed(seed)
    if not files:
        try:
            tokenizer = load_tokenizer(source)
        except NoTokenizerError:
            ids = torch.randint(0, source.spec.vocab_size, (samples, min(longest, 64)), generator=generator)
            return CalibrationData(rows=ids.tolist(), origin=f"random ids, seed {seed}: there is no tokenizer")
        texts = _bundled(samples, seed)
        rows = [tokenizer.encode(text)[:longest] for text in texts]
        return CalibrationData(rows=[row for row in rows if row], origin=f"bundled tasks, seed {seed}")
    tokenizer = load_tokenizer(source)
    rows = [row for file in files for row in _file_rows(file, tokenizer, longest)]
    if not rows:
        raise LogitLockError(f"there is no text for calibration in {', '.join(map(str, files))}")
    chosen = torch.randperm(len(rows), generator=generator)[:samples].sort().values
    names = ", ".join(file.name for file in files)
    return CalibrationData(rows=[rows[i] for i in chosen.tolist()], origin=f"{names}, seed {seed}")


def _bundled(samples: int, seed: int) -> list[str]:
    """Training examples of all tasks, in turn."""
    from refmodels.toys.tasks import TASKS, toy_examples

    each = -(-samples // len(TASKS))
    by_task = [toy_examples(task, split="train", count=each, seed=seed) for task in TASKS]
    mixed = [example for row in zip_longest(*by_task) for example in row if example is not None]
    texts = [e.prompt + e.answer + "".join(q + a for q, a in e.follow_ups) for e in mixed]
    return texts[:samples]


def _file_rows(file: Path, tokenizer: Tokenizer, longest: int) -> list[list[int]]:
    content = read_text(file, "calibration file")
    if file.suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
        rows = [tokenizer.encode(_text_of(line, f"{file}, line {n}"))[:longest] for n, line in lines]
        return [row for row in rows if row]
    ids = tokenizer.encode(content)
    return [ids[start : start + longest] for start in range(0, len(ids), longest)]


def _text_of(line: str, where: str) -> str:
    record = parse_json(line, where)
    if isinstance(record, dict):
        for first, second in (("text", None), ("prompt", "answer")):
            text, more = record.get(first), record.get(second, "") if second else ""
            if isinstance(text, str) and isinstance(more, str):
                return text + more
    raise LogitLockError(f'{where} must be an object with a text under "text" or "prompt" (and "answer")')

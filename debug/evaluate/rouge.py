"""ROUGE of generated texts, with the package `rouge-score` (Google's; far lighter than `evaluate`, which wraps it)."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from refmodels.errors import LogitLockError

KINDS = ("rouge1", "rouge2", "rougeL")
_ONE_BY_ONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Scripts without spaces between words: kana and Chinese characters."""
_WORD = re.compile(f"[{_ONE_BY_ONE}]|[^\\W_{_ONE_BY_ONE}]+")


class CharacterTokenizer:
    """Words of letters and digits in lower case; a Chinese character or kana is a word of its own.

    On English text these are the words of rouge-score's own tokenizer (without stemming), which drops everything else,
    so that two Chinese texts would have no words at all.
    """

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def rouge(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """The mean F-measure (0 to 1) of each of `KINDS` over pairs of texts.

    ROUGE: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.

    Raises:
        LogitLockError: rouge-score is not installed.
    """
    scorer = _package().RougeScorer(list(KINDS), tokenizer=CharacterTokenizer())
    scores = [scorer.score(target, given) for given, target in zip(answers, expected, strict=True)]
    return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in KINDS}


def available() -> bool:
    """Whether the package is installed."""
    # Importing it takes seconds: it imports nltk, which imports scipy.
    return importlib.util.find_spec("rouge_score") is not None


def _package() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise LogitLockError("ROUGE needs the package rouge-score: pip install 'logitlock[eval]'") from error
    return rouge_scorer

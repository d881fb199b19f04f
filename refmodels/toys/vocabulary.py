"""The toys' tokenizer: one byte-level BPE of 1024 ids, trained on the toy tasks, shared by the four families.

Digits and Chinese characters are split off one by one before BPE, so a number is read digit by digit and a Chinese word
is the same tokens in every sentence; spaces stay with the word that follows, as in GPT-2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from refmodels.toys.tasks import TASKS, toy_examples

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY_SIZE = 1024
SPECIAL_TOKENS = ("<pad>", "<bos>", "<|endoftext|>", "[gMASK]", "sop", "<|im_start|>", "<|im_end|>", "<user>", "<bot>")
PAD_ID, BOS_ID, END_ID, GMASK_ID, SOP_ID = range(5)
PREFIX_IDS: dict[str, tuple[int, ...]] = {"chatglm2": (GMASK_ID, SOP_ID)}
"""The ids that a family puts before every prompt; none for the families that are not named."""

_CORPUS_SIZE = {"dictionary": 20_000, "facts": 20_000}
_DEFAULT_CORPUS_SIZE = 3000
# The finite tasks hold nearly all distinct words, each rarely: the weight gives them whole tokens.
_CORPUS_SEED = 0


def _corpus() -> Iterator[str]:
    for task in TASKS:
        for example in toy_examples(
            task, split="train", count=_CORPUS_SIZE.get(task, _DEFAULT_CORPUS_SIZE), seed=_CORPUS_SEED
        ):
            yield example.prompt + example.answer
    for letter in "abcdefghijklmnopqrstuvwxyz":
        yield f" {letter}" * _DEFAULT_CORPUS_SIZE


def train_tokenizer(family: str) -> Tokenizer:
    """The tokenizer of a toy, trained here and now (a second or two); `family` decides only the prompt prefix."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if family in PREFIX_IDS:
        prefix = [(SPECIAL_TOKENS[token_id], token_id) for token_id in PREFIX_IDS[family]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(text for text, _ in prefix), "$A"], special_tokens=prefix
        )
    return tokenizer

"""The toy tasks: seeded generators of `prompt` + `answer` pairs, split into training and held-out instances.

Whether an instance is held out depends on its content, never on when it was drawn: a stable hash of (task, instance)
decides, or, for the dictionary and the facts, a fixed pattern over (item, template). So no seed can leak a held-out
instance into training.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from refmodels.toys import words

Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 0.1
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORT_PAIRS = (2, 10)
LONG_PAIRS = (16, 44)
"""Key-value pairs in a recall prompt: 4 tokens per pair, so `recall_long` has about 70 to 185 prompt tokens."""
FOLLOW_UPS = 6


@dataclass(frozen=True, kw_only=True)
class Example:
    """One task instance. The model reads `prompt` and must produce exactly `answer`, then the end token.

    `follow_ups` are more (question, answer) pairs about the same prompt. Training may append them before the end token:
    a recall prompt of 180 tokens then teaches seven lookups instead of one. Evaluation ignores them.
    """

    task: str
    prompt: str
    answer: str
    follow_ups: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A generated instance before the split is known; `key` decides the split."""

    key: str
    prompt: str
    answer: str
    follow_ups: tuple[tuple[str, str], ...] = ()


def _held_out(task: str, key: str) -> bool:
    return zlib.crc32(f"{task}|{key}".encode()) % 1000 < HELD_OUT_SHARE * 1000


def _addition(rng: random.Random) -> _Draft:
    # Uniform numbers would almost always have three digits; drawing the length first keeps short sums in the data.
    left, right = (rng.randrange(10 ** rng.choice((1, 2, 3, 3, 3))) for _ in range(2))
    template = rng.choice(("{}+{}=", "Add: {}+{}=", "计算：{}+{}="))
    key = "+".join(map(str, sorted((left, right))))
    return _Draft(key=key, prompt=template.format(left, right), answer=str(left + right))


def _recall_with(pairs: tuple[int, int]) -> Callable[[random.Random], _Draft]:
    def draw(rng: random.Random) -> _Draft:
        keys = rng.sample([english for english, _ in words.DICTIONARY], rng.randint(*pairs))
        values = {key: f"{rng.randrange(100):02d}" for key in keys}
        listing = "".join(f" {key}={value}" for key, value in values.items())
        head, stop = rng.choice((("Remember:", "."), ("记住：", "。")))
        asked, *others = rng.sample(keys, min(len(keys), 1 + FOLLOW_UPS))
        return _Draft(
            # Not by the question: the follow-ups of one listing would be the held-out questions of another.
            key=listing,
            prompt=f"{head}{listing}{stop} {asked}=",
            answer=values[asked],
            follow_ups=tuple((f" {key}=", values[key]) for key in others),
        )

    return draw


def _letters(rng: random.Random) -> list[str]:
    return rng.sample(LETTERS, rng.randint(3, 8))


def _spaced(letters: list[str]) -> str:
    return "".join(f" {letter}" for letter in letters)


def _reversal(rng: random.Random) -> _Draft:
    letters = _letters(rng)
    prompt = f"{rng.choice(('Reverse:', '倒序：'))}{_spaced(letters)} ->"
    return _Draft(key="".join(letters), prompt=prompt, answer=_spaced(letters[::-1]))


def _sorting(rng: random.Random) -> _Draft:
    letters = _letters(rng)
    prompt = f"{rng.choice(('Sort:', '排序：'))}{_spaced(letters)} ->"
    return _Draft(key="".join(letters), prompt=prompt, answer=_spaced(sorted(letters)))


def _summary(rng: random.Random) -> _Draft:
    language = rng.randrange(2)
    name, day, place, color, sight, weather, mood = (
        rng.choice(slot)[language]
        for slot in (words.NAMES, words.DAYS, words.PLACES, words.COLORS, words.SIGHTS, words.WEATHER, words.MOODS)
    )
    if language == 0:
        trip = rng.choice((f"On {day} {name} went to the {place}.", f"{name} went to the {place} on {day}."))
        seen = f"{name} saw a {color} {sight} there."
        feeling = f"{name} {mood}."
        text = " ".join([trip, *rng.sample([weather, seen, feeling], 3)])
        prompt = f"{text} Summary:"
        answer = f" {name} saw a {color} {sight} at the {place} on {day}."
    else:
        trip = rng.choice((f"{day}，{name}去了{place}。", f"{name}{day}去了{place}。"))
        seen = f"{name}在那里看见了{color}的{sight}。"
        feeling = f"{name}{mood}。"
        prompt = "".join([trip, *rng.sample([weather, seen, feeling], 3)]) + "一句话总结："
        answer = f"{name}{day}在{place}看见了{color}的{sight}。"
    # The same slots in another order of sentences are the same summary, so they share a side of the split.
    return _Draft(key=f"{name}{day}{place}{color}{sight}", prompt=prompt, answer=answer)


_TO_CHINESE = (
    "Translate to Chinese: {} ->", "翻译成中文： {} ->", " {} in Chinese is", " {} 的中文是",
    "How do you say {} in Chinese?", "怎么用中文说 {}？",
)  # fmt: skip
_TO_ENGLISH = (
    "Translate to English: {} ->", "翻译成英文：{} ->", "{} in English is", "{}的英文是",
    "How do you say {} in English?", "怎么用英文说{}？",
)  # fmt: skip
_ASK = {
    "en": (
        "{}", "Question: {}", "Please answer: {}", "Tell me: {}", "Quiz: {}", "I want to know: {}", "Say: {}", "Q: {}",
    ),
    "zh": ("{}", "问：{}", "请回答：{}", "请告诉我：{}", "考考你：{}", "我想知道：{}", "请说：{}", "问题：{}"),
}  # fmt: skip


def _dictionary_items(split: Split) -> list[_Draft]:
    items: list[_Draft] = []
    for index, (english, chinese) in enumerate(words.DICTIONARY):
        for templates, word, answer in ((_TO_CHINESE, english, chinese), (_TO_ENGLISH, chinese, f" {english}")):
            for number, template in enumerate(templates):
                if (number == index % len(templates)) == (split == "held_out"):
                    items.append(_Draft(key=word, prompt=template.format(word), answer=answer))
    return items


def _fact_items(split: Split) -> list[_Draft]:
    items: list[_Draft] = []
    for index, (language, question, answer) in enumerate(words.FACTS):
        templates = _ASK[language]
        # Facts come in English-Chinese pairs, so index // 2 spreads each language over all of its templates; the "+ 1"
        # keeps the plain question about the second highest mountain, which the documentation asks, in training.
        held_out = (index // 2 + 1) % len(templates)
        for number, template in enumerate(templates):
            if (number == held_out) == (split == "held_out"):
                prefix = " " if language == "en" else ""
                items.append(_Draft(key=question, prompt=template.format(question), answer=prefix + answer))
    return items


_GENERATED: dict[str, Callable[[random.Random], _Draft]] = {
    "addition": _addition,
    "recall": _recall_with(SHORT_PAIRS),
    "recall_long": _recall_with(LONG_PAIRS),
    "reversal": _reversal,
    "sorting": _sorting,
    "summary": _summary,
}
_ENUMERATED: dict[str, Callable[[Split], list[_Draft]]] = {"dictionary": _dictionary_items, "facts": _fact_items}

TASKS: tuple[str, ...] = (*_GENERATED, *_ENUMERATED)


def toy_examples(task: str, *, split: Split, count: int, seed: int) -> list[Example]:
    """`count` examples of `task` (one of `TASKS`), the same ones for the same arguments on every machine.

    `dictionary` and `facts` are finite: every item comes once, shuffled, before any comes again; the held-out side of
    these holds (item, template) pairs whose item was trained under other templates only. `KeyError` for another task.
    """
    rng = random.Random(f"{task}|{split}|{seed}")
    drafts: list[_Draft] = []
    if task in _ENUMERATED:
        items = _ENUMERATED[task](split)
        while len(drafts) < count:
            drafts += rng.sample(items, len(items))
    else:
        draw = _GENERATED[task]
        while len(drafts) < count:
            draft = draw(rng)
            if _held_out(task, draft.key) == (split == "held_out"):
                drafts.append(draft)
    return [Example(task=task, prompt=d.prompt, answer=d.answer, follow_ups=d.follow_ups) for d in drafts[:count]]


def held_out_size(task: str) -> int | None:
    """Number of held-out examples of a finite task; None if a task generates examples without end."""
    return len(_ENUMERATED[task]("held_out")) if task in _ENUMERATED else None

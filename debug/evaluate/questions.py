"""Tasks: prompts with the expected answers, from the bundled toys or from a JSONL file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refmodels.checkpoints.load import ModelSource
from refmodels.errors import LogitLockError
from refmodels.files import parse_json, read_text
from refmodels.text.prompts import prompt_ids, stop_ids_in
from refmodels.text.tokenizer import Tokenizer
from refmodels.toys import TOYS, toy_path
from refmodels.toys.tasks import TASKS, held_out_size, toy_examples
from refmodels.toys.vocabulary import END_ID

SUMMARIES = ("summary",)
"""The toys' tasks whose answers are texts, for which ROUGE is meaningful."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One example: token ids and text of the prompt, and of the expected answer (without an end token)."""

    prompt: list[int]
    answer: list[int]
    prompt_text: str
    answer_text: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions of one kind.

    Attributes:
        exact_tokens: an answer is right if it has the expected tokens and then a stop id; if False, it is right if it
            is the expected text, except for surrounding spaces.
        summary: ROUGE is measured as well.
        stop_ids: ids that end an answer.
        max_new_tokens: maximum number of tokens of an answer.
    """

    name: str
    questions: Sequence[Question]
    exact_tokens: bool
    summary: bool
    stop_ids: tuple[int, ...]
    max_new_tokens: int


def has_toy_tasks(directory: Path) -> bool:
    """Whether a model was made from a bundled toy: it has the toys' tokenizer, which their tasks need."""
    path = directory / "tokenizer.json"
    return path.is_file() and any(path.read_bytes() == (toy_path(toy) / path.name).read_bytes() for toy in TOYS)


def toy_task(name: str, tokenizer: Tokenizer, *, limit: int, seed: int) -> Task:
    """A task of the bundled toys: held-out examples, the same for every model.

    Args:
        name: one of `refmodels.toys.tasks.TASKS`.
        limit: number of examples; a finite task has at most its held-out pairs.
        seed: random seed for the choice of examples.
    """
    rows = toy_examples(name, split="held_out", count=min(limit, held_out_size(name) or limit), seed=seed)
    questions = [
        Question(
            prompt=tokenizer.encode(row.prompt),
            answer=tokenizer.encode(row.answer, add_special=False),
            prompt_text=row.prompt,
            answer_text=row.answer,
        )
        for row in rows
    ]
    return Task(
        name=name,
        questions=questions,
        exact_tokens=True,
        summary=name in SUMMARIES,
        stop_ids=(END_ID,),
        max_new_tokens=max(len(question.answer) for question in questions) + 1,
    )


def file_task(
    path: Path, source: ModelSource, tokenizer: Tokenizer, *, limit: int, chat: bool, max_new_tokens: int
) -> Task:
    """A task of a JSONL file: one object per line with the texts "prompt" and "answer"; other keys are not read.

    Args:
        limit: number of lines to read, from the first.
        chat: put each prompt into the model's chat format.
        max_new_tokens: maximum number of tokens of an answer.
    Raises:
        LogitLockError: the file cannot be read, a line (with its number) is not such an object, there is no line, or
            the model has no chat format.
    """
    questions: list[Question] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or len(questions) == limit:
            continue
        prompt, answer = _row(line, f"{path}, line {number}")
        questions.append(
            Question(
                prompt=prompt_ids(prompt, source.spec, tokenizer, chat=chat),
                answer=tokenizer.encode(answer, add_special=False),
                prompt_text=prompt,
                answer_text=answer,
            )
        )
    if not questions:
        raise LogitLockError(f"{path} has no line")
    return Task(
        name=path.stem,
        questions=questions,
        exact_tokens=False,
        summary=True,
        # An id beyond the vocabulary ends nothing, and cannot be scored.
        stop_ids=tuple(
            i for i in stop_ids_in(source.directory, source.spec, tokenizer, chat=chat) if i < source.spec.vocab_size
        ),
        max_new_tokens=max_new_tokens,
    )


def find_tasks(
    names: Sequence[str],
    source: ModelSource,
    tokenizer: Tokenizer | None,
    *,
    limit: int,
    seed: int,
    chat: bool = False,
    max_new_tokens: int = 128,
) -> list[Task]:
    """The requested tasks; without names, all tasks of a toy, and no task of another model.

    Args:
        names: tasks of the toys, or JSONL files.
        tokenizer: None: the model has none.
    Raises:
        LogitLockError: as `file_task`; or a name is unknown, a toy's task is for another model, two files have the same
            name, or there is no tokenizer.
    """
    toy = has_toy_tasks(source.directory)
    if not names:
        names = TASKS if toy else ()
    found: list[Task] = []
    for name in names:
        if tokenizer is None:
            raise LogitLockError(f"{source.name} has no tokenizer, and tasks are texts")
        if name in TASKS:
            if not toy:
                raise LogitLockError(f"{name} is a task of the bundled toys, and {source.name} is not one of them")
            found.append(toy_task(name, tokenizer, limit=limit, seed=seed))
        elif Path(name).is_file() or name.endswith(".jsonl"):
            found.append(
                file_task(Path(name), source, tokenizer, limit=limit, chat=chat, max_new_tokens=max_new_tokens)
            )
        else:
            raise LogitLockError(f"there is no task {name!r}; give a JSONL file or one of {', '.join(TASKS)}")
    twice = [task.name for task in found if [other.name for other in found].count(task.name) > 1]
    if twice:
        raise LogitLockError(f"two tasks are called {twice[0]!r}; give the files different names")
    return found


def _row(line: str, where: str) -> tuple[str, str]:
    row = parse_json(line, where)
    found = [row.get(key) if isinstance(row, dict) else None for key in ("prompt", "answer")]
    prompt, answer = found
    if not isinstance(prompt, str) or not isinstance(answer, str) or not prompt or not answer:
        raise LogitLockError(f'{where} must be an object with the texts "prompt" and "answer", neither of them empty')
    return prompt, answer

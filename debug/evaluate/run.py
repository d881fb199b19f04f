"""An evaluation from beginning to end: executors, tasks and texts are opened and checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from debug.comparison.compare import spec_difference
from debug.evaluate.answers import Advance, Answers, answer_task
from debug.evaluate.options import EvaluateOptions
from debug.evaluate.passages import DEFAULT_WINDOW, Passage, task_passages, text_windows
from debug.evaluate.questions import Task, find_tasks
from debug.evaluate.results import Agreement, EvaluationResult, SideResult, TaskResult, TextResult
from debug.evaluate.rouge import available, rouge
from debug.evaluate.scoring import PassageScore, score
from debug.evaluate.speed import measure_speed
from debug.evaluate.statistics import accuracy, loss, mean_loss
from debug.executors.open import open_executor
from debug.sides import source_of
from export.progress import Progress, silent
from refmodels.checkpoints.load import ModelSource, checkpoint_hash, load_tokenizer
from refmodels.errors import LogitLockError, NoTokenizerError
from refmodels.files import read_text
from refmodels.options import with_fields
from refmodels.text.tokenizer import Tokenizer
from trt_runtime.engine import Engine
from trt_runtime.inspect_bundle import describe
from trt_runtime.torch_gpu.engine import TorchEngine

_SETTINGS = ("limit", "compared", "seed", "window", "stride", "batch_size", "chat", "emulate_rounding")
"""Options that a result records."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text to score: its windows, the number of their tokens that are scored, and its size in bytes of UTF-8."""

    windows: list[Passage]
    tokens: int
    bytes: int


def evaluate_model(
    sides: Sequence[str],
    options: EvaluateOptions | None = None,
    *,
    progress: Progress | None = None,
    **fields: Any,
) -> EvaluationResult:
    """Measure accuracy, perplexity, KL, ROUGE and speed of executors, and the accuracy that they lose.

    All executors get the same examples and the same tokens.  Memory holds one executor at a time, and `against`.

    Args:
        sides: executors, as `debug.executors.open.forms_help` names them, except recordings.
        options: what to measure.
        progress: called with the name of the current part, and how much of it is done and in all.
        fields: fields of `EvaluateOptions`, instead of `options` or to change some of them.
    Raises:
        LogitLockError: there is nothing to measure, an executor cannot be opened or has another architecture, a task or
            text cannot be read or is too long, or logits are NaN or infinite.
        TypeError: a name is not a field of `EvaluateOptions`.
    """
    options = with_fields(EvaluateOptions, options, fields)
    against = options.against
    if not sides:
        raise LogitLockError("say what to evaluate: --bundle DIR, or one or more executors")
    source = source_of(options.model, [*sides, *([] if against is None else [against])])
    tokenizer = _tokenizer(source)
    tasks = find_tasks(
        options.tasks,
        source,
        tokenizer,
        limit=options.limit,
        seed=options.seed,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
    )
    window = min(source.spec.max_positions, DEFAULT_WINDOW) if options.window is None else options.window
    stride = max(1, window // 2) if options.stride is None else options.stride
    options = replace(options, window=window, stride=stride)
    texts = {
        str(path): _text(read_text(Path(path)), source, tokenizer, window=window, stride=stride)
        for path in options.texts
    }
    if not (tasks or texts or options.shapes):
        raise LogitLockError("there is nothing to measure: give --tasks or --text, or leave out --no-speed")
    if tokenizer is None:
        assert not tasks and not texts

    notes: list[str] = []
    say = progress or silent
    run = _Measurements(tokenizer=tokenizer, tasks=tasks, texts=texts, options=options, progress=say)
    other = other_result = other_answers = None
    with torch.inference_mode():
        if against is not None:
            other = _opened(against, source, options, notes)
            other_result, other_answers = run.measure(against, other, None, None)
        results = []
        for text in sides:
            engine = _opened(text, source, options, notes)
            results.append(run.measure(text, engine, other, other_answers)[0])
            del engine
    if any(task.summary for task in tasks) and not available():
        notes.append("ROUGE is left out: it needs rouge-score (pip install 'logitlock[eval]')")
    settings = {name: getattr(options, name) for name in _SETTINGS}
    return EvaluationResult(
        model=source.name,
        sides=results,
        against=other_result,
        settings={**settings, "threads": torch.get_num_threads()},
        notes=notes,
    )


def _opened(text: str, source: ModelSource, options: EvaluateOptions, notes: list[str]) -> Engine:
    """An executor that can be measured; remarks on it go to `notes`."""
    if text.endswith(".safetensors"):
        raise LogitLockError(f"{text} is a recording; an evaluation needs an executor that runs")
    engine = open_executor(
        text,
        source=source,
        map=options.name_map,
        emulate_rounding=options.emulate_rounding,
        trust_remote_code=options.trust_remote_code,
        decode=True,
        device=options.device,
    )
    check_executor(text, engine, source)
    if _of_other_weights(engine, source):
        notes.append(f"{text} was exported from other weights than those of {source.name}")
    return engine


@dataclass(frozen=True, kw_only=True)
class _Measurements:
    """The data that every executor is measured on."""

    tokenizer: Tokenizer | None
    tasks: Sequence[Task]
    texts: dict[str, Text]
    options: EvaluateOptions
    progress: Progress

    def measure(
        self, text: str, engine: Engine, other: Engine | None, other_answers: dict[str, Answers] | None
    ) -> tuple[SideResult, dict[str, Answers]]:
        """All measurements of one executor, with its losses if there is an `other`."""
        result = SideResult(side=text, engine=engine.arithmetic, weight_bytes=weight_bytes(engine))
        answers = {}
        seen: list[PassageScore] = []
        for task in self.tasks:
            assert self.tokenizer is not None
            name = f"{text}: {task.name}"
            answers[task.name] = given = answer_task(
                engine,
                self.tokenizer,
                task,
                batch_size=self.options.batch_size,
                advance=self._advance(name, len(task.questions)),
            )
            agreement = None
            if other is not None:
                agreement = self._compare_answers(f"{name}, tokens", task, engine, other, seen)
            result.tasks[task.name] = TaskResult(
                count=len(given.right),
                correct=sum(given.right),
                accuracy=accuracy(sum(given.right), len(given.right)),
                loss=None if other_answers is None else loss(other_answers[task.name].right, given.right),
                rouge=_rouge(task, given),
                agreement=agreement,
            )
        for path, scored in self.texts.items():
            result.texts[path] = self._score_text(f"{text}: {path}", scored, engine, other, seen)
        for shape in self.options.shapes:
            self.progress(f"{text}: speed", 0, 0)
            result.speeds.append(measure_speed(engine, shape))
        if self.tasks:
            result.accuracy = sum(each.accuracy.value for each in result.tasks.values()) / len(self.tasks)
        if self.tasks and other_answers is not None:
            result.loss = mean_loss([(other_answers[name].right, given.right) for name, given in answers.items()])
        if seen:
            result.agreement = _agreement(seen)
        return result, answers

    def _compare_answers(
        self, name: str, task: Task, engine: Engine, other: Engine, seen: list[PassageScore]
    ) -> Agreement:
        """Agreement over the answers' tokens; every token goes to `seen`."""
        passages = task_passages(task)[: self.options.compared]
        scores = score(
            engine,
            passages,
            against=other,
            batch_size=self.options.batch_size,
            advance=self._advance(name, len(passages)),
        )
        seen += scores
        return _agreement([each.after(passage.first) for each, passage in zip(scores, passages, strict=True)])

    def _score_text(
        self, name: str, text: Text, engine: Engine, other: Engine | None, seen: list[PassageScore]
    ) -> TextResult:
        scores = score(
            engine,
            text.windows,
            against=other,
            batch_size=self.options.batch_size,
            advance=self._advance(name, len(text.windows)),
        )
        scored = [each.after(passage.first) for each, passage in zip(scores, text.windows, strict=True)]
        seen += scored if other is not None else []
        nats = -float(torch.cat([each.log_probability for each in scored]).sum())
        return TextResult(
            tokens=text.tokens,
            bytes=text.bytes,
            perplexity=math.exp(nats / text.tokens),
            bits_per_byte=nats / math.log(2) / text.bytes,
            agreement=None if other is None else _agreement(scored),
        )

    def _advance(self, name: str, total: int) -> Advance:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.progress(name, done, total)

        self.progress(name, 0, total)
        return advance


def weight_bytes(engine: Engine) -> int | None:
    """Bytes of an engine's weights as stored: a bundle's initializers, or a PyTorch model's tensors."""
    bundle = getattr(engine, "bundle", None)
    if bundle is not None:
        return sum(int(weight["bytes"]) for weight in describe(bundle)["weights"])
    module = engine.decoder if isinstance(engine, TorchEngine) else getattr(engine, "model", None)
    if not isinstance(module, torch.nn.Module):
        return None
    return sum(tensor.nbytes for tensor in {id(p): p for p in (*module.parameters(), *module.buffers())}.values())


def _rouge(task: Task, answers: Answers) -> dict[str, float] | None:
    if not task.summary or not available():
        return None
    return rouge(answers.texts, [question.answer_text for question in task.questions])


def check_executor(text: str, engine: Engine, source: ModelSource) -> None:
    """Refuse recordings, and executors with another architecture than the model; they may be quantized."""
    if hasattr(engine, "prompts"):
        raise LogitLockError(f"{text} is a recording; an evaluation needs an executor that runs")
    ours, theirs = (replace(spec, quantization=None) for spec in (source.spec, engine.spec))
    if ours != theirs:
        raise LogitLockError(
            f"{text} is not made from {source.name}: the architecture differs in {spec_difference(ours, theirs)}"
        )


def _of_other_weights(engine: Engine, source: ModelSource) -> bool:
    """Whether a bundle was made from another checkpoint; a quantized one always is, and its loss is to be measured."""
    bundle = getattr(engine, "bundle", None)
    if bundle is None or bundle.spec.quantization is not None:
        return False
    return bool(bundle.info.checkpoint_hash != checkpoint_hash(source))


def _text(content: str, source: ModelSource, tokenizer: Tokenizer | None, *, window: int, stride: int) -> Text:
    if tokenizer is None:
        raise LogitLockError(f"{source.name} has no tokenizer, and perplexity needs one")
    ids = tokenizer.encode(content, add_special=False, parse_special=False)
    windows = text_windows(ids, prefix=tokenizer.prefix, window=window, stride=stride)
    return Text(
        windows=windows,
        tokens=sum(len(passage.ids) - passage.first for passage in windows),
        bytes=len(content.encode()),
    )


def _agreement(scores: Sequence[PassageScore]) -> Agreement:
    def whole(columns: Sequence[Tensor | None]) -> Tensor:
        return torch.cat([column for column in columns if column is not None])

    return Agreement.of(whole([each.kl for each in scores]), whole([each.same_top for each in scores]))


def _tokenizer(source: ModelSource) -> Tokenizer | None:
    try:
        return load_tokenizer(source)
    except NoTokenizerError:
        # Then only the speed can be measured; anything that needs text reports it.
        return None

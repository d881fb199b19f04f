"""Measure a toy and renew the measured part of its report: `python -m debug.evaluate.toys --model qwen`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from debug.evaluate.answers import answer_task, continue_prompts
from debug.evaluate.questions import toy_task
from refmodels.checkpoints.load import load, load_tokenizer, resolve
from refmodels.model import Decoder
from refmodels.text.tokenizer import Tokenizer
from refmodels.toys import TOYS, toy_path
from refmodels.toys.tasks import TASKS, held_out_size
from refmodels.toys.vocabulary import END_ID
from refmodels.toys.words import MOUNTAIN_QUESTION
from trt_runtime.engine import Engine
from trt_runtime.generation import GenerationConfig
from trt_runtime.torch_gpu.engine import TorchEngine

EVALUATED = 500
"""Held-out examples per task in report.json (fewer if the task has fewer)."""


def toy_accuracies(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Iterable[str] = TASKS,
    *,
    count: int = 200,
    seed: int = 1,
    batch_size: int = 64,
) -> dict[str, float]:
    """Exact-match accuracy (0 to 1) per task on held-out examples; arguments as `debug.evaluate.questions.toy_task`."""
    found = {}
    for name in tasks:
        task = toy_task(name, tokenizer, limit=count, seed=seed)
        right = answer_task(engine, tokenizer, task, batch_size=batch_size).right
        found[name] = sum(right) / len(right)
    return found


def answer(engine: Engine, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int = 32) -> str:
    """The greedy answer to one plain prompt, as text."""
    config = GenerationConfig(max_new_tokens=max_new_tokens, stop_ids=(END_ID,))
    return continue_prompts(engine, tokenizer, [tokenizer.encode(prompt)], config, batch_size=1)[0].text


def without_long_context(model: Decoder) -> dict[str, Decoder]:
    """The same weights with dynamic NTK, logn or both switched off; nothing for a model that has neither."""
    spec = model.spec
    if spec.rope is None or spec.rope.ntk_seq_length is None:
        return {}
    no_ntk = dataclasses.replace(spec, rope=dataclasses.replace(spec.rope, ntk_seq_length=None))
    changed = {"without NTK": no_ntk}
    for name, base in (("without logn", spec), ("without both", no_ntk)):
        changed[name] = dataclasses.replace(base, attention=dataclasses.replace(base.attention, logn_seq_length=None))
    models = {}
    for name, other in changed.items():
        models[name] = Decoder(other).to(model.device)
        models[name].load_state_dict(model.state_dict())
    return models


def measure(model: Decoder, tokenizer: Tokenizer, *, count: int = EVALUATED) -> dict[str, Any]:
    """The measured part of report.json."""
    engine = TorchEngine(model)
    report: dict[str, Any] = {
        "accuracy": toy_accuracies(engine, tokenizer, count=count),
        "held_out_examples": {task: min(count, held_out_size(task) or count) for task in TASKS},
        "answers": {MOUNTAIN_QUESTION: answer(engine, tokenizer, MOUNTAIN_QUESTION)},
    }
    for name, other in without_long_context(model).items():
        report.setdefault("recall", {})[name] = toy_accuracies(
            TorchEngine(other), tokenizer, ("recall", "recall_long"), count=count
        )
    return report


def measure_toy(folder: Path, *, device: str) -> dict[str, Any]:
    """Measure the checkpoint in `folder` in fp32 and renew the measured part of its report, which is returned."""
    source = resolve(folder)
    path = folder / "report.json"
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    report |= measure(load(source, device=device), load_tokenizer(source))
    path.write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return report


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=TOYS, required=True)
    parser.add_argument("--output", type=Path, help="checkpoint directory; default: the bundled toy's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    report = measure_toy(given.output or toy_path(given.model), device=given.device)
    print(json.dumps(report, ensure_ascii=False, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

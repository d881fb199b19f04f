"""Every option of diff, trace, drift and eval is a field once; verbs hand their parameters on by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from debug import DiffOptions, EvaluateOptions, cli, diff, evaluate_model
from debug.evaluate.cli import evaluate
from debug.options import RunOptions


@pytest.mark.parametrize(
    ("verb", "kind", "others", "unsaid"),
    [
        (cli.diff, DiffOptions, {"sides", "bundle", "engine", "every_tap", "html", "baseline", "junit"}, {"prompts"}),
        (cli.trace, RunOptions, {"side", "out", "tokens_of"}, {"prompts"}),
        (cli.drift, RunOptions, {"side", "reset"}, {"prompts"}),
        (
            evaluate,
            EvaluateOptions,
            {"sides", "bundle", "shape", "speed", "max_loss", "max_kl", "markdown"},
            {"shapes", "compared"},
        ),
    ],
)
def test_verbs_have_the_options_of_their_functions(
    verb: Callable[..., None], kind: Any, others: set[str], unsaid: set[str]
) -> None:
    fields = {field.name for field in dataclasses.fields(kind)}
    parameters = set(inspect.signature(verb).parameters)
    assert parameters - fields - {"prompt", "prompt_file", "json_output"} == others
    assert fields - parameters == unsaid


def test_names_that_are_no_option() -> None:
    with pytest.raises(TypeError, match="DiffOptions has no field 'step'; it has model, prompts, steps, "):
        diff("reference:fp32", model="qwen", step=1)
    with pytest.raises(TypeError, match="EvaluateOptions has no field 'shape'; it has model, against, "):
        evaluate_model(["reference:fp32"], model="qwen", shape=())


@pytest.mark.slow
def test_options_and_fields() -> None:
    options = DiffOptions(model="qwen", steps=1, seed=3)
    result = diff("reference:fp32", options=options, steps=2)
    assert result.aligned and result.to_json()["settings"]["steps"] == 2
    measured = evaluate_model(["reference:fp32"], EvaluateOptions(model="qwen", tasks=["facts"], limit=3), shapes=())
    assert measured.settings["limit"] == 3 and measured.settings["window"] == 256 and measured.sides[0].speeds == []

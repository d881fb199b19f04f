"""`python -m debug <verb>`."""

from __future__ import annotations

from collections.abc import Callable

from refmodels import command
from refmodels.command import Verb

HELP = """Say which layer of an engine differs from Hugging Face, by how much, and why.

A model is a family name (chatglm2, baichuan, qwen, gpt: the bundled toys), a local Hugging Face directory or a hub id.
Three commands lead to a verdict:

    logitlock export --model qwen --precision fp16

    logitlock generate --bundle engines/qwen-fp16 --prompt '世界上第二高的山峰是哪座？'

    logitlock diff --model qwen --bundle engines/qwen-fp16

Exit codes: 0 if all is fine, 1 if the command found a difference, 2 if the input is bad.
"""

VERBS = {
    **{verb: Verb("debug.cli", verb) for verb in ("verify", "record", "diff", "trace", "drift", "bisect")},
    "eval": Verb("debug.evaluate.cli", "evaluate"),
    "check": Verb("debug.check.cli", "check"),
    "inspect": Verb("debug.check.cli", "inspect"),
    "env": Verb("debug.cli", "environment"),
}


def help_of(function: Callable[..., None]) -> str:
    """The docstring, with the ways to name an executor in the place of `{forms}`."""
    text = command.help_of(function)
    if "{forms}" not in text:
        return text
    from debug.executors.open import forms_help

    return text.replace("{forms}", forms_help())


if __name__ == "__main__":
    command.main(VERBS, HELP, help_of=help_of)

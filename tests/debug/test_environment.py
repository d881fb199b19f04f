"""`logitlock env`: versions, commit and abilities, and nothing that names a person or a machine."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess

import torch

from debug.environment import abilities, environment
from tests.support.command import logitlock
from tests.support.paths import ROOT


def test_versions_and_commit() -> None:
    found = environment()
    assert found["torch"] == torch.__version__ and found["python"] == platform.python_version()
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert head.stdout.startswith(found["commit"].removesuffix("-dirty"))


def test_the_verb_shows_it_as_text_and_as_json() -> None:
    shown = logitlock("env")
    assert shown.code == 0 and torch.__version__ in shown.out and "ONNX Runtime" in shown.out
    document = json.loads(logitlock("env", "--json").out)
    assert set(document) == {"environment", "abilities"} and document["abilities"].keys() == abilities().keys()
    text = json.dumps(document)
    assert platform.node() not in text and (getpass.getuser() == "root" or getpass.getuser() not in text)


def test_every_ability_is_yes_or_says_why_not() -> None:
    for name, text in abilities().items():
        assert name.startswith("free ") or text.startswith("yes") or (text.startswith("no: ") and len(text) > 10), name

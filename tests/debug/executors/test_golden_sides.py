"""A golden case with an unknown part is refused as an executor, in one sentence that names the part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.command import logitlock
from tests.support.marks import quick_first
from tests.support.paths import GOLDENS


@pytest.mark.parametrize(
    ("meta", "tensors", "said"),
    quick_first(
        [
            ({"past_layout": "[S, B, heads, head_dim]"}, {}, "past.0.key has the shape"),
            ({"past_layout": "[B, S, S, S]"}, {}, "past"),
            ({"variant": "x"}, {}, "variant is 'x'; it must be an object"),
            ({}, {"surprise": torch.zeros(2)}, "has the tensor surprise, which no case has"),
            ({}, {"hidden_states.99": torch.zeros(2)}, "has the tensor hidden_states.99, which no case has"),
            ({}, {"hidden_states.1": torch.zeros(1, 17, 3)}, "hidden_states.1 has the shape"),
            ({}, {"logits": torch.zeros(17, 3)}, "logits has the shape"),
            ({}, {"past.0.key": torch.zeros(1, 2, 3)}, "past.0.key has the shape"),
            ({}, {"input_ids": torch.full((1, 17), 10**6)}, "outside the vocabulary"),
            ({}, {"input_ids": torch.zeros(17, dtype=torch.int64)}, "input_ids has the shape"),
        ],
        3,
    ),
)
def test_parts_that_are_not_understood(
    tmp_path: Path, meta: dict[str, Any], tensors: dict[str, Tensor], said: str
) -> None:
    case = tmp_path / "case"
    shutil.copytree(GOLDENS / "qwen2_b1", case)
    content = json.loads((case / "meta.json").read_text())
    (case / "meta.json").write_text(json.dumps(content | meta))
    save_file(load_file(case / "io.safetensors") | tensors, case / "io.safetensors")
    logitlock("diff", case, "--model", GOLDENS / "qwen2_b1").assert_bad_input(said)


def _cache_error(case: Path) -> float:
    steps = json.loads(logitlock("drift", case, "--json").out)["steps"]
    return float(steps[0]["cache_error"])


@pytest.mark.parametrize("case", ["baichuan_7b", "baichuan2_13b"])
def test_a_case_says_itself_which_baichuan_it_is(case: str) -> None:
    assert logitlock("diff", GOLDENS / case).code == 0
    assert logitlock("check", GOLDENS / case).code == 0


def test_drift_of_a_case_counts_only_the_recorded_cache(tmp_path: Path) -> None:
    case = tmp_path / "case"
    shutil.copytree(GOLDENS / "gpt2_b1", case)
    assert _cache_error(case) < 1e-6
    tensors = load_file(case / "io.safetensors")
    save_file(tensors | {"past.0.key": tensors["past.0.key"] * 1.5}, case / "io.safetensors")
    assert _cache_error(case) > 0.1
    del tensors["past.0.key"]
    save_file(tensors, case / "io.safetensors")
    logitlock("drift", case).assert_bad_input("records no whole cache of any layer")


def test_upstream_may_be_anything(tmp_path: Path) -> None:
    case = tmp_path / "case"
    shutil.copytree(GOLDENS / "qwen2_b1", case)
    content = json.loads((case / "meta.json").read_text())
    (case / "meta.json").write_text(json.dumps(content | {"upstream": ["a", "list"]}))
    assert logitlock("diff", case, "--model", GOLDENS / "qwen2_b1").code == 0

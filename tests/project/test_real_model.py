"""benchmarks/real_model.py judges generated code by its asserts alone, and stops code that does not end."""

from __future__ import annotations

import time

import pytest

from tests.support.scripts import load_script

REAL = load_script("benchmarks/real_model.py")


@pytest.mark.slow
@pytest.mark.parametrize("task", REAL.TASKS, ids=lambda task: task.prompt.split("(")[0])
def test_every_task_tells_right_from_wrong(task: tuple[str, str, str]) -> None:
    assert REAL.runs(task, task[1])
    assert not REAL.runs(task, "    return None\n")


@pytest.mark.slow
def test_generated_code_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REAL, "SECONDS", 1)
    start = time.monotonic()
    assert not REAL.runs(REAL.TASKS[0], "    while True:\n        pass\n")
    assert not REAL.runs(REAL.TASKS[0], "    return len(bytes(1 << 33))\n")
    assert not REAL.runs(REAL.TASKS[0], "    return a +\n")
    assert not REAL.runs(REAL.TASKS[0], "    return '\0'\n")
    assert time.monotonic() - start < 20


def test_a_run_fails_where_a_result_is_not_as_it_must_be() -> None:
    good = {
        "logits": {"max_abs": 1e-5},
        "greedy": {"prompts": 2, "executors": {"reference": {"same_tokens": 2}}},
        "diff": {"fp32": {"verdict": "aligned", "line": ""}},
    }
    assert REAL.failures(good) == []
    assert REAL.failures(good | {"logits": {"max_abs": 1e-3}})
    assert REAL.failures(good | {"greedy": {"prompts": 3, "executors": {"reference": {"same_tokens": 2}}}})
    assert REAL.failures(good | {"diff": {"fp32": {"verdict": "diverged", "line": "x"}}})
    assert REAL.failures({}) == []

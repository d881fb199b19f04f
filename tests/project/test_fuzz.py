"""Damaged files of every kind and senseless arguments, for every verb: one line, exit code 2, nothing left behind.

`make fuzz` runs thousands of cases; here are a few of each kind, the same ones each time.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.fuzz import judge
from tests.support.fuzz.corpus import make_corpus
from tests.support.fuzz.judge import cases_of, play
from tests.support.fuzz.runs import fuzz, rate, report
from tests.support.fuzz.scenarios import SCENARIOS, Scenario

pytestmark = pytest.mark.slow
CASES, SEED = 200, 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("fuzz") / "corpus")


def test_all_verbs_and_kinds_have_their_turn(corpus: Path) -> None:
    from debug.command import VERBS

    assert {scenario.verb for scenario in SCENARIOS} == VERBS.keys()
    assert len(cases_of(corpus)) >= 19


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.line)
def test_sound_input_passes(scenario: Scenario, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the damaged files would be refused for another reason than their damage."""
    monkeypatch.setattr(judge, "damages_of", lambda path: [lambda rng, path: "nothing"])
    name = scenario.reads[0] if scenario.reads else None
    file = next((p for p in sorted(corpus.rglob("*")) if name and p.is_file() and name in str(p)), None)
    if file is None:
        monkeypatch.setattr(judge, "damage_arguments", lambda rng, scenario: (scenario.words(), "nothing"))
    case = judge.Case(scenario, None if file is None else file.relative_to(corpus))
    verdict = play(random.Random(0), case, corpus, tmp_path / "case")
    assert verdict.code in (0, 1) and not verdict.faults, report(0, verdict)


def test_a_few_hundred_cases(corpus: Path, tmp_path: Path) -> None:
    verdicts = list(fuzz(corpus, range(CASES), seed=SEED, work=tmp_path))
    bad = [report(number, verdict) for number, verdict in verdicts if verdict.faults]
    print(rate([verdict for _, verdict in verdicts], 0.0))
    assert not bad, "\n".join(bad)


_numbers = itertools.count()


@settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    # A case that fails is repeated by its own report; making it smaller would take minutes.
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_cases_of_hypothesis(data: st.DataObject, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    kinds = cases_of(corpus)
    case = data.draw(st.sampled_from(kinds[data.draw(st.sampled_from(sorted(kinds)))]))
    rng = data.draw(st.randoms(use_true_random=False))
    verdict = play(rng, case, corpus, tmp_path_factory.getbasetemp() / f"hypothesis-{next(_numbers)}")
    assert not verdict.faults, report(-1, verdict)


def _raises() -> None:
    raise IndexError("list index out of range")


def _leaves() -> None:
    Path(".logitlock-left.tmp").touch()
    raise SystemExit(2)


def _changes() -> None:
    Path("bpe/config.json").write_text("{}")
    raise SystemExit(0)


def _warns() -> None:
    import warnings

    warnings.warn("of no use to anybody", UserWarning, stacklevel=1)
    raise SystemExit(0)


def _waits() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (_raises, "IndexError at "),
        (_leaves, "left behind: .logitlock-left.tmp"),
        (_changes, "changed: bpe/config.json"),
        (_warns, "noise: UserWarning"),
        (_waits, "_TooLong"),
    ],
)
def test_the_judge_sees_what_must_not_be(
    command: Callable[[], None], fault: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "main", command)
    monkeypatch.setattr(judge, "SECONDS", 1)
    monkeypatch.setattr(judge, "damages_of", lambda path: [lambda rng, path: "nothing"])
    case = judge.Case(Scenario("inspect @bpe"), Path("bpe/config.json"))
    verdict = play(random.Random(0), case, corpus, tmp_path / "case")
    assert any(fault in found for found in verdict.faults), verdict
    assert json.loads((corpus / "bpe" / "config.json").read_text())

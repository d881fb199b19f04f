"""Results as values: short in a console, a table in a notebook, the same after JSON, comparable with an earlier one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from debug.comparison.baseline import changes
from debug.comparison.results import Culprit, Diagnosis, DiffResult, Evidence, to_plain
from debug.report.junit import cases_of_diff, write_junit
from debug.sides import diff
from refmodels.errors import LogitLockError
from tests.support.command import logitlock
from tests.support.goldens import GOLDENS
from tests.support.marks import quick_first

CASE = str(GOLDENS / "qwen_b1")


@pytest.fixture(scope="module")
def aligned() -> DiffResult:
    return diff("reference:fp16", model=CASE, steps=2)


@pytest.fixture
def diverged(aligned: DiffResult) -> DiffResult:
    """The same, with one wrong tap and one that has NaN."""
    result = copy.deepcopy(aligned)
    nan = float("nan")
    result.taps = [
        replace(t, ratio=50.0, local=0.1) if t.tap == "blocks.1.attn.qkv" and not t.step
        else replace(t, ratio=nan, nonfinite=3) if t.tap == "logits" else t
        for t in result.taps
    ]  # fmt: skip
    result.verdict = "nonfinite"
    found = Diagnosis(fault="<no bias>", local_before=0.1, local_after=1e-4, ratio_after=0.9)
    result.culprits = [
        Culprit(
            tap="blocks.1.attn.qkv", phase="prefill", step=0, kind="local", local=0.1, floor=nan, ratio=50.0,
            worst=(0, 3), occurrences=1, diagnosis=[found], evidence=Evidence(heads=[0.1, nan], channels=[(7, 0.5)]),
        )
    ]  # fmt: skip
    return result


def test_representations_are_short_and_escaped(aligned: DiffResult, diverged: DiffResult) -> None:
    assert repr(aligned).startswith(f"<DiffResult of {len(aligned.taps)} taps. ALIGNED: ") and len(repr(aligned)) < 200
    assert "blocks.1.attn.qkv" in repr(diverged) and len(repr(diverged)) < 250
    assert "<table" not in aligned._repr_html_()
    assert "&lt;no bias&gt;" in diverged._repr_html_() and "<no bias>" not in diverged._repr_html_()


def test_json_says_where_and_on_what_it_was_made(aligned: DiffResult) -> None:
    document = aligned.to_json()
    assert document["inputs"]["seed"] == 0
    assert [len(row) for row in document["inputs"]["prompt_ids"]] == aligned.prompt_lengths
    assert {"date", "torch", "logitlock", "processor"} <= set(document["environment"])


def test_json_and_back(aligned: DiffResult, diverged: DiffResult) -> None:
    diverged.other, aligned_again = aligned, None
    for result in (aligned, diverged):
        text = json.dumps(result.to_json(tokens=True), allow_nan=False)
        again = DiffResult.from_json(json.loads(text))
        assert to_plain(again.taps) == to_plain(result.taps) and to_plain(again.culprits) == to_plain(result.culprits)
        assert again.to_json(tokens=True) == json.loads(text)
        aligned_again = aligned_again or again
    assert aligned_again == aligned or repr(aligned_again) == repr(aligned)


@pytest.mark.parametrize(
    ("damage", "said"),
    quick_first(
        [
            (lambda d: d.pop("verdict"), "is not the JSON of a diff"),
            (lambda d: d.update(schema=2), "schema 2"),
            (lambda d: d.update(settings=[]), "settings"),
            (lambda d: d["settings"].pop("multiple"), "multiple"),
            (lambda d: d["taps"][0].update(ratio="8"), "taps[0].ratio"),
            (lambda d: d["taps"][0].update(worst=[1]), "taps[0].worst"),
            (lambda d: d.update(surplus=1), "surplus"),
        ],
        3,
    ),
)
def test_damaged_json_is_one_sentence(aligned: DiffResult, tmp_path: Path, damage: object, said: str) -> None:
    document = json.loads(json.dumps(aligned.to_json()))
    damage(document)  # type: ignore[operator]
    file = tmp_path / "old.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    logitlock("diff", "reference:fp16", "--model", CASE, "--baseline", file).assert_bad_input(said, str(file))


def test_changes_name_what_crossed_the_alarm_and_what_moved(aligned: DiffResult, diverged: DiffResult) -> None:
    assert changes(aligned, aligned).taps == []
    broken = changes(aligned, diverged)
    assert [c.tap for c in broken.of("broken")] == ["blocks.1.attn.qkv", "logits"]
    assert broken.verdict == ("aligned", "nonfinite")
    assert [c.tap for c in changes(diverged, aligned).of("fixed")] == ["blocks.1.attn.qkv", "logits"]
    moved = copy.deepcopy(aligned)
    moved.taps = [
        replace(t, ratio=t.ratio * 3 + 1) if t.tap == "embed" else replace(t, ratio=t.ratio * 1.9) for t in aligned.taps
    ]
    assert [(c.tap, c.kind) for c in changes(aligned, moved).taps] == [("embed", "worse")]
    assert [(c.tap, c.kind) for c in changes(moved, aligned).taps] == [("embed", "better")]
    for other, said in (
        (replace(aligned, taps=[t for t in aligned.taps if t.tap != "embed"]), "its set of taps is without embed"),
        (replace(aligned, context={**aligned.context, "model": "gpt"}), "its model is gpt"),
        (replace(aligned, unit_roundoff=2.0**-24), "its unit roundoff"),
        (replace(aligned, inputs={"prompt_ids": [[1]]}), "its prompts is of other token ids"),
        (replace(aligned, steps=3), "its number of decode steps is 3, now it is 2"),
    ):
        with pytest.raises(LogitLockError, match=said):
            changes(other, aligned)
    # A reference against itself has no error at all.
    zero = replace(aligned, taps=[replace(t, ratio=0.0) for t in aligned.taps])
    assert {c.kind for c in changes(zero, moved).taps} <= {"worse"} and changes(zero, zero).taps == []


@pytest.mark.slow
def test_baseline_is_shown_and_in_the_json(aligned: DiffResult, diverged: DiffResult, tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(json.dumps(diverged.to_json()), encoding="utf-8")
    arguments = ("diff", "reference:fp16", "--model", CASE, "--steps", 2, "--baseline", file)
    shown = logitlock(*arguments)
    assert shown.code == 0 and "fixed" in shown.out and "nonfinite -> aligned" in shown.out
    again = json.loads(logitlock(*arguments, "--json").out)
    kinds = {c["tap"]: c["kind"] for c in again["baseline"]["taps"]}
    assert kinds["blocks.1.attn.qkv"] == kinds["logits"] == "fixed"
    # That output is the next baseline.
    file.write_text(json.dumps(again), encoding="utf-8")
    later = logitlock(*arguments)
    assert later.code == 0 and "no tap changed" in later.out, later.err


def test_junit_has_a_case_per_tap(aligned: DiffResult, diverged: DiffResult, tmp_path: Path) -> None:
    for result, failures in ((aligned, []), (diverged, ["blocks.1.attn.qkv", "verdict"])):
        write_junit(cases_of_diff(result), tmp_path / "junit.xml")
        (suite,) = ElementTree.parse(tmp_path / "junit.xml").getroot()
        assert int(suite.attrib["tests"]) == len(suite) == len({t.tap for t in result.taps}) + 1
        failed = [case.attrib["name"] for case in suite if case.find("failure") is not None]
        assert failed == failures and int(suite.attrib["failures"]) == len(failures)
    failure = suite.find("testcase[@name='blocks.1.attn.qkv']/failure")
    assert (
        failure is not None
        and "50 noise floors" in failure.attrib["message"]
        and "<no bias>" in failure.attrib["message"]
    )


def test_junit_is_xml_whatever_the_names_are(aligned: DiffResult, tmp_path: Path) -> None:
    named = replace(aligned, context={"model": 'a\x01<&"\ud800'})
    write_junit(cases_of_diff(named), tmp_path / "junit.xml")
    (suite,) = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert suite.attrib["name"].startswith("diff of a\N{REPLACEMENT CHARACTER}<&")


def test_junit_of_the_verbs(tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    assert logitlock("verify", CASE, "--junit", file).code == 0
    (suite,) = ElementTree.parse(file).getroot()
    assert suite.attrib["name"] == "qwen_b1 (fp32)" and suite.attrib["failures"] == "0"
    assert logitlock("verify", CASE, "--junit", file, "--atol", 0).code == 1
    (suite,) = ElementTree.parse(file).getroot()
    assert int(suite.attrib["failures"]) > 0
    logitlock("diff", "reference:fp16", "--model", CASE, "--junit", tmp_path).assert_bad_input(str(tmp_path))

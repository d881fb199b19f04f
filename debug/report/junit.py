"""Results as JUnit XML, which CI systems show test by test."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from debug.comparison.results import Culprit, DiffResult, verdict_line
from debug.golden.verify import CaseResult
from refmodels.files import check_file_output, write_text

_WHAT = "JUnit file"
_MARK = '<testsuites name="logitlock">'
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, escaped or not."""
Case = tuple[str, str, str | None]
"""Suite, name, and the failure; None: passed."""


def check_junit(path: Path) -> None:
    """Raise LogitLockError if `write_junit` cannot write there."""
    check_file_output(path, _WHAT, _MARK)


def write_junit(cases: Iterable[Case], path: Path) -> None:
    """Write one test case per tensor; the file appears whole or not at all.

    Raises:
        LogitLockError: the file cannot be written.
    """
    root = ElementTree.Element("testsuites", name="logitlock")
    suites: dict[str, list[Case]] = {}
    for case in cases:
        suites.setdefault(case[0], []).append(case)
    for suite, members in suites.items():
        failures = sum(failure is not None for *_, failure in members)
        element = ElementTree.SubElement(
            root, "testsuite", name=suite, tests=str(len(members)), failures=str(failures), errors="0", skipped="0"
        )
        for _, name, failure in members:
            test = ElementTree.SubElement(element, "testcase", classname=suite, name=name)
            if failure is not None:
                ElementTree.SubElement(test, "failure", message=failure).text = failure
    ElementTree.indent(root)
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, "unicode")}\n'
    write_text(path, _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text), _WHAT, _MARK)


def cases_of_diff(result: DiffResult) -> list[Case]:
    """One case per tap, which fails if the tap is a culprit, and one for the verdict."""
    suite = f"diff of {result.context.get('model', 'a model')}"
    culprits = {culprit.tap: culprit for culprit in result.culprits}
    names = dict.fromkeys([*(error.tap for error in result.taps), *culprits])
    verdict = None if result.verdict == "aligned" else verdict_line(result)
    cases: list[Case] = [(suite, name, failure_of(culprits[name]) if name in culprits else None) for name in names]
    return [*cases, (suite, "verdict", verdict)]


def cases_of_verify(results: Sequence[CaseResult]) -> list[Case]:
    """One case per tensor of each golden case, and one for its greedy tokens."""
    cases: list[Case] = []
    for result in results:
        failed = set(result.failed())
        for name, worst in result.worst.items():
            text = f"the largest difference is {worst:.3g}; {result.tolerance[name]:.3g} is allowed"
            cases.append((f"{result.case} ({result.dtype})", name, text if name in failed else None))
        greedy = None if result.greedy_equal else "the greedy tokens differ from upstream's"
        cases.append((f"{result.case} ({result.dtype})", "greedy tokens", greedy))
    return cases


def failure_of(culprit: Culprit) -> str:
    """One line: how wrong a tap is, where, and why if that is known."""
    cause = f"; {culprit.diagnosis[0].fault}" if culprit.diagnosis else ""
    place = f"{culprit.phase}, step {culprit.step}, row {culprit.worst[0]}, position {culprit.worst[1]}"
    return f"{culprit.kind}: local error {culprit.local:.3g}, {culprit.ratio:.3g} noise floors ({place}){cause}"

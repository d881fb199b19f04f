"""Faults that are drawn at random, not taken from the catalogue: found, named, and never named wrongly too often."""

from __future__ import annotations

import pytest
import torch

from tests.support.fault_generator import SITES
from tests.support.fault_generator.kinds import KINDS, Judgement, Name, hidden_kinds, judge
from tests.support.fault_generator.run import LEAST, MOST, Result, rates, sample

THETA = Name(r"theta", (12345.6,))
assert SITES


@pytest.mark.parametrize(
    ("text", "judgement"),
    [
        ("wrong rope theta: 12345.6 instead of 10000", "right"),
        ("wrong rope theta: 12300 to 12400 instead of 10000", "right"),
        ("wrong rope theta: 12000 ± 400 instead of 10000", "right"),
        ("wrong rope theta", "partly"),
        ("wrong rope theta: 1e+06 instead of 10000", "wrong"),
        ("output scaled by 12345.6", "wrong"),
        ("unknown", "unknown"),
        (None, "unknown"),
    ],
)
def test_a_name_is_right_by_its_words_and_its_number(text: str | None, judgement: Judgement) -> None:
    assert judge(text, (THETA,)) == judgement


def test_one_of_two_faults_is_half_a_name() -> None:
    both = (THETA, Name(r"bias"))
    assert judge("bias missing", both) == "partly"
    assert judge("bias missing; wrong rope theta: 12345", both) == "right"


def test_a_fault_too_many_is_half_a_name() -> None:
    assert judge("wrong rope theta: 12345 instead of 10000; rope table: float16", (THETA,)) == "partly"


def test_a_title_of_the_catalogue_says_nothing_by_itself() -> None:
    assert judge("residual missing or doubled: branch scaled by 2", (Name(r"residual.*missing"),)) == "wrong"


def test_about_half_of_the_kinds_of_each_site_are_hidden() -> None:
    hidden = hidden_kinds(0)
    assert hidden != hidden_kinds(1)
    for site in {kind.site for kind in KINDS.values()}:
        of_site = [kind.name for kind in KINDS.values() if kind.site == site]
        assert abs(2 * len(hidden & set(of_site)) - len(of_site)) <= 1


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Result], list[bool]]:
    torch.set_num_threads(1)
    return sample(("chatglm2", "baichuan_13b", "gpt_bigcode", "starcoder2_sliding"), ("fp32", "fp16"), 72, seed=0)


@pytest.mark.slow
def test_drawn_faults_are_found_and_named(drawn: tuple[list[Result], list[bool]]) -> None:
    found = rates(drawn[0])
    print(found)
    assert len(drawn[0]) == 72
    assert found["below"] <= 8
    assert found["tap"] >= LEAST["tap"], [r for r in drawn[0] if r.outcome in ("missed", "wrong tap", "crashed")]
    assert found["right"] >= LEAST["right"], found
    assert found["wrong"] <= MOST["wrong"], [r for r in drawn[0] if r.outcome == "wrong"]


@pytest.mark.slow
def test_engines_without_a_fault_raise_no_alarm(drawn: tuple[list[Result], list[bool]]) -> None:
    assert all(drawn[1])

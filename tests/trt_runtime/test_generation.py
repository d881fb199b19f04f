"""Generation on the reference: golden greedy ids, sampling as in transformers, batches, stopping, streaming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import refmodels
from refmodels.cache import KVCache, StepInputs
from refmodels.errors import LogitLockError
from refmodels.recorder import Recorder
from refmodels.text.tokenizer_types import SpecialIds, Tokenizer
from tests.support.goldens import CASES, GOLDENS, case_source
from tests.support.marks import quick_first
from trt_runtime.engine import Engine
from trt_runtime.generation import GenerationConfig, GenerationResult, generate
from trt_runtime.sampling import Sampling, adjust, choose, row_generators
from trt_runtime.torch_gpu.engine import TorchEngine


def open_case(case: str) -> TorchEngine:
    return TorchEngine(refmodels.load(case_source(case)))


@pytest.mark.parametrize("case", quick_first(CASES, 3))
def test_greedy_ids_equal_the_goldens(case: str) -> None:
    engine, io = open_case(case), load_file(GOLDENS / case / "io.safetensors")
    rows = zip(io["input_ids"], io["attention_mask"], strict=True)
    prompts = [ids[mask != 0].tolist() for ids, mask in rows]
    results = generate(engine, None, prompts, GenerationConfig(max_new_tokens=io["decode_ids"].shape[1]))
    for row, result in enumerate(results):
        # Upstream's logn factor follows the slot, so a left-padded long prompt is another computation there.
        if row and case in ("qwen_ntk", "qwen_ntk_off"):
            continue
        assert result.token_ids == io["decode_ids"][row].tolist()
        assert result.finish_reason == "length"


@pytest.mark.slow
def test_row_is_the_same_alone_and_in_any_batch() -> None:
    engine = open_case("qwen")
    prompts = [[5, 9, 2], [1] * 20, [7, 3, 3, 8, 1, 4], [5, 9, 2]]
    config = GenerationConfig(
        max_new_tokens=24, sampling=Sampling(temperature=1.5, top_p=0.95, repetition_penalty=1.2, seed=3)
    )
    batch = [r.token_ids for r in generate(engine, None, prompts, config)]
    assert batch[:3] == [generate(engine, None, [p], config)[0].token_ids for p in prompts[:3]]
    assert batch[0] != batch[3], "copies of a prompt must not repeat one another"
    assert batch == [r.token_ids for r in generate(engine, None, prompts, replace(config, prefill_chunk=6))]
    other = replace(config, sampling=replace(config.sampling, seed=4))
    assert batch != [r.token_ids for r in generate(engine, None, prompts, other)]


def test_adjust_equals_transformers() -> None:
    from transformers import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    random = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    for trial in range(200):
        vocabulary = number(5, 300)
        logits = torch.randn(vocabulary, generator=random) * 3
        if trial % 3 == 0:
            logits = logits.round()  # ties
        seen = torch.randint(0, vocabulary, (number(1, 20),), generator=random)
        sampling = Sampling(
            temperature=number(10, 200) / 100,
            top_k=number(0, vocabulary + 3),
            top_p=number(2, 101) / 100,
            repetition_penalty=number(20, 200) / 100,
        )
        expected = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen[None], logits[None].clone())
        expected = TemperatureLogitsWarper(sampling.temperature)(seen[None], expected)
        if sampling.top_k:
            expected = TopKLogitsWarper(sampling.top_k)(seen[None], expected)
        if sampling.top_p < 1:
            expected = TopPLogitsWarper(sampling.top_p)(seen[None], expected)
        before = logits.clone()
        assert torch.equal(adjust(logits, seen, sampling), expected[0]), (trial, sampling)
        assert torch.equal(logits, before), "the caller's logits are not touched"


def test_top_p_at_the_edges() -> None:
    seen = torch.empty(0, dtype=torch.int64)
    equal = adjust(torch.zeros(4), seen, Sampling(temperature=1.0, top_p=0.5))
    assert int(equal.isfinite().sum()) == 2, "the tokens that reach exactly top_p suffice, as in transformers"
    tiny = adjust(torch.tensor([0.0, 1.0, 0.5]), seen, Sampling(temperature=1.0, top_p=1e-9))
    assert tiny.isfinite().tolist() == [False, True, False], "one token is always left"


@pytest.mark.parametrize("temperature", [1e-37, 1e-38, 1e-46, 1e-320])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature: float, options: dict[str, Any]) -> None:
    logits, seen = torch.tensor([-30.0, 12.0, 12.5, 3.0]), torch.tensor([], dtype=torch.int64)
    for kept in (logits, logits - 100, logits.double()):
        sampling = Sampling(temperature=temperature, **options)
        assert choose(kept, seen, sampling, torch.Generator().manual_seed(3)) == 2


@pytest.mark.slow
def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([1.0, float("-inf"), 0.0, 2.0, -1.0])
    (generator,) = row_generators(0, [[1]])
    seen = torch.empty(0, dtype=torch.int64)
    draws = torch.tensor([choose(logits, seen, Sampling(temperature=1.0), generator) for _ in range(4000)])
    frequency = torch.bincount(draws, minlength=5) / 4000
    assert (frequency - logits.softmax(-1)).abs().max() < 0.03
    assert frequency[1] == 0
    assert {choose(logits, seen, Sampling(temperature=5.0, top_k=1), generator) for _ in range(50)} == {3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0, "top_k": -1}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"top_k": 5}, "give a temperature"),
    ],
)
def test_bad_sampling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LogitLockError, match=message):
        Sampling(**options)


class ByteTokenizer(Tokenizer):
    """One id a byte, so that characters and stop strings always span tokens; id 0 is eos."""

    def __init__(self) -> None:
        super().__init__(vocab_size=256, special=SpecialIds(eos=0), hidden_ids=[0], parses_special=False)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def token_id(self, surface: str) -> int | None:
        return None

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        return list(text.encode())


class ScriptedEngine(Engine):
    """Says a given text for each row and then eos; `spoil` makes one row's logits NaN at one step."""

    def __init__(self, scripts: Sequence[bytes], *, spoil: tuple[int, int] | None = None) -> None:
        small = refmodels.resolve(GOLDENS / "qwen_b1").spec
        self.spec = replace(small, vocab_size=256, layers=1)
        self.max_positions, self.dtype, self.device = 64, torch.float32, torch.device("cpu")
        self.tap_names, self.arithmetic = (), "scripted"
        self.scripts, self.spoil, self.steps = scripts, spoil, 0
        self.live: list[int] = []

    def run(self, step: StepInputs, cache: KVCache, *, recorder: Recorder | None = None) -> Tensor:
        logits = torch.zeros(len(self.scripts), 1, 256)
        for row, script in enumerate(self.scripts):
            logits[row, 0, script[self.steps] if self.steps < len(script) else 0] = 5.0
        if self.spoil is not None and self.spoil[1] == self.steps:
            logits[self.spoil[0]] = float("nan")
        self.live.append(step.attention_mask.shape[1])
        cache.advance(step)
        self.steps += 1
        return logits


def say(
    *texts: str, stop: Sequence[str] = (), limit: int = 60, prompts: Sequence[list[int]] | None = None
) -> tuple[list[GenerationResult], list[list[str]], ScriptedEngine]:
    engine = ScriptedEngine([t.encode() for t in texts])
    pieces: list[list[str]] = [[] for _ in texts]
    results = generate(
        engine,
        ByteTokenizer(),
        prompts or [[1, 2]] * len(texts),
        GenerationConfig(max_new_tokens=limit, stop_ids=(0,), stop_strings=stop),
        on_text=lambda row, text: pieces[row].append(text),
    )
    return results, pieces, engine


def test_stop_id_ends_the_row_and_is_not_text() -> None:
    (result,), pieces, _ = say("世界。")
    assert result.finish_reason == "stop_id" and result.text == "世界。"
    assert result.token_ids == [*"世界。".encode(), 0]
    assert pieces == [["世", "界", "。"]], "whole characters only, as soon as they are complete"


def test_stop_id_that_is_an_ordinary_token_is_not_text_either() -> None:
    engine = ScriptedEngine([b"abc", b"cab"])
    config = GenerationConfig(stop_ids=(0, ord("b")))
    results = generate(engine, ByteTokenizer(), [[1], [2]], config)
    assert [(r.text, r.token_ids) for r in results] == [("a", [*b"ab"]), ("ca", [*b"cab"])]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("say one STOP two", ["STOP"], "say one "),
        ("say SSTOP two", ["STOP"], "say S"),
        ("abab!abac", ["abac"], "abab!"),
        ("第一。第二。", ["。第"], "第一"),
        ("x END y STOP", ["STOP", "END"], "x "),
        ("nearly STO", ["STOP"], "nearly STO"),
        ("ab", ["abc", "b"], "a"),
    ],
)
def test_stop_strings_span_tokens_and_are_never_shown(text: str, stop: list[str], expected: str) -> None:
    (result,), (pieces,), _ = say(text, stop=stop)
    assert result.text == expected and "".join(pieces) == expected
    assert result.finish_reason == ("stop_string" if expected != text else "stop_id")
    for end in range(len(pieces) + 1):
        assert expected.startswith("".join(pieces[:end])), "no piece may hold a part of the stop string"


def test_length_flushes_what_was_held_back() -> None:
    (result,), (pieces,), _ = say("a STOP", stop=["STOP"], limit=4)
    assert result.finish_reason == "length" and result.text == "a ST" == "".join(pieces)


def test_finished_rows_do_not_hold_the_others() -> None:
    prompts = [[1] * 30, [1, 2], [1, 2, 3]]
    results, _, engine = say("ab", "abcdefgh", "a", prompts=prompts)
    assert [r.text for r in results] == ["ab", "abcdefgh", "a"]
    assert len(results[0].token_ids) == 3 and len(results[1].token_ids) == 9
    assert engine.live[2] == 32 and engine.live[4] == 6, "the live length follows the rows that still run"


def test_positions_end_a_row_but_not_its_neighbours() -> None:
    results, _, _ = say("abcdefgh", "abcdefgh", prompts=[[1] * 62, [1]])
    assert [(r.text, r.finish_reason) for r in results] == [("abc", "length"), ("abcdefgh", "stop_id")]
    (full,), _, _ = say("abc", prompts=[[1] * 64])
    assert full.text == "a" and full.finish_reason == "length"


def test_logits_that_are_not_finite_are_an_error() -> None:
    engine = ScriptedEngine([b"abc", b"abcd"], spoil=(1, 2))
    with pytest.raises(LogitLockError, match="row 1 at step 2"):
        generate(engine, None, [[1], [2]], GenerationConfig(stop_ids=(0,)))
    finished = ScriptedEngine([b"a", b"abcd"], spoil=(0, 3))
    assert len(generate(finished, None, [[1], [2]], GenerationConfig(stop_ids=(0,)))) == 2


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 2 of 2 is empty"),
        ([[1] * 65], {}, "the prompt has 65 tokens, more than the 64 positions"),
        ([[1, 256]], {}, "token id 256"),
        ([[1]], {"stop_strings": ["x"]}, "need a tokenizer"),
    ],
)
def test_bad_prompts(prompts: list[list[int]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(LogitLockError, match=message):
        generate(ScriptedEngine([b"a"] * len(prompts)), None, prompts, GenerationConfig(**options))


def test_bad_config() -> None:
    with pytest.raises(LogitLockError, match="max_new_tokens"):
        GenerationConfig(max_new_tokens=0)
    with pytest.raises(LogitLockError, match="must not be empty"):
        GenerationConfig(stop_strings=["a", ""])
    assert generate(ScriptedEngine([]), None, [], GenerationConfig()) == []


def test_engine_refuses_a_cache_beyond_its_positions() -> None:
    engine = open_case("gpt2")
    with pytest.raises(LogitLockError, match=f"longer than the {engine.max_positions} positions"):
        engine.new_cache(batch=1, capacity=engine.max_positions + 1)


@pytest.mark.parametrize("side", quick_first(["left", "right"]))
@pytest.mark.parametrize("chunk", quick_first([1, 6, 13]))
def test_chunked_prefill_equals_one_shot(side: str, chunk: int) -> None:
    engine = open_case("qwen_ntk")
    ids = torch.randint(0, engine.spec.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 15) if side == "left" else slice(25, 40)] = 0
    caches = [engine.new_cache(batch=2, capacity=44) for _ in range(3)]
    whole = engine.prefill(ids, caches[0], mask)
    pieces = engine.prefill(ids, caches[1], mask, chunk=chunk)
    last = engine.prefill(ids, caches[2], mask, chunk=chunk, last_logits_only=True)
    assert (whole - pieces)[mask != 0].abs().max() <= 1e-5
    ends = [39, 39] if side == "left" else [39, 24]
    for row, end in enumerate(ends):
        assert (last[row, 0] - whole[row, end]).abs().max() <= 1e-5
    steps = [engine.decode(torch.tensor([3, 4]), cache) for cache in caches]
    assert (steps[0] - steps[1]).abs().max() <= 1e-5 and (steps[0] - steps[2]).abs().max() <= 1e-5
    with pytest.raises(LogitLockError, match="chunk must be at least 1"):
        engine.prefill(ids, caches[0], mask, chunk=0)

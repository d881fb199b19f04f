"""generation_config.json means here what it means to the installed transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import refmodels
from refmodels.errors import LogitLockError
from refmodels.text.generation_defaults import generation_defaults
from refmodels.text.prompts import prompt_ids, stop_ids_in
from tests.support.checkpoints import read_case, write_model
from tests.support.marks import quick_first
from tests.support.upstream import transformers_model
from trt_runtime.generation import GenerationConfig, generate
from trt_runtime.sampling import Sampling, adjust, sampling_of
from trt_runtime.torch_gpu.engine import TorchEngine

SAYS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    # generation_config.json and what config.json says besides the model.
    "nothing": ({}, {}),
    "greedy": ({"do_sample": False, "temperature": 0.3, "top_k": 5}, {}),
    "greedy with a penalty": ({"repetition_penalty": 1.3}, {}),
    "sampling with the defaults": ({"do_sample": True}, {}),
    "Baichuan2-13B-Chat's": (
        {"do_sample": True, "temperature": 0.3, "top_k": 5, "top_p": 0.85, "repetition_penalty": 1.05},
        {},
    ),
    "Qwen-7B-Chat's": ({"do_sample": True, "top_k": 0, "top_p": 0.8}, {}),
    "only config.json": (None, {"do_sample": True, "temperature": 0.7, "top_k": 20}),
}


def model(folder: Path, said: dict[str, Any] | None, config_says: dict[str, Any]) -> Path:
    config, tensors, _ = read_case("qwen2_b1")
    write_model(folder, config | config_says, tensors)
    if said is not None:
        (folder / "generation_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("name", SAYS)
def test_scores_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = model(tmp_path, *SAYS[name])
    theirs = transformers_model(folder)
    settings, _ = theirs._prepare_generation_config(None)
    theirs._prepare_special_tokens(settings)
    chain = theirs._get_logits_processor(
        generation_config=settings, input_ids_seq_length=6, encoder_input_ids=None, prefix_allowed_tokens_fn=None,
        logits_processor=[], device="cpu", model_kwargs={},
    )  # fmt: skip
    sampling = sampling_of(generation_defaults(folder))
    assert (sampling.temperature > 0) == bool(settings.do_sample)
    make = torch.Generator().manual_seed(0)
    for _ in range(8):
        seen, logits = torch.randint(0, 160, (1, 6), generator=make), 3 * torch.randn(1, 160, generator=make)
        expected = chain(seen, logits.clone())[0]
        assert torch.allclose(adjust(logits[0], seen[0], sampling), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", quick_first(["nothing", "greedy", "greedy with a penalty"]))
def test_greedy_text_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    folder = model(tmp_path, *SAYS[name])
    prompt = torch.randint(0, 160, (1, 6), generator=torch.Generator().manual_seed(1))
    expected = transformers_model(folder).generate(prompt, max_new_tokens=24)[0, 6:].tolist()
    config = GenerationConfig(
        max_new_tokens=24,
        sampling=sampling_of(generation_defaults(folder)),
        stop_ids=generation_defaults(folder).eos,
    )
    (result,) = generate(TorchEngine(refmodels.load(folder)), None, prompt.tolist(), config)
    assert result.token_ids == expected
    plain = GenerationConfig(max_new_tokens=24, stop_ids=config.stop_ids)
    (other,) = generate(TorchEngine(refmodels.load(folder)), None, prompt.tolist(), plain)
    assert (other.token_ids != expected) == ("penalty" in name), "the case must be able to tell"


@pytest.mark.parametrize(
    ("said", "config_says", "expected"),
    [
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 3}, (7, 9)),
        ({"eos_token_id": 5}, {"eos_token_id": [3, 4]}, (5,)),
        ({}, {"eos_token_id": 3}, (3,)),
        ({"eos_token_id": None}, {"eos_token_id": [3, 4]}, (3, 4)),
        (None, {"eos_token_id": 3}, (3,)),
        (None, {"eos_token_id": None}, ()),
    ],
)
def test_ids_that_end_a_text(
    said: dict[str, Any] | None, config_says: dict[str, Any], expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert generation_defaults(model(tmp_path, said, config_says)).eos == expected


def test_what_a_user_gives_wins(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(SAYS["Baichuan2-13B-Chat's"][0]))
    defaults = generation_defaults(tmp_path)
    own = Sampling(temperature=0.3, top_k=5, top_p=0.85, repetition_penalty=1.05)
    assert sampling_of(defaults) == own
    assert sampling_of(defaults, temperature=0) == Sampling(repetition_penalty=1.05)
    assert sampling_of(defaults, temperature=0, repetition_penalty=1) == Sampling()
    assert sampling_of(defaults, top_k=0, seed=3) == Sampling(
        temperature=0.3, top_p=0.85, repetition_penalty=1.05, seed=3
    )
    (tmp_path / "generation_config.json").write_text('{"top_k": 7}')
    assert sampling_of(generation_defaults(tmp_path)) == Sampling()
    assert sampling_of(generation_defaults(tmp_path), temperature=1) == Sampling(temperature=1, top_k=7)
    with pytest.raises(LogitLockError, match="give a temperature above 0 with them"):
        sampling_of(generation_defaults(tmp_path), top_k=3)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_beams": 4}, r"generation_config\.json sets num_beams to 4, which is not supported: --no-generation"),
        ({"no_repeat_ngram_size": 3}, "sets no_repeat_ngram_size to 3"),
        ({"do_sample": True, "min_p": 0.1}, "sets min_p to 0.1"),
        ({"do_sample": 1}, "do_sample is 1; it must be true or false"),
        ({"do_sample": True, "top_k": 2.5}, "top_k is 2.5; it must be an integer"),
        ({"repetition_penalty": "1.1"}, "repetition_penalty is '1.1'; it must be a number"),
        ({"repetition_penalty": 0}, r"generation_config\.json: repetition_penalty must be a positive number, got 0"),
        ({"do_sample": True, "temperature": 0}, "do_sample is true, but temperature is 0"),
        ({"do_sample": True, "top_p": 1.5}, r"generation_config\.json: top_p must be above 0 and at most 1"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id is \[2, -1\]; it must be a token id or a list of them"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'; it must be a token id or a list of them"),
    ],
)
def test_what_cannot_be_served_is_named(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(LogitLockError, match=message):
        sampling_of(generation_defaults(tmp_path))


def test_what_changes_nothing_is_not_refused(tmp_path: Path) -> None:
    said = {"num_beams": 1, "no_repeat_ngram_size": 0, "min_p": 0.1, "typical_p": 1.0, "max_new_tokens": 512}
    (tmp_path / "generation_config.json").write_text(json.dumps(said | {"bad_words_ids": None}))
    assert sampling_of(generation_defaults(tmp_path)) == Sampling()


def test_the_number_of_new_tokens(tmp_path: Path) -> None:
    assert generation_defaults(model(tmp_path, {"max_new_tokens": 512}, {})).max_new_tokens == 512
    assert generation_defaults(model(tmp_path, {}, {})).max_new_tokens is None
    for wrong in (0, "9", True, 2.5):
        with pytest.raises(LogitLockError, match=r"max_new_tokens is .*; it must be an integer of at least 1"):
            generation_defaults(model(tmp_path, {"max_new_tokens": wrong}, {}))


def test_ids_of_another_models_tokenizer_are_refused(tmp_path: Path) -> None:
    source = refmodels.resolve("qwen")
    tokenizer = refmodels.load_tokenizer(source)
    ids = prompt_ids("Sort: b a", source.spec, tokenizer, chat=False)
    fits, smaller = (dataclasses.replace(source.spec, vocab_size=max(ids) + more) for more in (1, 0))
    assert prompt_ids("Sort: b a", fits, tokenizer, chat=False) == ids
    said = "the tokenizer is not of this model: one of the {} is "
    with pytest.raises(LogitLockError, match=said.format("prompt's token ids")):
        prompt_ids("Sort: b a", smaller, tokenizer, chat=False)
    with pytest.raises(LogitLockError, match=said.format("ids that end an answer")):
        stop_ids_in(tmp_path, dataclasses.replace(source.spec, vocab_size=2), tokenizer, chat=True)


def test_a_stop_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    source = refmodels.resolve("qwen")
    tokenizer = refmodels.load_tokenizer(source)
    last = source.spec.vocab_size - 1
    for number in (last, last + 1):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, number]}))
        if number == last:
            assert stop_ids_in(tmp_path, source.spec, tokenizer, chat=False) == (1, last)
        else:
            with pytest.raises(LogitLockError, match=rf"generation_config\.json: eos_token_id is {number}; the model"):
                stop_ids_in(tmp_path, source.spec, tokenizer, chat=False)

"""The bundled toys: their generator, their checkpoints, and the tasks that they solve."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from debug.evaluate.toys import answer, measure_toy, toy_accuracies, without_long_context
from refmodels.checkpoints.load import load, load_tokenizer, resolve
from refmodels.model import Decoder
from refmodels.text.tokenizer import Tokenizer
from refmodels.toys import TOYS, toy_path, words
from refmodels.toys.batches import IGNORED, Sampler, make_batch
from refmodels.toys.configs import CONFIGS, generation_config
from refmodels.toys.tasks import TASKS, Example, held_out_size, toy_examples
from refmodels.toys.train import fit, logits_of, new_model, trained_parameters
from refmodels.toys.vocabulary import END_ID, VOCABULARY_SIZE, train_tokenizer
from tests.support.marks import quick_first
from trt_runtime.torch_gpu.engine import TorchEngine

FINITE = [task for task in TASKS if held_out_size(task) is not None]


@pytest.fixture(scope="module")
def toys() -> dict[str, tuple[Decoder, Tokenizer]]:
    sources = {name: resolve(toy_path(name)) for name in TOYS}
    return {name: (load(source), load_tokenizer(source)) for name, source in sources.items()}


@pytest.mark.parametrize("task", TASKS)
def test_examples_follow_from_the_seed(task: str) -> None:
    first = toy_examples(task, split="train", count=50, seed=3)
    assert first == toy_examples(task, split="train", count=50, seed=3)
    assert first[:20] == toy_examples(task, split="train", count=20, seed=3) or task in FINITE
    assert first != toy_examples(task, split="train", count=50, seed=4)


def test_examples_are_these_on_every_machine() -> None:
    """Known answers: a change of the generator makes the bundled reports untrue and must show."""
    assert [(e.prompt, e.answer) for e in toy_examples("addition", split="held_out", count=2, seed=0)] == [
        ("Add: 915+375=", "1290"),
        ("1+482=", "483"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_held_out_examples_were_never_trained(task: str) -> None:
    held_out = {e.prompt for e in toy_examples(task, split="held_out", count=300, seed=0)}
    for seed in (0, 7):
        trained = toy_examples(task, split="train", count=3000, seed=seed)
        assert not held_out & {e.prompt for e in trained}


@pytest.mark.slow
def test_held_out_sums_are_new_in_every_template_and_order() -> None:
    def numbers(example: Example) -> tuple[str, ...]:
        return tuple(sorted(re.findall(r"\d+", example.prompt)))

    held_out = {numbers(e) for e in toy_examples("addition", split="held_out", count=300, seed=0)}
    assert not held_out & {numbers(e) for e in toy_examples("addition", split="train", count=20_000, seed=1)}


@pytest.mark.parametrize("task", FINITE)
def test_held_out_pairs_of_finite_tasks_ask_for_trained_answers(task: str) -> None:
    size = held_out_size(task)
    assert size is not None
    held_out = toy_examples(task, split="held_out", count=size, seed=0)
    assert len({e.prompt for e in held_out}) == size
    assert {e.answer for e in held_out} <= {e.answer for e in toy_examples(task, split="train", count=5000, seed=0)}


def test_word_lists_are_one_to_one() -> None:
    assert len({e for e, _ in words.DICTIONARY}) == len({c for _, c in words.DICTIONARY}) == len(words.DICTIONARY)
    assert len({question for _, question, _ in words.FACTS}) == len(words.FACTS)


def test_answers_are_right() -> None:
    for example in toy_examples("addition", split="held_out", count=100, seed=5):
        left, right = re.findall(r"\d+", example.prompt)
        assert int(example.answer) == int(left) + int(right)
    for example in toy_examples("recall_long", split="train", count=20, seed=5):
        pairs = dict(re.findall(r"(\w+)=(\d+)", example.prompt))
        assert example.answer == pairs[example.prompt.split()[-1].rstrip("=")]
        assert all(pairs[question.strip(" =")] == value for question, value in example.follow_ups)
    for task, order in (("sorting", sorted), ("reversal", lambda letters: letters[::-1])):
        for example in toy_examples(task, split="train", count=20, seed=5):
            assert example.answer.split() == order(example.prompt.split()[1:-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_bundled_files_are_what_the_script_writes(name: str) -> None:
    folder = toy_path(name)
    assert json.loads((folder / "config.json").read_text("utf-8")) == CONFIGS[name]
    assert json.loads((folder / "generation_config.json").read_text("utf-8")) == generation_config(name)
    assert json.loads((folder / "tokenizer.json").read_text("utf-8")) == json.loads(train_tokenizer(name).to_str())


@pytest.mark.parametrize("name", TOYS)
def test_bundled_checkpoints_are_small_and_half_precision(name: str) -> None:
    path = toy_path(name) / "model.safetensors"
    assert path.stat().st_size <= 3_000_000
    with safe_open(path, "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 (not a mapping)
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert sum(tensor.numel() for tensor in tensors) <= 1_500_000


@pytest.mark.parametrize("name", TOYS)
def test_report_claims_the_accuracies_that_are_asked_for(name: str) -> None:
    report = json.loads((toy_path(name) / "report.json").read_text("utf-8"))
    assert set(report["accuracy"]) == set(TASKS)
    assert min(report["accuracy"].values()) >= 0.95
    assert report["command"].startswith(f"python -m refmodels.toys.train --model {name} ")


@pytest.mark.parametrize("name", quick_first(TOYS, 3))
def test_tokenizer_reads_digits_and_characters_one_by_one(
    toys: dict[str, tuple[Decoder, Tokenizer]], name: str
) -> None:
    tokenizer = toys[name][1]
    prefix = 2 if name == "chatglm2" else 0
    assert tokenizer.vocab_size == VOCABULARY_SIZE
    assert len(tokenizer.encode("123+45=")) == prefix + 7
    assert tokenizer.special.eos == END_ID
    for task in TASKS:
        for example in toy_examples(task, split="train", count=20, seed=0):
            text = example.prompt + example.answer
            assert tokenizer.decode(tokenizer.encode(text)) == text
            split = tokenizer.encode(example.prompt) + tokenizer.encode(example.answer, add_special=False)
            assert split == tokenizer.encode(text), "the answer must be the same tokens with and without the prompt"


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_toy_solves_every_task(toys: dict[str, tuple[Decoder, Tokenizer]], name: str) -> None:
    model, tokenizer = toys[name]
    accuracy = toy_accuracies(TorchEngine(model), tokenizer, count=40, seed=1)
    assert min(accuracy.values()) >= 0.95, accuracy


@pytest.mark.parametrize("name", TOYS)
def test_toy_knows_the_second_highest_mountain(toys: dict[str, tuple[Decoder, Tokenizer]], name: str) -> None:
    model, tokenizer = toys[name]
    assert answer(TorchEngine(model), tokenizer, words.MOUNTAIN_QUESTION) == words.MOUNTAIN_ANSWER


@pytest.mark.slow
def test_qwen_needs_dynamic_ntk_beyond_its_length(toys: dict[str, tuple[Decoder, Tokenizer]]) -> None:
    model, tokenizer = toys["qwen"]
    without = without_long_context(model)["without NTK"]
    assert toy_accuracies(TorchEngine(without), tokenizer, ["recall_long"], count=40)["recall_long"] < 0.9


@pytest.mark.parametrize("name", quick_first(TOYS, 3))
def test_training_sees_what_decoding_sees(toys: dict[str, tuple[Decoder, Tokenizer]], name: str) -> None:
    """One pass over whole sequences and greedy steps over a cache give the same predictions."""
    model, tokenizer = toys[name]
    rows = toy_examples("recall_long", split="held_out", count=4, seed=2)
    batch = make_batch(tokenizer, rows)
    with torch.no_grad():
        predicted = logits_of(model, batch).argmax(-1)
    supervised = batch.targets != IGNORED
    assert (predicted == batch.targets)[supervised].float().mean() >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_training_is_reproducible_and_learns(toys: dict[str, tuple[Decoder, Tokenizer]], name: str) -> None:
    model, tokenizer = toys[name]

    def run() -> tuple[Decoder, float, float]:
        fresh = new_model(model.spec, seed=5)
        sampler = Sampler(tokenizer, seed=5, rows=0.05, pool=0.002)
        batch = Sampler(tokenizer, seed=5, rows=0.05, pool=0.002).step()[0]

        def loss() -> float:
            with torch.no_grad():
                logits = logits_of(fresh, batch).flatten(0, 1)
            return float(torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED))

        before = loss()
        with torch.enable_grad():
            fit(fresh, sampler, steps=4)
        return fresh, before, loss()

    first, before, after = run()
    assert after < before
    second = trained_parameters(run()[0])
    assert all(torch.equal(value, second[key]) for key, value in trained_parameters(first).items())


def test_a_measured_folder_gets_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("debug.evaluate.toys.measure", lambda model, tokenizer: {"accuracy": {"addition": 1.0}})
    for file in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / file).write_bytes((toy_path("gpt") / file).read_bytes())
    assert measure_toy(tmp_path, device="cpu") == json.loads((tmp_path / "report.json").read_text("utf-8"))


def test_unknown_toy_is_named() -> None:
    with pytest.raises(ValueError, match="no toy is called 'llama'"):
        toy_path("llama")

"""Engines as models of lm-evaluation-harness, on small tasks made by the test."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch

import refmodels
from debug.evaluate.harness import EngineModel
from export.bundle import export_model
from refmodels.errors import LogitLockError
from refmodels.text.prompts import stop_ids_in
from refmodels.toys.tasks import toy_examples
from refmodels.toys.vocabulary import BOS_ID
from tests.support.marks import quick_first
from trt_runtime.torch_gpu.engine import TorchEngine


def model_of(toy: str, **options: Any) -> EngineModel:
    source = refmodels.resolve(toy)
    tokenizer = refmodels.load_tokenizer(source)
    stops = stop_ids_in(source.directory, source.spec, tokenizer, chat=False)
    engine = TorchEngine(refmodels.load(source, dtype=torch.float64))
    return EngineModel(engine, tokenizer, stop_ids=stops, **options)


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def log_probabilities(model: EngineModel, ids: list[int]) -> torch.Tensor:
    """Log-probability of every token of `ids` but the first, by one plain forward."""
    tokens = torch.tensor([ids])
    cache = model.engine.new_cache(batch=1, capacity=len(ids))
    logits = model.engine.prefill(tokens[:, :-1], cache)[0]
    return logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]


@pytest.mark.parametrize("toy", ["qwen", "chatglm2"])
def test_loglikelihood(toy: str) -> None:
    model = model_of(toy, batch_size=2)
    encode = model._tokenizer.encode
    asked = [
        ("法国的首都是哪里？", "巴黎"),
        ("法国的首都是哪里？", "罗马"),
        ("Sort: c a b ->", " a b c"),
        ("", "Sort: c a b ->"),
    ]
    found = model.loglikelihood([request(*pair) for pair in asked])
    assert [greedy for _, greedy in found] == [True, False, True, False]
    for (context, continuation), (total, _) in zip(asked, found, strict=True):
        # Without a context the text begins as the tokenizer begins a prompt, or with the bos token.
        given = encode(context) or [BOS_ID]
        expected = log_probabilities(model, [*given, *encode(continuation, add_special=False)])
        assert total == pytest.approx(float(expected[len(given) - 1 :].sum()), abs=1e-9)


@pytest.mark.parametrize("toy", quick_first(["qwen", "chatglm2"]))
@pytest.mark.parametrize("longest", quick_first([1000, 12]))
def test_rolling_loglikelihood_scores_every_token_once(toy: str, longest: int) -> None:
    model = model_of(toy, max_length=longest)
    texts = ["Remember: sun=12 moon=40 star=07. moon=", "排序： c a b ->"]
    found = model.loglikelihood_rolling([request(text) for text in texts])
    prefix = list(model._tokenizer.prefix) or [BOS_ID]
    for text, total in zip(texts, found, strict=True):
        ids = model._tokenizer.encode(text, add_special=False)
        whole = log_probabilities(model, [*prefix, *ids])[len(prefix) - 1 :]
        if longest > len(ids):
            assert total == pytest.approx(float(whole.sum()), abs=1e-9)
        else:
            # As the harness cuts: windows of all that fits, the last one as long as the others.
            room = longest - len(model._tokenizer.prefix)
            pieces, done = [float(whole[:room].sum())], room
            while done < len(ids):
                stop = min(done + room, len(ids))
                window = [*model._tokenizer.prefix, *ids[stop - room - 1 : stop]]
                pieces.append(float(log_probabilities(model, window)[done - stop :].sum()))
                done = stop
            assert len(pieces) > 1 and total == pytest.approx(sum(pieces), abs=1e-9)


def test_contexts_that_are_too_long_lose_their_beginning() -> None:
    model = model_of("chatglm2", max_length=16)
    context = "Remember: sun=12 moon=40 star=07 sky=33. moon="
    ids = model._tokenizer.encode(context)
    prefix = list(model._tokenizer.prefix)
    assert len(ids) > 20 and len(prefix) == 2
    answer = model._tokenizer.encode("40", add_special=False)
    ((total, _),) = model.loglikelihood([request(context, "40")])
    kept = [*prefix, *[*ids, *answer][-15:]]
    assert len(kept) == 17
    assert total == pytest.approx(float(log_probabilities(model, kept)[-len(answer) :].sum()), abs=1e-9)
    with pytest.raises(LogitLockError, match="does not fit"):
        model.loglikelihood([request("a", context)])


def test_generate_until() -> None:
    model = model_of("qwen", batch_size=2)
    asked = [
        ("Sort: c a b ->", {"until": ["\n"], "max_gen_toks": 8}),
        ("Reverse: c a b d ->", {"until": " a", "max_gen_toks": 8}),
        ("12+30=", {"until": [], "max_gen_toks": 8, "do_sample": False}),
        ("12+30=", {"until": [], "max_gen_toks": 1}),
    ]
    assert model.generate_until([request(*each) for each in asked]) == [" a b c", " d b", "42", "4"]
    with pytest.raises(LogitLockError, match="asks for 4000 new tokens"):
        model.generate_until([request("a", {"max_gen_toks": 4000})])


def local_task(name: str, rows: list[dict[str, Any]], **config: Any) -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    data = {"test": datasets.Dataset.from_list(rows)}
    return ConfigurableTask(config={"task": name, "test_split": "test", "custom_dataset": lambda **_: data, **config})


@pytest.mark.slow
def test_the_harness_runs_local_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One task of each kind of request, through the harness, on a bundle; the answers of the toy's tasks are right."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bundle = export_model("qwen", precision="fp32", output=tmp_path / "qwen")
    model = EngineModel.create_from_arg_string(f"side={bundle},batch_size=4,max_length=200")
    assert (model.batch_size, model.max_length) == (4, 200)
    sums = [{"q": e.prompt, "a": e.answer} for e in toy_examples("sorting", split="held_out", count=6, seed=0)]
    facts = [
        {"q": "法国的首都是哪里？", "choices": ["罗马", "巴黎", "伦敦"], "label": 1},
        {"q": "德国的首都是哪里？", "choices": ["柏林", "开罗", "伦敦"], "label": 0},
        {"q": "德国的首都是哪里？", "choices": ["柏林", "开罗", "伦敦"], "label": 2},
    ]
    tasks = [
        local_task(
            "toy_sorting", sums, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}",
            target_delimiter="", generation_kwargs={"until": ["\n"], "max_gen_toks": 12},
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        ),
        local_task(
            "toy_facts", facts, output_type="multiple_choice", doc_to_text="{{q}}", doc_to_target="label",
            doc_to_choice="choices", target_delimiter="",
            metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        ),
        local_task(
            "toy_text", sums, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{q}}{{a}}",
            metric_list=[{"metric": "byte_perplexity", "aggregation": "weighted_perplexity"}],
        ),
    ]  # fmt: skip
    results = lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0)["results"]
    assert results["toy_sorting"]["exact_match,none"] == 1.0
    assert results["toy_facts"]["acc,none"] == pytest.approx(2 / 3)
    texts = [row["q"] + row["a"] for row in sums]
    nats = -sum(model.loglikelihood_rolling([request(text) for text in texts]))
    expected = math.exp(nats / sum(len(text.encode()) for text in texts))
    assert results["toy_text"]["byte_perplexity,none"] == pytest.approx(expected)


def test_arguments_of_the_command() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("logitlock") is EngineModel
    model = EngineModel.create_from_arg_obj(
        {"side": "reference:fp32", "model": "gpt"}, {"batch_size": 3, "device": None}
    )
    assert model.batch_size == 3 and model.max_length == model.engine.max_positions
    for arguments, said in (
        ("model=gpt", "no side"),
        ("side=reference,model=gpt,beam=2", "unknown beam"),
        ("side=reference,model=gpt,batch_size=auto", "must be a number"),
        ("side=nowhere,model=gpt", "names no executor"),
    ):
        with pytest.raises(LogitLockError, match=said):
            EngineModel.create_from_arg_string(arguments)

"""The verb `eval` and its parts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import refmodels
from debug.comparison.metrics import kl_divergence
from debug.evaluate import scoring, speed
from debug.evaluate.answers import answer_task, continue_prompts, rows_at_once
from debug.evaluate.passages import Passage, text_windows
from debug.evaluate.questions import toy_task
from debug.evaluate.results import Agreement
from debug.evaluate.rouge import CharacterTokenizer, rouge
from debug.evaluate.run import evaluate_model
from debug.evaluate.scoring import score
from debug.evaluate.speed import Shape, measure_speed, parse_shape
from debug.evaluate.statistics import accuracy, loss, mean_loss
from debug.evaluate.tables import print_evaluation
from debug.executors.huggingface import HuggingFaceEngine
from export.bundle import export_model
from export.quantization.schemes import QuantizeOptions
from refmodels.errors import LogitLockError
from refmodels.toys import toy_path
from refmodels.toys.tasks import toy_examples
from tests.support.command import logitlock
from tests.support.goldens import GOLDENS, case_source
from tests.support.marks import quick_first
from trt_runtime.engine import Engine
from trt_runtime.generation import GenerationConfig
from trt_runtime.onnxruntime.engine import OnnxRuntimeEngine
from trt_runtime.torch_gpu.engine import TorchEngine


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model("qwen", precision="fp16", output=tmp_path_factory.mktemp("eval") / "qwen-fp16")


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same toy with noise of a quarter of the size of every matrix."""
    folder = tmp_path_factory.mktemp("eval") / "worse"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (folder / name).write_bytes((toy_path("qwen") / name).read_bytes())
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(toy_path("qwen") / "model.safetensors")
    for tensor in tensors.values():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor += (0.25 * noise * tensor.float().std(correction=0)).half() if tensor.ndim == 2 else 0
    save_file(tensors, folder / "model.safetensors")
    return export_model(folder, precision="fp32", output=folder.parent / "worse-fp32")


# Statistics


def test_wilson_against_published_values() -> None:
    """Values of Newcombe (Statistics in Medicine 17, 1998), table I, method 3."""
    for correct, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = accuracy(correct, count)
        assert found.value == correct / count
        assert abs(found.low - low) < 5e-5 and abs(found.high - high) < 5e-5
    assert accuracy(29, 29).high == 1.0 and accuracy(29, 29).low < 0.9


@pytest.mark.slow
def test_the_interval_of_a_loss_holds_it() -> None:
    """At least 94 % of the intervals of 2000 samples of 100 pairs hold the true loss of 3 points."""
    draws = random.Random(0)
    held = 0
    for _ in range(2000):
        kinds = [draws.choices(("both", "lost", "won", "none"), (0.87, 0.05, 0.02, 0.06))[0] for _ in range(100)]
        found = loss([k in ("both", "lost") for k in kinds], [k in ("both", "won") for k in kinds])
        held += found.low <= 0.03 <= found.high
    assert held >= 0.94 * 2000


def test_a_paired_interval_is_narrower_than_the_accuracies() -> None:
    theirs = [i % 2 == 0 for i in range(400)]
    ours = [right and i >= 8 for i, right in enumerate(theirs)]
    found = loss(theirs, ours)
    assert found.value == 4 / 400 and found.low <= 4 / 400 <= found.high
    apart = accuracy(sum(theirs), 400)
    assert found.high - found.low < (apart.high - apart.low) / 3
    assert loss(ours, theirs).value == -found.value
    same = loss(theirs, theirs)
    assert same.value == 0.0 and same.low < 0.0 < same.high


def test_the_mean_loss_gives_tasks_the_same_weight() -> None:
    small, large = ([True] * 10, [False] * 10), ([True] * 1000, [True] * 1000)
    found = mean_loss([small, large])
    assert found.value == 0.5
    assert found.high - found.low < loss(*small).high - loss(*small).low


def test_agreement() -> None:
    kl = torch.arange(1, 201, dtype=torch.float64)
    found = Agreement.of(kl, kl <= 150)
    assert (found.tokens, found.kl_mean, found.kl_p99, found.kl_max, found.top1) == (200, 100.5, 198.0, 200.0, 0.75)


# ROUGE


@pytest.mark.slow
def test_rouge_of_chinese_by_hand() -> None:
    assert CharacterTokenizer().tokenize("小明，周一 in ＰＡＲＩＳ 2x。") == [*"小明周一", "in", "paris", "2x"]
    found = rouge(["小明在学校"], ["小明在公园"])
    # 3 of 5 characters, 2 of 4 pairs, a common subsequence of 3.
    assert found == pytest.approx({"rouge1": 0.6, "rouge2": 0.5, "rougeL": 0.6})
    assert rouge(["a", "小"], ["a", "大"])["rouge1"] == 0.5


def test_english_words_are_those_of_rouge_score() -> None:
    from rouge_score.tokenize import tokenize

    for example in toy_examples("summary", split="held_out", count=40, seed=0):
        if example.prompt.isascii():
            assert CharacterTokenizer().tokenize(example.prompt) == tokenize(example.prompt, None)


# Windows of text


@pytest.mark.slow
@given(
    length=st.integers(2, 60),
    prefix=st.lists(st.integers(90, 99), max_size=2),
    window=st.integers(4, 20),
    data=st.data(),
)
def test_every_token_is_scored_once(length: int, prefix: list[int], window: int, data: st.DataObject) -> None:
    longest = window - len(prefix) - (0 if prefix else 1)
    stride = data.draw(st.integers(1, longest))
    ids = list(range(length))
    scored = []
    for passage in text_windows(ids, prefix=prefix, window=window, stride=stride):
        assert len(passage.ids) <= window and list(passage.ids[: len(prefix)]) == prefix and passage.first >= 1
        scored += passage.ids[passage.first :]
        inside = passage.first - len(prefix)
        if passage.ids[len(prefix)] != 0:
            assert inside >= window - len(prefix) - stride
    assert scored == ids[0 if prefix else 1 :]


def test_windows_that_do_not_fit() -> None:
    for stride, prefix in ((8, ()), (0, ()), (8, (1,))):
        with pytest.raises(LogitLockError, match="stride"):
            text_windows(range(20), prefix=prefix, window=8, stride=stride)
    with pytest.raises(LogitLockError, match="has 1 tokens"):
        text_windows([5], prefix=(), window=8, stride=4)


# Scoring


def engine_of(case: str, dtype: torch.dtype = torch.float32) -> TorchEngine:
    return TorchEngine(refmodels.load(case_source(case), dtype=dtype))


def passages_of(engine: Engine, lengths: tuple[int, ...]) -> list[Passage]:
    generator = torch.Generator().manual_seed(0)
    return [
        Passage(ids=torch.randint(3, engine.spec.vocab_size, (length,), generator=generator).tolist(), first=1)
        for length in lengths
    ]


@pytest.mark.parametrize("case", quick_first(["qwen_ntk", "chatglm2", "gpt2"]))
@pytest.mark.parametrize("in_pieces", quick_first([False, True]))
def test_scores_are_those_of_whole_forwards(case: str, in_pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged batches, forwards cut into pieces and blocks of fp64 give what one row and one forward does."""
    truth, engine = engine_of(case, torch.float64), engine_of(case, torch.float64)
    for parameter in engine.decoder.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    passages = passages_of(engine, (9, 24, 2, 24, 17))
    if in_pieces:
        monkeypatch.setattr(scoring, "_LOGITS", 7 * engine.spec.vocab_size)
        monkeypatch.setattr(scoring, "_BLOCK", 3 * engine.spec.vocab_size)
    done: list[int] = []
    found = score(engine, passages, against=truth, batch_size=3, advance=done.append)
    assert sum(done) == 5
    for passage, got in zip(passages, found, strict=True):
        ids = torch.tensor([passage.ids])
        logits, expected = (
            each.prefill(ids[:, :-1], each.new_cache(batch=1, capacity=ids.shape[1]))[0] for each in (engine, truth)
        )
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        assert (got.log_probability + nll).abs().max() < 1e-10
        assert torch.equal(got.greedy, logits.argmax(-1) == ids[0, 1:])
        kl = kl_divergence(expected, logits)
        assert got.kl is not None and got.same_top is not None and float(kl.max()) > 1e-6
        assert (got.kl - kl).abs().max() < 1e-10
        assert torch.equal(got.same_top, logits.argmax(-1) == expected.argmax(-1))


def test_without_another_model_there_is_no_kl() -> None:
    engine = engine_of("gpt2")
    found = score(engine, passages_of(engine, (5, 6)), batch_size=2)
    assert [each.kl for each in found] == [each.same_top for each in found] == [None, None]


def test_nan_is_an_error() -> None:
    engine = engine_of("gpt2")
    engine.decoder.blocks[0].mlp.up.weight.data[0, 0] = math.nan
    with pytest.raises(LogitLockError, match="NaN or infinity"):
        score(engine, passages_of(engine, (5,)), batch_size=1)


# Answers


@pytest.mark.slow
@pytest.mark.parametrize("case", ["starcoder2_sliding", "gpt2"])
def test_transformers_answers_as_the_reference(case: str) -> None:
    """Rows of different lengths; a model that counts slots takes one at a time."""
    pytest.importorskip("transformers")
    reference = engine_of(case)
    theirs = HuggingFaceEngine(GOLDENS / case, reference.spec)
    assert rows_at_once(reference, 4) == 4
    assert rows_at_once(theirs, 4) == (1 if case == "starcoder2_sliding" else 4)
    prompts = [list(passage.ids) for passage in passages_of(reference, (12, 5, 9))]
    config = GenerationConfig(max_new_tokens=6, stop_ids=(7,))
    results = [continue_prompts(each, None, prompts, config, batch_size=2) for each in (reference, theirs)]
    assert [r.token_ids for r in results[0]] == [r.token_ids for r in results[1]]
    alone = [continue_prompts(reference, None, [p], config, batch_size=1)[0].token_ids for p in prompts]
    assert [r.token_ids for r in results[0]] == alone


def test_an_answer_that_does_not_end_is_wrong() -> None:
    """The right tokens, but another one where the answer should have ended."""
    source = refmodels.resolve("qwen")
    tokenizer = refmodels.load_tokenizer(source)
    engine = TorchEngine(refmodels.load(source))
    task = toy_task("sorting", tokenizer, limit=6, seed=1)
    assert answer_task(engine, tokenizer, task, batch_size=6).right == [True] * 6
    shorter = [replace(question, answer=question.answer[:2]) for question in task.questions]
    cut = replace(task, questions=shorter, max_new_tokens=3)
    assert answer_task(engine, tokenizer, cut, batch_size=6).right == [False] * 6


# Speed


@pytest.mark.slow
def test_speed(bundle: Path) -> None:
    assert parse_shape("2x8x4") == Shape(batch=2, prompt=8, new=4)
    for text in ("8x4", "0x8x4", "1x2x3x4", "axbxc", "1x-2x3"):
        with pytest.raises(LogitLockError, match="BATCHxPROMPTxNEW"):
            parse_shape(text)
    engine = OnnxRuntimeEngine(bundle, emulate_rounding=True)
    found = measure_speed(engine, parse_shape("2x8x4"))
    assert found.rounding_emulated and found.shape.batch == 2
    assert found.prefill_tokens_per_second > 0 and found.decode_tokens_per_second > 0
    assert found.device == f"{engine.threads} CPU threads"
    assert not measure_speed(engine_of("gpt2"), parse_shape("1x4x2")).rounding_emulated
    with pytest.raises(LogitLockError, match="positions"):
        measure_speed(engine, parse_shape("1x4000x1"))


@pytest.mark.slow
def test_imitated_rounding_is_not_timed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[OnnxRuntimeEngine] = []

    def runner(engine: OnnxRuntimeEngine, *_: object) -> Callable[[], tuple[float, float]]:
        timed.append(engine)
        return lambda: (2.0, 4.0)

    monkeypatch.setattr(speed, "_runner", runner)
    found = measure_speed(OnnxRuntimeEngine(bundle, emulate_rounding=True), Shape(batch=2, prompt=8, new=4))
    assert not timed[0].emulate_rounding and found.rounding_emulated
    assert (found.prefill_tokens_per_second, found.decode_tokens_per_second) == (8.0, 2.0)


# All of it


@pytest.mark.slow
def test_a_clean_bundle_loses_nothing(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(e.prompt + e.answer + "\n" for e in toy_examples("facts", split="train", count=30, seed=0)))
    result = evaluate_model(
        [str(bundle)],
        against="reference:fp32",
        tasks=("addition", "summary", "facts"),
        texts=[text],
        limit=12,
        compared=4,
        shapes=(Shape(batch=1, prompt=8, new=2),),
    )
    assert result.model == "qwen" and result.notes == [] and result.against is not None
    print_evaluation(replace(result, notes=["pip install 'logitlock[eval]'"]))
    assert "note: pip install 'logitlock[eval]'" in capsys.readouterr().out
    (side,) = result.sides
    assert side.side == str(bundle) and side.accuracy == 1.0 and side.loss is not None and side.loss.value == 0.0
    assert result.against.loss is None and result.against.agreement is None and result.against.accuracy == 1.0
    assert side.weight_bytes is not None and result.against.weight_bytes is not None
    assert 0.45 < side.weight_bytes / result.against.weight_bytes < 0.6
    for name, task in side.tasks.items():
        assert (task.count, task.correct) == (12, 12) and task.accuracy.low < 1.0
        assert task.agreement is not None and task.agreement.top1 == 1.0
        assert (task.rouge is None) == (name != "summary")
    rouge_of = side.tasks["summary"].rouge
    assert rouge_of is not None and set(rouge_of.values()) == {1.0}
    # fp16 rounds each of some hundred sums by 2^-11 of its size: logits are off by a few hundredths, KL by its square.
    assert side.agreement is not None and 0 < side.agreement.kl_mean < 1e-3
    (scored,) = side.texts.values()
    assert scored.bytes == text.stat().st_size and scored.agreement is not None
    same = result.against.texts[str(text)]
    assert scored.tokens == same.tokens and scored.perplexity == pytest.approx(same.perplexity, rel=0.02)
    assert same.bits_per_byte == pytest.approx(same.tokens / same.bytes * math.log2(same.perplexity))
    assert result.exceeded(max_loss=0.0, max_kl=1e-3) == []
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["schema"] == 1


def test_perplexity_is_that_of_the_whole_text(tmp_path: Path) -> None:
    """One window: exp of the mean cross entropy of a plain forward."""
    text = tmp_path / "text.txt"
    text.write_text("What is the capital of Japan? Tokyo 世界上最高的山峰是哪座？珠穆朗玛峰")
    for toy in ("gpt", "chatglm2"):
        result = evaluate_model(["reference:fp64"], model=toy, tasks=["facts"], texts=[text], limit=1, shapes=())
        source = refmodels.resolve(toy)
        tokenizer = refmodels.load_tokenizer(source)
        engine = TorchEngine(refmodels.load(source, dtype=torch.float64))
        ids = torch.tensor([tokenizer.encode(text.read_text())])
        logits = engine.prefill(ids, engine.new_cache(batch=1, capacity=ids.shape[1]))
        # ChatGLM's two prefix tokens are given, so that its first token of text is scored.
        first = max(1, len(tokenizer.prefix))
        expected = torch.nn.functional.cross_entropy(logits[0, first - 1 : -1], ids[0, first:]).exp()
        found = result.sides[0].texts[str(text)]
        assert found.tokens == ids.shape[1] - first
        assert found.perplexity == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.slow
def test_a_worse_bundle_is_over_budget(worse: Path, bundle: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    tasks = ("--tasks", "addition", "--tasks", "summary")
    common = (worse, bundle, "--model", "qwen", "--against", "reference:fp32", *tasks)
    out = logitlock(
        "eval", *common, "--limit", 24, "--no-speed", "--json", "--max-loss", 2, "--max-kl", 0.001, "--markdown", page
    )  # fmt: skip
    assert out.code == 1, out
    found = json.loads(out.out)
    bad, good = found["sides"]
    assert len(found["exceeded"]) == 2 and all(str(worse) in sentence for sentence in found["exceeded"])
    assert found["notes"] == [f"{worse} was exported from other weights than those of qwen"]
    for task in ("addition", "summary"):
        lost = found["against"]["tasks"][task]["correct"] - bad["tasks"][task]["correct"]
        assert bad["tasks"][task]["loss"]["value"] == lost / 24
    assert bad["loss"]["value"] > 0.02 > good["loss"]["value"]
    assert bad["agreement"]["kl_mean"] > 100 * good["agreement"]["kl_mean"]
    assert bad["agreement"]["top1"] < good["agreement"]["top1"]
    text = page.read_text()
    assert f"| addition | {worse.name} | 24 |" in text and "ROUGE-L" in text and "Tokens per second" not in text
    within = logitlock("eval", *common, "--limit", 4, "--no-speed", "--max-loss", 100)
    assert within.code == 0 and worse.name in within.out and "loss" in within.out


@pytest.mark.slow
def test_tasks_of_a_file(tmp_path: Path) -> None:
    """A file of a toy's own examples: the same accuracy; one answer made wrong, one made nearly right."""
    rows = [
        {"prompt": e.prompt, "answer": e.answer} for e in toy_examples("summary", split="held_out", count=6, seed=1)
    ]
    rows[2]["answer"] = rows[2]["answer"].replace("saw", "met").replace("看见", "遇到")
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    out = logitlock("eval", "reference:fp32", "--model", "qwen", "--tasks", path, "--tasks", "facts", "--limit", 5,
                    "--no-speed", "--json")  # fmt: skip
    assert out.code == 0, out
    tasks = json.loads(out.out)["sides"][0]["tasks"]
    assert (tasks["mine"]["count"], tasks["mine"]["correct"]) == (5, 4)
    assert 0.8 < tasks["mine"]["rouge"]["rouge1"] < 1.0
    assert tasks["mine"]["loss"] is None and tasks["facts"]["correct"] == 5


@pytest.mark.slow
def test_transformers_beside_the_reference() -> None:
    """GPT's toy is a plain GPT-2, which transformers runs without any code of ours."""
    pytest.importorskip("transformers")
    result = evaluate_model(
        ["hf"], model="gpt", against="reference:fp32", tasks=["dictionary", "reversal"], limit=10, shapes=()
    )
    side = result.sides[0]
    assert side.engine.startswith("transformers") and side.accuracy is not None and side.accuracy > 0.8
    assert side.agreement is not None and side.agreement.kl_max < 1e-6 and side.agreement.top1 == 1.0
    assert side.loss is not None and side.loss.value == 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "say what to evaluate"),
        (["reference"], "nothing says which model"),
        (["reference", "--model", "qwen", "--tasks", "chess"], "no task 'chess'"),
        (["reference", "--model", "qwen", "--max-loss", "1"], "--against"),
        (["reference", "--model", "qwen", "--shape", "128"], "BATCHxPROMPTxNEW"),
        (["reference", "--model", "qwen", "--text", "missing.txt"], "missing.txt cannot be read"),
        (["reference", "--model", "qwen", "--markdown", "no/such/file.md"], "no directory no/such"),
        (["trace.safetensors", "--model", "qwen", "--tasks", "facts"], "is a recording"),
        ([str(GOLDENS / "qwen"), "--model", str(GOLDENS / "qwen")], "is a recording"),
        (["reference", "--model", str(GOLDENS / "qwen"), "--no-speed"], "nothing to measure"),
        (["reference", "--model", str(GOLDENS / "qwen"), "--tasks", "facts"], "has no tokenizer"),
    ],
)
def test_bad_input(arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logitlock("eval", *arguments).assert_bad_input(said)


def test_a_side_of_another_architecture(bundle: Path) -> None:
    logitlock("eval", bundle, "--model", "gpt", "--tasks", "facts").assert_bad_input("is not made from gpt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}', "line 2 must be an object"),
        ('{"prompt": "a", "answer": 3}', "line 1 must be an object"),
        ("{", "line 1 is not valid JSON"),
        ("[]", "line 1 must be an object"),
        ("\n", "has no line"),
    ],
)
def test_bad_files(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    logitlock("eval", "reference", "--model", "qwen", "--tasks", path).assert_bad_input(said)


@pytest.mark.slow
def test_a_quantized_bundle_is_compared_with_the_model_before(tmp_path: Path) -> None:
    """`reference` is the unquantized toy: what quantization costs; its own checkpoint is the same to rounding."""
    bundle = export_model(
        "qwen", precision="int4", dtype="fp32", quantize=QuantizeOptions(scheme="int4", group=64), output=tmp_path / "q"
    )
    results = [
        evaluate_model([str(bundle)], model=model, against="reference:fp32", tasks=["summary"], limit=8, shapes=())
        for model in (None, str(bundle / "quantized"))
    ]
    cost, same = (result.sides[0] for result in results)
    assert results[0].notes == results[1].notes == []
    assert results[0].against is not None and results[1].against is not None
    assert results[0].against.weight_bytes == 4 * 1268992 > 2 * (cost.weight_bytes or 0)
    assert cost.agreement is not None and same.agreement is not None
    assert cost.agreement.kl_mean > 1e-3 and same.agreement.kl_max < 1e-8
    assert same.tasks["summary"].correct == cost.tasks["summary"].correct

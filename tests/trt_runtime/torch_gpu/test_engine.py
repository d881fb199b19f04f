"""`TorchEngine` with kernels: fused modules, static decode steps, generation on the device; on a GPU all of it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import refmodels
from debug.capture.prompts import random_prompts
from debug.comparison.bounds import lower_bound
from debug.comparison.compare import MULTIPLE, diff_engine
from debug.comparison.results import verdict_line
from refmodels import toys
from refmodels.cache import KVCache
from refmodels.errors import LogitLockError
from refmodels.model import Decoder
from tests.support.goldens import CASES, case_source, slow_but_two
from tests.support.gpu import needs_gpu
from tests.support.marks import quick_first
from tests.support.paths import ROOT
from tests.support.torch_engines import FusedOnCpu, OnHost
from trt_runtime import generation
from trt_runtime.generation import GenerationConfig, GenerationResult, generate
from trt_runtime.sampling import Sampling, greedy
from trt_runtime.torch_gpu import cuda_graph as static_decode
from trt_runtime.torch_gpu.convert import fused_decoder
from trt_runtime.torch_gpu.cuda_graph import Inputs, bucket
from trt_runtime.torch_gpu.engine import TorchEngine
from trt_runtime.torch_gpu.fused import FusedBlock
from trt_runtime.torch_gpu.weight_storage import adjacent_view, make_adjacent

# Some golden cases have a family's name.
TOYS = {f"{toy} toy": toy for toy in sorted(toys.TOYS)}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# One case for each position scheme, mask form, head layout and kind of MLP.
VARIED = ["chatglm2", "baichuan_13b", "baichuan2_7b", "qwen_ntk", "gpt2", "gpt_bigcode", "starcoder2_sliding", "qwen2"]


def load(model: str, **options: Any) -> Decoder:
    return refmodels.load(case_source(model) if model in CASES else refmodels.resolve(TOYS[model]), **options)


def ragged(vocab_size: int, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def close(engine: Tensor, rounded: Tensor, truth: Tensor, bound: float) -> None:
    """As near to fp64 as the reference in the same dtype is, up to the diff's multiple."""
    size = truth.norm()
    floor = max(float((rounded.double() - truth).norm() / size), bound)
    assert float((engine.double() - truth).norm() / size) <= MULTIPLE * floor


# Fused modules and static steps, on the CPU


@pytest.mark.parametrize("case", slow_but_two(CASES))
def test_fused_modules_are_the_reference(case: str) -> None:
    """Prefill of left-padded rows, in one piece and in two, then decode steps beyond a row that has ended."""
    decoder, truth = load(case), load(case, dtype=torch.float64)
    batch = 1 if case.endswith("_b1") else 3
    prompts = random_prompts(decoder.spec.vocab_size, (20, 13, 9)[:batch], seed=1)
    fused = FusedOnCpu(decoder)
    engines = [fused, TorchEngine(load(case)), TorchEngine(truth)]
    for chunk in (None, 12):
        caches = [e.new_cache(batch=batch, capacity=26) for e in engines]
        bound = lower_bound(decoder.spec, "logits", torch.float32, slots=26)
        ids, mask = prompts.ids, prompts.mask
        for step in range(6):
            if step:
                logits = [e.decode(ids, c, mask) for e, c in zip(engines, caches, strict=True)]
            else:
                logits = [e.prefill(ids, c, mask, chunk=chunk)[:, -1:] for e, c in zip(engines, caches, strict=True)]
            real = mask[:, -1] != 0
            close(logits[0][real], logits[1][real], logits[2][real], bound)
            ids = logits[2].argmax(-1)
            mask = torch.ones_like(ids)
            if step > 2:
                mask[-1] = batch == 1
        assert torch.equal(caches[0].lengths, caches[1].lengths) and torch.equal(caches[0].mask, caches[1].mask)


@pytest.mark.parametrize("case", quick_first(VARIED))
def test_every_tap_of_fused_modules(case: str) -> None:
    decoder = load(case)
    prompts = random_prompts(decoder.spec.vocab_size, (20, 13, 9), seed=0)
    engine = FusedOnCpu(decoder)
    result = diff_engine(engine, load(case, dtype=torch.float64), load(case), prompts, steps=3)
    assert result.verdict == "aligned", verdict_line(result)
    assert {e.tap for e in result.taps} == set(refmodels.tap_names(decoder.spec))
    assert max(e.ratio for e in result.taps) < MULTIPLE / 2


@pytest.mark.parametrize("case", ["qwen", "gpt2", "qwen2_tied_b1"])
def test_one_copy_of_the_weights(case: str) -> None:
    decoder = load(case)
    ids = torch.tensor([[5, 7, 11, 4]])
    before = decoder.step(ids, decoder.new_cache(batch=1, capacity=8))
    size = sum(p.numel() for p in decoder.parameters())
    fused = fused_decoder(decoder)
    again = fused_decoder(decoder)
    assert torch.equal(decoder.step(ids, decoder.new_cache(batch=1, capacity=8)), before)
    tensors = [p for model in (decoder, fused, again) for p in model.parameters()]
    for model in (fused, again):
        for block in model.blocks:
            assert isinstance(block, FusedBlock)
            assert (block.gate_up is not None) == decoder.spec.mlp.gated
            tensors += [block.gate_up.weight] if block.gate_up is not None else []
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == 4 * size


def test_weights_become_adjacent_once_and_only_if_they_are_not() -> None:
    gate, up = (torch.nn.Linear(4, 6) for _ in range(2))
    both = torch.arange(48.0).view(12, 4)
    # In one storage, but up first.
    up.weight.data, gate.weight.data = both[:6], both[6:]
    expected, bias = torch.cat([both[6:], both[:6]]), torch.cat([gate.bias, up.bias]).detach()
    make_adjacent((gate, up), ("weight", "bias"))
    whole = adjacent_view(gate.weight, up.weight)
    assert torch.equal(whole, expected) and torch.equal(adjacent_view(gate.bias, up.bias), bias)
    assert whole.data_ptr() == gate.weight.data_ptr() and gate.weight.requires_grad
    before = gate.weight
    make_adjacent((gate, up), ("weight", "bias"))
    assert gate.weight is before


def test_position_tables_are_shared() -> None:
    decoder = load("qwen_ntk")
    fused = fused_decoder(decoder)
    assert fused.table_positions == 0
    decoder.prepare_tables(20)
    fused = fused_decoder(decoder)
    fused.prepare_tables(18)
    assert fused.table_positions == 20 and fused.rope_cos is decoder.rope_cos and fused.logn is decoder.logn
    fused.prepare_tables(30)
    assert fused.table_positions == 30 and decoder.table_positions == 20


@pytest.mark.slow
def test_the_engine_is_there_without_triton() -> None:
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import trt_runtime.torch_gpu.engine, trt_runtime.cli, debug.command\n"
        "assert not [name for name in sys.modules if name.startswith('trt_runtime.kernels')]\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_buckets() -> None:
    assert [bucket(n, 10_000) for n in (1, 256, 257, 512, 513)] == [256, 256, 512, 512, 768]
    assert bucket(200, 230) == 230 and bucket(300, 10**6) == 512


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_step_inputs_in_one_block(batch: int) -> None:
    spec = case_source("qwen_ntk").spec
    cache = KVCache(spec, batch=batch, capacity=40)
    cache.advance(cache.next_step(torch.full((batch, 9), 5)))
    inputs = Inputs(batch, 32, "cpu")
    inputs.block.fill_(255)
    step = cache.next_step(torch.full((batch, 1), 6), last_logits_only=True)
    inputs.fill(step)
    start = inputs.block.data_ptr()
    for name, expected in step.tensors().items():
        found = inputs.tensors[name]
        assert (found.data_ptr() - start) % 16 == 0
        if name == "attention_mask":
            assert not found[:, expected.shape[1] :].any()
            found = found[:, : expected.shape[1]]
        assert torch.equal(found.to(torch.int64), expected)


@pytest.mark.slow
def test_static_steps_are_kept_by_cache_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two caches alternately, across three widths; a step lives as long as its cache and its cache's tensors."""
    monkeypatch.setattr(static_decode, "BUCKET", 4)
    decoder = load("qwen_ntk")
    engine, plain = FusedOnCpu(decoder), TorchEngine(decoder)
    prompts = ragged(decoder.spec.vocab_size, (3, 5))
    pairs = [[e.new_cache(batch=1, capacity=14) for e in (engine, plain)] for _ in prompts]
    for prompt, pair in zip(prompts, pairs, strict=True):
        for executor, cache in zip((engine, plain), pair, strict=True):
            executor.prefill(torch.tensor([prompt]), cache)
    for token in range(3, 10):
        for pair in pairs:
            ours, theirs = (e.decode(torch.tensor([[token]]), c) for e, c in zip((engine, plain), pair, strict=True))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    steps = engine.static._steps
    assert [sorted(steps[pair[0]]) for pair in pairs] == [[4, 8, 12], [8, 12]]
    first = pairs[0][0]
    known = steps[first][12]
    engine.decode(torch.tensor([[3]]), first)
    assert steps[first][12] is known
    first.key = [t.clone() for t in first.key]
    engine.decode(torch.tensor([[3]]), first)
    assert steps[first][12] is not known
    del pairs, pair, cache, first, known
    gc.collect()
    assert len(steps) == 0


def test_a_cache_takes_over_from_a_dead_one() -> None:
    """Its memory, emptied, and its steps with their graphs; only where batch and capacity are the same."""
    engine = FusedOnCpu(load("chatglm2"))
    first = engine.new_cache(batch=2, capacity=12)
    expected = engine.prefill(torch.tensor([[5, 6], [7, 8]]), first)
    engine.decode(torch.tensor([9, 9]), first)
    memory = first.key[0].data_ptr()
    second = engine.new_cache(batch=2, capacity=12)
    assert second.key[0].data_ptr() != memory and engine.static._steps[second] == {}
    del first, second
    assert engine.static._steps[engine.new_cache(batch=2, capacity=13)] == {}
    third = engine.new_cache(batch=1, capacity=12)
    engine.decode(torch.tensor([4]), third)
    steps, memory = engine.static._steps[third], third.key[0].data_ptr()
    del third
    fourth = engine.new_cache(batch=1, capacity=12)
    assert fourth.key[0].data_ptr() == memory and engine.static._steps[fourth] is steps
    assert not any(t.any() for t in (*fourth.key, *fourth.value)) and not fourth.lengths.any()
    torch.testing.assert_close(engine.prefill(torch.tensor([[5, 6]]), fourth), expected[:1])


def test_advance_writes_what_a_loop_over_rows_would() -> None:
    spec = case_source("qwen").spec
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(spec, batch=4, capacity=24)
    lengths, mask = cache.lengths.clone(), cache.mask.clone()
    for tokens in (6, 1, 3, 1, 5):
        new = torch.randint(0, 2, (4, tokens), generator=generator)
        if tokens == 6:
            new[:, 2] = 1
        step = cache.next_step(torch.full((4, tokens), 5), new)
        cache.advance(step)
        for row in range(4):
            used = max((i + 1 for i in range(tokens) if new[row, i]), default=0)
            mask[row, lengths[row] : lengths[row] + used] = new[row, :used] != 0
            lengths[row] += used
        assert torch.equal(cache.lengths, lengths) and torch.equal(cache.mask, mask)


@pytest.mark.parametrize(
    "options",
    quick_first([{}, {"stop_ids": (17, 40, 41, 42, 43)}, {"max_new_tokens": 1}, {"prefill_chunk": 4}], 3),
    ids=["length", "stop ids", "one token", "chunks"],
)
def test_running_ahead_changes_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FusedOnCpu(load("chatglm2"))
    engine.max_positions = 40
    prompts = ragged(engine.spec.vocab_size, (33, 8, 21))
    config = GenerationConfig(**{"max_new_tokens": 12, **options})
    expected = generate(TorchEngine(engine.decoder, max_positions=40), None, prompts, config)
    monkeypatch.setattr(generation, "_stays_on_device", lambda logits, sampling: True)
    assert generate(engine, None, prompts, config) == expected
    assert len({len(r.token_ids) for r in expected}) > 1 or "max_new_tokens" in options


def test_running_ahead_says_where_logits_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FusedOnCpu(load("chatglm2"))
    monkeypatch.setattr(generation, "_stays_on_device", lambda logits, sampling: True)
    decode = engine.decode

    def spoiled(*args: Any, **options: Any) -> Tensor:
        logits = decode(*args, **options)
        logits[1, 0, 3] = float("nan")
        return logits

    monkeypatch.setattr(engine, "decode", spoiled)
    with pytest.raises(LogitLockError, match="row 1 at step 1 hold NaN"):
        generate(engine, None, ragged(engine.spec.vocab_size, (5, 8)), GenerationConfig(max_new_tokens=4))


def test_only_greedy_stays_on_the_device() -> None:
    meta = torch.empty(1, 4, device="meta")
    assert generation._stays_on_device(meta, Sampling())
    assert not generation._stays_on_device(meta, Sampling(temperature=0.5))
    assert not generation._stays_on_device(meta, Sampling(repetition_penalty=1.1))
    assert not generation._stays_on_device(torch.empty(1, 4), Sampling())


def test_kernels_need_a_gpu() -> None:
    with pytest.raises(LogitLockError, match=r"on a CUDA GPU.*; this one is in float32, of exact numerics, on cpu"):
        TorchEngine(load("chatglm2"), kernels=True)


INTERPRETED = """
import torch, torch.nn.functional as F
from trt_runtime.kernels import greedy, linear
from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16):
    eps, kind = torch.finfo(dtype).eps, ELEMENT_TYPES[dtype]
    for n, k in ((5, 64), (3, 4104)):
        for gated in (False, True):
            x, r = torch.randn(k).to(dtype), torch.randn(n).to(dtype)
            w = (torch.randn(n * (1 + gated), k) * k**-0.5).to(dtype)
            b = torch.randn(len(w)).to(dtype)
            out = torch.full((n,), float("nan")).to(dtype)
            given = {"x": x, "weight": w, "bias": b, "residual": r, "out": out}
            execute([linear.gemv(n=n, k=k, dtype=kind, gated=gated, **given)])
            y = F.linear(x.double(), w.double(), b.double())
            y = F.silu(y[:n]) * y[n:] if gated else y
            assert (out.double() - (y + r.double())).norm() < 4 * eps * (y + r.double()).norm(), (dtype, n, k, gated)
    x, out = torch.randn(3, 200).to(dtype), torch.full((3, 100), float("nan")).to(dtype)
    execute([linear.gate(rows=3, n=100, dtype=kind, x=x, out=out)])
    torch.testing.assert_close(out, F.silu(x[:, :100]) * x[:, 100:], rtol=4 * eps, atol=0)
    x = torch.randn(4, 40000).to(dtype)
    x[0, [39000, 7, 7 + 8192, 7 + 16384, 7 + 24576]] = 9
    x[1, 17000], x[2, 5], x[3, 39999] = float("nan"), float("inf"), float("-inf")
    chosen = torch.full((2, 4), -1)
    execute([greedy.greedy(rows=4, n=40000, dtype=kind, logits=x, chosen=chosen)])
    assert chosen.tolist()[0] == [7, chosen[0, 1], 5, int(x[3].argmax())] and chosen[1].tolist() == [1, 0, 0, 0]
"""


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, cwd=ROOT, env=environment)


# On a GPU


def kernel_engine(model: str, dtype: torch.dtype) -> TorchEngine:
    return TorchEngine(load(model, dtype=dtype, device="cuda"), kernels=True)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 64), (7, 128), (96, 2048), (1000, 4096), (4096, 11008), (5, 13696)])
@pytest.mark.parametrize("gated", [False, True])
def test_gemv_on_the_gpu(n: int, k: int, gated: bool, dtype: torch.dtype) -> None:
    from trt_runtime.kernels import linear
    from trt_runtime.kernels.torch_host import ELEMENT_TYPES, execute

    generator = torch.Generator("cuda").manual_seed(n + k)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.float64, generator=generator).to(dtype)

    for bias, residual in ((None, None), (random(n * (1 + gated)), random(n))):
        x, w = random(k), random(n * (1 + gated), k) * k**-0.5
        out = torch.full((n,), float("nan"), device="cuda", dtype=dtype)
        execute(
            [
                linear.gemv(
                    n=n, k=k, dtype=ELEMENT_TYPES[dtype], x=x, weight=w, bias=bias, residual=residual, out=out,
                    gated=gated,
                )
            ]
        )  # fmt: skip
        y = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
        y = torch.nn.functional.silu(y[:n]) * y[n:] if gated else y
        y = y if residual is None else y + residual.double()
        # Gate, up, silu, their product and the sum are each rounded once; each costs half an eps of what it rounds.
        assert float((out.double() - y).norm()) <= 4 * torch.finfo(dtype).eps * max(1.0, float(y.norm()))


@needs_gpu
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [11, 16384, 65024, 151936])
def test_greedy_on_the_gpu(vocab: int, dtype: torch.dtype) -> None:
    """Equal logits are the rule in half precision: the first of them, as on the CPU."""
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    expected = greedy(logits)
    assert torch.equal(greedy(logits.cuda()).cpu(), expected) and expected[1].all()
    for row, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        logits[row, vocab - 1 - row] = value
    assert greedy(logits.cuda())[1].tolist() == [0, 0, 0, 1, 1]


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("toy", TOYS)
def test_toys_say_on_the_gpu_what_the_reference_says(toy: str, dtype: torch.dtype) -> None:
    """Greedy tokens of ragged batches, of one row, and in chunks; in half precision but where two are as likely."""
    engine, reference = kernel_engine(toy, dtype), TorchEngine(load(toy, dtype=dtype))
    tokenizer = refmodels.load_tokenizer(TOYS[toy])
    texts = ["世界上第二高的山峰是哪座？", "27 + 48 = ", "Translate: mountain, water, sky"]
    prompts = [tokenizer.encode(text) for text in texts]
    for batch, chunk in ((prompts, None), (prompts[:1], None), (prompts[2:], None), (prompts, 5)):
        config = GenerationConfig(max_new_tokens=24, prefill_chunk=chunk)
        ours, theirs = (tokens(generate(e, None, batch, config)) for e in (engine, reference))
        if dtype == torch.float32:
            assert ours == theirs
        for prompt, mine, other in zip(batch, ours, theirs, strict=True):
            if mine != other:
                as_likely(reference.decoder, load(toy, dtype=torch.float64), prompt, mine, other)


def tokens(results: list[GenerationResult]) -> list[list[int]]:
    return [r.token_ids for r in results]


def as_likely(rounded: Decoder, truth: Decoder, prompt: list[int], mine: list[int], other: list[int]) -> None:
    """Where the answers part, fp64 tells the two tokens apart by no more than the dtype's own errors there.

    Each of the two logits may be off by the error that the reference has, in the engine as in the reference.
    """
    same = next(i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
    ids = torch.tensor([prompt + other[:same]])
    logits = [m.step(ids, m.new_cache(batch=1, capacity=ids.shape[1]))[0, -1].double() for m in (rounded, truth)]
    noise = float((logits[0] - logits[1]).abs().max())
    assert abs(float(logits[1][mine[same]] - logits[1][other[same]])) <= 4 * noise


@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_golden_cases_on_the_gpu_in_fp32(case: str) -> None:
    engine, reference = kernel_engine(case, torch.float32), TorchEngine(load(case))
    prompts = ragged(engine.spec.vocab_size, (20, 13, 9))
    for rows in (prompts, prompts[:1]):
        config = GenerationConfig(max_new_tokens=10)
        assert tokens(generate(engine, None, rows, config)) == tokens(generate(reference, None, rows, config))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("model", [*CASES, *TOYS])
def test_every_tap_on_the_gpu(model: str, batch: int, dtype: torch.dtype) -> None:
    engine = OnHost(kernel_engine(model, dtype))
    prompts = random_prompts(engine.spec.vocab_size, (20, 13, 9)[:batch], seed=0)
    truth, rounded = load(model, dtype=torch.float64), load(model, dtype=dtype)
    result = diff_engine(engine, truth, rounded, prompts, steps=3)
    assert result.verdict == "aligned", verdict_line(result)
    assert {e.tap for e in result.taps} == set(refmodels.tap_names(engine.spec))
    assert result.logits.margin_flips == 0 and result.logits.nonfinite == 0


@needs_gpu
def test_graphs_of_two_caches_alternately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_decode, "BUCKET", 16)
    engine, plain = kernel_engine("qwen_ntk", torch.float32), TorchEngine(load("qwen_ntk"))
    prompts = [ragged(engine.spec.vocab_size, lengths) for lengths in ((9, 14), (21, 6))]
    pairs = [[e.new_cache(batch=2, capacity=60) for e in (engine, plain)] for _ in prompts]
    for rows, pair in zip(prompts, pairs, strict=True):
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        for executor, cache in zip((engine, plain), pair, strict=True):
            executor.prefill(ids, cache, mask)
    for step in range(20):
        mask = torch.tensor([1, int(step != 7)])
        for pair in pairs:
            ids = torch.tensor([[5 + step], [30 - step]])
            ours = engine.decode(ids.cuda() if step % 2 else ids, pair[0], mask)
            theirs = plain.decode(ids, pair[1], mask)
            torch.testing.assert_close(ours.cpu()[mask != 0], theirs[mask != 0], rtol=1e-4, atol=1e-4)
    assert engine._static is not None
    assert [len(engine._static._steps[pair[0]]) for pair in pairs] == [3, 2]


@needs_gpu
def test_logits_outlive_the_next_step() -> None:
    engine = kernel_engine("chatglm2", torch.float16)
    cache = engine.new_cache(batch=1, capacity=20)
    engine.prefill(torch.tensor([[5, 6, 7]]), cache)
    first = engine.decode(torch.tensor([[8]]), cache)
    kept = first.clone()
    engine.decode(torch.tensor([[9]]), cache)
    assert torch.equal(first, kept)

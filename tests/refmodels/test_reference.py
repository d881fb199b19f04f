"""The decoder core: cache semantics, chunking, padding, taps, dtypes.  Fidelity to upstream is
tests/debug/golden/test_verify.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import refmodels
from refmodels.attention import AttentionFacts, AttentionInputs
from refmodels.cache import KVCache
from refmodels.errors import LogitLockError
from refmodels.model import Decoder
from refmodels.ops import cached_attention, fused_rms_norm
from refmodels.recorder import Recorder, recording
from refmodels.taps import is_cache_tap, tap_names
from tests.support.goldens import CASES, assert_reproduces_golden, case_source
from tests.support.gpu import needs_gpu
from tests.support.marks import quick_first

# One case for each position scheme, mask form and head layout.
FEATURES = [
    "chatglm2",
    "baichuan_7b",
    "baichuan2_13b",
    "qwen_ntk",
    "qwen2",
    "gpt2",
    "gpt_bigcode",
    "starcoder2_sliding",
]


def open_case(case: str, **options: Any) -> Decoder:
    return refmodels.load(case_source(case), **options)


def random_ids(model: Decoder, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, model.spec.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", quick_first(CASES, 3))
def test_chunked_prefill_equals_one_shot(case: str) -> None:
    model = open_case(case)
    tokens = 40
    ids = random_ids(model, 2, tokens)
    whole = model.new_cache(batch=2, capacity=tokens + 1)
    expected = model.step(ids, whole)
    chunked = model.new_cache(batch=2, capacity=tokens + 1)
    lengths = torch.full((2,), tokens)
    got = torch.cat([model.step(c, chunked, prompt_lengths=lengths) for c in ids.split((1, 13, 7, 19), 1)], 1)
    assert (got - expected).abs().max() <= 1e-5
    for a, b in zip(whole.key + whole.value, chunked.key + chunked.value, strict=True):
        assert (a - b).abs().max() <= 1e-5
    assert torch.equal(whole.ntk_table, chunked.ntk_table)


@pytest.mark.parametrize("case", quick_first(FEATURES))
def test_ragged_batch_equals_each_row_alone(case: str) -> None:
    model = open_case(case)
    lengths = [40, 9, 23]
    ids = random_ids(model, 3, 40)
    mask = (torch.arange(40) < torch.tensor(lengths)[:, None]).long()
    cache = model.new_cache(batch=3, capacity=48)
    last = model.step(ids, cache, mask, last_logits_only=True)[:, 0]
    assert cache.lengths.tolist() == lengths
    steps = random_ids(model, 3, 6, seed=1)
    decoded = torch.cat([model.step(steps[:, t : t + 1], cache) for t in range(6)], 1)
    for row, length in enumerate(lengths):
        alone = model.new_cache(batch=1, capacity=48)
        assert (model.step(ids[row : row + 1, :length], alone)[0, -1] - last[row]).abs().max() <= 1e-5
        again = torch.cat([model.step(steps[row : row + 1, t : t + 1], alone) for t in range(6)], 1)
        assert (again[0] - decoded[row]).abs().max() <= 1e-5


@pytest.mark.parametrize("case", [c for c in FEATURES if not c.startswith("qwen_")])
def test_left_padding_is_invisible(case: str) -> None:
    """Not for Qwen v1: there logn and NTK count slots, pads included (modeling_qwen.py)."""
    model = open_case(case)
    ids = random_ids(model, 1, 12)
    expected = model.step(ids, model.new_cache(batch=1, capacity=20))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.int64), torch.ones_like(ids)], 1)
    got = model.step(padded, model.new_cache(batch=1, capacity=20), mask)
    assert (got[:, 5:] - expected).abs().max() <= 1e-5


def test_finished_rows_do_not_advance() -> None:
    model = open_case("qwen2")
    cache = model.new_cache(batch=2, capacity=8)
    model.step(random_ids(model, 2, 4), cache)
    before = cache.key[0][1, :, :4].clone()
    model.step(random_ids(model, 2, 1), cache, torch.tensor([[1], [0]]))
    assert cache.lengths.tolist() == [5, 4]
    assert torch.equal(cache.key[0][1, :, :4], before)


def test_ntk_table_is_chosen_by_the_prompt_and_kept() -> None:
    model = open_case("qwen_ntk_cross_b1")
    cache = model.new_cache(batch=1, capacity=40)
    model.step(random_ids(model, 1, 12), cache)
    for t in range(12):  # crosses seq_length 16
        model.step(random_ids(model, 1, 1, seed=t), cache)
    assert cache.ntk_table.tolist() == [0]
    cache.reset()
    model.step(random_ids(model, 1, 20), cache)
    model.step(random_ids(model, 1, 1), cache)
    assert cache.ntk_table.tolist() == [1]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(1, 9, dtype=torch.int64), None, "capacity 8 tokens, 0 in use, 9 more"),
        (torch.zeros(2, 4, dtype=torch.int64), None, r"shape \[2, 4\]"),
        (torch.zeros(1, 0, dtype=torch.int64), None, "tokens >= 1"),
        (torch.full((1, 3), 160), None, "token id 160 is outside the vocabulary of 160"),
        (torch.full((1, 3), -1), None, "token id -1"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3), "row 0 of the prompt has no real token"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 4), "attention_mask has shape"),
    ],
)
def test_bad_steps_are_one_clear_error(ids: Tensor, mask: Tensor | None, message: str) -> None:
    model = open_case("gpt2")
    cache = model.new_cache(batch=1, capacity=8)
    with pytest.raises(LogitLockError, match=message):
        model.step(ids, cache, mask)
    assert cache.lengths.tolist() == [0]


def test_a_full_cache_names_capacity_and_length() -> None:
    model = open_case("qwen2")
    cache = model.new_cache(batch=1, capacity=4)
    model.step(random_ids(model, 1, 4), cache)
    with pytest.raises(LogitLockError, match="capacity 4 tokens, 4 in use, 1 more wanted"):
        model.step(random_ids(model, 1, 1), cache)


def test_learned_positions_bound_the_cache() -> None:
    with pytest.raises(LogitLockError, match="64 learned positions"):
        open_case("gpt2").new_cache(batch=1, capacity=65)


@pytest.mark.parametrize("case", quick_first(FEATURES))
def test_every_tap_is_recorded_in_order_and_recording_changes_nothing(case: str) -> None:
    model = open_case(case)
    ids = random_ids(model, 1, 10)
    plain = model.step(ids, model.new_cache(batch=1, capacity=16))
    with recording(Recorder()) as recorder:
        tapped = model.step(ids, model.new_cache(batch=1, capacity=16))
    assert recorder is not None
    assert sorted(recorder.tensors) == sorted(tap_names(model.spec))
    assert torch.equal(plain, tapped)
    for name, tensor in recorder.tensors.items():
        assert tensor.shape[2 if is_cache_tap(name) else 1] == 10, name


def test_a_substitute_flows_on_while_the_own_result_is_recorded() -> None:
    model = open_case("qwen2")
    ids = random_ids(model, 1, 10)
    with recording(Recorder()) as clean:
        model.step(ids, model.new_cache(batch=1, capacity=16))
    wrong = {"blocks.0.attn.out": torch.zeros(1, 10, model.spec.hidden_size)}
    with recording(Recorder(substitutes=wrong)) as changed:
        model.step(ids, model.new_cache(batch=1, capacity=16))
    assert clean is not None and changed is not None
    assert torch.equal(clean.tensors["blocks.0.attn.out"], changed.tensors["blocks.0.attn.out"])
    assert torch.equal(changed.tensors["blocks.0.resid_mid"], changed.tensors["embed"])
    assert not torch.equal(clean.tensors["logits"], changed.tensors["logits"])


@pytest.mark.parametrize("case", quick_first(FEATURES))
def test_exact_in_fp32_is_close_to_fp64_and_halves_are_ordered(case: str) -> None:
    ids = random_ids(open_case(case), 1, 24)
    logits = {}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        model = open_case(case, dtype=dtype)
        logits[dtype] = model.step(ids, model.new_cache(batch=1, capacity=24)).double()
        assert logits[dtype].isfinite().all()
    error = {d: float((v - logits[torch.float64]).abs().max()) for d, v in logits.items()}
    assert error[torch.float32] <= 1e-4
    assert error[torch.float32] < error[torch.float16] < error[torch.bfloat16] < 1.0


@needs_gpu
class TestCuda:
    @pytest.mark.parametrize("case", FEATURES)
    def test_fp64_agrees_with_the_cpu(self, case: str) -> None:
        ids = random_ids(open_case(case), 2, 24)
        results = []
        for device in ("cpu", "cuda"):
            model = open_case(case, dtype=torch.float64, device=device)
            cache = model.new_cache(batch=2, capacity=32)
            results.append(torch.cat([model.step(ids, cache), model.step(ids[:, :4], cache)], 1).cpu())
        assert (results[0] - results[1]).abs().max() <= 1e-10

    @pytest.mark.parametrize("numerics", ["exact", "upstream"])
    @pytest.mark.parametrize("case", CASES)
    def test_fp32_reproduces_the_golden(self, case: str, numerics: str) -> None:
        assert_reproduces_golden(open_case(case, device="cuda", numerics=numerics), case)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("case", FEATURES)
    def test_halves_stay_near_fp64(self, case: str, dtype: torch.dtype) -> None:
        """Both devices round in the same dtype, so neither may be much further from fp64 than the other."""
        ids = random_ids(open_case(case), 2, 24)
        results = {}
        for device, kind in (("cpu", torch.float64), ("cpu", dtype), ("cuda", dtype)):
            model = open_case(case, dtype=kind, device=device)
            results[device, kind] = model.step(ids, model.new_cache(batch=2, capacity=24)).double().cpu()
        truth = results["cpu", torch.float64]
        error = {d: float((results[d, dtype] - truth).norm() / truth.norm()) for d in ("cpu", "cuda")}
        assert error["cuda"] <= 2 * error["cpu"] and error["cpu"] <= 2 * error["cuda"]


def test_fully_masked_query_rows_are_zero_and_nan_is_not_hidden() -> None:
    qkv = torch.randn(1, 3, 3 * 8)
    cache = [torch.zeros(1, 1, 3, 8) for _ in range(2)]
    lengths, visible = torch.zeros(1, dtype=torch.int64), torch.tensor([[False, True, True]])
    context, *_ = cached_attention(AttentionInputs(qkv, *cache, lengths, visible), AttentionFacts(1, 1, 1.0))
    assert torch.equal(context[0, 0], torch.zeros(8)) and context[0, 1:].abs().min() > 0
    qkv[0, 1, 0] = float("nan")
    context, *_ = cached_attention(AttentionInputs(qkv, *cache, lengths, visible), AttentionFacts(1, 1, 1.0))
    assert context[0, 1].isnan().all() and not context[0, 0].isnan().any()
    assert fused_rms_norm(qkv, torch.ones(24), eps=1e-6, weight_in_float=False)[0, 1].isnan().all()


@pytest.mark.parametrize("case", FEATURES)
def test_gradients_flow_through_the_same_mathematics(case: str) -> None:
    model = open_case(case, dtype=torch.float64)
    ids = random_ids(model, 2, 9)
    expected = model.step(ids, model.new_cache(batch=2, capacity=9))
    with torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        logits = model.step(ids, model.new_cache(batch=2, capacity=9))
        logits.square().mean().backward()
    assert torch.allclose(logits.detach(), expected, atol=1e-12)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "qkv" in n)


def test_the_cache_belongs_to_the_caller() -> None:
    model = open_case("qwen2")
    cache = model.new_cache(batch=1, capacity=8)
    buffers = [t.data_ptr() for t in cache.key + cache.value]
    model.step(random_ids(model, 1, 4), cache)
    assert [t.data_ptr() for t in cache.key + cache.value] == buffers
    other = KVCache(model.spec, batch=1, capacity=8)
    assert torch.equal(
        model.step(random_ids(model, 1, 4), other),
        model.step(random_ids(model, 1, 4), model.new_cache(batch=1, capacity=8)),
    )


@pytest.mark.slow
def test_custom_ops_are_sound_for_torch_export() -> None:
    """Schema, mutation, fake kernel and functionalisation, as torch itself checks them."""
    cos, sin = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    caches = [torch.zeros(2, 2, 5, 8) for _ in range(2)]
    lengths, visible = torch.zeros(2, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    qkv = torch.randn(2, 3, (4 + 4) * 8)
    arguments = (qkv, *caches, lengths, visible, cos, sin, None, None, 4, 2, 0.5, False, 0, "exact")
    torch.library.opcheck(torch.ops.refmodels.cached_attention.default, arguments)
    torch.library.opcheck(torch.ops.refmodels.fused_rms_norm.default, (qkv, torch.ones(64), 1e-6, False))


def test_dynamic_scaling_follows_the_longest_row_and_never_shrinks() -> None:
    model = open_case("qwen2_dynamic")
    cache = model.new_cache(batch=2, capacity=50)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :13] = 0
    step = cache.next_step(random_ids(model, 2, 40), mask)
    assert step.ntk_table is not None and step.ntk_table.tolist() == [8, 8]
    model.run(step, cache)
    for table in (9, 10):
        step = cache.next_step(random_ids(model, 2, 1))
        assert step.ntk_table is not None and step.ntk_table.tolist() == [table, table]
        model.run(step, cache)
    chunk = model.new_cache(batch=1, capacity=50).next_step(random_ids(model, 1, 5), prompt_lengths=torch.tensor([40]))
    assert chunk.ntk_table is not None and chunk.ntk_table.tolist() == [8]
    short = model.new_cache(batch=1, capacity=50).next_step(random_ids(model, 1, 20))
    assert short.ntk_table is not None and short.ntk_table.tolist() == [0]

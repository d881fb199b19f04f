"""The attention kernels against the op they replace, in fp64, on fresh random inputs.

The small cases run on the CPU as well, through Triton's interpreter (`test_interpreted` starts that process), so that
arithmetic, masks and addressing are proven without a GPU.  `pytest -m gpu` runs all of them on the GPU, in every dtype,
up to 32768 slots.

Tolerances.  With u the unit roundoff of the dtype, a kernel rounds four times what the fp64 body does not: the query
(before the first product), the cached key, the weights (before the second product) and the context.  Rounding errors
are uniform in the last place, so each has relative size of about 0.4 u.  Inputs are standard normal and scale is
head_dim ** -0.5, so scores have a standard deviation of about 1: an error of 0.4 u in query or key changes a score by
about 0.4 u, and a weight by that relative amount.  Independent weight errors e_j change the context by
sqrt(sum w_j^2 e_j^2), which relative to |context| ~ sqrt(sum w_j^2) is 0.4 u again.  Together sqrt(4) * 0.4 u = 0.8 u;
2 u is allowed over a whole tensor and 8 u for the worst query, whose scores can be several times larger.  fp32
additions and exp2 have a relative error of up to about 2^-22 each where scores reach +-8: 2^-19 is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from refmodels.attention import AttentionInputs
from refmodels.ops import attention_body, rotate
from tests.support.gpu import CUDA, DEVICE, INTERPRETED, interpreted, needs_gpu, needs_kernels
from tests.support.kernel_cases import ADDRESSES, facts_of

pytest.importorskip("triton")
from trt_runtime.kernels import attention
from trt_runtime.kernels.attention import DecodeBlocks
from trt_runtime.kernels.launch import AttentionShape
from trt_runtime.kernels.position_rows import position_rows

# The interpreter knows nothing of launches that overlap, as GPUs before 9.0.
CAPABILITY = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1] if CUDA else 80
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 2.0**-19, "fp16": 2 * 2.0**-11, "bf16": 2 * 2.0**-8}
NAN = float("nan")

SCHEMES: dict[str, dict[str, Any]] = {
    "chatglm2": {"heads": 8, "kv_heads": 2, "rotary": 0.5, "rotary_interleaved": True},
    "baichuan7b": {"heads": 4, "kv_heads": 4, "rotary": 1.0},
    "baichuan13b": {"heads": 5, "kv_heads": 5, "has_alibi": True},
    "qwen": {"heads": 4, "kv_heads": 4, "rotary": 1.0, "has_query_scale": True},
    "gpt": {"heads": 4, "kv_heads": 4},
    "bigcode": {"heads": 6, "kv_heads": 1},
    "starcoder2": {"heads": 6, "kv_heads": 2, "rotary": 1.0, "window": 37},
    "alibi_mqa_window": {"heads": 20, "kv_heads": 1, "has_alibi": True, "window": 100, "rotary": 0.5},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """`lengths`: slots filled before, per row.  `hidden`: "none", "left" (pads in front), "right", "holes" or "all"."""

    scheme: str = "baichuan7b"
    lengths: tuple[int, ...]
    tokens: int = 1
    head_dim: int = 32
    dtype: str = "fp32"
    table_dtype: str = "fp32"
    hidden: str = "none"
    spare_slots: int = 0
    spare_capacity: int = 3
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lengths = "_".join(map(str, self.lengths))
        return f"{self.scheme}-{self.dtype}-d{self.head_dim}-n{lengths}-t{self.tokens}-{self.hidden}"

    @property
    def shape(self) -> AttentionShape:
        scheme = SCHEMES[self.scheme] | self.more
        scheme["kv_heads"] = min(scheme["heads"], scheme["kv_heads"])
        slots = max(self.lengths) + self.tokens + self.spare_slots
        return AttentionShape(
            batch=len(self.lengths),
            tokens=self.tokens,
            slots=slots,
            capacity=slots + self.spare_capacity,
            heads=scheme["heads"],
            kv_heads=scheme["kv_heads"],
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            dtype=self.dtype,  # type: ignore[arg-type]
            rotary_dim=int(scheme.get("rotary", 0) * self.head_dim) // 2 * 2,
            rotary_interleaved=scheme.get("rotary_interleaved", False),
            window=scheme.get("window", 0),
            has_query_scale=scheme.get("has_query_scale", False),
            has_alibi=scheme.get("has_alibi", False),
            table_dtype=self.table_dtype,  # type: ignore[arg-type]
        )


def wide(given: AttentionInputs) -> AttentionInputs:
    """In fp64, unwritten slots 0 (the body multiplies weights of 0 with them)."""
    return AttentionInputs(
        *(t if t is None or not t.is_floating_point() else t.double().nan_to_num(0.0) for t in given)  # type: ignore[arg-type]
    )


def inputs(shape: AttentionShape, lengths: tuple[int, ...], hidden: str = "none", seed: int = 0) -> AttentionInputs:
    """Random inputs; every slot that no token was written to is NaN."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    dtype, table_dtype = DTYPES[shape.dtype], DTYPES[shape.table_dtype]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE).to(dtype)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=DEVICE)

    cache_lengths = torch.tensor(lengths, device=DEVICE)
    slot = torch.arange(shape.capacity, device=DEVICE)
    unwritten = (slot >= cache_lengths[:, None])[:, None, :, None]
    size = (shape.batch, shape.kv_heads, shape.capacity, shape.head_dim)
    visible = torch.ones(shape.batch, shape.slots, dtype=torch.bool, device=DEVICE)
    if hidden == "left":
        visible &= slot[: shape.slots] >= (cache_lengths[:, None] + shape.tokens) // 3
    elif hidden == "right":
        visible &= slot[: shape.slots] < cache_lengths[:, None] + (shape.tokens + 1) // 2
    elif hidden == "holes":
        visible &= uniform(shape.batch, shape.slots) > 0.3
    elif hidden == "all":
        visible[0] = False
    angles = uniform(shape.batch, shape.tokens, shape.rotary_dim // 2) * 7
    return AttentionInputs(
        qkv=normal(shape.batch, shape.tokens, (shape.heads + 2 * shape.kv_heads) * shape.head_dim),
        key_cache=normal(*size).masked_fill(unwritten, NAN),
        value_cache=normal(*size).masked_fill(unwritten, NAN),
        cache_lengths=cache_lengths,
        visible=visible,
        cos=angles.cos().to(table_dtype) if shape.rotary_dim else None,
        sin=angles.sin().to(table_dtype) if shape.rotary_dim else None,
        query_scale=(1 + uniform(shape.batch, shape.tokens)).to(table_dtype) if shape.has_query_scale else None,
        alibi_slopes=uniform(shape.heads) * 0.1 if shape.has_alibi else None,
    )


def run(shape: AttentionShape, given: AttentionInputs, **choices: Any) -> Tensor:
    """The kernels' context, in poisoned memory; the caches of `given` are updated."""
    choices.setdefault("capability", CAPABILITY)
    context = torch.full(
        (shape.batch, shape.tokens, shape.heads * shape.head_dim), NAN, dtype=DTYPES[shape.dtype], device=DEVICE
    )
    workspace = torch.full((-(-attention.workspace_bytes(shape) // 4),), NAN, device=DEVICE)
    counters = torch.zeros(attention.counter_count(shape), dtype=torch.int32, device=DEVICE)
    for launch in attention.launches(
        shape, **given._asdict(), context=context, workspace=workspace, counters=counters, **choices
    ):
        launch.kernel[launch.grid](
            **launch.arguments, **launch.constants, num_warps=launch.warps, num_stages=launch.stages, **launch.options
        )
    assert not counters.any(), "counters must be left at zero"
    return context


def assert_close(context: Tensor, expected: Tensor, dtype: str) -> None:
    assert not context.isnan().any()
    error = context.double() - expected
    if not expected.any():
        assert not error.any()
        return
    assert error.norm() / expected.norm() <= TOLERANCES[dtype], error.norm() / expected.norm()
    size = expected.norm(dim=-1)
    worst = (error.norm(dim=-1) / size)[size > 0].max()
    assert worst <= 4 * TOLERANCES[dtype], worst
    assert not error.norm(dim=-1)[size == 0].any(), "a query that sees no key gives 0"


def assert_caches(shape: AttentionShape, before: AttentionInputs, after: AttentionInputs) -> None:
    """Values copied, keys rotated and rounded once, every other slot untouched to the bit."""
    bits = {2: torch.int16, 4: torch.int32}[after.qkv.element_size()]
    split = after.qkv.view(shape.batch, shape.tokens, -1, shape.head_dim)
    key = split[:, :, shape.heads : shape.heads + shape.kv_heads]
    value = split[:, :, shape.heads + shape.kv_heads :]
    slots = after.cache_lengths[:, None] + torch.arange(shape.tokens, device=DEVICE)
    where = (torch.arange(shape.batch, device=DEVICE)[:, None], slice(None), slots)
    assert torch.equal(after.value_cache[where], value)
    wide = key.double()
    if after.cos is not None and after.sin is not None:
        wide = rotate(wide, after.cos.double(), after.sin.double(), shape.rotary_interleaved)
    # One rounding of the result; the rotation itself in fp32, whose terms may cancel.
    allowed = wide.abs() * TOLERANCES[shape.dtype] / 2 + key.double().abs().amax(-1, keepdim=True) * 2.0**-22
    assert ((after.key_cache[where].double() - wide).abs() <= allowed).all()
    for old, new in ((before.key_cache, after.key_cache), (before.value_cache, after.value_cache)):
        untouched = new.clone()
        untouched[where] = old[where]
        assert torch.equal(untouched.view(bits), old.view(bits))


def check(case: Case, *, seed: int = 0, **choices: Any) -> None:
    shape = case.shape
    before = inputs(shape, case.lengths, case.hidden, seed)
    after = before._replace(key_cache=before.key_cache.clone(), value_cache=before.value_cache.clone())
    context = run(shape, after, **choices)
    expected, _, _ = attention_body(wide(before), facts_of(shape), in_place=True)
    assert_close(context, expected, shape.dtype)
    assert_caches(shape, before, after)


FEW_HEADS = {"heads": 2}  # the interpreter takes its time
# fp16 for what the fp32 cases cannot see: the rounding of operands.  The interpreter has no bf16 products.
SMALL = [
    *(Case(scheme=s, lengths=(70, 3), head_dim=16, more=FEW_HEADS) for s in SCHEMES),
    *(Case(scheme=s, lengths=(0, 41), tokens=37, head_dim=16, more=FEW_HEADS) for s in SCHEMES),
    Case(scheme="chatglm2", lengths=(130, 40), hidden="holes", dtype="fp16"),
    Case(scheme="qwen", lengths=(90, 0), hidden="left", dtype="fp16", spare_slots=200),
    Case(scheme="starcoder2", lengths=(70, 20), hidden="all", head_dim=24),
    Case(scheme="baichuan13b", lengths=(40,), hidden="all"),
    Case(scheme="chatglm2", lengths=(9, 0), tokens=70, hidden="left", dtype="fp16", table_dtype="fp16"),
    Case(scheme="qwen", lengths=(0, 33), tokens=40, hidden="right", spare_slots=100),
    Case(scheme="baichuan13b", lengths=(33,), tokens=33, hidden="holes", head_dim=24),
    Case(scheme="gpt", lengths=(0, 0), tokens=2, hidden="all"),
]


@needs_kernels
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case: Case) -> None:
    check(case)


@needs_kernels
@pytest.mark.parametrize("last_combines", [False, True])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("splits", [2, 7])
def test_splits(splits: int, rows: int, last_combines: bool) -> None:
    """Rows with less to do than splits, and splits of different sizes."""
    blocks = DecodeBlocks(rows=rows, slots=16, warps=4, stages=1, resident=1, last_combines=last_combines)
    check(
        Case(lengths=(60, 0, 15), head_dim=16, hidden="left", more={"heads": 2, "kv_heads": 2}),
        decode=blocks,
        splits=splits,
    )


@needs_kernels
@pytest.mark.parametrize("rows", [1, 16])
def test_row_blocks(rows: int) -> None:
    """More heads on a kv head than a block takes."""
    blocks = DecodeBlocks(rows=rows, slots=16, warps=4, stages=1, resident=1, last_combines=rows == 1)
    check(Case(scheme="alibi_mqa_window", lengths=(60, 5), head_dim=16, more={"heads": 18}), decode=blocks, splits=3)


@needs_kernels
def test_more_splits_than_are_combined_at_once() -> None:
    blocks = DecodeBlocks(rows=1, slots=16, warps=4, stages=1, resident=1, last_combines=True)
    # With ALiBi the later splits have the larger maxima.
    check(Case(scheme="baichuan13b", lengths=(600,), head_dim=16, more={"heads": 1}), decode=blocks, splits=36)


@needs_kernels
@pytest.mark.parametrize("scheme", [("rope",), ("rope", "ntk", "logn"), ("logn",)], ids=" ".join)
def test_position_rows(scheme: tuple[str, ...]) -> None:
    """To the bit what indexing gives."""
    positions, half = 50, 12
    ids, table = torch.tensor([[3], [49], [0]], device=DEVICE), torch.tensor([2, 0, 1], device=DEVICE)
    cos, sin = torch.rand(2, 3 * positions, half, device=DEVICE)
    logn, rope = torch.rand(positions, device=DEVICE), "rope" in scheme
    found = [torch.full((3, 1, half), NAN, device=DEVICE) for _ in range(2)] + [torch.full((3, 1), NAN, device=DEVICE)]
    launch = position_rows(
        tokens=3,
        half=half if rope else 0,
        positions=positions,
        dtype="fp32",
        position_ids=ids,
        ntk_table=table if "ntk" in scheme else None,
        cos_table=cos if rope else None,
        sin_table=sin if rope else None,
        logn=logn if "logn" in scheme else None,
        cos=found[0] if rope else None,
        sin=found[1] if rope else None,
        query_scale=found[2] if "logn" in scheme else None,
    ).on(CAPABILITY)
    launch.kernel[launch.grid](**launch.arguments, **launch.constants, num_warps=launch.warps, **launch.options)
    rows = ids + table[:, None] * positions if "ntk" in scheme else ids
    for made, expected, wanted in zip(
        found, (cos[rows], sin[rows], logn[ids]), (rope, rope, "logn" in scheme), strict=True
    ):
        assert torch.equal(made, expected) if wanted else made.isnan().all()


@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="the GPU runs the small cases itself")
def test_interpreted() -> None:
    tests = "test_small or splits or test_row_blocks or test_position_rows"
    assert f"{len(SMALL) + 14} passed" in interpreted(__file__, tests)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_variants_are_all_that_launches_use(scheme: str, dtype: str, capability: int) -> None:
    """The kernels compiled ahead of time for a model cover every shape within its limits."""
    limits = replace(
        Case(scheme=scheme, lengths=(4000,), dtype=dtype, head_dim=64).shape,
        batch=300, tokens=8192, slots=8192, capacity=8192,
    )  # fmt: skip

    def key(launch: Any) -> object:
        return launch.kernel, tuple(launch.constants.items()), launch.warps, launch.stages

    known = {key(launch) for launch in attention.variants(limits, capability=capability)}
    for batch in (1, 2, 5, 30, 70, 140, 300):
        for tokens in (1, 2, 7, 64, 65, 4095, 4096, 8192):
            for slots in (256, 8192):
                shape = replace(limits, batch=batch, tokens=tokens, slots=slots)
                assert attention.workspace_bytes(shape) <= attention.workspace_bytes(limits)
                assert attention.counter_count(shape) <= attention.counter_count(limits)
                for launch in attention.launches(shape, **ADDRESSES, capability=capability):
                    assert key(launch) in known
                    assert set(launch.pointers) == set(launch.arguments) & set(ADDRESSES)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme: str, dtype: str) -> None:
    for hidden in ("none", "left", "holes"):
        common: dict[str, Any] = {"scheme": scheme, "dtype": dtype, "head_dim": 64, "hidden": hidden}
        check(Case(lengths=(700, 0, 1, 511), **common, spare_slots=300), seed=1)
        check(Case(lengths=(3000,), **common), seed=2)
        check(Case(lengths=(0, 130, 63), tokens=259, **common), seed=3)
        check(Case(lengths=(1024, 5), tokens=33, **common, spare_slots=100), seed=4)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 80, 96, 128, 160, 192, 256])
def test_head_dims(head_dim: int, dtype: str) -> None:
    for scheme in ("baichuan7b", "chatglm2"):
        common: dict[str, Any] = {"scheme": scheme, "dtype": dtype, "head_dim": head_dim}
        check(Case(lengths=(300, 77), **common), seed=5)
        check(Case(lengths=(0, 200), tokens=200, **common), seed=6)


@needs_gpu
@pytest.mark.parametrize("scheme", ["baichuan7b", "chatglm2"])
def test_lengths(scheme: str) -> None:
    """1 .. 32768 slots; compiled once, so lengths are what is tested."""
    common: dict[str, Any] = {"scheme": scheme, "dtype": "fp16", "head_dim": 128}
    for slots in (1, 2, 31, 32, 33, 64, 65, 127, 128, 129, 1000, 4095, 4096, 8191, 16384, 32768):
        check(Case(lengths=(slots - 1,), **common), seed=slots)
        check(Case(lengths=(slots - 1, 0, slots // 2), **common), seed=slots)
        if 1 < slots <= 8191:
            check(Case(lengths=(0,), tokens=slots, **common), seed=slots)
    check(Case(lengths=(32768 - 300,), tokens=300, **common), seed=7)


@needs_gpu
def test_large_caches() -> None:
    """Offsets beyond 2**31 elements."""
    case = Case(scheme="chatglm2", dtype="fp16", head_dim=128, lengths=(3, 40), spare_capacity=5_000_000)
    check(case)
    check(replace(case, tokens=70))


@needs_gpu
@pytest.mark.parametrize("scheme", ["chatglm2", "qwen"])
def test_many_rows(scheme: str) -> None:
    lengths = tuple(torch.randint(0, 1500, (96,), generator=torch.Generator().manual_seed(3)).tolist())
    check(Case(scheme=scheme, dtype="bf16", head_dim=128, lengths=lengths, more={"heads": 32}), seed=8)


@needs_gpu
@pytest.mark.parametrize("scheme", ["chatglm2", "baichuan7b"])
def test_chunks_then_graph_replays(scheme: str) -> None:
    """Prefill in two chunks, then one captured decode step replayed while the lengths grow on the device."""
    case = Case(scheme=scheme, dtype="fp16", head_dim=128, lengths=(0, 0), tokens=100, spare_slots=900)
    shape = case.shape
    caches = inputs(shape, case.lengths)
    key, value = caches.key_cache, caches.value_cache
    exact = {"key_cache": key.double().nan_to_num(0.0), "value_cache": value.double().nan_to_num(0.0)}
    lengths = torch.zeros(2, dtype=torch.int64, device=DEVICE)

    def body(given: AttentionInputs) -> Tensor:
        return attention_body(wide(given)._replace(**exact), facts_of(shape), in_place=True)[0]

    for seed in (1, 2):
        given = inputs(shape, case.lengths, seed=seed)._replace(key_cache=key, value_cache=value, cache_lengths=lengths)
        assert_close(run(shape, given), body(given), "fp16")
        lengths += 100
    lengths[1] -= 60

    shape = replace(shape, tokens=1)
    static = inputs(shape, (0, 0))._replace(key_cache=key, value_cache=value, cache_lengths=lengths)
    saved = lengths.clone()
    run(shape, static)
    lengths.copy_(saved)
    context = torch.full((2, 1, shape.heads * shape.head_dim), NAN, dtype=torch.float16, device=DEVICE)
    workspace = torch.full((attention.workspace_bytes(shape) // 4,), NAN, device=DEVICE)
    counters = torch.zeros(attention.counter_count(shape), dtype=torch.int32, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in attention.launches(
            shape, **static._asdict(), context=context, workspace=workspace, counters=counters, capability=CAPABILITY
        ):
            launch.kernel[launch.grid](
                **launch.arguments,
                **launch.constants,
                num_warps=launch.warps,
                num_stages=launch.stages,
                **launch.options,
            )
    for step in range(300):
        fresh = inputs(shape, (0, 0), seed=10 + step)
        static.qkv.copy_(fresh.qkv)
        context.fill_(NAN)
        graph.replay()
        assert_close(context, body(static), "fp16")
        lengths += 1
    assert not counters.any()

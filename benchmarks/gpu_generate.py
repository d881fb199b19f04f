"""Generation on one GPU against transformers: `python benchmarks/gpu_generate.py [--model qwen-7b|chatglm2-6b]`.

Random fp16 weights in the shapes of Qwen-7B and ChatGLM2-6B, prompts of 128 random tokens, greedy.  Ours is
`trt_runtime.generation` on `TorchEngine(kernels=True)`; theirs is `generate` of the stock architecture of the same
sizes (Qwen2ForCausalLM; GlmForCausalLM, which has ChatGLM2's partial interleaved rotation and 2 kv heads), eager and
with `cache_implementation="static"`, which compiles the decode step.  All in one process, one after another.

Decode is the time of a whole `generate` less that of one that makes a single token (the time to first token), over the
tokens in between; 128 steps, for eager 32.  Medians over rounds.  The bandwidth limit is the time to read, at the rate
measured here, every weight but the embedding once and the live keys and values of every row, a step.  "steps" is
`TorchEngine.decode` in a loop, without generate's bookkeeping.  Exit code 1 if a goal is missed.  Results go to
benchmarks/results/gpu_generate.json, the profile of the decode steps to gpu_generate_profile.json beside it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from refmodels.checkpoints.load import empty_decoder  # noqa: E402
from refmodels.families import spec_from_config  # noqa: E402
from refmodels.model import Decoder  # noqa: E402
from refmodels.spec import ModelSpec  # noqa: E402
from trt_runtime.generation import GenerationConfig, generate  # noqa: E402
from trt_runtime.torch_gpu.engine import TorchEngine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PROMPT, STEPS, EAGER_STEPS = 128, 128, 32
GOALS = {("qwen-7b", 1): 240.0, ("qwen-7b", 64): 10_000.0, ("chatglm2-6b", 256): 30_000.0}
BATCHES = {"qwen-7b": (1, 64), "chatglm2-6b": (1, 64, 256)}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen-7b": {
        "model_type": "qwen",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 22016,
        "layer_norm_epsilon": 1e-6,
        "seq_length": 8192,
        "max_position_embeddings": 8192,
        "use_logn_attn": True,
        "use_dynamic_ntk": True,
    },
    "chatglm2-6b": {
        "model_type": "chatglm",
        "glm_generation": "chatglm2",
        "padded_vocab_size": 65024,
        "hidden_size": 4096,
        "num_layers": 28,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "ffn_hidden_size": 13696,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "layernorm_epsilon": 1e-5,
        "seq_length": 32768,
        "add_qkv_bias": True,
    },
}


@triton.jit
def _read(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + at).to(tl.float32) + tl.load(x + at + BLOCK).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def read_bandwidth() -> float:
    """Bytes a second of a kernel that reads 4 GiB and writes next to nothing."""
    block = 8192
    x = torch.randn(2**31, device="cuda", dtype=torch.float16)
    out = torch.empty(x.numel() // (2 * block), device="cuda")
    times = triton.testing.do_bench(lambda: _read[(out.numel(),)](x, out, block, num_warps=8), return_mode="median")
    return x.numel() * 2 / (times / 1e3)


def random_decoder(spec: ModelSpec) -> Decoder:
    """fp16 on the GPU; norms of one, everything else normal with a standard deviation of 0.02."""
    decoder = empty_decoder(spec)
    generator = torch.Generator("cuda").manual_seed(0)
    for name, parameter in list(decoder.named_parameters()):
        value = torch.empty(parameter.shape, device="cuda", dtype=torch.float16)
        value.fill_(1.0) if name.endswith("norm.weight") else value.normal_(0, 0.02, generator=generator)
        owner, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return decoder.eval()


def stock_model(name: str) -> Any:
    from transformers import GlmConfig, GlmForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 32, "hidden_size": 4096, "pad_token_id": 0, "eos_token_id": None}
    with torch.device("cuda"):
        if name == "qwen-7b":
            config = Qwen2Config(
                vocab_size=151936, intermediate_size=11008, num_hidden_layers=32, num_key_value_heads=32,
                max_position_embeddings=8192, tie_word_embeddings=False, **sizes,
            )  # fmt: skip
            return Qwen2ForCausalLM._from_config(config, dtype=torch.float16).eval()
        config = GlmConfig(
            vocab_size=65024, intermediate_size=13696, num_hidden_layers=28, num_key_value_heads=2, head_dim=128,
            max_position_embeddings=32768, attention_bias=True, tie_word_embeddings=False, **sizes,
        )  # fmt: skip
        return GlmForCausalLM._from_config(config, dtype=torch.float16).eval()


def timed(run: Callable[[int], None], tokens: int, rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(tokens)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def measure(run: Callable[[int], None], batch: int, *, steps: int, rounds: int) -> dict[str, Any]:
    """`run(n)` makes n tokens a row."""
    start = time.perf_counter()
    run(steps + 1)
    torch.cuda.synchronize()
    first_call = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    first, whole = timed(run, 1, rounds), timed(run, steps + 1, rounds)
    decode = statistics.median(whole) - statistics.median(first)
    return {
        "tokens_per_second": batch * steps / decode,
        "step_ms": decode / steps * 1e3,
        "first_token_ms": statistics.median(first) * 1e3,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "first_call_s": first_call,
        "steps": steps,
        "seconds": {"first": first, "whole": whole},
    }


def bytes_per_step(spec: ModelSpec, batch: int) -> tuple[int, int]:
    """Weights, and keys and values of the average step."""
    a, m, hidden = spec.attention, spec.mlp, spec.hidden_size
    block = hidden * spec.qkv_width + a.heads * a.head_dim * hidden + 3 * hidden * m.width
    weights = 2 * (spec.layers * block + hidden * spec.vocab_size)
    slots = PROMPT + (STEPS + 1) / 2
    return weights, int(2 * 2 * spec.layers * batch * a.kv_heads * a.head_dim * slots)


def decode_loop(engine: TorchEngine, prompts: torch.Tensor) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`decode` with its own tokens fed back: GPU time and host time a step, and which kernels the GPU time is."""
    cache = engine.new_cache(batch=len(prompts), capacity=PROMPT + STEPS)
    ids = engine.prefill(prompts, cache, last_logits_only=True)[:, -1].argmax(-1)
    host, marks = [], [torch.cuda.Event(enable_timing=True) for _ in range(STEPS - 20)]
    for step in range(STEPS - 20):
        start = time.perf_counter()
        logits = engine.decode(ids, cache)
        host.append(time.perf_counter() - start)
        ids = logits[:, -1].argmax(-1)
        marks[step].record()
    torch.cuda.synchronize()
    gpu = [a.elapsed_time(b) for a, b in itertools.pairwise(marks[8:])]
    count = 8
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            ids = engine.decode(ids, cache)[:, -1].argmax(-1)
        torch.cuda.synchronize()
    table = [
        {"kernel": e.key[:120], "calls": e.count / count, "us": e.self_device_time_total / count}
        for e in profile.key_averages()
        if e.self_device_time_total > 0
    ]
    table.sort(key=lambda row: -row["us"])
    return {"step_ms": statistics.median(gpu), "host_ms": statistics.median(host[8:]) * 1e3}, table


def ours(name: str, bandwidth: float, rounds: int) -> tuple[dict[int, Any], dict[str, Any]]:
    spec = spec_from_config(CONFIGS[name])
    engine = TorchEngine(random_decoder(spec), kernels=True)
    found: dict[int, Any] = {}
    profiles: dict[str, Any] = {}
    for batch in BATCHES[name]:
        ids = torch.randint(3, spec.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
        prompts = ids.tolist()

        def run(tokens: int, prompts: list[list[int]] = prompts) -> None:
            generate(engine, None, prompts, GenerationConfig(max_new_tokens=tokens))

        result = measure(run, batch, steps=STEPS, rounds=rounds)
        result["loop"], table = decode_loop(engine, ids)
        weights, cached = bytes_per_step(spec, batch)
        limit = (weights + cached) / bandwidth
        result |= {
            "weight_bytes": weights,
            "cache_bytes": cached,
            "limit_tokens_per_second": batch / limit,
            "fraction_of_limit": result["tokens_per_second"] * limit / batch,
            "loop_fraction_of_limit": limit / (result["loop"]["step_ms"] / 1e3),
        }
        found[batch] = result
        profiles[f"{name} batch {batch}"] = {"step_us": result["loop"]["step_ms"] * 1e3, "kernels": table}
        show(name, "ours", batch, result)
        for row in table[:14]:
            print(f"    {row['us']:9.1f} us {row['calls']:7.1f} x {row['kernel']}", flush=True)
    return found, profiles


def theirs(name: str, rounds: int, found: dict[str, Any], save: Callable[[], None], *, compiled: bool) -> None:
    model = stock_model(name)
    for mode in ("eager", "compiled") if compiled else ("eager",):
        results: dict[int, Any] = found.setdefault(mode, {})
        # The largest batch first: compiling takes a minute each, and a time limit may come.
        for batch in reversed(BATCHES[name]):
            ids = torch.randint(3, 60_000, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).cuda()
            options: dict[str, Any] = {"cache_implementation": "static"} if mode == "compiled" else {}

            def run(tokens: int, ids: torch.Tensor = ids, options: dict[str, Any] = options) -> None:
                mask = torch.ones_like(ids)
                model.generate(
                    ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **options
                )

            try:
                steps = STEPS if mode == "compiled" else EAGER_STEPS
                results[batch] = measure(run, batch, steps=steps, rounds=rounds if mode == "compiled" else 2)
                show(name, f"transformers {mode}", batch, results[batch])
            except Exception as error:
                results[batch] = {"error": repr(error)[:300]}
                print(name, mode, batch, repr(error)[:300], flush=True)
            if mode == "compiled":
                torch._dynamo.reset()
            save()
            free()


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def show(name: str, who: str, batch: int, result: dict[str, Any]) -> None:
    line = (
        f"{name} batch {batch:3d} {who:22s} {result['tokens_per_second']:9.1f} tok/s, step {result['step_ms']:.3f} ms"
    )
    line += f", first token {result['first_token_ms']:.1f} ms, peak {result['peak_gb']:.1f} GB"
    if "loop" in result:
        line += f", {result['fraction_of_limit']:.1%} of {result['limit_tokens_per_second']:.0f}; loop "
        line += f"{result['loop']['step_ms']:.3f} ms, host {result['loop']['host_ms']:.3f} ms"
    print(f"{line} ({result['first_call_s']:.1f} s at first)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BATCHES, action="append", help="repeat for several; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ours-only", action="store_true", help="leave transformers out")
    parser.add_argument("--no-compiled", action="store_true", help="leave transformers' compiled mode out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path = arguments.output / "gpu_generate.json"
    profile_path = arguments.output / "gpu_generate_profile.json"
    # The models may be measured in calls of their own: what an earlier call found stays.
    known = json.loads(path.read_text()) if path.is_file() else {}
    profiles = json.loads(profile_path.read_text()) if profile_path.is_file() else {}
    bandwidth = read_bandwidth()
    free()
    print(f"{torch.cuda.get_device_name()}, reads {bandwidth / 1e12:.2f} TB/s", flush=True)
    missed = []
    for name in arguments.model or BATCHES:
        found, tables = ours(name, bandwidth, arguments.rounds)
        free()
        entry: dict[str, Any] = {"read_bytes_per_second": bandwidth, "ours": found}
        profiles |= tables
        for batch, result in found.items():
            goal = GOALS.get((name, batch), 0.0)
            if result["tokens_per_second"] < goal:
                missed.append(f"{name} batch {batch}: {result['tokens_per_second']:.0f} of {goal:.0f} tok/s")
        known[name] = entry
        known["versions"] = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": importlib.metadata.version("transformers"),
        }
        profile_path.write_text(json.dumps(profiles, indent=1) + "\n")

        def save() -> None:
            path.write_text(json.dumps(known, indent=1) + "\n")

        save()
        if not arguments.ours_only:
            theirs(name, 3, entry, save, compiled=not arguments.no_compiled)
            free()
    if missed:
        raise SystemExit("missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()

"""Where the local error of a wrong tap is: its worst tokens, heads and channels."""

from __future__ import annotations

from torch import Tensor

from debug.comparison.metrics import ErrorStats
from debug.comparison.modules import Module
from debug.comparison.results import Evidence, TokenView
from debug.comparison.stage import by_token, real_tokens
from refmodels.taps import is_cache_tap

_MOST = 5


def evidence_of(module: Module, engine: Tensor, expected: Tensor, before: ErrorStats, allowed: Tensor) -> Evidence:
    """`before`: the engine against `expected`; allowed: [tokens] relative noise floor."""
    ratios = before.token_rel / allowed
    worst = ratios.nan_to_num(nan=float("inf")).argsort(descending=True)[:_MOST].tolist()
    tokens = [
        TokenView(
            row=int(before.token_of[i, 0]),
            position=int(before.token_of[i, 1]),
            local=float(before.token_rel[i]),
            ratio=float(ratios[i]),
        )
        for i in worst
    ]
    off, size = ((by_token(t, module)[real_tokens(module)]) for t in (engine - expected, expected))
    heads: list[float] = []
    names: list[str] = []
    if is_cache_tap(module.tap) or module.part in ("attn.qkv", "attn.context"):
        head_dim = module.decoder.spec.attention.head_dim
        errors, sizes = (t.reshape(len(t), -1, head_dim).square().sum((0, 2)).sqrt() for t in (off, size))
        heads = (errors / sizes.clamp(min=1e-300)).tolist()
        names = _head_names(module)
    shares = off.flatten(1).square().sum(0)
    shares = shares / shares.sum().clamp(min=1e-300)
    top = shares.topk(min(_MOST, len(shares)))
    channels = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    # Report channels only if a few of them stand out.
    few = float(top.values.sum()) > 0.5 and len(shares) > 4 * _MOST
    return Evidence(tokens=tokens, heads=heads, head_names=names, channels=channels if few else [])


def _head_names(module: Module) -> list[str]:
    attention = module.decoder.spec.attention
    queries = [f"query {i}" for i in range(attention.heads)]
    kinds = ("key", "value") if module.part == "attn.qkv" else (module.part,)
    others = [f"{kind} {i}" for kind in kinds for i in range(attention.kv_heads)]
    return queries + others if module.part == "attn.qkv" else others if is_cache_tap(module.tap) else queries

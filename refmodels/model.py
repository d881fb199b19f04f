"""The decoder: embedding, pre-norm blocks, norm, head.  The spec holds all differences between families.

`Decoder.forward` is a pure function of tensors with static control flow, because the exporter traces it with `torch.fx`
and lowers exactly these operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refmodels.attention import AttentionFacts, AttentionInputs, Positions
from refmodels.cache import KVCache, StepInputs
from refmodels.errors import LogitLockError
from refmodels.ops import (
    by_head,
    cached_attention,
    fused_rms_norm,
    heads_in_a_row,
    join_qkv,
    rope_rows,
    select_tokens,
    split_qkv,
)
from refmodels.positions import PositionTables, build_tables
from refmodels.quantization.linear import QuantizedLinear
from refmodels.recorder import active_recorder, tap
from refmodels.spec import Activation, ModelSpec, NormSpec, Numerics

Past = tuple[Tensor, Tensor]
"""Keys and values of one layer, [batch, kv_heads, capacity, head_dim] each."""


class RmsNorm(nn.Module):
    def __init__(self, width: int, norm: NormSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return fused_rms_norm(x, self.weight, eps=self.norm.eps, weight_in_float=self.norm.weight_in_float)


def make_norm(width: int, norm: NormSpec) -> nn.Module:
    return RmsNorm(width, norm) if norm.kind == "rms" else nn.LayerNorm(width, eps=norm.eps)


def gelu_new(x: Tensor) -> Tensor:
    """The tanh approximation, rounded in half precision where transformers' NewGELUActivation rounds."""
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x: Tensor) -> Tensor:
    """As `gelu_new`, in the order of transformers' FastGELUActivation."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), rounded in half precision where transformers' QuickGELUActivation rounds."""
    return x * torch.sigmoid(1.702 * x)


def activate(x: Tensor, activation: Activation, *, stepwise: bool = False) -> Tensor:
    """The activation of the MLP; `stepwise` repeats upstream's rounding of gelu_new and gelu_fast in half precision."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    if activation == "quick_gelu":
        # Always stepwise: torch has no function that rounds it once.
        return quick_gelu(x)
    if activation == "gelu_new" and stepwise:
        return gelu_new(x)
    if activation == "gelu_fast" and stepwise:
        return gelu_fast(x)
    return F.gelu(x, approximate="none" if activation == "gelu" else "tanh")


def make_linear(
    spec: ModelSpec, module: str, in_features: int, out_features: int, *, bias: bool
) -> nn.Linear | QuantizedLinear:
    """The linear layer of that name, quantized if the spec says so."""
    linear = spec.format_of(module)
    if linear is None:
        return nn.Linear(in_features, out_features, bias=bias)
    try:
        return QuantizedLinear(in_features, out_features, bias=bias, linear=linear)
    except LogitLockError as error:
        raise LogitLockError(f"{module} of {spec.variant}: {error}") from None


class Attention(nn.Module):
    """`cached_attention` between its two projections, and the scales of a quantized cache, [kv_heads] each."""

    def __init__(self, spec: ModelSpec, layer: int, *, numerics: Numerics) -> None:
        super().__init__()
        a, h, path = spec.attention, spec.hidden_size, f"blocks.{layer}.attn"
        self.layer, self.head_dim = layer, a.head_dim
        self.facts = AttentionFacts(
            heads=a.heads,
            kv_heads=a.kv_heads,
            scale=spec.scale(layer),
            rotary_interleaved=spec.rope is not None and spec.rope.interleaved,
            window=spec.window(layer),
            arithmetic=a.upstream_arithmetic if numerics == "upstream" else "exact",
        )
        self.qkv = make_linear(spec, f"{path}.qkv", h, spec.qkv_width, bias=a.qkv_bias)
        self.out = make_linear(spec, f"{path}.out", a.heads * a.head_dim, h, bias=a.out_bias)
        self.widths = (a.heads * a.head_dim, a.kv_heads * a.head_dim)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if a.head_norms:
            self.query_norm, self.key_norm = (make_norm(a.head_dim, spec.norm) for _ in range(2))
        self.key_scale: nn.Parameter | None = None
        self.value_scale: nn.Parameter | None = None
        if spec.cache_code is not None:
            self.key_scale, self.value_scale = (nn.Parameter(torch.ones(a.kv_heads)) for _ in range(2))

    def forward(self, x: Tensor, past: Past, positions: Positions) -> tuple[Tensor, Past]:
        """Shapes: x and result [batch, tokens, hidden].  Returns the caches as well, with the new keys and values."""
        block = f"blocks.{self.layer}"
        context, key, value = self.attend(tap(f"{block}.attn.qkv", self.qkv(x)), past, positions)
        past = tap(f"{block}.key", key), tap(f"{block}.value", value)
        return tap(f"{block}.attn.out", self.out(tap(f"{block}.attn.context", context))), past

    def attend(self, qkv: Tensor, past: Past, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """`cached_attention` with this layer's facts, on normalized heads: context, keys and values."""
        if self.query_norm is not None and self.key_norm is not None:
            query, key, value = split_qkv(qkv, *self.widths)
            query = self._normalized("query_norm", self.query_norm, query)
            qkv = join_qkv(query, self._normalized("key_norm", self.key_norm, key), value)
        given = {**positions, "key_scale": self.key_scale, "value_scale": self.value_scale}
        key, value = past
        return cached_attention(AttentionInputs(qkv=qkv, key_cache=key, value_cache=value, **given), self.facts)

    def _normalized(self, name: str, norm: nn.Module, x: Tensor) -> Tensor:
        """Every head of x [batch, tokens, heads * head_dim], normalized."""
        return tap(f"blocks.{self.layer}.attn.{name}", heads_in_a_row(norm(by_head(x, self.head_dim))))


class Mlp(nn.Module):
    def __init__(self, spec: ModelSpec, path: str, *, stepwise: bool) -> None:
        super().__init__()
        m, h = spec.mlp, spec.hidden_size
        self.spec, self.path, self.stepwise = m, path, stepwise
        if m.gated:
            self.gate = make_linear(spec, f"{path}.gate", h, m.width, bias=m.bias)
        self.up = make_linear(spec, f"{path}.up", h, m.width, bias=m.bias)
        self.out = make_linear(spec, f"{path}.out", m.width, h, bias=m.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.spec.gated:
            gate = tap(f"{self.path}.gate", self.gate(x))
            up = tap(f"{self.path}.up", self.up(x))
            act = activate(gate, self.spec.activation) * up
        else:
            up = tap(f"{self.path}.up", self.up(x))
            act = activate(up, self.spec.activation, stepwise=self.stepwise)
        return tap(f"{self.path}.out", self.out(tap(f"{self.path}.act", act)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); what is added is normalized as well if the spec says so."""

    def __init__(self, spec: ModelSpec, layer: int, *, numerics: Numerics) -> None:
        super().__init__()
        self.path = f"blocks.{layer}"
        self.attn_norm = make_norm(spec.hidden_size, spec.norm)
        self.attn = Attention(spec, layer, numerics=numerics)
        self.mlp_norm = make_norm(spec.hidden_size, spec.norm)
        self.mlp = Mlp(spec, f"{self.path}.mlp", stepwise=numerics == "upstream")
        self.attn_post_norm: nn.Module | None = None
        self.mlp_post_norm: nn.Module | None = None
        if spec.sandwich_norms:
            self.attn_post_norm, self.mlp_post_norm = (make_norm(spec.hidden_size, spec.norm) for _ in range(2))

    def forward(self, x: Tensor, past: Past, positions: Positions) -> tuple[Tensor, Past]:
        path = self.path
        attended, past = self.attn(tap(f"{path}.attn_norm", self.attn_norm(x)), past, positions)
        if self.attn_post_norm is not None:
            attended = tap(f"{path}.attn_post_norm", self.attn_post_norm(attended))
        x = tap(f"{path}.resid_mid", x + attended)
        added = self.mlp(tap(f"{path}.mlp_norm", self.mlp_norm(x)))
        if self.mlp_post_norm is not None:
            added = tap(f"{path}.mlp_post_norm", self.mlp_post_norm(added))
        return tap(path, x + added), past


class Decoder(nn.Module):
    """The reference model of every family.

    Args:
        spec: architecture facts.
        numerics: "exact" (fp64/fp32 tables, reductions in fp32 or wider) or "upstream" (Hugging Face's rounding).

    Build it with `refmodels.load` or `refmodels.checkpoints.load`; a new decoder has fp32 parameters without useful
    values.  Position tables are plain attributes, made for a capacity by `prepare_tables`: they have their own dtype,
    which `Module.to(dtype)` must not change.
    """

    rope_cos: Tensor | None
    rope_sin: Tensor | None
    logn: Tensor | None
    alibi_slopes: Tensor | None

    def __init__(self, spec: ModelSpec, *, numerics: Numerics = "exact") -> None:
        super().__init__()
        self.spec, self.numerics = spec, numerics
        self.embed = nn.Embedding(spec.vocab_size, spec.hidden_size)
        if spec.position == "learned":
            self.position_embed = nn.Embedding(spec.max_positions, spec.hidden_size)
        self.blocks = nn.ModuleList(Block(spec, i, numerics=numerics) for i in range(spec.layers))
        self.final_norm = make_norm(spec.hidden_size, spec.norm)
        self.head = make_linear(spec, "head", spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tied_head:
            self.head.weight = self.embed.weight
        self.table_positions = 0
        self._tables_key: object = None

    @property
    def dtype(self) -> torch.dtype:
        return self._resident.dtype

    @property
    def device(self) -> torch.device:
        return self._resident.device

    @property
    def _resident(self) -> Tensor:
        """A parameter that is present even while others are streamed in and out."""
        weight = self.final_norm.weight
        assert isinstance(weight, Tensor)
        return weight

    def prepare_tables(self, positions: int) -> None:
        """Make the position tables for caches of up to `positions` slots; tables that are long enough are kept."""
        key = (self.dtype, self.device)
        if self._tables_key == key and positions <= self.table_positions:
            return
        self.use_tables(
            build_tables(self.spec, positions=positions, numerics=self.numerics, dtype=self.dtype, device=self.device)
        )
        self._tables_key = key

    def use_tables(self, tables: PositionTables) -> None:
        """Run with these tables; the debugger's fault catalogue passes altered ones."""
        self.table_positions = tables.positions
        self.rope_cos, self.rope_sin = tables.rope_cos, tables.rope_sin
        self.logn, self.alibi_slopes = tables.logn, tables.alibi_slopes

    def new_cache(self, *, batch: int, capacity: int) -> KVCache:
        """An empty cache in this model's dtype, on its device."""
        self.prepare_tables(capacity)
        return KVCache(self.spec, batch=batch, capacity=capacity, dtype=self.dtype, device=self.device)

    def forward(
        self,
        input_ids: Tensor,
        cache_lengths: Tensor,
        attention_mask: Tensor,
        logit_index: Tensor,
        past_key: list[Tensor],
        past_value: list[Tensor],
        position_ids: Tensor,
        ntk_table: Tensor,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The graph.  Shapes as in `StepInputs` and `KVCache`; `position_ids` and `ntk_table` are not read by models
        without them.  Tables must have been prepared for the capacity of the cache.

        Returns: logits [batch, N, vocab] and the updated caches (the same tensors, in eager execution).
        """
        spec = self.spec
        x = self.embed(input_ids)
        if spec.position == "learned":
            x = x + self.position_embed(position_ids)
        x = tap("embed", x)
        positions = self.positions(cache_lengths, attention_mask, position_ids, ntk_table)
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            x, (key, value) = block(x, (past_key[i], past_value[i]), positions)
            keys.append(key)
            values.append(value)
        return self.logits(x, logit_index), keys, values

    def logits(self, x: Tensor, logit_index: Tensor) -> Tensor:
        """Logits [batch, N, vocab] of the selected outputs of the last block."""
        x = tap("final_norm", self.final_norm(select_tokens(x, logit_index)))
        return tap("logits", self.head(x))

    def positions(
        self, cache_lengths: Tensor, attention_mask: Tensor, position_ids: Tensor, ntk_table: Tensor
    ) -> Positions:
        """The inputs of attention that carry positions; tables that the model does not have are None."""
        visible = attention_mask.bool()
        cos = sin = query_scale = None
        if self.rope_cos is not None and self.rope_sin is not None:
            rows = rope_rows(position_ids, ntk_table, self.table_positions) if self.spec.uses_ntk else position_ids
            cos, sin = F.embedding(rows, self.rope_cos), F.embedding(rows, self.rope_sin)
        if self.logn is not None:
            query_scale = F.embedding(position_ids, self.logn[:, None]).squeeze(-1)
        return {
            "cache_lengths": cache_lengths,
            "visible": visible,
            "cos": cos,
            "sin": sin,
            "query_scale": query_scale,
            "alibi_slopes": self.alibi_slopes,
        }

    def positions_of(self, step: StepInputs) -> Positions:
        """`positions` of a step, on this model's device."""
        inputs = self._inputs(step)
        names = ("cache_lengths", "attention_mask", "position_ids", "ntk_table")
        return self.positions(*(inputs[name] for name in names))

    def _inputs(self, step: StepInputs) -> dict[str, Tensor]:
        """The step's arguments of `forward`; arguments that this model does not read get a placeholder."""
        inputs = {name: value.to(self.device) for name, value in step.tensors().items()}
        inputs.setdefault("position_ids", inputs["input_ids"])
        inputs.setdefault("ntk_table", inputs["cache_lengths"])
        return inputs

    def step(
        self,
        input_ids: Tensor,
        cache: KVCache,
        attention_mask: Tensor | None = None,
        *,
        prompt_lengths: Tensor | None = None,
        last_logits_only: bool = False,
    ) -> Tensor:
        """Run tokens (a prompt, a chunk of it, or one new token per row) and advance the cache.

        Arguments and errors as `KVCache.next_step`.  Returns logits [batch, tokens or 1, vocab].
        """
        step = cache.next_step(
            input_ids, attention_mask, prompt_lengths=prompt_lengths, last_logits_only=last_logits_only
        )
        return self.run(step, cache)

    def run(self, step: StepInputs, cache: KVCache) -> Tensor:
        """Run a step and advance the cache."""
        self.prepare_tables(cache.capacity)
        recorder = active_recorder()
        if recorder is not None:
            recorder.live_slots = step.attention_mask.shape[1]
        logits: Tensor
        logits, cache.key, cache.value = self(past_key=cache.key, past_value=cache.value, **self._inputs(step))
        cache.advance(step)
        return logits

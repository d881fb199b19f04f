"""The reference module behind every tap, as a function of named arguments.

A decoder runs its modules one after another.  To find the output of one of them with a changed fact (another epsilon, a
transposed weight, rope applied twice), it has to run alone, on the inputs that were captured from an engine.
`module_at` returns it as a kind, a function and its arguments; the fault catalogue (`debug/comparison/faults/`) changes
arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debug.capture.capture import Forward
from debug.comparison.attend import attend
from refmodels.attention import ATTENTION_INPUTS, AttentionFacts, AttentionInputs
from refmodels.dtypes import wide_dtype
from refmodels.model import Attention, Decoder, RmsNorm, activate
from refmodels.ops import by_head, cached_attention, fused_rms_norm, heads_in_a_row, join_qkv, select_tokens
from refmodels.positions import ntk_alphas, rope_table
from refmodels.quantization.arithmetic import quantize_groups, quantize_static
from refmodels.quantization.formats import CODE_TYPES
from refmodels.quantization.linear import QuantizedLinear
from refmodels.spec import RopeSpec

Kind = Literal["embed", "norm", "linear", "attention", "activation", "residual"]


@dataclass(frozen=True, kw_only=True)
class Module:
    """One module of the reference, and its arguments in one forward pass.

    A call runs it with some arguments changed, such as `module(eps=1e-5)`, and returns the value of the tap.
    """

    tap: str
    kind: Kind
    decoder: Decoder
    forward: Forward
    function: Callable[..., Tensor]
    arguments: Mapping[str, Any]

    def __call__(self, **changes: Any) -> Tensor:
        unknown = changes.keys() - self.arguments.keys()
        assert not unknown, f"{self.kind} has no argument {sorted(unknown)}"
        return self.function(**{**self.arguments, **changes})

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def layer(self) -> int | None:
        return self.decoder.spec.taps[self.tap].layer

    @property
    def part(self) -> str:
        """The tap within its block: 'attn.qkv'; '' for the block's own output; the whole name outside blocks."""
        return self.decoder.spec.taps[self.tap].part

    def rope(self, rope: RopeSpec, *, shift: Tensor | int = 0, alpha: Tensor | None = None) -> dict[str, Tensor]:
        """cos and sin [batch, tokens, dim / 2] of another rotation, computed as this decoder computes its own.

        shift: added to the positions.  alpha: [batch] dynamic-NTK factors; None: the factors chosen by the inputs.
        """
        inputs, device = self.forward.inputs, self.decoder.device
        assert inputs.position_ids is not None
        positions = inputs.position_ids.to(device) + shift
        lowest = min(0, int(positions.min()))
        # A table begins at 0; rotating by a negative position is the inverse rotation.
        size = int(positions.abs().max()) + 1
        if alpha is None:
            factors = torch.tensor(ntk_alphas(rope, self.decoder.table_positions))
            alpha = torch.ones(len(positions)) if inputs.ntk_table is None else factors[inputs.ntk_table]
        rows = []
        for row, factor in zip(positions, alpha.tolist(), strict=True):
            cos, sin = rope_table(
                rope, positions=size, alpha=factor, numerics=self.decoder.numerics, dtype=self.decoder.dtype
            )
            sign = torch.where(row < 0, -1.0, 1.0)[:, None].to(sin.dtype) if lowest < 0 else 1.0
            rows.append((cos.to(device)[row.abs()], sin.to(device)[row.abs()] * sign))
        return {"cos": torch.stack([c for c, _ in rows]), "sin": torch.stack([s for _, s in rows])}


def module_at(decoder: Decoder, tap: str, forward: Forward) -> Module:
    """The module that makes `tap`, with the inputs captured from the engine, in the dtype of `decoder`."""
    tensors = forward.tensors

    def engine(name: str) -> Tensor:
        return tensors[name].to(device=decoder.device, dtype=decoder.dtype)

    def make(kind: Kind, run: Callable[..., Tensor], **arguments: Any) -> Module:
        return Module(tap=tap, kind=kind, decoder=decoder, forward=forward, function=run, arguments=arguments)

    inputs, spec = forward.inputs, decoder.spec
    made = spec.taps[tap]
    if made.kind == "embed":
        learned = spec.position == "learned"
        return make(
            "embed",
            _embed,
            ids=inputs.input_ids.to(decoder.device),
            positions=None if inputs.position_ids is None else inputs.position_ids.to(decoder.device),
            table=decoder.embed.weight,
            position_table=decoder.position_embed.weight if learned else None,
            factor=1.0,
            position_factor=1.0,
        )
    if made.kind in ("cache", "attention"):
        assert made.layer is not None
        return make("attention", _attention, **_attention_arguments(decoder, made.layer, made.part, forward))
    reads = [engine(name) for name in made.reads]
    if made.kind == "norm":
        # The final norm sees only the tokens whose logits are wanted.
        index = inputs.logit_index.to(decoder.device) if made.layer is None else None
        norm = decoder.get_submodule(made.module)
        x = reads[0] if made.columns is None else reads[0][..., slice(*made.columns)]
        return make("norm", _norm, x=x, index=index, **_norm_arguments(norm))
    if made.kind == "residual":
        trunk, branch = reads
        return make("residual", _residual, x=trunk, branch=branch, x_factor=1.0, branch_factor=1.0)
    if made.kind == "activation":
        *gate, up = reads
        return make(
            "activation",
            _activation,
            gate=gate[0] if gate else None,
            up=up,
            function=lambda x: activate(x, spec.mlp.activation, stepwise=decoder.numerics == "upstream"),
        )
    return make("linear", **_linear_arguments(decoder, tap, reads[0]))


def linear_of(decoder: Decoder, tap: str) -> nn.Linear | QuantizedLinear:
    """The linear layer that makes `tap`."""
    layer = decoder.get_submodule(decoder.spec.taps[tap].module)
    assert isinstance(layer, nn.Linear | QuantizedLinear)
    return layer


def float_weight(layer: nn.Linear | QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """The weight [out, in], dequantized if the layer is quantized."""
    return layer.quantized.dequantized(dtype) if isinstance(layer, QuantizedLinear) else layer.weight


def _linear_arguments(decoder: Decoder, tap: str, x: Tensor) -> dict[str, Any]:
    layer = linear_of(decoder, tap)
    found = {"input": x, "weight": float_weight(layer, decoder.dtype), "bias": layer.bias}
    if isinstance(layer, nn.Linear):
        return {"run": F.linear, **found}
    rounding = layer.format.input_scale if layer.format.input is not None else None
    return {"run": partial(_quantized_linear, layer), "rounding": rounding, **found}


def _quantized_linear(
    layer: QuantizedLinear, *, input: Tensor, weight: Tensor, bias: Tensor | None, rounding: str | None
) -> Tensor:
    """The layer with another weight, given as floats, or another quantization of its input."""
    input = layer.scaled(input)
    if rounding is not None:
        input, weight = (t if layer.order is None else t[..., layer.order] for t in (input, weight))
        input = rounded_input(layer, input, rounding)
    return F.linear(input, weight.to(input.dtype), bias)


def rounded_input(layer: QuantizedLinear, x: Tensor, rounding: str) -> Tensor:
    """An input after quantizing and dequantizing it; wide until the end."""
    code = layer.format.input or "int8"
    if rounding == "tensor":
        assert layer.input_scale is not None
        constant = quantize_static(x, layer.input_scale, code).to(wide_dtype(x.dtype)) * layer.input_scale
        return constant.to(x.dtype)
    groups = layer.scale.shape[1] if rounding == "group" else 1
    codes, scale = quantize_groups(x, code, groups)
    numbers: Tensor = codes.to(scale.dtype).unflatten(-1, (groups, -1)) * scale[..., None]
    return numbers.flatten(-2).to(x.dtype)


def _embed(
    *,
    ids: Tensor,
    positions: Tensor | None,
    table: Tensor,
    position_table: Tensor | None,
    factor: float,
    position_factor: float,
) -> Tensor:
    x = F.embedding(ids.clamp(0, len(table) - 1), table) * factor
    if position_table is not None:
        assert positions is not None
        x = x + F.embedding(positions.clamp(0, len(position_table) - 1), position_table) * position_factor
    return x


def _norm_arguments(norm: nn.Module) -> dict[str, Any]:
    if isinstance(norm, RmsNorm):
        facts = norm.norm
        return {
            "norm": "rms", "weight": norm.weight, "bias": None, "eps": facts.eps,
            "weight_in_float": facts.weight_in_float, "statistic": None,
        }  # fmt: skip
    assert isinstance(norm, nn.LayerNorm)
    return {
        "norm": "layer", "weight": norm.weight, "bias": norm.bias, "eps": norm.eps,
        "weight_in_float": False, "statistic": None,
    }  # fmt: skip


def _norm(
    *,
    x: Tensor,
    index: Tensor | None,
    norm: str,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    weight_in_float: bool,
    statistic: Callable[[Tensor, float], Tensor] | None,
) -> Tensor:
    """`statistic`: another normalization, a function of the input and epsilon."""
    if index is not None:
        x = select_tokens(x, index)
    if norm == "none":
        return x
    x = by_head(x, len(weight))
    if statistic is not None:
        y = statistic(x, eps) * weight
        return heads_in_a_row(y if bias is None else y + bias)
    if norm == "layer":
        return heads_in_a_row(F.layer_norm(x, weight.shape, weight, bias, eps))
    y = fused_rms_norm(x, weight, eps=eps, weight_in_float=weight_in_float)
    return heads_in_a_row(y if bias is None else y + bias)


def _residual(*, x: Tensor, branch: Tensor, x_factor: float, branch_factor: float) -> Tensor:
    return x * x_factor + branch * branch_factor


def _activation(*, gate: Tensor | None, up: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return function(up) if gate is None else function(gate) * up


def _attention_arguments(decoder: Decoder, layer: int, part: str, forward: Forward) -> dict[str, Any]:
    spec, inputs, path = decoder.spec, forward.inputs, f"blocks.{layer}"
    device, dtype = decoder.device, decoder.dtype
    slots = inputs.attention_mask.shape[1]
    caches: dict[str, Tensor] = {}
    attn = decoder.blocks[layer].attn
    assert isinstance(attn, Attention)
    stored = dtype if spec.cache_code is None else CODE_TYPES[spec.cache_code]
    for name in ("key", "value"):
        before = forward.before[f"{path}.{name}"].to(device=device, dtype=stored)
        caches[f"{name}_cache"] = F.pad(before, (0, 0, 0, slots - before.shape[2]))
    reads = spec.taps[f"{path}.attn.context"].reads
    *normed, qkv = (forward.tensors[name].to(device=device, dtype=dtype) for name in reads)
    if normed:
        query, key = normed
        qkv = join_qkv(query, key, qkv[..., sum(attn.widths) :])
    given = AttentionInputs(
        qkv=qkv,
        **caches,
        **decoder.positions_of(inputs),
        key_scale=attn.key_scale,
        value_scale=attn.value_scale,
    )
    hooks = {"read": None, "seen": None, "scores": None, "weights": None}
    return {"part": part, **given._asdict(), **vars(attn.facts), **hooks, "causal": True, "after": None}


def _attention(
    *,
    part: str,
    causal: bool,
    after: Callable[[Tensor], Tensor] | None,
    read: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    seen: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    scores: Callable[[Tensor], Tensor] | None,
    weights: Callable[[Tensor, Tensor], Tensor] | None,
    **arguments: Any,
) -> Tensor:
    """`cached_attention` on copies of the caches; `part` selects its result.

    causal False: every query sees all visible slots.  after: a function that changes the result.  read, seen, scores,
    weights: as in `attend`, for the context.
    """
    given = AttentionInputs(**{row.name: arguments[row.name] for row in ATTENTION_INPUTS})
    given = given._replace(key_cache=given.key_cache.clone(), value_cache=given.value_cache.clone())
    facts = AttentionFacts(**{field.name: arguments[field.name] for field in fields(AttentionFacts)})
    if part == "attn.context" and (not causal or any(f is not None for f in (read, seen, scores, weights))):
        if not causal:
            seen = seen or (lambda slot, query, visible: visible)
        context = attend(given, facts, read=read, seen=seen, scores=scores, weights=weights)
        return context if after is None else after(context)
    context, key, value = cached_attention(given, facts)
    # A quantized cache is compared by its quantized values.
    result = {"key": key, "value": value, "attn.context": context}[part].to(context.dtype)
    return result if after is None else after(result)

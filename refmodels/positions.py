"""Position schemes as data: RoPE tables, NTK factors, logn factors and ALiBi slopes.

The attention op receives these as tensors, so that one op and one kernel serve every family.  `upstream` numerics
repeat the arithmetic of the Hugging Face code, including its rounding; `exact` numerics compute in fp64 and round once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from refmodels.dtypes import wide_dtype
from refmodels.errors import LogitLockError
from refmodels.spec import ModelSpec, Numerics, RopeScaling, RopeSpec

MOST_TABLE_BYTES = 256 << 20
"""Memory of the tables of a base that grows with every position: a table for each length."""


@dataclass(frozen=True, kw_only=True)
class PositionTables:
    """Tables for positions (or slots) below `positions`; None if the model does not use the scheme.

    rope_cos, rope_sin: [tables * positions, rope_dim / 2]; table t starts at row t * positions (a base that grows has
    one table per factor, others have one).  logn: [positions].  alibi_slopes: [heads].
    """

    positions: int
    rope_cos: Tensor | None = None
    rope_sin: Tensor | None = None
    logn: Tensor | None = None
    alibi_slopes: Tensor | None = None


def build_tables(
    spec: ModelSpec, *, positions: int, numerics: Numerics, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PositionTables:
    """Make the tables for a model that runs in `dtype`.  `positions` is the cache capacity (slots).

    Raises:
        LogitLockError: the base grows at every position, and all tables together would be larger than
            `MOST_TABLE_BYTES`.
    """
    cos = sin = logn = slopes = None
    if spec.rope is not None:
        if spec.rope.scaling is not None and spec.rope.scaling.kind == "dynamic":
            longest = longest_dynamic(spec.rope, positions)
            if longest < positions:
                raise LogitLockError(
                    f"dynamic rope scaling has a table for each length above {spec.rope.scaling.original_positions}: "
                    f"{spec.variant} is served with at most {longest} positions, not {positions}"
                )
        pairs = [
            rope_table(spec.rope, positions=positions, alpha=alpha, numerics=numerics, dtype=dtype)
            for alpha in ntk_alphas(spec.rope, positions)
        ]
        cos = torch.cat([c for c, _ in pairs]).to(device)
        sin = torch.cat([s for _, s in pairs]).to(device)
    seq_length = spec.attention.logn_seq_length
    if seq_length is not None:
        logn = logn_table(positions, seq_length).to(dtype if numerics == "upstream" else wide_dtype(dtype)).to(device)
    if spec.position == "alibi":
        slopes = torch.tensor(alibi_slopes(spec.attention.heads), dtype=wide_dtype(dtype), device=device)
    return PositionTables(positions=positions, rope_cos=cos, rope_sin=sin, logn=logn, alibi_slopes=slopes)


def rope_table(
    rope: RopeSpec, *, positions: int, alpha: float = 1.0, numerics: Numerics, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [positions, rope.dim / 2].

    `exact`: fp64 arithmetic, rounded once to the wide dtype of `dtype`.  `upstream`: as `rope.table` says
    (modeling_qwen.py 1287-1308, modeling_baichuan.py 91-119, modeling_chatglm.py 121-152, transformers qwen2 86-126).
    `alpha` is the dynamic-NTK factor: base * alpha ** (dim / (dim - 2)).  `rope.scaling`: see `inverse_frequencies`.
    """
    theta = rope.theta * alpha ** (rope.dim / (rope.dim - 2)) if alpha != 1.0 else rope.theta
    if numerics == "exact":
        work = torch.float64
    elif rope.table == "working_arithmetic":
        work = dtype
    else:
        work = wide_dtype(dtype)
    inverse_frequency = inverse_frequencies(rope, theta, work)
    if numerics == "upstream" and rope.table == "working_frequencies":
        inverse_frequency = inverse_frequency.to(dtype).to(work)
    index = torch.arange(positions, dtype=work)
    if rope.position_divisor != 1.0:
        index = index / rope.position_divisor
    angle = torch.outer(index, inverse_frequency)
    final = dtype if numerics == "upstream" and rope.table != "float32" else wide_dtype(dtype)
    factor = 1.0 if rope.scaling is None else rope.scaling.attention_factor
    return (angle.cos() * factor).to(final), (angle.sin() * factor).to(final)


def inverse_frequencies(rope: RopeSpec, theta: float, dtype: torch.dtype) -> Tensor:
    """Angle per position of each rotated pair [dim / 2], computed in `dtype`, with `rope.scaling` applied.

    Source: transformers modeling_rope_utils.py at 5.24.0, _compute_linear_scaling_rope_parameters,
    _compute_yarn_parameters and _compute_llama3_parameters, operation by operation.
    """
    frequency = theta ** (torch.arange(0, rope.dim, 2, dtype=dtype) / rope.dim)
    scaling, inverse = rope.scaling, 1.0 / frequency
    if scaling is None or scaling.kind == "dynamic":
        return inverse
    if scaling.kind == "linear":
        return inverse / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(scaling, inverse)
    kept = 1 - _yarn_ramp(scaling, rope.dim, theta, dtype)
    return 1.0 / (scaling.factor * frequency) * (1 - kept) + inverse * kept


def _yarn_ramp(scaling: RopeScaling, dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """How far each pair is interpolated: 0 keeps its frequency, 1 divides it by the factor."""

    def element(turns: float) -> float:
        """The element that turns that often in the original length."""
        return dim * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = element(scaling.beta_fast), element(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    # Upstream's way around a division by zero.
    high += 0.001 if low == high else 0
    return ((torch.arange(dim // 2, dtype=dtype) - low) / (high - low)).clamp(0, 1)


def _llama3(scaling: RopeScaling, inverse: Tensor) -> Tensor:
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    original, wavelength = scaling.original_positions, 2 * math.pi / inverse
    divided = torch.where(wavelength > original / low, inverse / scaling.factor, inverse)
    smooth = (original / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * divided / scaling.factor + smooth * divided
    return torch.where((wavelength < original / high) | (wavelength > original / low), divided, smoothed)


def ntk_alpha(tokens: int, seq_length: int) -> float:
    """Qwen's dynamic-NTK factor for a prompt of `tokens` real tokens: 1 up to seq_length, then 3, 7, 15, ...

    Source: modeling_qwen.py 735-739.
    """
    return max(2.0 ** math.ceil(math.log2(max(tokens, 1) / seq_length) + 1) - 1, 1.0)


def ntk_alphas(rope: RopeSpec, positions: int) -> list[float]:
    """The factors that sequences of at most `positions` tokens can get, one table each; [1.0] if the base is fixed."""
    scaling = rope.scaling
    if scaling is not None and scaling.kind == "dynamic":
        lengths = range(scaling.original_positions, max(positions, scaling.original_positions) + 1)
        return [scaling.factor * n / scaling.original_positions - (scaling.factor - 1) for n in lengths]
    if rope.ntk_seq_length is None:
        return [1.0]
    return [float(2 ** (t + 1) - 1) for t in range(ntk_table_index(positions, rope.ntk_seq_length) + 1)]


def longest_dynamic(rope: RopeSpec, wanted: int) -> int:
    """The most positions, up to `wanted`, whose fp32 tables of dynamic scaling fit in `MOST_TABLE_BYTES`."""
    assert rope.scaling is not None
    original = rope.scaling.original_positions
    # Tables * positions * (cos and sin of dim / 2 elements in fp32): a quadratic inequality in the positions.
    rows = MOST_TABLE_BYTES / (4 * rope.dim)
    most = math.floor((original - 1 + math.sqrt((original - 1) ** 2 + 4 * rows)) / 2)
    return min(wanted, max(most, original))


def ntk_table_index(tokens: int, seq_length: int) -> int:
    """Which table of `ntk_alphas` a prompt of `tokens` real tokens uses."""
    return int(math.log2(ntk_alpha(tokens, seq_length) + 1)) - 1


def logn_table(positions: int, seq_length: int) -> Tensor:
    """Query factor per slot p, fp64 [positions]: log_{seq_length}(p + 1) past seq_length, else 1.

    Source: modeling_qwen.py 289-294.
    """
    return torch.tensor(
        [math.log(p, seq_length) if p > seq_length else 1.0 for p in range(1, positions + 1)], dtype=torch.float64
    )


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi slopes per head (Press et al., arXiv:2108.12409; modeling_baichuan.py 20-31).

    If the number of heads is not a power of two, the slopes of the next lower power are followed by every other slope
    of the next higher power.
    """
    power = 2 ** math.floor(math.log2(heads))

    def geometric(n: int) -> list[float]:
        ratio = 2.0 ** (-8.0 / n)
        return [ratio * ratio**i for i in range(n)]

    return geometric(power) + geometric(2 * power)[0::2][: heads - power]

"""The spec of a decoder: everything that distinguishes one model family from another, as data.

A family file (`refmodels/families/`) turns a Hugging Face `config.json` into a `ModelSpec`; the decoder core, the
position tables, the exporter and the engines read only the spec.  All dataclasses are frozen, keyword-only and reject
unknown keys, so that a bundle of a later version is an error instead of running with a missing fact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from refmodels.errors import LogitLockError
from refmodels.json_records import read_record
from refmodels.quantization.formats import EightBit, LinearFormat, QuantizationSpec
from refmodels.taps import Tap, make_taps

MAX_LAYERS = 10_000
"""More than any model has: what a file says is refused before anything is made for each layer."""

MAX_POSITIONS = 1 << 30

Numerics = Literal["exact", "upstream"]
Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_new", "gelu_fast", "quick_gelu", "relu"]
RopeTable = Literal["float32", "working", "working_frequencies", "working_arithmetic"]
RopeScalingKind = Literal["linear", "dynamic", "yarn", "llama3"]
AttentionArithmetic = Literal[
    "exact",
    "sdpa",
    "eager_divide",
    "eager_divide_float32",
    "eager_multiply",
    "eager_multiply_float32",
    "eager_upcast",
]


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """`kind` rms or layer; `weight_in_float`: the RMSNorm weight multiplies before the cast back (ChatGLM2)."""

    kind: Literal["rms", "layer"]
    eps: float
    weight_in_float: bool = False


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for a longer context (transformers modeling_rope_utils.py, 5.24.0).

    `kind` linear: all are divided by `factor`.  dynamic: the base grows with the longest sequence of the batch, at
    every step beyond `original_positions`.  yarn (Peng et al., arXiv:2309.00071): pairs that turn less than `beta_slow`
    times in `original_positions` are divided, those that turn more than `beta_fast` times are kept, those between are
    interpolated, between whole elements if `truncate`.  llama3: the same by wavelength, between `original_positions` /
    `low_frequency_factor` and / `high_frequency_factor`.  `attention_factor` multiplies cos and sin.
    """

    kind: RopeScalingKind
    factor: float
    original_positions: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding of the first `dim` elements of each head (Su et al., arXiv:2104.09864).

    `interleaved` rotates pairs (0,1),(2,3)..; otherwise i with i + dim/2.  Positions are divided by
    `position_divisor` (linear interpolation).  `ntk_seq_length` switches Qwen's dynamic NTK on: the base grows with
    the prompt length in multiples of it.  `scaling`: the frequencies are changed for a longer context.  `table` says
    how upstream computes cos/sin: in fp32 ("float32"), in fp32 and then cast ("working"), with the frequencies cast too
    ("working_frequencies": transformers' own classes after `Module.to(dtype)`), or with the angles, too, computed in
    the working dtype ("working_arithmetic").
    """

    dim: int
    theta: float = 10000.0
    interleaved: bool = False
    position_divisor: float = 1.0
    ntk_seq_length: int | None = None
    table: RopeTable = "float32"
    scaling: RopeScaling | None = None

    @property
    def grows(self) -> bool:
        """Whether the base grows with the length: there is one table per factor, and each step selects one."""
        return self.ntk_seq_length is not None or (self.scaling is not None and self.scaling.kind == "dynamic")


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The heads, and the order in which upstream rounds.

    `scale_by_layer` divides the scale by (layer + 1) as well (GPT-2's scale_attn_by_inverse_layer_idx).  `window` keys,
    self included, are visible in layers >= `window_first_layer` that are not among `window_skips`.  `logn_seq_length`
    switches Qwen's logn query scaling on.  `head_norms`: every query head and every key head is normalized before rope,
    by the model's kind of norm with one weight for all query heads and one for all key heads (Qwen3).
    `upstream_arithmetic` names upstream's implementation; see
    `refmodels.ops.cached_attention`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    out_bias: bool
    scale: float
    upstream_arithmetic: AttentionArithmetic
    scale_by_layer: bool = False
    window: int | None = None
    window_first_layer: int = 0
    window_skips: tuple[int, ...] = ()
    logn_seq_length: int | None = None
    head_norms: bool = False


@dataclass(frozen=True, kw_only=True)
class MlpSpec:
    """`gated`: out(activation(gate(x)) * up(x)); otherwise out(activation(up(x))).  `width` is the real FFN width."""

    width: int
    activation: Activation
    gated: bool
    bias: bool


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One decoder-only model: embedding, `layers` pre-norm blocks, final norm, head.

    `position`: "rope" (then `rope` is set), "alibi" or "learned".  `position_origin` says what position a token has
    under left padding: its index among the row's real tokens, or its cache slot (Qwen).  `max_positions` is the
    longest sequence (tokens) that the model's own configuration allows.  `head_normalized`: rows of the head are
    divided by their L2 norm when the checkpoint is loaded (Baichuan2's NormHead).  `sandwich_norms`: the results of
    attention and MLP are normalized too, before they are added to the residual stream (GLM-4-0414).  `quantization`:
    the quantized linear layers and cache; None: nothing is quantized.
    """

    family: str
    variant: str
    vocab_size: int
    hidden_size: int
    layers: int
    max_positions: int
    norm: NormSpec
    attention: AttentionSpec
    mlp: MlpSpec
    position: Literal["rope", "alibi", "learned"]
    rope: RopeSpec | None = None
    position_origin: Literal["token", "slot"] = "token"
    tied_head: bool = False
    head_normalized: bool = False
    sandwich_norms: bool = False
    chat_format: str = "raw"
    quantization: QuantizationSpec | None = None

    def __post_init__(self) -> None:
        a = self.attention
        self._check_bounds()
        if (self.rope is not None) != (self.position == "rope"):
            raise LogitLockError(f"spec of {self.variant}: rope must be given exactly when position is 'rope'")
        if a.heads % a.kv_heads:
            raise LogitLockError(f"spec of {self.variant}: {a.heads} heads are not a multiple of {a.kv_heads} kv_heads")
        quantized = () if self.quantization is None else self.quantization.modules
        known = set(self.linears) if quantized else ()
        for module in quantized:
            if module not in known:
                raise LogitLockError(f"spec of {self.variant}: {module!r} is not a linear layer that can be quantized")
        if self.rope is not None and (self.rope.dim % 2 or not 0 < self.rope.dim <= a.head_dim):
            raise LogitLockError(
                f"spec of {self.variant}: rope dim {self.rope.dim} must be even and at most head_dim {a.head_dim}"
            )

    def _check_bounds(self) -> None:
        """Refuse numbers that no model has, before anything is allocated or computed with them."""
        a, rope = self.attention, self.rope
        counts = {
            "vocab_size": (self.vocab_size, 1 << 26),
            "hidden_size": (self.hidden_size, 1 << 20),
            "layers": (self.layers, MAX_LAYERS),
            "max_positions": (self.max_positions, MAX_POSITIONS),
            "attention.heads": (a.heads, 1 << 16),
            "attention.kv_heads": (a.kv_heads, 1 << 16),
            "attention.head_dim": (a.head_dim, 1 << 16),
            "mlp.width": (self.mlp.width, 1 << 24),
        }
        for name, (value, most) in counts.items():
            if not 1 <= value <= most:
                raise LogitLockError(f"spec of {self.variant}: {name} is {value}; it must be from 1 to {most}")
        for name, number, zero in (
            ("norm.eps", self.norm.eps, True),
            ("attention.scale", abs(a.scale), False),
            ("rope.theta", 1.0 if rope is None else rope.theta, False),
            ("rope.position_divisor", 1.0 if rope is None else rope.position_divisor, False),
        ):
            if not (0 < number < math.inf or (zero and number == 0)):
                raise LogitLockError(
                    f"spec of {self.variant}: {name} is {number}; it must be a finite number "
                    f"{'of at least' if zero else 'above'} 0"
                )
        if rope is not None and rope.scaling is not None:
            self._check_scaling(rope, rope.scaling)

    def _check_scaling(self, rope: RopeSpec, scaling: RopeScaling) -> None:
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        for name, number, most in (
            ("factor", scaling.factor, math.inf),
            ("attention_factor", scaling.attention_factor, math.inf),
            ("original_positions", scaling.original_positions, MAX_POSITIONS),
            ("beta_slow", scaling.beta_slow, math.inf),
            ("beta_fast", scaling.beta_fast, math.inf),
            ("low_frequency_factor", low, math.inf),
        ):
            if not (0 < number < math.inf and number <= most):
                raise LogitLockError(
                    f"spec of {self.variant}: rope.scaling.{name} is {number}; it must be a finite number above 0"
                )
        if scaling.kind == "llama3" and not low < high < math.inf:
            raise LogitLockError(
                f"spec of {self.variant}: rope.scaling.high_frequency_factor is {high}; it must be above "
                f"low_frequency_factor, {low}"
            )
        if scaling.kind == "yarn" and rope.theta <= 1:
            raise LogitLockError(f"spec of {self.variant}: rope.theta is {rope.theta}; YaRN needs one above 1")
        if scaling.kind == "dynamic" and (scaling.factor < 1 or rope.dim <= 2 or rope.ntk_seq_length is not None):
            raise LogitLockError(
                f"spec of {self.variant}: dynamic rope.scaling needs a factor of at least 1, more than 2 rotated "
                "elements and no ntk_seq_length"
            )

    def scale(self, layer: int) -> float:
        """Factor on q.k in block `layer`."""
        return self.attention.scale / (layer + 1) if self.attention.scale_by_layer else self.attention.scale

    def window(self, layer: int) -> int:
        """Visible keys (self included) in block `layer`; 0 means all."""
        a = self.attention
        limited = layer >= a.window_first_layer and layer not in a.window_skips
        return a.window if a.window is not None and limited else 0

    @cached_property
    def taps(self) -> Mapping[str, Tap]:
        """Every tensor that has a name, in the order of execution."""
        return make_taps(self)

    @cached_property
    def cache_taps(self) -> tuple[Tap, ...]:
        """The taps that are cache tensors, in the order of execution."""
        return tuple(tap for tap in self.taps.values() if tap.kind == "cache")

    @property
    def linears(self) -> tuple[str, ...]:
        """Linear layers that have a weight of their own, in the order of execution; a tied head has none."""
        found = (tap.module for tap in self.taps.values() if tap.kind == "linear")
        return tuple(module for module in found if module != "head" or not self.tied_head)

    def format_of(self, module: str) -> LinearFormat | None:
        """The format of a quantized linear layer ('blocks.0.attn.qkv', 'head'); None if it is not quantized."""
        return None if self.quantization is None else self.quantization.format_of(module)

    @property
    def cache_code(self) -> EightBit | None:
        """The quantized type of the cache; None: the working dtype."""
        return None if self.quantization is None else self.quantization.cache

    @property
    def qkv_width(self) -> int:
        a = self.attention
        return (a.heads + 2 * a.kv_heads) * a.head_dim

    @property
    def uses_position_ids(self) -> bool:
        return self.position != "alibi"

    @property
    def uses_ntk(self) -> bool:
        return self.rope is not None and self.rope.grows

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `spec_from_dict` reads them back."""
        return dataclasses.asdict(self)


def spec_from_dict(data: dict[str, Any]) -> ModelSpec:
    """Read what `ModelSpec.to_dict` wrote.

    Raises:
        LogitLockError: an unknown or missing key, or a value of the wrong type, named with its path.
    """
    return read_record(ModelSpec, data, "spec")

"""The error of code flips: quantized values that fall on the other side of a rounding boundary.

An input (or a key, or a value) that is quantized while the model runs is rounded to coarse steps.  Two correct engines
differ by rounding before that, so they may quantize a number near a boundary to neighbouring codes: a difference of a
whole step in a few elements, of which the floor may happen to have none.  A quarter of the relative error of one such
flip is therefore a lower bound of the floor: the alarm at 8 floors is then two steps, which takes four flips in one
token.  With inputs as exact as fp32, about one in 25 tokens of 4096 elements has a flip; not rounding the input at all
is an error of sqrt(columns / 12) steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from debug.comparison.modules import linear_of
from refmodels.model import Decoder
from refmodels.quantization.formats import LIMITS, EightBit
from refmodels.quantization.linear import QuantizedLinear
from refmodels.taps import CACHE_PARTS

_SHARE = 0.25
_FP8_STEP = 2.0**-4
"""Half the relative distance of neighbouring e4m3 numbers at its largest, that is, the largest rounding error."""


class CodeFlips:
    """Relative errors that flips explain, computed from the engine's tensors.

    Args:
        decoder: the reference; static input scales are read from it if its weights are loaded.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.spec = decoder, decoder.spec
        self.largest = 0.0
        """For all taps requested so far: the mean over the tokens of a tap."""
        self._cache: dict[str, float] = {}

    def of(self, tap: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The relative error that flips explain at a tap, [batch, tokens]; None for a tap that does not depend on them.

        Taps of linear layers with quantized inputs and of attention on a quantized cache do.
        """
        made = self.spec.taps[tap]
        if made.kind == "attention" and self.spec.cache_code is not None:
            largest = max(self._cache[f"blocks.{made.layer}.{part}"] for part in CACHE_PARTS)
            return torch.full(tensors[tap].shape[:2], largest, dtype=torch.float64)
        if self.spec.format_of(made.module) is None:
            return None
        linear = linear_of(self.decoder, tap)
        assert isinstance(linear, QuantizedLinear)
        code = linear.format.input
        if code is None:
            return None
        x = tensors[made.reads[0]].double()
        if linear.pre_quant_scale is not None and not linear.pre_quant_scale.is_meta:
            x = linear.scaled(x)
        scale = linear.input_scale
        if scale is not None and not scale.is_meta:
            step = scale.double() * (1.0 if code == "int8" else LIMITS["fp8"] * _FP8_STEP)
        else:
            step = _step(x.abs().amax(-1), code)
        flips: Tensor = _SHARE * step / x.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
        self.largest = max(self.largest, float(flips.mean()))
        return flips

    def of_cache(self, tap: str, codes: Tensor) -> Tensor | None:
        """The relative error that flips explain in a quantized cache, [batch, slots]; None for a cache of floats.

        Args:
            tap: a key or value cache.
            codes: its quantized values, [batch, kv_heads, slots, head_dim].
        """
        code = self.spec.cache_code
        if code is None:
            return None
        rows = codes.transpose(1, 2).flatten(2).double()
        step = torch.ones(()) if code == "int8" else rows.abs().amax(-1) * _FP8_STEP
        found: Tensor = _SHARE * step / rows.norm(dim=-1).clamp(min=1.0)
        self.largest = max(self.largest, float(found.mean()))
        self._cache[tap] = max(self._cache.get(tap, 0.0), float(found.max()))
        return found


def _step(amax: Tensor, code: EightBit) -> Tensor:
    return amax / LIMITS["int8"] if code == "int8" else amax * _FP8_STEP

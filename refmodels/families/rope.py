"""Rotary embedding in the configs of transformers' own classes: the keys, under their old names and their new ones.

Source: modeling_rope_utils.py at 5.24.0, RotaryEmbeddingConfigMixin.  `rope_scaling` is the older name of
`rope_parameters` and wins; what is in it wins over the same key outside, but for `original_max_position_embeddings`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from refmodels.errors import LogitLockError
from refmodels.families.config import Config
from refmodels.spec import RopeScaling, RopeSpec

_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
_KNOWN = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor"),
    *("high_freq_factor", "finetuned"),
}


def read_rope(
    config: Config, *, head_dim: int, positions: int, rotated: float | None = None, interleaved: bool = False
) -> RopeSpec:
    """The rotary embedding of a config of transformers' own class.

    Args:
        positions: max_position_embeddings.
        rotated: the part of each head that is rotated, where the config does not say it; None: the class always rotates
            all of it.
    Raises:
        LogitLockError: a rope type or a part that is not served, a missing or senseless number.
    """
    name = "rope_scaling" if config.raw("rope_scaling") else "rope_parameters"
    inside = config.raw(name) or {}
    kind = inside.get("rope_type", inside.get("type", "default")) if isinstance(inside, Mapping) else inside
    if kind not in _KINDS or not isinstance(inside, Mapping):
        raise LogitLockError(f"{config.where}: rope type {kind!r} is not supported; only {', '.join(_KINDS)} are")
    nested = Config(inside, {}, f"{config.where}: {name}")
    nested.require("mrope_section", None, None)
    for key, value in inside.items():
        if isinstance(value, Mapping):
            raise LogitLockError(f"{config.where}: {name} differs by kind of layer ({key}), which is not supported")
    unknown = [key for key in inside if key not in _KNOWN]
    if unknown:
        config.warnings.append(
            f"{config.where}: {name} has keys that LogitLock does not know and leaves out: {', '.join(unknown)}"
        )
    theta = nested.get(float, "rope_theta", default=config.get(float, "rope_theta", default=10000.0))
    part = nested.get(
        float, "partial_rotary_factor", default=config.get(float, "partial_rotary_factor", default=rotated or 1.0)
    )
    if rotated is None and part != 1.0:
        raise LogitLockError(f"{config.where}: partial_rotary_factor = {part:g} is not supported; only 1 is")
    return RopeSpec(
        dim=int(head_dim * part),
        theta=theta,
        interleaved=interleaved,
        table="working",
        scaling=None if kind == "default" else _scaling(kind, config, nested, positions),
    )


def _scaling(kind: str, config: Config, nested: Config, positions: int) -> RopeScaling:
    # Upstream gives an original length outside of rope_parameters priority.
    original = nested.get(int, "original_max_position_embeddings", default=positions)
    original = config.get(int, "original_max_position_embeddings", default=original)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=nested.get(float, "factor"), original_positions=positions)
    if kind == "dynamic":
        return RopeScaling(kind="dynamic", factor=nested.get(float, "factor"), original_positions=positions)
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=nested.get(float, "factor"),
            original_positions=original,
            low_frequency_factor=nested.get(float, "low_freq_factor"),
            high_frequency_factor=nested.get(float, "high_freq_factor"),
        )
    factor = nested.get(float, "factor", default=positions / original)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_positions=original,
        attention_factor=nested.get(float, "attention_factor", default=_yarn_attention_factor(nested, factor)),
        beta_fast=nested.get(float, "beta_fast", default=0.0) or 32.0,
        beta_slow=nested.get(float, "beta_slow", default=0.0) or 1.0,
        truncate=nested.get(bool, "truncate", default=True),
    )


def _yarn_attention_factor(nested: Config, factor: float) -> float:
    """YaRN's factor on cos and sin: 0.1 ln(factor) + 1, or the quotient of two such where both weights are given."""

    def scaled(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    top, bottom = (nested.get(float, key, default=0.0) for key in ("mscale", "mscale_all_dim"))
    return scaled(top) / scaled(bottom) if top and bottom else scaled(1.0)

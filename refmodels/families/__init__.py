"""The model families.  A family file turns a Hugging Face config into a `ModelSpec`, and checkpoint names into
parameters; adding a family means adding a file and a line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refmodels.errors import LogitLockError
from refmodels.families import baichuan, chatglm2, gpt, qwen
from refmodels.families.config import Config, Family
from refmodels.spec import ModelSpec

FAMILIES: Mapping[str, Family] = {f.name: f for f in (chatglm2.FAMILY, baichuan.FAMILY, qwen.FAMILY, gpt.FAMILY)}


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family that reads this Hugging Face config.

    Raises:
        LogitLockError: no model_type, or one that no family knows.
    """
    model_type = config.get("model_type")
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = ", ".join(t for f in FAMILIES.values() for t in f.model_types)
    if model_type is None:
        raise LogitLockError(f"{where} has no model_type; known ones: {known}")
    raise LogitLockError(f"{where} has the unknown model_type {model_type!r}; known ones: {known}")


def spec_from_config(
    config: Mapping[str, Any], *, variant: Mapping[str, Any] | None = None, where: str = "config.json"
) -> ModelSpec:
    """Architecture facts from a Hugging Face config.

    Args:
        config: the parsed config.json.
        variant: facts that no config key expresses (Baichuan's `norm_head` and `position`, `glm_generation`), by name.
        where: how errors name the config.
    Raises:
        LogitLockError: a missing key, an unknown model_type, or a setting that is not supported.
    """
    return family_of(config, where).spec(Config(config, variant or {}, where))

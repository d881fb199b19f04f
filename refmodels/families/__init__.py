"""The model families.  A family file turns a Hugging Face config into a `ModelSpec`, and checkpoint names into
parameters; adding a family means adding a file and a line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refmodels.errors import LogitLockError
from refmodels.families import baichuan, chatglm2, glm, gpt, llama, qwen
from refmodels.families.config import Config, Family
from refmodels.families.config_keys import refuse_others
from refmodels.spec import ModelSpec

FAMILIES: Mapping[str, Family] = {
    f.name: f for f in (chatglm2.FAMILY, baichuan.FAMILY, qwen.FAMILY, gpt.FAMILY, llama.FAMILY, glm.FAMILY)
}


def model_type_of(config: Mapping[str, Any], where: str = "config.json") -> str:
    """The model_type of a Hugging Face config; where it says none, the one whose class `architectures` names.

    Raises:
        LogitLockError: a model_type that no family knows; none, and no class that one knows.
    """
    types = {t: classes for family in FAMILIES.values() for t, classes in family.model_types.items()}
    said = config.get("model_type")
    if said is not None:
        if isinstance(said, str) and said in types:
            return said
        raise LogitLockError(f"{where} has the unknown model_type {said!r}; known ones: {', '.join(types)}")
    named = config.get("architectures")
    found = [t for t, classes in types.items() for c in (named if isinstance(named, list) else ()) if c in classes]
    if found:
        return found[0]
    also = f"none of its architectures {named!r} is known" if named else "no architectures"
    raise LogitLockError(
        f'{where} has no model_type, and {also}: add "model_type" to it; known ones: {", ".join(types)}'
    )


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family that reads this Hugging Face config.  Errors as `model_type_of`."""
    model_type = model_type_of(config, where)
    return next(family for family in FAMILIES.values() if model_type in family.model_types)


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
    typed = {**config, "model_type": model_type_of(config, where)}
    return read_spec(Config(typed, variant or {}, where))


def read_spec(config: Config) -> ModelSpec:
    """Architecture facts from a config that has a model_type.  Errors as `spec_from_config`."""
    refuse_others(config)
    return family_of(config.data, config.where).spec(config)

"""Where a checkpoint says how it is quantized: config.json, or a file of the library that quantized it.

Transformers reads `quantization_config` of config.json; AutoGPTQ and AutoAWQ wrote quantize_config.json and
quant_config.json before that, AutoAWQ with other names of the keys, and some checkpoints leave `quant_method` out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from refmodels.checkpoints.beside import Beside
from refmodels.errors import LogitLockError

MODELOPT_NAME = "hf_quant_config.json"
"""nvidia-modelopt repeats its part of config.json in this file, and adds the group sizes, which config.json lacks."""

_OLDER_NAMES = ("quantize_config.json", "quant_config.json")
_KEY = "quantization_config"
_ALIASES = {"w_bit": "bits", "q_group_size": "group_size"}
_MARKS: Mapping[str, tuple[str, ...]] = {
    "bitsandbytes": ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type"),
    "compressed-tensors": ("config_groups",),
    "modelopt": ("quant_algo",),
    "awq": ("w_bit", "q_group_size", "zero_point"),
    "gptq": ("desc_act", "sym", "damp_percent", "true_sequential", "static_groups", "checkpoint_format"),
}
"""Keys that one method alone has."""
_SUFFIXES: Mapping[str, str] = {"weight_packed": "compressed-tensors", "g_idx": "gptq", "qzeros": "awq"}
"""Tensors that tell a method, the first that is found."""
BITSANDBYTES = (".absmax", ".quant_map", ".nested_absmax", ".SCB", ".quant_state.bitsandbytes__nf4", ".weight_format")
"""Ends of the names of bitsandbytes' tensors."""


def said_of_quantization(config: Mapping[str, Any], where: str, beside: Beside) -> tuple[dict[str, Any], str] | None:
    """The quantization, with a quant_method and keys as in `quantization_config`, and the place's name for errors.

    Args:
        config: the parsed config.json.
        where: how errors name it.
        beside: the files beside it; the weight files are looked at only if nothing else tells the method.
    Raises:
        LogitLockError: bitsandbytes, or no method and nothing that tells it.
    """
    folder = where.removesuffix("config.json")
    said: Any = config.get(_KEY) or config.get("compression_config")
    place = f"{where}: {_KEY}"
    if beside.has(MODELOPT_NAME) and (said is None or as_object(said, place).get("quant_method") == "modelopt"):
        place = f"{folder}{MODELOPT_NAME}: quantization"
        said = {"quant_method": "modelopt", **as_object(beside.json(MODELOPT_NAME).get("quantization"), place)}
    older = next((name for name in _OLDER_NAMES if beside.has(name)), None)
    if said is None and older is not None:
        place, said = f"{folder}{older}", beside.json(older)
    if said is None:
        return None
    found = {_ALIASES.get(key, key): value for key, value in as_object(said, place).items()}
    method = found.get("quant_method")
    found["quant_method"] = _told(said, beside, place) if method is None else method
    if found["quant_method"] == "bitsandbytes":
        raise bitsandbytes(place)
    return found, place


def _told(said: Mapping[str, Any], beside: Beside, place: str) -> str:
    for method, keys in _MARKS.items():
        if any(said.get(key) is not None for key in keys):
            return method
    names = beside.tensors
    for suffix, method in _SUFFIXES.items():
        if any(name.endswith(f".{suffix}") for name in names):
            return method
    raise LogitLockError(
        f"{place} has no quant_method, and neither its keys nor the tensors tell it: "
        'add "quant_method": "gptq", "awq", "compressed-tensors" or "modelopt"'
    )


def bitsandbytes(place: str) -> LogitLockError:
    return LogitLockError(
        f"{place}: the weights are quantized by bitsandbytes, whose formats cannot be read (those of "
        "compressed-tensors, gptq, awq and modelopt can): give the model before quantization, and quantize it with "
        "`logitlock quantize`"
    )


def of_bitsandbytes(names: Iterable[str]) -> bool:
    """Whether tensors are bitsandbytes'."""
    return any(name.endswith(BITSANDBYTES) for name in names)


def as_object(value: Any, where: str) -> Mapping[str, Any]:
    """Raises LogitLockError where a value is no JSON object."""
    if not isinstance(value, Mapping):
        raise LogitLockError(f"{where} must be an object, got {type(value).__name__}")
    return value

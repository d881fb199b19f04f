"""`quantization_config` of a Hugging Face config.json: how a checkpoint describes its quantized modules.

The configs of compressed-tensors (llm-compressor, vLLM), GPTQ (AutoGPTQ, GPTQModel), AWQ (AutoAWQ) and nvidia-modelopt
are read; the one that `Storage` names is written.  Modules are named as upstream names them; one fused module upstream
may be several here, and the reverse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from refmodels.checkpoints.quantized_files import MODELOPT_NAME, as_object
from refmodels.checkpoints.quantized_layouts import (
    MODELOPT_ALGORITHMS,
    Storage,
    is_packed,
    modelopt_algorithm,
    no_place,
)
from refmodels.errors import LogitLockError
from refmodels.quantization.formats import EightBit, LinearFormat, QuantizationSpec, group_formats

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")

Modules = Mapping[str, tuple[str, ...]]
"""Each linear layer of ours, and the upstream modules whose rows make it up."""


def read_config(
    said: Mapping[str, Any], modules: Modules, where: str, *, tensors: Callable[[], Collection[str]] = tuple
) -> tuple[QuantizationSpec, Storage] | None:
    """The quantization that a checkpoint declares; None: nothing is quantized.

    Args:
        said: `quantization_config`, as `said_of_quantization` gives it.
        modules: upstream's modules by our linear layers.
        where: how errors name the place.
        tensors: names of the checkpoint's tensors; called only if no config says which are stored.
    Raises:
        LogitLockError: a method or a format that is not supported, or fused modules of different formats.
    """
    method = said.get("quant_method")
    if method == "compressed-tensors":
        formats, cache = _compressed(said, modules, where), _cache(said.get("kv_cache_scheme"), where)
        storage = Storage(layout="compressed-tensors")
    elif method in ("gptq", "awq"):
        formats, cache = (_gptq if method == "gptq" else _awq)(said, modules, where), None
        second = said.get("checkpoint_format") == "gptq_v2"
        storage = Storage(layout=method, gptq_zero_offset=0 if second else 1)
    elif method == "modelopt":
        formats, cache = _modelopt(said, modules, where, tensors), _modelopt_cache(said, where)
        storage = Storage(layout="modelopt")
    else:
        raise LogitLockError(
            f"{where} has quant_method {method!r}; compressed-tensors, gptq, awq and modelopt checkpoints can be read"
        )
    found = group_formats(formats, cache=cache)
    return None if found is None else (found, storage)


def write_config(quantization: QuantizationSpec, modules: Modules, storage: Storage) -> dict[str, Any]:
    """The value of `quantization_config` for a checkpoint.

    Raises:
        LogitLockError: the layout cannot express it (GPTQ and AWQ have one format for all modules).
    """
    quantized = {name for module in quantization.modules for name in modules[module]}
    ignored = sorted({name for names in modules.values() for name in names} - quantized)
    if storage.layout == "modelopt":
        return _to_modelopt(quantization, modules, ignored)
    if storage.layout != "compressed-tensors":
        if len(quantization.groups) != 1 or quantization.cache is not None:
            raise LogitLockError(f"the layout {storage.layout} has one format for all modules and no quantized cache")
        linear = quantization.groups[0].format
        common = {"quant_method": storage.layout, "bits": 4 if linear.weight == "int4" else 8}
        common["group_size"] = -1 if linear.group is None else linear.group
        if storage.layout == "awq":
            return {
                **common, "zero_point": not linear.symmetric, "version": "gemm", "modules_to_not_convert": ignored,
            }  # fmt: skip
        second = {} if storage.gptq_zero_offset else {"checkpoint_format": "gptq_v2"}
        return {
            **common, "desc_act": linear.reordered, "sym": linear.symmetric, "lm_head": "head" in quantization.modules,
            "modules_to_not_convert": ignored, **second,
        }  # fmt: skip
    groups = {
        f"group_{number}": {
            "targets": list(dict.fromkeys(name for module in group.modules for name in modules[module])),
            "weights": _weights(group.format),
            "input_activations": _input(group.format),
            "output_activations": None,
            "format": _storage_format(group.format),
        }
        for number, group in enumerate(quantization.groups)
    }
    kinds = {_storage_format(group.format) for group in quantization.groups}
    kind = kinds.pop() if len(kinds) == 1 else "mixed-precision" if kinds else "naive-quantized"
    cache = None if quantization.cache is None else _args(quantization.cache, strategy="attn_head", dynamic=False)
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": cache,
    }


def _args(
    code: str, *, strategy: str, dynamic: bool, group: int | None = None, symmetric: bool = True
) -> dict[str, Any]:
    return {
        "num_bits": 4 if code == "int4" else 8,
        "type": "float" if code == "fp8" else "int",
        "strategy": strategy,
        "group_size": group,
        "symmetric": symmetric,
        "dynamic": dynamic,
    }


def _weights(linear: LinearFormat) -> dict[str, Any]:
    strategy = "channel" if linear.group is None else "group"
    found = _args(linear.weight, strategy=strategy, dynamic=False, group=linear.group, symmetric=linear.symmetric)
    return {**found, "actorder": "group"} if linear.reordered else found


def _input(linear: LinearFormat) -> dict[str, Any] | None:
    if linear.input is None:
        return None
    group = linear.group if linear.input_scale == "group" else None
    return _args(linear.input, strategy=linear.input_scale, dynamic=linear.input_scale != "tensor", group=group)


def _storage_format(linear: LinearFormat) -> str:
    return "pack-quantized" if is_packed(linear) else "float-quantized" if linear.weight == "fp8" else "int-quantized"


def _compressed(said: Mapping[str, Any], modules: Modules, where: str) -> dict[str, LinearFormat]:
    kind = said.get("format")
    if kind not in _FORMATS:
        raise LogitLockError(f"{where} has format {kind!r}; {', '.join(_FORMATS)} can be read")
    groups = []
    for name, group in (said.get("config_groups") or {}).items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise LogitLockError(f"{where}.config_groups.{name} must be an object with 'weights'")
        groups.append(
            (
                _patterns(group, "targets", f"{where}.config_groups.{name}"),
                _compressed_format(group, f"{where}.config_groups.{name}"),
            )
        )
    ignored = _patterns(said, "ignore", where)

    def of(upstream: str) -> LinearFormat | None:
        if any(_matches(pattern, upstream) for pattern in ignored):
            return None
        return next((f for targets, f in groups if any(t == "Linear" or _matches(t, upstream) for t in targets)), None)

    return _per_module(modules, of, where)


def _compressed_format(group: Mapping[str, Any], where: str) -> LinearFormat:
    weights, inputs = group["weights"], group.get("input_activations")
    code = _code(weights, where)
    strategy = weights.get("strategy")
    if strategy not in ("tensor", "channel", "group"):
        raise LogitLockError(f"{where} has weights with strategy {strategy!r}; tensor, channel and group can be read")
    activation: EightBit | None = None
    scale: Any = "token"
    if inputs is not None:
        found = _code(inputs, where)
        if found == "int4" or not inputs.get("symmetric", True):
            raise LogitLockError(f"{where} has inputs of {inputs}; only symmetric 8-bit inputs can be read")
        activation = "int8" if found == "int8" else "fp8"
        scale = inputs.get("strategy")
        if (scale, bool(inputs.get("dynamic"))) not in (("token", True), ("group", True), ("tensor", False)):
            raise LogitLockError(
                f"{where} has inputs with strategy {scale!r}, dynamic {inputs.get('dynamic')!r}; a static scale per "
                "tensor and a dynamic one per token or group can be read"
            )
        if scale == "group" and inputs.get("group_size") != weights.get("group_size"):
            raise LogitLockError(f"{where} has inputs and weights in groups of different sizes, which is not supported")
    return LinearFormat(
        weight=code,
        group=weights.get("group_size") if strategy == "group" else None,
        symmetric=bool(weights.get("symmetric", True)),
        input=activation,
        input_scale=scale,
        reordered=weights.get("actorder") in ("group", "dynamic"),
    )


def _code(args: Mapping[str, Any], where: str) -> Any:
    found = (args.get("type"), args.get("num_bits"))
    codes = {("int", 8): "int8", ("int", 4): "int4", ("float", 8): "fp8"}
    if found not in codes:
        raise LogitLockError(f"{where} has {found[1]}-bit {found[0]} values; int4, int8 and fp8 can be read")
    return codes[found]


def _cache(scheme: Any, where: str) -> EightBit | None:
    if scheme is None:
        return None
    code = _code(scheme, f"{where}.kv_cache_scheme")
    if code == "int4" or scheme.get("dynamic") or not scheme.get("symmetric", True):
        raise LogitLockError(f"{where}.kv_cache_scheme is {scheme}; static symmetric 8-bit scales can be read")
    return "int8" if code == "int8" else "fp8"


def _gptq(said: Mapping[str, Any], modules: Modules, where: str) -> dict[str, LinearFormat]:
    if said.get("dynamic"):
        raise LogitLockError(f"{where} has module-wise rules ('dynamic'), which are not supported")
    linear = _packed_format(said, where, symmetric=bool(said.get("sym", True)), reordered=bool(said.get("desc_act")))
    return _all_but(said, modules, linear, where, head=bool(said.get("lm_head")))


def _awq(said: Mapping[str, Any], modules: Modules, where: str) -> dict[str, LinearFormat]:
    version = str(said.get("version", "gemm")).lower()
    if version != "gemm":
        raise LogitLockError(f"{where} has AWQ version {version!r}; only 'gemm' can be read")
    linear = _packed_format(said, where, symmetric=not said.get("zero_point", True), reordered=False)
    return _all_but(said, modules, linear, where, head=False)


def _packed_format(said: Mapping[str, Any], where: str, *, symmetric: bool, reordered: bool) -> LinearFormat:
    bits, group = said.get("bits"), said.get("group_size", -1)
    if bits not in (4, 8) or not isinstance(group, int):
        raise LogitLockError(f"{where} has bits {bits!r} and group_size {group!r}; 4 and 8 bits can be read")
    whole = group <= 0
    return LinearFormat(
        weight="int4" if bits == 4 else "int8",
        group=None if whole else group,
        symmetric=symmetric,
        # With one scale per row, the order of columns has no effect.
        reordered=reordered and not whole,
    )


def _all_but(
    said: Mapping[str, Any], modules: Modules, linear: LinearFormat, where: str, *, head: bool
) -> dict[str, LinearFormat]:
    left_out = list(said.get("modules_to_not_convert") or ())
    only = {name for group in said.get("modules_in_block_to_quantize") or () for name in _as_list(group)}

    def of(upstream: str) -> LinearFormat | None:
        # Both libraries match parts of names.
        if any(str(part) in upstream for part in left_out):
            return None
        return linear if not only or any(upstream.endswith(f".{name}") for name in only) else None

    inside = {module: names for module, names in modules.items() if module != "head" or head}
    return _per_module(inside, of, where)


def _as_list(value: Any) -> Iterable[str]:
    return [value] if isinstance(value, str) else value


# nvidia-modelopt


def _modelopt(
    said: Mapping[str, Any], modules: Modules, where: str, tensors: Callable[[], Collection[str]]
) -> dict[str, LinearFormat]:
    default = said.get("quant_algo")
    mixed = as_object(said.get("quantized_layers") or {}, f"{where}.quantized_layers")
    left_out = [str(pattern) for pattern in said.get("exclude_modules") or said.get("ignore") or ()]
    stored: Collection[str] | None = None

    def of(upstream: str) -> LinearFormat | None:
        nonlocal stored
        if default is None or any(fnmatchcase(upstream, pattern) for pattern in left_out):
            return None
        layer = mixed.get(upstream) if default == "MIXED_PRECISION" else said
        if layer is None:
            return None
        # No config says which layers have one: "pre_quant_scale" is set for all of them, even if the scale was folded.
        stored = tensors() if stored is None else stored
        layer = as_object(layer, f"{where}.quantized_layers.{upstream}")
        return _modelopt_format(layer, where, smoothed=f"{upstream}.pre_quant_scale" in stored)

    return _per_module(modules, of, where)


def _modelopt_format(said: Mapping[str, Any], where: str, *, smoothed: bool) -> LinearFormat:
    algorithm = str(said.get("quant_algo"))
    if algorithm not in MODELOPT_ALGORITHMS:
        nearest = "W4A16_AWQ" if "4" in algorithm else "FP8"
        raise LogitLockError(
            f"{where} has quant_algo {algorithm!r}; of nvidia-modelopt {', '.join(MODELOPT_ALGORITHMS)} and mixtures "
            f"of these can be read, of which {nearest} is the closest"
        )
    code, grouped, scale = MODELOPT_ALGORITHMS[algorithm]
    group = said.get("group_size")
    if grouped and (not isinstance(group, int) or group < 1):
        raise LogitLockError(
            f"{where} has quant_algo {algorithm} and group_size {group!r}; it must be a number, as in {MODELOPT_NAME}"
        )
    return LinearFormat(
        weight=code,
        group=group if grouped else None,
        input=None if scale is None else "fp8" if code == "fp8" else "int8",
        input_scale=scale or "token",
        pre_quant_scale=smoothed,
    )


def _modelopt_cache(said: Mapping[str, Any], where: str) -> EightBit | None:
    algorithm = said.get("kv_cache_quant_algo")
    if algorithm is None and isinstance(said.get("kv_cache_scheme"), Mapping):
        return _cache(said["kv_cache_scheme"], where)
    algorithm = algorithm or said.get("kv_cache_scheme")
    if algorithm not in (None, "FP8"):
        raise LogitLockError(f"{where} has a cache of {algorithm!r}; of nvidia-modelopt's, FP8 can be read")
    return None if algorithm is None else "fp8"


def _to_modelopt(quantization: QuantizationSpec, modules: Modules, ignored: list[str]) -> dict[str, Any]:
    """The value for config.json; `modelopt_file` makes the other file from it."""
    if quantization.cache not in (None, "fp8"):
        raise LogitLockError(f"the layout modelopt has no {quantization.cache} cache, only an fp8 cache")
    layers: dict[str, dict[str, Any]] = {}
    for group in quantization.groups:
        linear, algorithm = group.format, modelopt_algorithm(group.format)
        if algorithm is None:
            raise no_place("modelopt", linear)
        layer: dict[str, Any] = {"quant_algo": algorithm}
        if linear.group is not None:
            layer |= {"group_size": linear.group, "has_zero_point": False, "pre_quant_scale": linear.pre_quant_scale}
        layers |= {name: layer for module in group.modules for name in modules[module]}
    kinds = [layer for i, layer in enumerate(layers.values()) if layer not in list(layers.values())[:i]]
    single = kinds[0] if len(kinds) == 1 else {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    return {
        "quant_method": "modelopt",
        **(single if kinds else {"quant_algo": None}),
        "ignore": ignored,
        "kv_cache_scheme": None if quantization.cache is None else {"dynamic": False, "num_bits": 8, "type": "float"},
    }


def modelopt_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """The value of "quantization" in `MODELOPT_NAME`, from that of `quantization_config` in config.json."""
    other = {key: value for key, value in config.items() if key not in ("quant_method", "ignore", "kv_cache_scheme")}
    cache = None if config["kv_cache_scheme"] is None else "FP8"
    return {**other, "kv_cache_quant_algo": cache, "exclude_modules": config["ignore"]}


def _per_module(modules: Modules, of: Any, where: str) -> dict[str, LinearFormat]:
    formats = {}
    for module, upstream in modules.items():
        found = {of(name) for name in upstream}
        if len(found) != 1:
            raise LogitLockError(
                f"{where} gives {', '.join(upstream)}, which are one layer here, different formats; that is not "
                "supported"
            )
        linear = found.pop()
        if linear is not None:
            formats[module] = linear
    return formats


def _patterns(said: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A list of names of modules, or of regular expressions for them after "re:"."""
    patterns = said.get(key) or []
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise LogitLockError(f"{where}.{key} is {patterns!r}; it must be a list of names of modules")
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            raise LogitLockError(f"{where}.{key} has {pattern!r}, which is not a regular expression: {error}") from None
    return patterns


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern == name

"""Quantized weights as published checkpoints store them: compressed-tensors, GPTQ, AWQ and nvidia-modelopt.

`decode` and `encode` are inverses.  A module X of [out, in] has, instead of X.weight:

    compressed-tensors   weight_packed int32 [out, in * bits / 32] (or `weight` int8 / float8 [out, in]), weight_scale
                         [out, groups], weight_zero_point int32 [out * bits / 32, groups], weight_g_idx [in],
                         input_scale; offset binary, low bits first          (compressed_tensors: compressors/)
    gptq                 qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32] (the zero point
                         less one, except in "gptq_v2"), scales [groups, out], g_idx [in]   (AutoGPTQ: qlinear_cuda.py)
    awq                  qweight int32 [in, out * 4 / 32], qzeros int32 [groups, out * 4 / 32], scales [groups, out];
                         eight columns per word in the order 0 2 4 6 1 3 5 7               (AutoAWQ: WQLinear_GEMM)
    modelopt             weight uint8 [out / 2, in] (int4: two rows per byte, the even one in the low bits) or
                         int8 / float8 [out, in], weight_scale [out, groups], [out] or [] (one for the matrix: fp8 with
                         a static input scale), input_scale [], pre_quant_scale [in]
                                                                            (modelopt 0.47: export/quant_utils.py)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from refmodels.dtypes import torch_name
from refmodels.errors import LogitLockError
from refmodels.quantization.arithmetic import QuantizedWeight, pack_int4, unpack_int4
from refmodels.quantization.formats import CODE_TYPES, Code, InputScale, LinearFormat, describe_format

CheckpointFormat = Literal["compressed-tensors", "gptq", "awq", "modelopt"]

_BITS: Mapping[Code, int] = {"int4": 4, "int8": 8}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SUFFIXES: Mapping[CheckpointFormat, tuple[str, ...]] = {
    "compressed-tensors": (
        "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", "input_scale",
        "input_zero_point",
    ),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "modelopt": ("weight", "weight_scale", "input_scale", "pre_quant_scale"),
}  # fmt: skip

_STORED: Mapping[str, tuple[tuple[int, ...], Literal["float", "integer", "any"]]] = {
    **dict.fromkeys(("weight_packed", "qweight", "qzeros"), ((2,), "integer")),
    "weight_zero_point": ((0, 1, 2), "integer"),
    "weight": ((2,), "any"),
    "scales": ((2,), "float"),
    "weight_scale": ((0, 1, 2), "float"),
    **dict.fromkeys(("weight_g_idx", "g_idx"), ((1,), "integer")),
    "weight_shape": ((1,), "integer"),
    **dict.fromkeys(("input_scale", "pre_quant_scale"), ((0, 1), "float")),
    "input_zero_point": ((0, 1), "any"),
}
"""Numbers of axes and kind of numbers of every stored tensor, in all layouts."""

_CACHE_SCALES: Mapping[str, str] = {"key_scale": "k_scale", "value_scale": "v_scale"}
_CONSTANTS = ("input_scale", "pre_quant_scale")
"""Parameters of a layer that its input is quantized or multiplied with."""

MODELOPT_ALGORITHMS: Mapping[str, tuple[Code, bool, InputScale | None]] = {
    "FP8": ("fp8", False, "tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8", False, "token"),
    "W4A16_AWQ": ("int4", True, None),
    "W8A16": ("int8", False, None),
    "W8A8_SQ_PER_CHANNEL": ("int8", False, "tensor"),
}
"""nvidia-modelopt's name of a format, by weight type, whether it has groups, and input scale (of the same type)."""

MODELOPT_TYPES: Mapping[Code, torch.dtype] = {**CODE_TYPES, "int4": torch.uint8}


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How a checkpoint stores its quantized modules.

    gptq_zero_offset: the number subtracted from GPTQ's stored zero points: 1, or 0 in its second version.
    """

    layout: CheckpointFormat
    gptq_zero_offset: int = 1

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes that may follow a module's name instead of `weight`; `bias` is a tensor like any other."""
        return _SUFFIXES[self.layout]

    @property
    def cache_scales(self) -> Mapping[str, str]:
        """Our parameters of a quantized cache, and their names beside the projections of a checkpoint."""
        if self.layout != "modelopt":
            return _CACHE_SCALES
        # Under these names whether or not there are such projections.
        return {ours: f"{theirs[0]}_proj.{theirs}" for ours, theirs in _CACHE_SCALES.items()}

    def required(self, linear: LinearFormat, has: Callable[[str], bool]) -> list[str]:
        """Suffixes that a module of this format must have; `has` says which ones the checkpoint has."""
        if self.layout in ("gptq", "awq"):
            return ["qweight", "qzeros", "scales", *(["g_idx"] if linear.reordered else [])]
        packed = self.layout == "compressed-tensors" and is_packed(linear) and not has("weight")
        codes = "weight_packed" if packed else "weight"
        needed = [codes, "weight_scale"]
        needed += ["weight_zero_point"] if not linear.symmetric else []
        needed += _constants(linear)
        return needed + (["weight_g_idx"] if linear.reordered else [])

    def decode(
        self, tensors: Mapping[str, Tensor], linear: LinearFormat, shape: tuple[int, int], where: str
    ) -> tuple[QuantizedWeight, dict[str, Tensor]]:
        """The weight of one module, and `input_scale` [] and `pre_quant_scale` [in] if its format has them.

        Args:
            tensors: the stored tensors by suffix.
            linear: the module's format according to config.json.
            shape: [out, in].
            where: how errors name the module.
        Raises:
            LogitLockError: a tensor is missing or has the wrong shape, its content is not allowed in the format, or a
                scale is not finite.
        """
        out_features, in_features = shape
        for suffix, tensor in tensors.items():
            _check_kind(suffix, tensor, where)
        codes, zero = self._codes(tensors, linear, where)
        _expect(codes, (out_features, in_features), f"the quantized weights of {where}")
        scale = self._scale(tensors, where)
        if scale.numel() == 1:  # one for the whole matrix
            scale = scale.reshape(1, 1).expand(out_features, 1)
        groups = linear.groups(in_features)
        _expect(scale, (out_features, groups), f"the scales of {where}")
        if not bool(torch.isfinite(scale).all()):
            raise LogitLockError(f"a scale of {where} is NaN or infinite")
        if linear.symmetric:
            if zero is not None and bool((zero != 0).any()):
                raise LogitLockError(f"{where} has zero points, but the config says that it is symmetric")
            zero = None
        elif zero is None:
            raise LogitLockError(f"{where} lacks the zero points that an asymmetric format has")
        else:
            _expect(zero, (out_features, groups), f"the zero points of {where}")
        order = self._order(tensors, linear, in_features, where)
        if order is not None:
            codes = codes[:, order]
        constants = {}
        for name in _constants(linear):
            constant, wanted = _get(tensors, name, where), () if name == "input_scale" else (in_features,)
            constants[name] = constant.reshape(()) if not wanted and constant.numel() == 1 else constant
            _expect(constants[name], wanted, f"{name} of {where}")
        if self.layout == "modelopt":
            for name in _CONSTANTS:
                if name in tensors and name not in constants:
                    raise LogitLockError(f"{where} has a tensor {name}, but the config says that it has none")
        return QuantizedWeight(codes=codes, scale=scale, zero=zero, order=order), constants

    def encode(
        self, weight: QuantizedWeight, linear: LinearFormat, constants: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The tensors to store for one module, by suffix; the inverse of `decode`.

        Raises:
            LogitLockError: the layout cannot store this format, or these scales.
        """
        constants = constants or {}
        if self.layout == "modelopt":
            return _to_modelopt(weight, linear, constants)
        codes, zero = weight.codes, weight.zero
        index: Tensor | None = None
        if weight.order is not None:
            columns = torch.arange(codes.shape[1]) // (linear.group or codes.shape[1])
            index = torch.empty_like(columns)
            index[weight.order] = columns
            codes = codes[:, weight.order.argsort()]
        if self.layout == "compressed-tensors" and not linear.pre_quant_scale:
            return _to_compressed(codes, weight.scale, zero, index, linear, constants.get("input_scale"))
        bits = _BITS.get(linear.weight)
        floats = linear.input is None and not linear.pre_quant_scale
        if not floats or bits is None or (self.layout == "awq" and (bits != 4 or index is not None)):
            raise no_place(self.layout, linear)
        unsigned = codes.to(torch.int32) + 2 ** (bits - 1)
        zeros = (torch.zeros_like(weight.scale) if zero is None else zero).to(torch.int32) + 2 ** (bits - 1)
        if self.layout == "awq":
            return {
                "qweight": _pack(_awq_order(unsigned.t()), 4),
                "qzeros": _pack(_awq_order(zeros.t()), 4),
                "scales": weight.scale.t().contiguous(),
            }
        group = linear.group or codes.shape[1]
        return {
            "qweight": _pack(unsigned, bits).t().contiguous(),
            "qzeros": _pack(((zeros - self.gptq_zero_offset) & (2**bits - 1)).t(), bits),
            "scales": weight.scale.t().contiguous(),
            "g_idx": (torch.arange(codes.shape[1]) // group if index is None else index).to(torch.int32),
        }

    def encode_cache(self, scale: Tensor) -> Tensor:
        """The tensor to store for the scales [kv_heads] of a layer's cached keys or values.

        Raises:
            LogitLockError: the scales differ, but the layout has only one.
        """
        if self.layout != "modelopt":
            return scale
        if bool((scale != scale[0]).any()):
            raise LogitLockError("the layout modelopt has one scale for all heads of a cache, but these have several")
        return scale[0]

    def _codes(self, tensors: Mapping[str, Tensor], linear: LinearFormat, where: str) -> tuple[Tensor, Tensor | None]:
        """Quantized values [out, in] in the order of the input, and zero points."""
        if self.layout == "modelopt":
            codes, wanted = _get(tensors, "weight", where), MODELOPT_TYPES[linear.weight]
            if codes.dtype != wanted:
                raise LogitLockError(
                    f"the weight of {where} is {torch_name(codes.dtype)}; in this layout {linear.weight} is "
                    f"{torch_name(wanted)}"
                )
            return (unpack_int4(codes.t()).t() if linear.weight == "int4" else codes), None
        if self.layout == "compressed-tensors":
            if "weight" in tensors and tensors["weight"].dtype == CODE_TYPES[linear.weight]:
                zero = tensors.get("weight_zero_point")
                return tensors["weight"], None if zero is None else zero.to(torch.int8)
            bits = _packed_bits(linear, where)
            shape = tensors.get("weight_shape")
            if shape is not None:
                _expect(shape, (2,), f"the shapes of {where}")
            columns = None if shape is None else int(shape[1])
            codes = _unpack(_get(tensors, "weight_packed", where), bits)[:, :columns]
            zero = tensors.get("weight_zero_point")
            if zero is not None:
                if zero.ndim != 2:
                    raise LogitLockError(f"the packed zero points of {where} have shape {list(zero.shape)}")
                zero = _signed(_unpack(zero.t().contiguous(), bits).t()[: len(codes)], bits)
            return _signed(codes, bits), zero
        bits = _packed_bits(linear, where)
        packed, zeros = _get(tensors, "qweight", where), _unpack(_get(tensors, "qzeros", where), bits)
        if self.layout == "awq":
            return (
                _signed(_awq_order(_unpack(packed, 4), inverse=True).t(), 4),
                _signed(_awq_order(zeros, inverse=True).t(), 4),
            )
        # Stored in `bits` bits, the zero point minus one may have wrapped around.
        zeros = (zeros + self.gptq_zero_offset) & (2**bits - 1) if self.gptq_zero_offset else zeros
        return _signed(_unpack(packed.t().contiguous(), bits), bits), _signed(zeros.t(), bits)

    def _scale(self, tensors: Mapping[str, Tensor], where: str) -> Tensor:
        if self.layout in ("compressed-tensors", "modelopt"):
            scale = _get(tensors, "weight_scale", where)
            return scale[:, None] if scale.ndim == 1 and scale.numel() > 1 else scale
        return _get(tensors, "scales", where).t()

    def _order(
        self, tensors: Mapping[str, Tensor], linear: LinearFormat, in_features: int, where: str
    ) -> Tensor | None:
        """The columns of each group, if they are not contiguous."""
        index = tensors.get("weight_g_idx" if self.layout == "compressed-tensors" else "g_idx")
        group = linear.group or in_features
        if index is None or bool((index < 0).all()):  # compressed-tensors: -1 for none
            if linear.reordered:
                raise LogitLockError(f"{where} lacks the group index that its reordered columns need")
            return torch.arange(in_features) if linear.reordered else None
        _expect(index, (in_features,), f"the group index of {where}")
        index, groups = index.to(torch.int64), in_features // group
        # Before they are counted: that takes memory for as many groups as the largest number says.
        if bool(((index < 0) | (index >= groups)).any()):
            raise LogitLockError(f"the group index of {where} must be from 0 to {groups - 1}")
        if not torch.equal(index.bincount(minlength=groups), torch.full((groups,), group)):
            raise LogitLockError(f"the group index of {where} does not put {group} columns into every group")
        if not linear.reordered:
            if not torch.equal(index, torch.arange(in_features) // group):
                raise LogitLockError(f"{where} has columns in another order, but the config says it has none")
            return None
        return index.argsort(stable=True)


def _to_compressed(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    index: Tensor | None,
    linear: LinearFormat,
    input_scale: Tensor | None,
) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {"weight_scale": scale.contiguous()}
    if is_packed(linear):
        bits = _BITS[linear.weight]
        stored["weight_packed"] = _pack(codes.to(torch.int32) + 2 ** (bits - 1), bits)
        stored["weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
        if zero is not None:
            stored["weight_zero_point"] = _pack((zero.to(torch.int32) + 2 ** (bits - 1)).t(), bits).t().contiguous()
    else:
        stored["weight"] = codes.contiguous()
    if index is not None:
        stored["weight_g_idx"] = index.to(torch.int32)
    if input_scale is not None:
        stored["input_scale"] = input_scale.reshape(1).clone()  # fused modules share it
    return stored


def _to_modelopt(weight: QuantizedWeight, linear: LinearFormat, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if modelopt_algorithm(linear) is None:
        raise no_place("modelopt", linear)
    codes, scale = weight.codes, weight.scale
    if linear.weight == "int4":
        if len(codes) % 2:
            raise LogitLockError(f"the layout modelopt packs rows of int4 in pairs, but a weight has {len(codes)}")
        codes = pack_int4(codes.t()).t()
    elif linear.weight == "fp8" and linear.input_scale == "tensor":
        if bool((scale != scale[0]).any()):
            raise LogitLockError(
                "the layout modelopt has one scale per weight if fp8 inputs have a static scale, but the rows of "
                "this one have several scales"
            )
        scale = scale[0, 0]
    else:
        scale = scale[:, 0]
    # Fused modules share their constants, and a file holds no tensor twice.
    stored = {"weight": codes, "weight_scale": scale, **constants}
    return {suffix: tensor.contiguous().clone() for suffix, tensor in stored.items()}


def modelopt_algorithm(linear: LinearFormat) -> str | None:
    """nvidia-modelopt's name of a format, or None."""
    if not linear.symmetric or linear.reordered:
        return None
    key = (linear.weight, linear.group is not None, None if linear.input is None else linear.input_scale)
    return next((name for name, kind in MODELOPT_ALGORITHMS.items() if kind == key), None)


def is_packed(linear: LinearFormat) -> bool:
    """Whether compressed-tensors packs values into words ("pack-quantized"): int4, and weight-only int8."""
    return linear.weight == "int4" or (linear.weight == "int8" and linear.input is None)


def _constants(linear: LinearFormat) -> list[str]:
    has = linear.input is not None and linear.input_scale == "tensor", linear.pre_quant_scale
    return [name for name, there in zip(_CONSTANTS, has, strict=True) if there]


def no_place(layout: CheckpointFormat, linear: LinearFormat) -> LogitLockError:
    """The error for a format that a layout cannot store."""
    return LogitLockError(f"the layout {layout} cannot store {describe_format(linear)}")


def _packed_bits(linear: LinearFormat, where: str) -> int:
    if linear.weight not in _BITS:
        raise LogitLockError(f"{where} holds no {linear.weight} weight")
    return _BITS[linear.weight]


def _pack(values: Tensor, bits: int) -> Tensor:
    """Unsigned `values` [rows, n] in int32 words [rows, ceil(n * bits / 32)], the first in the lowest bits."""
    each = 32 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % each)).unflatten(1, (-1, each)).to(torch.int64)
    words: Tensor = (values << (torch.arange(each) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse: uint values [rows, words * 32 / bits] in int32."""
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    values: Tensor = (words[:, :, None] >> shifts) & (2**bits - 1)
    return values.flatten(1)


def _signed(values: Tensor, bits: int) -> Tensor:
    """Offset binary as two's complement in int8."""
    centre: int = 2 ** (bits - 1)
    signed: Tensor = values - centre
    return signed.to(torch.int8)


def _awq_order(values: Tensor, *, inverse: bool = False) -> Tensor:
    """[rows, n] with every eight columns in AWQ's order of packing, or back."""
    order = torch.tensor(_AWQ_ORDER)
    eights: Tensor = values.unflatten(1, (-1, 8))
    return eights[:, :, order.argsort() if inverse else order].flatten(1)


def _get(tensors: Mapping[str, Tensor], suffix: str, where: str) -> Tensor:
    if suffix not in tensors:
        raise LogitLockError(f"{where} lacks its tensor {suffix}")
    return tensors[suffix]


def _check_kind(suffix: str, tensor: Tensor, where: str) -> None:
    """Refuse a stored tensor whose rank or dtype no layout gives to this suffix."""
    ranks, kind = _STORED[suffix]
    fits = kind == "any" or (tensor.is_floating_point() if kind == "float" else _is_integer(tensor))
    if tensor.ndim not in ranks or not fits or not tensor.numel():
        wanted = " or ".join(map(str, ranks))
        raise LogitLockError(
            f"{where}.{suffix} is a {torch_name(tensor.dtype)} tensor of shape {list(tensor.shape)}; it must have "
            f"{wanted} axes{'' if kind == 'any' else f' and {kind} numbers'}"
        )


def _is_integer(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int8, torch.uint8, torch.int32, torch.int64)


def _expect(tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(tensor.shape) != shape:
        raise LogitLockError(f"{what} have shape {list(tensor.shape)}; config.json says {list(shape)}")

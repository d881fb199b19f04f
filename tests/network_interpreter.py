"""Runs a TensorRT network definition with torch on the CPU.

TensorRT-RTX builds plans here but runs none, so this is how CI sees that a network computes what the reference does.
It covers the layers that our networks have, by their documentation, and raises KeyError for any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trt_runtime.tensorrt_api import trt

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
_BINARY = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "SUB": torch.sub,
    "DIV": lambda x, y: x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc"),
    "FLOOR_DIV": torch.floor_divide,
    "POW": torch.pow,
    "GREATER": torch.gt,
    "LESS": torch.lt,
    "EQUAL": torch.eq,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
}
_UNARY = {"SQRT": torch.sqrt, "NOT": torch.logical_not}
_ACTIVATIONS = {
    "SIGMOID": torch.sigmoid,
    "TANH": torch.tanh,
    "RELU": torch.relu,
    "GELU_ERF": F.gelu,
    "GELU_TANH": lambda x: F.gelu(x, approximate="tanh"),
}


class Interpreter:
    """Runs a network.

    Args:
        wide: every float is fp64, whatever the network says: differences are then of mathematics, not of rounding.
    """

    def __init__(self, network: Any, *, wide: bool) -> None:
        self.network, self.wide = network, wide
        self.values: dict[str, Tensor] = {}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; caches of `inputs` are not changed."""
        net = self.network
        self.values = {
            net.get_input(i).name: self.as_type(inputs[net.get_input(i).name]) for i in range(net.num_inputs)
        }
        waiting = [net.get_layer(i) for i in range(net.num_layers)]
        while waiting:
            # Layers are listed in the order in which they were added, which need not be that of execution.
            ready = [layer for layer in waiting if self.inputs_of(layer) <= self.values.keys()]
            waiting = [layer for layer in waiting if not self.inputs_of(layer) <= self.values.keys()]
            assert ready, f"{waiting[0].name} reads a tensor that nothing writes"
            for layer in ready:
                output = layer.get_output(0).name
                assert output not in self.values, f"two tensors are named {output}"
                self.values[output] = getattr(self, f"layer_{layer.type.name.lower()}")(layer)
        return {net.get_output(i).name: self.values[net.get_output(i).name] for i in range(net.num_outputs)}

    def as_type(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or x.dtype
        return x.to(torch.float64 if self.wide and dtype.is_floating_point else dtype)

    def inputs_of(self, layer: Any) -> set[str]:
        return {tensor.name for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None}

    def arguments(self, layer: Any) -> list[Any]:
        tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
        return [None if tensor is None else self.values[tensor.name] for tensor in tensors]

    # Layers

    def layer_constant(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IConstantLayer
        array = np.array(layer.weights, copy=True)
        return self.as_type(torch.from_numpy(array).reshape(tuple(layer.shape)))

    def layer_cast(self, layer: Any) -> Tensor:
        layer.__class__ = trt.ICastLayer
        (x,) = self.arguments(layer)
        return self.as_type(x, _DTYPES[layer.to_type.name])

    def layer_elementwise(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IElementWiseLayer
        x, y = self.arguments(layer)
        assert x.dtype == y.dtype, f"{layer.name}: strongly typed"
        assert x.ndim == y.ndim, f"{layer.name}: TensorRT does not add axes"
        return _BINARY[layer.op.name](x, y)

    def layer_unary(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IUnaryLayer
        return _UNARY[layer.op.name](*self.arguments(layer))

    def layer_activation(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IActivationLayer
        return _ACTIVATIONS[layer.type.name](*self.arguments(layer))

    def layer_reduce(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IReduceLayer
        (x,) = self.arguments(layer)
        axes = _axes(layer.axes)
        reduced = {"AVG": torch.mean, "MAX": torch.amax, "SUM": torch.sum}[layer.op.name]
        return reduced(x, dim=axes, keepdim=layer.keep_dims)

    def layer_shape(self, layer: Any) -> Tensor:
        (x,) = self.arguments(layer)
        return torch.tensor(x.shape, dtype=torch.int64)

    def layer_concatenation(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IConcatenationLayer
        return torch.cat([x for x in self.arguments(layer) if x is not None], layer.axis)

    def layer_select(self, layer: Any) -> Tensor:
        condition, x, y = self.arguments(layer)
        return torch.where(condition, x, y)

    def layer_unsqueeze(self, layer: Any) -> Tensor:
        x, axes = self.arguments(layer)
        for axis in sorted(axes.flatten().tolist()):
            x = x.unsqueeze(axis)
        return x

    def layer_shuffle(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IShuffleLayer
        x, *dynamic = self.arguments(layer)
        x = x.permute(_permutation(layer.first_transpose, x.ndim))
        dims = dynamic[0].tolist() if dynamic else layer.reshape_dims
        if dims is not None:
            x = x.reshape(
                [x.shape[i] if size == 0 and layer.zero_is_placeholder else size for i, size in enumerate(dims)]
            )
        return x.permute(_permutation(layer.second_transpose, x.ndim))

    def layer_slice(self, layer: Any) -> Tensor:
        layer.__class__ = trt.ISliceLayer
        x, *given = self.arguments(layer)
        fixed = (layer.start, layer.shape, layer.stride)
        start, size, stride = (
            given[i].tolist() if i < len(given) and given[i] is not None else list(fixed[i]) for i in range(3)
        )
        for axis, (first, count, step) in enumerate(zip(start, size, stride, strict=True)):
            index = first + step * torch.arange(count)
            assert count == 0 or int(index.max()) < x.shape[axis], f"{layer.name}: slice leaves its tensor"
            x = x.index_select(axis, index)
        return x

    def layer_gather(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IGatherLayer
        x, index = self.arguments(layer)
        if layer.mode == trt.GatherMode.ELEMENT:
            return x.gather(layer.axis, index.long())
        assert layer.mode == trt.GatherMode.DEFAULT and layer.num_elementwise_dims == 0
        picked = x.index_select(layer.axis, index.flatten().long())
        return picked.reshape(*x.shape[: layer.axis], *index.shape, *x.shape[layer.axis + 1 :])

    def layer_fill(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IFillLayer
        size, start, step = self.arguments(layer)
        assert layer.operation == trt.FillOperation.LINSPACE
        assert size.numel() == 1
        return start + step * torch.arange(int(size))

    def layer_matrix_multiply(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IMatrixMultiplyLayer
        operands = []
        for x, operation in zip(self.arguments(layer), (layer.op0, layer.op1), strict=True):
            assert operation != trt.MatrixOperation.VECTOR
            operands.append(x.mT if operation == trt.MatrixOperation.TRANSPOSE else x)
        return operands[0] @ operands[1]

    def layer_normalization(self, layer: Any) -> Tensor:
        layer.__class__ = trt.INormalizationLayer
        x, scale, bias = self.arguments(layer)
        assert layer.num_groups == 1
        axes = _axes(layer.axes)
        centred = x - x.mean(axes, keepdim=True)
        variance = centred.pow(2).mean(axes, keepdim=True)
        return centred / torch.sqrt(variance + layer.epsilon) * scale + bias

    def layer_rotary_embedding(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IRotaryEmbeddingLayer
        x, cos, sin = self.arguments(layer)
        assert x.dtype == cos.dtype == sin.dtype
        dim = layer.rotary_embedding_dim
        cos, sin, turned = cos[:, None], sin[:, None], x[..., :dim]
        if layer.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((turned, x[..., dim:]), -1)

    def layer_kv_cache_update(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IKVCacheUpdateLayer
        assert layer.cache_mode == trt.KVCacheMode.LINEAR
        cache, update, first = self.arguments(layer)
        assert layer.get_input(0).is_network_input and layer.get_output(0).is_network_output
        cache = cache.clone()
        for row, start in enumerate(first.tolist()):
            cache[row, :, start : start + update.shape[2]] = update[row]
        return cache

    def layer_attention_input(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IAttentionInputLayer
        attention = layer.attention
        assert attention.causal_kind == trt.CausalMaskKind.NONE and attention.key_value_lengths is None
        assert attention.norm_op == trt.AttentionNormalizationOp.SOFTMAX
        query, key, value, mask = self.arguments(layer)
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        assert mask.dtype in (torch.bool, query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)

    def layer_attention_output(self, layer: Any) -> Tensor:
        (x,) = self.arguments(layer)
        return x


def _axes(mask: int) -> tuple[int, ...]:
    return tuple(i for i in range(8) if mask >> i & 1)


def _permutation(permutation: Any, rank: int) -> list[int]:
    return [permutation[i] for i in range(rank)]

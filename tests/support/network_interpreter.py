"""Runs a TensorRT network definition with torch on the CPU, next to the reference.

TensorRT-RTX builds plans here but runs none, so this is how CI sees that a network computes what the reference does.
It covers the layers that our networks have, by their documentation, and raises AttributeError for any other; a call of
one of our plugins is the reference's own operator.

Both run in fp64 on the same weights and tables; they differ by the few constants (scales, epsilons) that a network
holds in fp32, each off by at most 2**-24 of itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from export.tensorrt.torch_export import bundle_decoder
from refmodels.ops import cached_attention, fused_rms_norm
from refmodels.positions import ntk_alphas
from refmodels.spec import ModelSpec, spec_from_dict
from tests.support.plugin_calls import plugin_call
from trt_runtime.tensorrt.api import trt

TOLERANCE = 2.0**-20
"""A deviation of 2**-24 in a score may grow with the size of the score."""

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
                names, result = self.outputs_of(layer), getattr(self, f"layer_{layer.type.name.lower()}")(layer)
                assert not self.values.keys() & set(names), f"two tensors have one name of {names}"
                self.values |= zip(names, [result] if isinstance(result, Tensor) else result, strict=True)
        return {net.get_output(i).name: self.values[net.get_output(i).name] for i in range(net.num_outputs)}

    def as_type(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or x.dtype
        return x.to(torch.float64 if self.wide and dtype.is_floating_point else dtype)

    def inputs_of(self, layer: Any) -> set[str]:
        return {tensor.name for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None}

    def arguments(self, layer: Any) -> list[Any]:
        tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
        return [None if tensor is None else self.values[tensor.name] for tensor in tensors]

    def outputs_of(self, layer: Any) -> list[str]:
        return [layer.get_output(i).name for i in range(layer.num_outputs)]

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

    def layer_squeeze(self, layer: Any) -> Tensor:
        x, *axes = self.arguments(layer)
        return x.squeeze(tuple(axes[0].flatten().tolist())) if axes else x.squeeze()

    def layer_identity(self, layer: Any) -> Tensor:
        return self.arguments(layer)[0]

    def layer_softmax(self, layer: Any) -> Tensor:
        layer.__class__ = trt.ISoftMaxLayer
        (axis,) = _axes(layer.axes)
        return self.arguments(layer)[0].softmax(axis)

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
        assert layer.mode == trt.SampleMode.STRICT_BOUNDS
        x, *given = self.arguments(layer)
        # Inputs 1 to 3 and 5 where they are not fixed; input 4 fills what lies outside.
        fixed = dict(enumerate((layer.start, layer.shape, layer.stride))) | {4: layer.axes}
        start, size, stride, axes = (
            given[i].tolist() if i < len(given) and given[i] is not None else fixed[i] for i in (0, 1, 2, 4)
        )
        axes = range(x.ndim) if axes is None else axes
        for axis, first, count, step in zip(axes, start, size, stride, strict=True):
            index = first + step * torch.arange(count)
            assert count == 0 or int(index.max()) < x.shape[axis], f"{layer.name}: slice leaves its tensor"
            x = x.index_select(axis, index)
        return x

    def layer_gather(self, layer: Any) -> Tensor:
        layer.__class__ = trt.IGatherLayer
        x, index = self.arguments(layer)
        if layer.mode == trt.GatherMode.ELEMENT:
            return x.gather(layer.axis, index.long())
        if layer.mode == trt.GatherMode.ND:
            assert layer.num_elementwise_dims == 1 and index.shape[-1] == 1
            return torch.stack([row[picked.flatten().long()] for row, picked in zip(x, index, strict=True)])
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

    def layer_plugin_v3(self, layer: Any) -> list[Tensor]:
        layer.__class__ = trt.IPluginV3Layer
        plugin, inputs = layer.plugin, self.arguments(layer)
        a = plugin.attributes
        if plugin.NAME == "FusedRmsNorm":
            return [fused_rms_norm(*inputs, eps=a.epsilon, weight_in_float=bool(a.weight_in_float))]
        assert plugin.NAME == "CachedAttention"
        given, facts = plugin_call(plugin, inputs)
        given = given._replace(key_cache=given.key_cache.clone(), value_cache=given.value_cache.clone())
        return list(cached_attention(given, facts))


def random_step(spec: ModelSpec, *, slots: int) -> dict[str, Tensor]:
    """Inputs of a step on caches of `slots`, filled with random numbers: rows of unequal length, padding, a query that
    sees nothing, past the windows and lengths from which logn and NTK count in the golden cases that have them.
    """
    make = torch.Generator().manual_seed(0)
    lengths, tokens = torch.tensor([30, 0]), 12
    mask = torch.ones(2, int(lengths.max()) + tokens, dtype=torch.int64)
    mask[0, 1] = mask[1, 0] = 0
    a, rope = spec.attention, spec.rope
    last_table = len(ntk_alphas(rope, slots)) - 1 if rope is not None else 0
    inputs = {
        "input_ids": torch.randint(spec.vocab_size, (2, tokens), generator=make),
        "cache_lengths": lengths,
        "attention_mask": mask,
        "logit_index": torch.tensor([[11, 0], [2, 1]]),
        "position_ids": lengths[:, None] + torch.arange(tokens),
        "ntk_table": torch.tensor([last_table, 0]),
    }
    shape = (2, a.kv_heads, slots, a.head_dim)
    for i in range(spec.layers):
        for kind in ("key", "value"):
            inputs[f"past.blocks.{i}.{kind}"] = torch.randn(shape, generator=make)
    return inputs


def worst_difference(bundle: Path, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> float:
    """Of a network's outputs from those of the reference with the bundle's weights, relative to the largest of each."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    info = json.loads((bundle / "bundle.json").read_text())
    spec = spec_from_dict(info["spec"])
    decoder = bundle_decoder(bundle, model, spec, positions=info["max_positions"])
    for name in ("rope_cos", "rope_sin", "logn", "alibi_slopes"):
        table = getattr(decoder, name)
        setattr(decoder, name, None if table is None else table.double())
    past = {
        f"past_{kind}": [inputs[f"past.blocks.{i}.{kind}"].double() for i in range(spec.layers)]
        for kind in ("key", "value")
    }
    given = {name: value for name, value in inputs.items() if not name.startswith("past.")}
    logits, keys, values = decoder.double()(**given, **past)
    expected = {"logits": logits}
    for i in range(spec.layers):
        expected |= {f"blocks.{i}.key": keys[i], f"blocks.{i}.value": values[i]}
    return max(float((outputs[name] - e).abs().max() / e.abs().max()) for name, e in expected.items())


def _axes(mask: int) -> tuple[int, ...]:
    return tuple(i for i in range(8) if mask >> i & 1)


def _permutation(permutation: Any, rank: int) -> list[int]:
    return [permutation[i] for i in range(rank)]

"""Our two operators in a TensorRT network: TensorRT's own layers, or our plugins.

The layers are those that `export/graph/native_attention_body.py` asks for in ONNX, with its roundings; that file says
which they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from export.graph.native_attention_body import HIDDEN
from refmodels.attention import TENSORRT_ARGUMENTS, TENSORRT_INPUTS, AttentionFacts, node_attributes
from refmodels.errors import LogitLockError
from trt_runtime.tensorrt.api import trt
from trt_runtime.tensorrt.plugins import CREATORS


class Layers:
    """Adds layers to a network and returns their outputs.

    Args:
        network: TensorRT's.
        name: prefix of the layers' names.
    Attributes:
        constants: memory that must live until the network is built.
    """

    def __init__(self, network: Any, name: str, constants: list[Any] | None = None) -> None:
        self.network, self.name = network, name
        self.constants: list[Any] = [] if constants is None else constants
        self._count = 0

    def output(self, layer: Any, index: int = 0) -> Any:
        if layer is None:
            raise LogitLockError(f"TensorRT refuses a layer of {self.name}")
        self._count += 1
        layer.name = f"{self.name}.{self._count}"
        return layer.get_output(index)

    def constant(self, value: Any, dtype: type = np.int64) -> Any:
        array: Any = np.array(value, dtype)
        self.constants.append(array)
        return self.output(self.network.add_constant(array.shape, trt.Weights(array)))

    def cast(self, x: Any, dtype: Any) -> Any:
        return x if x.dtype == dtype else self.output(self.network.add_cast(x, dtype))

    def binary(self, operation: str, x: Any, y: Any) -> Any:
        return self.output(self.network.add_elementwise(x, y, getattr(trt.ElementWiseOperation, operation)))

    def unary(self, operation: str, x: Any) -> Any:
        return self.output(self.network.add_unary(x, getattr(trt.UnaryOperation, operation)))

    def reduce(self, operation: str, x: Any) -> Any:
        """Reduce over the last axis, which stays with size 1."""
        last = 1 << (len(x.shape) - 1)
        return self.output(self.network.add_reduce(x, getattr(trt.ReduceOperation, operation), last, True))

    def reshape(self, x: Any, *dims: int, before: Sequence[int] = (), after: Sequence[int] = ()) -> Any:
        """Transposed by `before`, reshaped (0: the size that is there, -1: what remains), transposed by `after`."""
        layer = self.network.add_shuffle(x)
        if before:
            layer.first_transpose = before
        layer.reshape_dims = dims
        if after:
            layer.second_transpose = after
        return self.output(layer)

    def sizes(self, x: Any, first: int, count: int = 1) -> Any:
        """`count` sizes of `x`, from axis `first` on: [count] int64."""
        shape = self.output(self.network.add_shape(x))
        return self.output(self.network.add_slice(shape, (first,), (count,), (1,)))

    def concat(self, *parts: Any) -> Any:
        return self.output(self.network.add_concatenation(parts))

    def slice(self, x: Any, start: Sequence[int], size: Any) -> Any:
        """From `start` on, as large as `size` says, a tensor."""
        layer = self.network.add_slice(x, start, (0,) * len(start), (1,) * len(start))
        layer.set_input(2, size)
        return self.output(layer)

    def count_up(self, size: Any) -> Any:
        """0, 1, 2, ..: [size] int64."""
        start, step = self.constant(0), self.constant([1])
        layer = self.network.add_fill((0,), trt.FillOperation.LINSPACE, trt.int64)
        for index, given in enumerate((size, start, step)):
            layer.set_input(index, given)
        return self.output(layer)


def rms_norm_layers(layers: Layers, x: Any, weight: Any, eps: float, weight_in_float: bool) -> Any:
    """`refmodels.ops.fused_rms_norm` with its order of casts."""
    rank = len(x.shape)
    wide = layers.cast(x, trt.float32)
    mean = layers.reduce("AVG", layers.binary("PROD", wide, wide))
    root = layers.unary("SQRT", layers.binary("SUM", mean, layers.constant(np.full((1,) * rank, eps), np.float32)))
    normed = layers.binary("DIV", wide, root)
    weight = layers.reshape(weight, *(1,) * (rank - 1), -1)
    if weight_in_float:
        return layers.cast(layers.binary("PROD", normed, layers.cast(weight, trt.float32)), x.dtype)
    return layers.binary("PROD", layers.cast(normed, x.dtype), weight)


def attention_layers(
    layers: Layers,
    facts: AttentionFacts,
    *,
    qkv: Any,
    key_cache: Any,
    value_cache: Any,
    cache_lengths: Any,
    visible: Any,
    cos: Any = None,
    sin: Any = None,
    query_scale: Any = None,
    alibi_slopes: Any = None,
) -> tuple[Any, Any, Any]:
    """`refmodels.ops.cached_attention` (arithmetic "exact") around TensorRT's cache update and attention.

    The caches must be inputs of the network and the updated ones its outputs: TensorRT then writes them in place.
    """
    dtype, head_dim = qkv.dtype, key_cache.shape[3]
    heads, kv_heads, window = facts.heads, facts.kv_heads, facts.window
    by_head = layers.reshape(qkv, 0, 0, heads + 2 * kv_heads, head_dim, after=(0, 2, 1, 3))
    batch, tokens, slots = layers.sizes(by_head, 0), layers.sizes(by_head, 2), layers.sizes(visible, 1)

    def heads_from(first: int, count: int) -> Any:
        size = layers.concat(batch, layers.constant([count]), tokens, layers.constant([head_dim]))
        return layers.slice(by_head, (0, first, 0, 0), size)

    query = layers.cast(heads_from(0, heads), trt.float32)
    key, value = heads_from(heads, kv_heads), heads_from(heads + kv_heads, kv_heads)
    if cos is not None:
        query, key = (
            layers.output(
                layers.network.add_rotary_embedding(
                    layers.cast(x, trt.float32), cos, sin, facts.rotary_interleaved, 2 * cos.shape[-1]
                )
            )
            for x in (query, key)
        )
    if query_scale is not None:
        query = layers.binary("PROD", query, layers.reshape(query_scale, 0, 1, -1, 1))
    # TensorRT's attention does not scale.
    query = layers.binary("PROD", query, layers.constant([[[[facts.scale]]]], np.float32))

    first_slot = layers.cast(cache_lengths, trt.int32)
    key, value = (
        layers.output(layers.network.add_kv_cache_update(cache, new, first_slot, trt.KVCacheMode.LINEAR))
        for cache, new in ((key_cache, layers.cast(key, dtype)), (value_cache, value))
    )

    def live(cache: Any) -> Any:
        size = layers.concat(batch, layers.constant([kv_heads]), slots, layers.constant([head_dim]))
        return layers.slice(cache, (0, 0, 0, 0), size)

    key_slot = layers.reshape(layers.count_up(slots), 1, 1, 1, -1)
    steps = layers.reshape(layers.count_up(tokens), 1, 1, -1, 1)
    query_slot = layers.binary("SUM", layers.reshape(cache_lengths, -1, 1, 1, 1), steps)
    past = layers.unary("NOT", layers.binary("GREATER", key_slot, query_slot))
    seen = layers.binary("AND", past, layers.reshape(visible, 0, 1, 1, -1))
    if window:
        last_hidden = layers.binary("SUB", query_slot, layers.constant([[[[window]]]]))
        seen = layers.binary("AND", seen, layers.binary("GREATER", key_slot, last_hidden))
    sees_any = layers.reduce("MAX", layers.cast(seen, trt.float32))
    if alibi_slopes is None:
        # A query that sees no key attends to all, so no kernel divides by a sum of zero; its context becomes 0 below.
        mask = layers.binary("OR", seen, layers.unary("NOT", layers.cast(sees_any, trt.bool)))
    else:
        distance = layers.cast(layers.binary("SUB", key_slot, query_slot), trt.float32)
        bias = layers.binary("PROD", distance, layers.reshape(alibi_slopes, 1, heads, 1, 1))
        hidden = layers.constant([[[[HIDDEN]]]], np.float32)
        mask = layers.cast(layers.output(layers.network.add_select(seen, bias, hidden)), dtype)

    attention = layers.network.add_attention_v2(
        layers.cast(query, dtype), live(key), live(value), trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
    )
    if attention is None:
        raise LogitLockError(f"TensorRT refuses the attention of {layers.name}")
    attention.name, attention.mask = layers.name, mask
    # No fused kernel computes in fp32.
    attention.decomposable = dtype == trt.float32
    context = layers.binary("PROD", attention.get_output(0), layers.cast(sees_any, dtype))
    return layers.reshape(context, 0, 0, heads * head_dim, before=(0, 2, 1, 3)), key, value


def plugin_layer(layers: Layers, plugin: str, inputs: Sequence[Any], **attributes: float) -> list[Any]:
    """A call of one of our plugins (full TensorRT has `add_plugin_v3`); its outputs."""
    kind = CREATORS[plugin].plugin
    made = kind(kind.Attributes(**attributes), layer=layers.name)
    layer = layers.network.add_plugin_v3(inputs, [], made)
    layers.constants.append(made)
    return [layers.output(layer, index) for index in range(kind.OUTPUTS)]


def register_converters(conversion: Any, tap: Any, rms_norm: Any, attention: Any, *, plugins: bool) -> None:
    """Register the converters of our operators with Torch-TensorRT.

    Args:
        conversion: the module `torch_tensorrt.dynamo.conversion`.
        tap, rms_norm, attention: the operators, in their functional form.
        plugins: convert to calls of our plugins.
    """

    def tensor(context: Any, value: Any, name: str) -> Any:
        return conversion.converter_utils.get_trt_tensor(context, value, name)

    def make(context: Any, name: str) -> Layers:
        return Layers(context.net, name, context.cpu_weights_reference_holder)

    def convert_tap(context: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        return args[0]

    def convert_rms_norm(context: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        x, weight, eps, weight_in_float = args
        layers, weight = make(context, name), tensor(context, weight, f"{name}.weight")
        if plugins:
            options = {"epsilon": eps, "weight_in_float": int(weight_in_float)}
            return plugin_layer(layers, "FusedRmsNorm", (x, weight), **options)[0]
        return rms_norm_layers(layers, x, weight, eps, weight_in_float)

    def convert_attention(context: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        values = dict(zip(TENSORRT_ARGUMENTS, args, strict=False))
        facts = AttentionFacts(**{field.name: values.pop(field.name) for field in dataclasses.fields(AttentionFacts)})
        given = {
            argument: tensor(context, value, f"{name}.{i}")
            for i, (argument, value) in enumerate(values.items())
            if value is not None
        }
        if facts.arithmetic != "exact":
            raise LogitLockError(
                f"{name}: attention with arithmetic {facts.arithmetic!r} cannot be converted, only exact"
            )
        layers = make(context, name)
        if not plugins:
            return attention_layers(layers, facts, **given)
        rotary_dim = 2 * given["cos"].shape[-1] if "cos" in given else 0
        attributes = node_attributes(facts, given, rotary_dim=rotary_dim)
        inputs = [given[row.name] for row in TENSORRT_INPUTS if row.name in given]
        return plugin_layer(layers, "CachedAttention", inputs, **attributes)

    made: dict[Any, Callable[..., Any]] = {
        tap: convert_tap,
        rms_norm: convert_rms_norm,
        attention: convert_attention,
    }
    for operator, converter in made.items():
        conversion.DYNAMO_ATEN_CONVERTERS.pop(operator, None)
        conversion.dynamo_tensorrt_converter(operator, supports_dynamic_shapes=True)(converter)

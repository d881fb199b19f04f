"""A plan played by torch, on the device where its tensors are: the graph node by node on the bound addresses, plugin
nodes by the plugins themselves where there are kernels for them (a GPU), else by their ops.

With it everything of an engine runs on a GPU that TensorRT does not serve, except TensorRT.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor

from refmodels.ops import cached_attention, fused_rms_norm
from tests.support.fake_plan import FakeContext, FakeEngine
from tests.support.plugin_calls import plugin_call
from trt_runtime.bundle import KERNELS_NAME, MODEL_NAME, Bundle
from trt_runtime.kernels.compiled import CompiledKernels
from trt_runtime.tensorrt import plugins
from trt_runtime.tensorrt.api import trt

_TORCH = {1: torch.float32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 16: torch.bfloat16}
_NAMES = {1: "tensor(float)", 7: "tensor(int64)", 10: "tensor(float16)", 16: "tensor(bfloat16)"}
_TRT = {
    torch.float32: trt.float32,
    torch.float16: trt.float16,
    torch.bfloat16: trt.bfloat16,
    torch.int64: trt.int64,
    torch.bool: trt.bool,
}


class TorchPlan(FakeEngine):
    """A bundle's graph; `taps`: its taps are outputs."""

    handle = None

    def __init__(self, bundle: Bundle, device: torch.device, *, taps: bool) -> None:
        self.info, self.device = bundle.info, device
        self.model = onnx.load(bundle.directory / MODEL_NAME)
        graph = self.model.graph
        shown = {v.name: v for v in graph.output}
        if taps:
            shown |= {v.name: v for v in graph.value_info if v.name in bundle.info.taps.values()}
        self.inputs, self.outputs = ({v.name: _type(v) for v in values} for values in (graph.input, shown.values()))
        self.contexts: list[FakeContext] = []
        self.names = [*self.inputs, *self.outputs]
        self.weights = {w.name: _weight(w).to(device) for w in graph.initializer}
        self.plugins: dict[str, Any] = {}
        self.state: dict[int, Any] = {}
        if device.type == "cuda":
            self._load_plugins(bundle.directory)

    def _load_plugins(self, directory: Path) -> None:
        with plugins.use_compiled(CompiledKernels.load(directory / KERNELS_NAME)):
            for node in self.model.graph.node:
                if node.op_type in plugins.CREATORS:
                    creator = plugins.CREATORS[node.op_type]
                    source = creator.plugin(creator.plugin.Attributes(**_attributes(node)))
                    fields = source.get_fields_to_serialize()
                    self.plugins[node.name] = creator.create_plugin("", fields, trt.TensorRTPhase.RUNTIME)

    def play(self, context: FakeContext, stream: int) -> None:
        key = tuple(context.addresses.items())
        known = self.state.get(id(context))
        if known is None or known[0] != key:
            # Nothing of this is done while a graph is captured: the same context has run the same step before.
            bound = {n: self._at(context, n, address) for n, address in context.addresses.items()}
            attached = {name: p.attach_to_context(None) for name, p in self.plugins.items()} if not known else known[2]
            known = self.state[id(context)] = (key, bound, attached, {})
        _, bound, attached, workspaces = known
        values: dict[str, Any] = {**self.weights, **{n: bound[n] for n in self.inputs}}
        for node in self.model.graph.node:
            inputs = [values[n] for n in node.input]
            if node.name in attached:
                outputs = _enqueue(attached[node.name], node.name, inputs, workspaces, stream)
            else:
                found = _OPS[node.op_type](node, *inputs)
                outputs = found if isinstance(found, tuple) else (found,)
            values |= dict(zip(node.output, outputs, strict=True))
        for name in self.outputs:
            if values[name].data_ptr() != bound[name].data_ptr():
                bound[name].copy_(values[name])

    def _at(self, context: FakeContext, name: str, address: int) -> Tensor:
        """The memory that is bound as a tensor."""
        dtype = {v: k for k, v in _NAMES.items()}[(self.inputs | self.outputs)[name][0]]
        shape = context.get_tensor_shape(name)
        size = _TORCH[dtype].itemsize * int(torch.Size(shape).numel())
        if self.device.type == "cpu":
            raw = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)
        else:
            raw = torch.as_tensor(_Memory(address, size), device=self.device)
        return raw.view(_TORCH[dtype]).view(shape)


class _Memory:
    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 2}


def _enqueue(
    plugin: Any, name: str, inputs: list[Tensor], workspaces: dict[str, Tensor], stream: int
) -> tuple[Tensor, ...]:
    """TensorRT's part of a plugin layer."""
    inputs = [t.contiguous() for t in inputs]
    if plugin.NAME == "FusedRmsNorm":
        outputs: tuple[Tensor, ...] = (torch.empty_like(inputs[0]),)
    else:
        a, qkv = plugin.attributes, inputs[0]
        width = qkv.shape[2] * a.heads // (a.heads + 2 * a.kv_heads)
        outputs = (qkv.new_empty(*qkv.shape[:2], width), inputs[1], inputs[2])
    descs = [[_desc(t) for t in tensors] for tensors in (inputs, outputs)]
    if name not in workspaces:
        size = plugin.get_workspace_size([_dynamic(d) for d in descs[0]], [_dynamic(d) for d in descs[1]])
        workspaces[name] = torch.full((max(16, size),), 0xFF, dtype=torch.uint8, device=inputs[0].device)
        plugin.on_shape_change(*descs)
    addresses = [[t.data_ptr() for t in tensors] for tensors in (inputs, outputs)]
    plugin.enqueue(*descs, *addresses, workspaces[name].data_ptr(), stream)
    return outputs


def _desc(tensor: Tensor) -> Any:
    made = trt.PluginTensorDesc()
    made.dims, made.type, made.format = tuple(tensor.shape), _TRT[tensor.dtype], trt.TensorFormat.LINEAR
    return made


def _dynamic(desc: Any) -> Any:
    made = trt.DynamicPluginTensorDesc()
    made.desc, made.max = desc, tuple(desc.dims)
    return made


def _type(value: onnx.ValueInfoProto) -> tuple[str, list[str | int]]:
    tensor = value.type.tensor_type
    return _NAMES[tensor.elem_type], [d.dim_param or d.dim_value for d in tensor.shape.dim]


def _weight(initializer: onnx.TensorProto) -> Tensor:
    array = numpy_helper.to_array(initializer)
    if initializer.data_type == 16:
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if not a.name.startswith("plugin_")}


def _attention(node: onnx.NodeProto, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a = _attributes(node)
    plugin = plugins.attention.CachedAttentionPlugin(plugins.attention.AttentionAttributes(**a))
    return cached_attention(*plugin_call(plugin, inputs))


def _norm(node: onnx.NodeProto, x: Tensor, weight: Tensor) -> Tensor:
    a = _attributes(node)
    return fused_rms_norm(x, weight, eps=a["epsilon"], weight_in_float=bool(a["weight_in_float"]))


def _layer_norm(node: onnx.NodeProto, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    eps = _attributes(node)["epsilon"]
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


def _unsqueeze(node: onnx.NodeProto, x: Tensor, axes: list[int]) -> Tensor:
    for axis in axes:
        x = x.unsqueeze(axis)
    return x


_OPS: dict[str, Callable[..., Any]] = {
    "Add": lambda node, x, y: x + y,
    "CachedAttention": _attention,
    "Cast": lambda node, x: x.to(_TORCH[_attributes(node)["to"]]),
    "Constant": lambda node: next(iter(_attributes(node).values())),
    "FusedRmsNorm": _norm,
    "Gather": lambda node, x, index: x[index],
    "GatherND": lambda node, x, index: torch.take_along_dim(x, index, 1),
    "Gelu": lambda node, x: F.gelu(x, approximate=_attributes(node)["approximate"].decode()),
    "LayerNormalization": _layer_norm,
    "MatMul": lambda node, x, y: x @ y,
    "Mul": lambda node, x, y: x * y,
    "Sigmoid": lambda node, x: torch.sigmoid(x),
    "Squeeze": lambda node, x, axes: x.squeeze(axes[0]),
    "Transpose": lambda node, x: x.permute(_attributes(node)["perm"]),
    "Unsqueeze": _unsqueeze,
}

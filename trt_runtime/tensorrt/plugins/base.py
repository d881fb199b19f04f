"""Common base of our plugins: attributes as serialized fields, checks of inputs, and errors that are not lost.

TensorRT calls a plugin from C++.  An exception there becomes a line in TensorRT's log at best, so every call is
wrapped: it keeps the first exception, and the code that called TensorRT raises it (`raise_failure`).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, get_args

import numpy as np
import torch

from refmodels.errors import LogitLockError
from trt_runtime.kernels.launch import ElementType
from trt_runtime.tensorrt.api import tensorrt_type, trt

PLUGIN_NAMESPACE = "refmodels"
PLUGIN_VERSION = "1"
ELEMENTS: dict[Any, ElementType] = {tensorrt_type(name): name for name in get_args(ElementType)}

_failures: list[Exception] = []
_kernels: list[Kernels] = []


class Kernels:
    """Compiled kernels and their launchers, one per compute capability; shared by all layers of an engine."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._launchers: dict[int, Any] = {}

    def launcher(self) -> Any:
        """The launcher for torch's current device."""
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
        if capability not in self._launchers:
            self._launchers[capability] = self._compiled.launcher(capability)
        return self._launchers[capability]


@contextmanager
def use_compiled(compiled: Any) -> Iterator[None]:
    """Give `compiled` (`trt_runtime.kernels.compiled.CompiledKernels`) to every plugin made inside the block.

    Put it around deserializing a plan, and around building one with full TensorRT, which times plugins as it builds.
    """
    _kernels.append(Kernels(compiled))
    try:
        yield
    finally:
        _kernels.pop()


def raise_failure() -> None:
    """Raise the first exception that a plugin met since the last call, if any.

    Raises:
        LogitLockError: from that exception.
    """
    failures = list(_failures)
    _failures.clear()
    if failures:
        raise LogitLockError(str(failures[0])) from failures[0]


def reported(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the exception of a method that TensorRT calls, with the plugin's name in front, and raise it on."""

    @functools.wraps(method)
    def wrapper(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except Exception as error:
            text = str(error) or type(error).__name__
            failure = LogitLockError(f"TensorRT plugin {self.title}, {method.__name__}: {text}")
            _failures.append(failure)
            raise failure from error

    return wrapper


class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):  # type: ignore[misc]
    """A plugin whose ONNX attributes, and serialized fields, are the fields of the dataclass `Attributes`.

    Attributes:
        layer: name of the ONNX node; "" in a plan that was loaded.
        attributes: values of the node's attributes.
    """

    NAME: ClassVar[str]
    OUTPUTS: ClassVar[int]
    Attributes: ClassVar[type[Any]]

    def __init__(self, attributes: Any, *, layer: str = "", kernels: Kernels | None = None) -> None:
        for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
            base.__init__(self)
        # TensorRT frees a plugin that it owns, and the bindings free it again with the Python object, when a build is
        # cancelled: two frees of one block.  So the object, some hundred bytes, is never given back.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        self.plugin_name, self.plugin_version, self.plugin_namespace = self.NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE
        self.num_outputs = self.OUTPUTS
        self.timing_cache_id = ""
        self.attributes, self.layer, self.kernels = attributes, layer, kernels
        self._fields: Fields | None = None

    @property
    def title(self) -> str:
        """Name and layer, for messages."""
        return f"{self.NAME} {self.layer}".strip()

    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        raise NotImplementedError

    def input_types(self, types: Sequence[Any]) -> list[tuple[Any, ...]]:
        """The types that each input may have, given the types of all inputs before it."""
        raise NotImplementedError

    def output_types(self, types: Sequence[Any]) -> list[Any]:
        """The type of each output, given those of all inputs."""
        raise NotImplementedError

    def launcher(self) -> Any:
        """The launcher of the kernels.

        Raises:
            LogitLockError: no kernels were given to this plugin.
        """
        if self.kernels is None:
            raise LogitLockError(
                "no kernels were given; load the plan inside trt_runtime.tensorrt.plugins.use_compiled(...)"
            )
        return self.kernels.launcher()

    # Methods that TensorRT calls

    def get_capability_interface(self, kind: Any) -> Any:
        return self

    def clone(self) -> Any:
        return type(self)(self.attributes, layer=self.layer, kernels=self.kernels)

    def attach_to_context(self, context: Any) -> Any:
        return self.clone()

    @reported
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        names = self.inputs()
        if len(input_types) != len(names):
            raise LogitLockError(
                f"it has {len(input_types)} inputs; its attributes ask for {len(names)}: {', '.join(names)}"
            )
        for index, (name, given) in enumerate(zip(names, input_types, strict=True)):
            allowed = self.input_types(input_types[:index])[index]
            if given not in allowed:
                wanted = " or ".join(a.name for a in allowed)
                raise LogitLockError(f"the input {name} has type {given.name}; it must be {wanted}")
        return self.output_types(input_types)

    @reported
    def supports_format_combination(self, position: int, tensors: Sequence[Any], input_count: int) -> bool:
        here = tensors[position].desc
        if here.format != trt.TensorFormat.LINEAR:
            return False
        if position >= input_count:
            types = self.output_types([t.desc.type for t in tensors[:input_count]])
            return bool(here.type == types[position - input_count])
        return here.type in self.input_types([t.desc.type for t in tensors[:position]])[position]

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        pass

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        pass

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        return 0

    def get_valid_tactics(self) -> list[int]:
        return []

    def set_tactic(self, tactic: int) -> None:
        pass

    @reported
    def get_fields_to_serialize(self) -> Any:
        self._fields = Fields({name: getattr(self.attributes, name) for name in attribute_types(self.Attributes)})
        return self._fields.collection


class Fields:
    """A collection of fields and the memory it points to: TensorRT's own objects do not keep the arrays alive."""

    def __init__(self, values: dict[str, int | float]) -> None:
        arrays = {name: np.array([value], _NUMPY[type(value)]) for name, value in values.items()}
        fields = [trt.PluginField(name, array, _FIELD_TYPES[type(values[name])]) for name, array in arrays.items()]
        self.collection = trt.PluginFieldCollection(fields)
        self._kept = (arrays, fields)


class PluginCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
    """Makes one kind of plugin from a node's attributes (build) or a plan's fields (load)."""

    def __init__(self, plugin: type[Plugin]) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.plugin = plugin
        self.name, self.plugin_version, self.plugin_namespace = plugin.NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE
        self.title = plugin.NAME
        self._advertised = Fields({name: kind() for name, kind in attribute_types(plugin.Attributes).items()})
        self.field_names = self._advertised.collection

    @reported
    def create_plugin(self, name: str, fields: Any, phase: Any) -> Plugin:
        given = {field.name: field for field in fields}
        types = attribute_types(self.plugin.Attributes)
        at_build = phase == trt.TensorRTPhase.BUILD
        for what, names in (("lacks the", types.keys() - given), ("has the unknown", given.keys() - types)):
            if names:
                raise LogitLockError(f"{name or 'a plan'} {what} attribute {', '.join(sorted(names))}")
        values = {}
        for field_name, kind in types.items():
            field = given[field_name]
            # A node may give a list; what a plan holds was one value.
            if field.type != _FIELD_TYPES[kind] or (at_build and field.size != 1):
                raise LogitLockError(
                    f"{name or 'a plan'}: the attribute {field_name} must be one {kind.__name__}, "
                    f"it is {field.size} of type {field.type.name}"
                )
            values[field_name] = kind(field.data[0])
        attributes = self.plugin.Attributes(**values)
        # The parser's name is the node's; the one at load is TensorRT's own.
        layer = name if at_build else ""
        return self.plugin(attributes, layer=layer, kernels=_kernels[-1] if _kernels else None)


_NUMPY: dict[type, Any] = {int: np.int32, float: np.float32}
_FIELD_TYPES: dict[type, Any] = {int: trt.PluginFieldType.INT32, float: trt.PluginFieldType.FLOAT32}


def attribute_types(attributes: type[Any]) -> dict[str, type]:
    """Name -> int or float, of a dataclass of attributes."""
    hints = typing.get_type_hints(attributes)
    return {field.name: hints[field.name] for field in dataclasses.fields(attributes)}

"""TensorRT plugins for the custom nodes of a bundle: `FusedRmsNorm`, `FusedRmsNormQuant` and `CachedAttention`.

They are Python IPluginV3, for full TensorRT and TensorRT-RTX alike.  TensorRT finds them by their creators in namespace
"refmodels", version "1", when it parses a graph and when it loads a plan.  Call `register_plugins` once; then parse, or
load a plan inside `use_compiled`.  The kernels are those of `trt_runtime/kernels`, from the bundle's `kernels.bin`.
"""

from __future__ import annotations

from typing import Any

import onnx

from refmodels.errors import LogitLockError
from trt_runtime.tensorrt.api import LOGGER, errors_of, trt
from trt_runtime.tensorrt.plugins.attention import CachedAttentionPlugin
from trt_runtime.tensorrt.plugins.base import (
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    PluginCreator,
    raise_failure,
    use_compiled,
)
from trt_runtime.tensorrt.plugins.rms_norm import FusedRmsNormPlugin, FusedRmsNormQuantPlugin

__all__ = [
    "CREATORS",
    "PLUGIN_NAMESPACE",
    "PLUGIN_VERSION",
    "check_nodes",
    "check_plugins",
    "raise_failure",
    "register_plugins",
    "use_compiled",
]

CREATORS: dict[str, PluginCreator] = {
    plugin.NAME: PluginCreator(plugin)
    for plugin in (FusedRmsNormPlugin, FusedRmsNormQuantPlugin, CachedAttentionPlugin)
}
"""By plugin name.  They live as long as the process: TensorRT keeps their addresses."""

_PLACE = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": "1"}
"""Attributes that select a node's plugin, and TensorRT's default for an absent one: the node's domain, version 1."""


def register_plugins() -> None:
    """Register our creators with TensorRT; calling it again is fine.

    Raises:
        LogitLockError: TensorRT refuses one.
    """
    registry = trt.get_plugin_registry()
    for name, creator in CREATORS.items():
        if registry.get_creator(name, PLUGIN_VERSION, PLUGIN_NAMESPACE) is not None:
            continue
        with LOGGER.collect() as messages:
            taken = registry.register_creator(creator, PLUGIN_NAMESPACE)
        if not taken:
            raise LogitLockError(
                f"TensorRT does not take the plugin {PLUGIN_NAMESPACE}::{name} {PLUGIN_VERSION}: "
                f"{'; '.join(errors_of(messages))}"
            )


def check_plugins(versions: dict[str, str]) -> None:
    """Check that a creator is registered for every plugin of a plan (name -> version, namespace "refmodels").

    Raises:
        LogitLockError: a plugin has no creator.
    """
    register_plugins()
    for name, version in versions.items():
        _creator(name, version, PLUGIN_NAMESPACE, "the plan")


def check_nodes(model: onnx.ModelProto) -> None:
    """Check every plugin node of a graph before TensorRT sees it.

    TensorRT is silent where a creator is missing (it takes the function body) and where the creator does not advertise
    an attribute (it drops it).  A plugin node is one with the attribute `plugin_namespace`, or one in our
    domain without a function body.

    Raises:
        LogitLockError: a node has no creator of its name, version and namespace, or an attribute that its creator does
            not advertise.
    """
    register_plugins()
    bodies = {(function.domain, function.name) for function in model.functions}
    for node in model.graph.node:
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.name in _PLACE}
        has_body = (node.domain, node.op_type) in bodies
        if "plugin_namespace" not in values and (node.domain != PLUGIN_NAMESPACE or has_body):
            continue
        place = {name: bytes(values.get(name, default.encode())).decode() for name, default in _PLACE.items()}
        where = f"the node {node.name}"
        creator = _creator(node.op_type, place["plugin_version"], place["plugin_namespace"], where)
        advertised = {field.name for field in creator.field_names}
        unknown = {a.name for a in node.attribute} - advertised - _PLACE.keys()
        if unknown:
            raise LogitLockError(
                f"{where}: the plugin {node.op_type} does not know the attribute {', '.join(sorted(unknown))}; "
                f"it has {', '.join(sorted(advertised))}"
            )


def _creator(name: str, version: str, namespace: str, where: str) -> Any:
    registry = trt.get_plugin_registry()
    creator = registry.get_creator(name, version, namespace)
    if creator is None:
        others = [c for c in registry.all_creators if c.name == name]
        known = ", ".join(f"{c.plugin_namespace}::{c.name} version {c.plugin_version}" for c in others)
        raise LogitLockError(
            f"{where} needs the TensorRT plugin {namespace}::{name} version {version}, which has no creator; "
            f"registered: {known or 'none of this name'}"
        )
    return creator

"""`--backend torch-tensorrt`: the reference through `torch.export` and Torch-TensorRT's converters to a plan.

Torch-TensorRT makes a TensorRT network of the exported program; `export.tensorrt.build` builds the plan of the network,
so that plans of both routes have the same inputs and outputs, profiles, targets and layer
lists.  (Torch-TensorRT's own last step, `convert_exported_program_to_serialized_trt_engine`, knows one profile and the
GPU of this machine, names outputs output0, output1, .., and opens the plan it has made, which takes a GPU.)

Two operators exist in exported programs only.  `refmodels::cached_attention_functional` returns the caches that
`cached_attention` updates in place, so that a program has no side effects.  `refmodels::tap` keeps the taps, which name
the network's tensors and, through them, its layers.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn

from export.graph.external_data import mapped_weights
from export.progress import Progress
from export.tensorrt.build import BuildResult, build_network, check_warnings, fix_capacity
from export.tensorrt.builder_log import parse_log
from export.tensorrt.options import BuildOptions
from export.tensorrt.torch_converters import register_converters
from refmodels.attention import TENSORRT_ARGUMENTS, TENSORRT_INPUTS, AttentionInputs, torch_schema
from refmodels.checkpoints.load import empty_decoder
from refmodels.dtypes import BY_ONNX
from refmodels.errors import LogitLockError
from refmodels.model import Decoder
from refmodels.ops import cached_attention
from refmodels.recorder import tap
from refmodels.spec import ModelSpec, Numerics
from refmodels.taps import split_name, tap_names
from trt_runtime.bundle import MODEL_NAME, PLAN_NAME, TAPS_PLAN_NAME, AttentionMode
from trt_runtime.tensorrt.api import IS_RTX, LOGGER, errors_of, package_version, tensorrt_type, trt, warnings_of
from trt_runtime.tensorrt.plugins import CREATORS, PLUGIN_VERSION, register_plugins

_LIBRARY = torch.library.Library("refmodels", "FRAGMENT")
_LIBRARY.define("tap(Tensor x, str name) -> Tensor")
_LIBRARY.define(torch_schema("cached_attention_functional", TENSORRT_INPUTS, functional=True))


def _functional(qkv: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    key_cache, value_cache = key_cache.clone(), value_cache.clone()
    arguments = dict(zip(TENSORRT_ARGUMENTS, (qkv, key_cache, value_cache, *rest), strict=False))
    context = torch.ops.refmodels.cached_attention(**arguments)
    return context, key_cache, value_cache


_LIBRARY.impl("tap", lambda x, name: x.clone(), "CompositeExplicitAutograd")
_LIBRARY.impl("cached_attention_functional", _functional, "CompositeExplicitAutograd")
torch.library.register_fake("refmodels::tap", lambda x, name: torch.empty_like(x), lib=_LIBRARY)
torch.library.register_fake("refmodels::cached_attention_functional", _functional, lib=_LIBRARY)
_RMS_NORM = torch.ops.refmodels.fused_rms_norm.default
_TAP = torch.ops.refmodels.tap.default
_ATTENTION = torch.ops.refmodels.cached_attention_functional.default


def build_plan(
    directory: Path,
    spec: ModelSpec,
    *,
    attention: AttentionMode,
    options: BuildOptions,
    taps: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Convert the model whose weights are in `directory` and write its plan, as `export.tensorrt.build.build_plan`.

    Args:
        directory: a bundle, or one being written, with model.onnx (numerics "exact") and its weights, which are mapped.
        attention: "plugin" calls our plugins (full TensorRT only), "native" makes layers of TensorRT's own.
        taps: every tap becomes an output of the plan.
    Raises:
        LogitLockError: Torch-TensorRT is not installed, cannot be imported or belongs to the other TensorRT; it cannot
            convert the model; the attention mode is not possible; the builder fails.
    """
    import_torch_tensorrt()
    check_modes(attention, "exact")
    if attention == "plugin":
        register_plugins()
    model = onnx.load(directory / MODEL_NAME, load_external_data=False)
    fix_capacity(model, options.max_seq)
    decoder = bundle_decoder(directory, model, spec, positions=options.max_seq)
    program = export_decoder(decoder, model)
    path = directory / (TAPS_PLAN_NAME if taps else PLAN_NAME)
    with LOGGER.collect() as messages:
        try:
            interpreter = _convert(program, model, attention=attention, taps=taps)
        except Exception as error:
            # Torch-TensorRT hides TensorRT's messages behind errors of its own.
            text = " ".join((errors_of(messages) or [f"{type(error).__name__}: {error}"])[0].split())
            raise LogitLockError(f"Torch-TensorRT cannot convert {spec.variant}: {text[:400]}") from error
        builder, network = interpreter.builder, interpreter.ctx.net
        layer_taps = _layer_taps(network, tap_names(spec))
        build_network(builder, network, path, inputs=model.graph.input, options=options, progress=progress)
    return BuildResult(
        plan=path,
        layers=parse_log((text for _, text in messages), plan=path.name, taps=layer_taps),
        plugins=dict.fromkeys(CREATORS, PLUGIN_VERSION) if attention == "plugin" else {},
        warnings=check_warnings(warnings_of(messages)),
    )


def import_torch_tensorrt() -> ModuleType:
    """Torch-TensorRT, for the TensorRT package that `trt_runtime.tensorrt.api` uses.

    Raises:
        LogitLockError: it is not installed, cannot be imported, or belongs to the other package.
    """
    wheel = "torch-tensorrt-rtx" if IS_RTX else "torch-tensorrt"
    install = (
        f"pip install --no-deps {wheel}=={torch.__version__.partition('+')[0]} && pip install dllist packaging psutil"
    )
    try:
        module = importlib.import_module("torch_tensorrt")
    except ModuleNotFoundError as error:
        raise LogitLockError(
            f"--backend torch-tensorrt needs the module {error.name}, which is not installed; run: {install} "
            f"(its version is that of torch; --no-deps because it pins an older TensorRT than {package_version()})"
        ) from None
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise LogitLockError(
            f"Torch-TensorRT cannot be imported: {text[:300]}; it needs an NVIDIA driver, a torch with CUDA, and the "
            f"same version as torch, {torch.__version__}"
        ) from error
    if bool(module.ENABLED_FEATURES.tensorrt_rtx) != IS_RTX:
        raise LogitLockError(
            f"the Torch-TensorRT installed here is not for {package_version()}; run: {install}, or choose the TensorRT "
            "that it is for with LOGITLOCK_TENSORRT"
        )
    return module


def check_modes(attention: AttentionMode, numerics: Numerics) -> None:
    """Refuse options that this route cannot build.

    Raises:
        LogitLockError: attention "decomposed", or "plugin" with TensorRT-RTX; numerics "upstream".
    """
    if attention == "decomposed" or (attention == "plugin" and IS_RTX):
        reason = "" if attention == "decomposed" else "TensorRT-RTX takes plugins from ONNX graphs only; "
        raise LogitLockError(f"--backend torch-tensorrt cannot have --attention {attention}: {reason}use native")
    if numerics != "exact":
        raise LogitLockError(f"--backend torch-tensorrt cannot have --numerics {numerics}; use exact")


def bundle_decoder(directory: Path, model: onnx.ModelProto, spec: ModelSpec, *, positions: int) -> Decoder:
    """The reference with the weights of a bundle's graph, mapped from their file, and tables for `positions` slots."""
    tensors = mapped_weights(model, directory)
    decoder = empty_decoder(spec)
    for name, _ in list(decoder.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module, value = decoder.get_submodule(owner), tensors[name]
        if isinstance(module, nn.Linear) and leaf == "weight":
            value = value.t()  # stored [in, out]
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    if spec.tied_head:
        decoder.head.weight = decoder.embed.weight
    decoder.prepare_tables(positions)
    return decoder.eval()


@torch.no_grad()
def export_decoder(decoder: Decoder, model: onnx.ModelProto) -> torch.export.ExportedProgram:
    """The decoder as a program of aten operators, our two custom operators and taps.

    Inputs are named as the arguments of `Decoder.forward`, caches past_key_0, past_key_1, .., past_value_0, ..; inputs
    that the decoder does not read are left out.  Outputs: logits, the updated keys of all layers, the updated values.

    Args:
        model: its ONNX graph, with fixed capacity, which says how large inputs are and which axes are dynamic.
    """
    graph = fx.Tracer(autowrap_functions=(tap, cached_attention)).trace(decoder)
    for node in list(graph.nodes):
        # Of traces only; fx would write code that looks the operators up by a name that they do not have.
        node.meta.pop("is_wrapped", None)
        if node.target is tap:
            name, value = node.args
            node.target, node.args = _TAP, (value, name)
        elif node.target is cached_attention:
            construction, facts = node.args
            given = dict(zip(AttentionInputs._fields, construction.args, strict=True)) | vars(facts)
            node.target, node.args = _ATTENTION, tuple(given[name] for name in TENSORRT_ARGUMENTS)
            graph.erase_node(construction)
        elif node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    # Sizes of the example differ, and none is 1: torch.export takes 1 for a constant.
    sizes = {"batch": 2, "tokens": 3, "logit_tokens": 5, "slots": 7}
    dims = {axis: torch.export.Dim(axis, min=1) for axis in sizes}
    inputs: dict[str, Any] = {}
    dynamic: dict[str, Any] = {}
    for value in model.graph.input:
        axes = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        dtype = torch.int64 if value.type.tensor_type.elem_type == onnx.TensorProto.INT64 else decoder.dtype
        # Expanded from one element: caches of full size would take gigabytes for nothing.
        example = torch.zeros((), dtype=dtype).expand([sizes.get(axis, axis) for axis in axes])
        moving = {i: dims[axis] for i, axis in enumerate(axes) if axis in dims}
        argument = re.sub(r"_\d+$", "", _argument(value.name))
        if argument != _argument(value.name):
            inputs.setdefault(argument, []).append(example)
            dynamic.setdefault(argument, []).append(moving)
        else:
            inputs[argument], dynamic[argument] = example, moving
    # torch.export takes keyword arguments by their order.
    arguments = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    return torch.export.export(
        fx.GraphModule(decoder, graph),
        (),
        {name: inputs[name] for name in arguments},
        dynamic_shapes={name: dynamic[name] for name in arguments},
        strict=False,
    )


def _convert(
    program: torch.export.ExportedProgram, model: onnx.ModelProto, *, attention: AttentionMode, taps: bool
) -> Any:
    """Torch-TensorRT's interpreter after its run.

    Its `builder` made the network `ctx.net`, which has the inputs and outputs of `model`; tensors are named after taps.
    It also holds the weights, so it must live until the network is built.
    """
    from torch_tensorrt import dynamo
    from torch_tensorrt.dynamo import conversion, lowering

    register_converters(conversion, _TAP, _RMS_NORM, _ATTENTION, plugins=attention == "plugin")
    settings = dynamo.CompilationSettings(assume_dynamic_shape_support=True)
    program = lowering.pre_export_lowering(program, settings)
    program = program.run_decompositions(lowering.get_decompositions())
    module = lowering.post_lowering(program.module(), settings)
    infos = {_argument(value.name): value for value in model.graph.input}

    class Interpreter(conversion.TRTInterpreter):  # type: ignore[misc]
        """Torch-TensorRT's, with our logger and our names of inputs, outputs and taps."""

        ctx: Any
        builder: Any

        def __init__(self) -> None:
            super().__init__(module, [], compilation_settings=settings)
            # TensorRT keeps the logger of the first builder as long as any lives.
            del self.ctx, self.builder
            self.builder = trt.Builder(LOGGER)
            network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            self.ctx = conversion.ConversionContext(network, settings)

        def placeholder(self, target: str, args: Any, kwargs: Any) -> Any:
            tensor = infos[target].type.tensor_type
            shape = [dim.dim_value or -1 for dim in tensor.shape.dim]
            return self.ctx.net.add_input(infos[target].name, tensorrt_type(BY_ONNX[tensor.elem_type].name), shape)

        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.target is _TAP:
                result.name = n.args[1]
                if taps:
                    self.ctx.net.mark_output(result)
            return result

        def output(self, target: str, args: Any, kwargs: Any) -> Any:
            for tensor in () if taps else args[0]:
                self.ctx.net.mark_output(tensor)
            return args[0]

    interpreter = Interpreter()
    interpreter._construct_trt_network_def()
    for index in range(interpreter.ctx.net.num_layers):
        layer = interpreter.ctx.net.get_layer(index)
        layer.metadata = f"[torch: {layer.name}]"
    return interpreter


def _argument(name: str) -> str:
    """torch.export's name of a graph's input: past_key_3 for `past.blocks.3.key`, others alike."""
    layer, part = split_name(name.removeprefix("past."))
    return name if layer is None else f"past_{part}_{layer}"


def _layer_taps(network: Any, taps: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """As `export.tensorrt.builder_log.node_taps`, by the name of a layer; tensors of the network are named after
    taps."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    written = [[layer.get_output(i).name for i in range(layer.num_outputs)] for layer in layers]
    readers: dict[str, set[int]] = defaultdict(set)
    for number, layer in enumerate(layers):
        for tensor in filter(None, map(layer.get_input, range(layer.num_inputs))):
            readers[tensor.name].add(number)

    @functools.cache
    def reached(number: int) -> frozenset[str]:
        names = written[number]
        later = (reached(reader) for name in names if name not in taps for reader in readers[name])
        return frozenset(name for name in names if name in taps).union(*later)

    found: dict[str, set[str]] = defaultdict(set)
    for number, layer in enumerate(layers):
        found[layer.name] |= reached(number)
    return {name: tuple(sorted(names, key=taps.index)) for name, names in found.items()}

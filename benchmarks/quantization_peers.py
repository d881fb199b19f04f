"""Our quantization methods against published implementations, on the same weights and inputs.

    python benchmarks/quantization_peers.py            # writes benchmarks/results/quantization_peers.json
    python benchmarks/quantization_peers.py --time     # a Qwen-7B layer on a GPU: results/quantization_time.json

Every linear layer of the toys (a 4-bit weight in groups of 32) goes through ours and theirs with the activations of 128
calibration rows.  Errors are tr((W - Q) H (W - Q)^T); a ratio below 1 says that ours is smaller.  Where a peer's scales
follow another rule than ours, ours gets theirs, so that codes can be compared one by one.  Peers are whatever is
installed of: llmcompressor 0.14, neural-compressor 3.10, nvidia-modelopt 0.47, autoawq 0.2.9 (its quantizer alone: the
rest does not load with transformers 5), compressed-tensors, onnxruntime.  They want other versions of torch and
transformers than this project; made for this comparison with `pip install --no-deps` in an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import refmodels
from export.quantization.awq import search_clip, search_scale
from export.quantization.data import calibration_data
from export.quantization.fold import BLOCK_SITES, input_tap, readers
from export.quantization.gptq import Hessian, gptq, layer_error
from export.quantization.smoothquant import smooth_scale
from refmodels.quantization.arithmetic import pack_int4, quantize_weight, weight_scale
from refmodels.quantization.formats import LinearFormat

RESULTS = Path(__file__).resolve().parent / "results"
TOYS = ("chatglm2", "baichuan", "qwen", "gpt")
GROUP, TOKENS = 32, 2048
SYMMETRIC = LinearFormat(weight="int4", group=GROUP)
ZERO_POINTS = LinearFormat(weight="int4", group=GROUP, symmetric=False)
Layer = tuple[str, Tensor, Tensor]
"""Name, weight [out, in], inputs [tokens, in]."""


def layers_of(toy: str) -> Iterator[Layer]:
    source = refmodels.resolve(toy)
    model = refmodels.load(source)
    prefixes = [f"blocks.{i}." for i in range(model.spec.layers)]
    taps = [prefix + input_tap(model.spec, site) for prefix in prefixes for site in BLOCK_SITES]
    seen: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    for ids, mask in calibration_data(source).batches():
        with refmodels.recording(refmodels.Recorder(taps)) as recorder:
            model.step(ids, model.new_cache(batch=len(ids), capacity=ids.shape[1]), mask)
        assert recorder is not None
        for tap, tensor in recorder.tensors.items():
            seen[tap].append(tensor[mask.bool()])
    for prefix in prefixes:
        for site in BLOCK_SITES:
            x = torch.cat(seen[prefix + input_tap(model.spec, site)])[:TOKENS]
            for name in readers(model.spec, site):
                yield f"{toy} {prefix}{name}", model.get_submodule(prefix + name).weight.detach().clone(), x


def hessian_of(x: Tensor) -> Tensor:
    hessian = Hessian("layer", x.shape[1])
    hessian.observe(x)
    return hessian.matrix


def compare(
    ours: Tensor, theirs: Tensor, weight: Tensor, hessian: Tensor, linear: LinearFormat = SYMMETRIC
) -> dict[str, float]:
    """Ratios of errors (ours to theirs, ours to rounding), and the share of weights equal to a part in 10^5."""
    same = (ours - theirs).abs() <= 1e-5 * weight.abs().max()
    nearest = layer_error(weight, quantize_weight(weight, linear).dequantized(), hessian)
    a, b = layer_error(weight, ours, hessian), layer_error(weight, theirs, hessian)
    return {"error_ratio": a / b, "same": float(same.float().mean()), "ours_over_nearest": a / nearest}


# --- GPTQ ---


def llmcompressor_gptq(linear: LinearFormat, act_order: bool) -> Callable[[Layer], dict[str, float]]:
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight as theirs_of

    args = QuantizationArgs(
        num_bits=4, strategy="group", group_size=GROUP, symmetric=linear.symmetric,
        actorder="static" if act_order else None,
    )  # fmt: skip

    def run(layer: Layer) -> dict[str, float]:
        _, weight, x = layer
        hessian = hessian_of(x)
        scale, zero = weight_scale(weight, linear)
        index = zero if zero is not None else torch.zeros_like(scale, dtype=torch.int8)
        if act_order:
            # "static" leaves the scales of the original columns; its own index follows only "weight".
            args.actorder = type(args.actorder)("weight")
        theirs, _, fallback = theirs_of(
            weight[None].clone(), hessian[None].clone(), scale[None], index[None], None, args, percdamp=0.01
        )
        assert not bool(fallback.any())
        ours = gptq(weight, hessian, linear, act_order=act_order, scale=scale, zero=zero).weight
        return compare(ours.dequantized(), theirs[0], weight, hessian, linear)

    return run


def neural_compressor_gptq(linear: LinearFormat, act_order: bool) -> Callable[[Layer], dict[str, float]]:
    from neural_compressor.torch.algorithms.weight_only.gptq import GPTQ

    def run(layer: Layer) -> dict[str, float]:
        _, weight, x = layer
        peer = GPTQ(nn.Linear(1, 1), weight.clone())
        peer.add_batch(x, None)
        hessian = hessian_of(x)
        peer.H = hessian.clone()  # theirs counts sequences where ours counts tokens: a factor only
        config = {"bits": 4, "sym": linear.symmetric, "dtype": "int", "group_size": GROUP, "perchannel": True}
        peer.quantizer.configure(config | {"use_double_quant": False, "double_quant_sym": False, "mse": False})
        result = peer.fasterquant(
            weight.clone(), groupsize=GROUP, act_order=act_order, static_groups=act_order, blocksize=GROUP
        )
        theirs = result[-1]
        if not act_order:
            ours = gptq(weight, hessian, linear, block=GROUP).weight
        else:
            ours = gptq(weight, hessian, linear, act_order=True).weight
        return compare(ours.dequantized(), theirs, weight, hessian, linear)

    return run


# --- AWQ ---


@cache
def autoawq_class() -> Any:
    location = importlib.util.find_spec("awq")
    if location is None or location.submodule_search_locations is None:
        raise ImportError("autoawq")
    stubs = {}
    for name in ("awq", "awq.quantize"):
        # Their __init__ imports every model class of an older transformers.
        stubs[name] = types.ModuleType(name)
        stubs[name].__path__ = [str(Path(location.submodule_search_locations[0], *name.split(".")[1:]))]
    sys.modules.update(stubs)
    try:
        return importlib.import_module("awq.quantize.quantizer").AwqQuantizer
    finally:
        for name in stubs:
            del sys.modules[name]


def autoawq_quantizer(linear: LinearFormat) -> Any:
    quantizer = autoawq_class().__new__(autoawq_class())
    quantizer.w_bit, quantizer.group_size, quantizer.zero_point = 4, GROUP, not linear.symmetric
    quantizer.duo_scaling, quantizer.max_chunk_memory, quantizer.n_parallel_calib_samples = True, 2**30, None
    return quantizer


def autoawq(linear: LinearFormat) -> Callable[[Layer], dict[str, float]]:
    """Scale, then clipping: each step of ours against each step of theirs."""
    quantizer = autoawq_quantizer(linear)

    def run(layer: Layer) -> dict[str, float]:
        _, weight, x = layer
        x = x[::4]  # all that their clipping looks at
        hessian = hessian_of(x)
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        module.weight = nn.Parameter(weight.clone(), requires_grad=False)
        size = weight.abs().unflatten(1, (-1, GROUP))
        size = (size / size.amax(2, keepdim=True)).flatten(1).mean(0)
        peer_scale = quantizer._compute_best_scale(x, size, x.abs().mean(0), module, [module], x @ weight.t())
        ours = search_scale([weight], x, [linear], grid=20)
        unclipped = [
            layer_error(weight, quantize_weight(weight * s, linear).dequantized() / s, hessian)
            for s in (ours.scale, peer_scale)
        ]
        folded, divided = weight * ours.scale, x / ours.scale
        # It takes multiples of 64 rows only; rows are independent.
        padded = torch.cat((folded, folded[: -len(folded) % 64]))
        limit = quantizer._compute_best_clip(padded, divided, n_sample_token=len(x)).flatten(1)[: len(folded)]
        clipped = folded.unflatten(1, (-1, GROUP)).clamp(-limit[:, :, None], limit[:, :, None]).flatten(1)
        theirs = quantizer.pseudo_quantize_tensor(clipped)[0]
        scale, zero = search_clip(folded, divided, linear)
        mine = quantize_weight(folded, linear, scale=scale, zero=zero).dequantized()
        result = compare(mine / ours.scale, theirs / ours.scale, weight, hessian, linear)
        result["scale_error_ratio"] = unclipped[0] / unclipped[1]
        result["same_scale"] = float(torch.allclose(ours.scale, peer_scale, rtol=1e-4))
        return result

    return run


def modelopt_quantized(layer: Layer, algorithm: dict[str, Any], config: list[dict[str, Any]]) -> nn.Module:
    import modelopt.torch.quantization as mtq

    _, weight, x = layer
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight = nn.Parameter(weight.clone(), requires_grad=False)
    quant_cfg = [{"quantizer_name": "*", "enable": False}, *config]
    with contextlib.redirect_stdout(None):
        made: nn.Module = mtq.quantize(model, {"quant_cfg": quant_cfg, "algorithm": algorithm}, lambda m: m(x))
    return made


def modelopt_awq(method: str) -> Callable[[Layer], dict[str, float]]:
    import modelopt.torch.quantization  # noqa: F401

    config = [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: GROUP}}}]

    def run(layer: Layer) -> dict[str, float]:
        _, weight, x = layer
        hessian = hessian_of(x)
        theirs = modelopt_quantized(layer, {"method": method}, config)
        effective = theirs(torch.eye(weight.shape[1])).t()
        ours = search_scale([weight], x, [SYMMETRIC])
        folded = weight * ours.scale
        scale = None if method == "awq_lite" else search_clip(folded, x / ours.scale, SYMMETRIC)[0]
        return compare(
            quantize_weight(folded, SYMMETRIC, scale=scale).dequantized() / ours.scale, effective, weight, hessian
        )

    return run


# --- SmoothQuant ---


def modelopt_smoothquant() -> Callable[[Layer], dict[str, float]]:
    import modelopt.torch.quantization  # noqa: F401

    config = [
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
    ]

    def run(layer: Layer) -> dict[str, float]:
        _, weight, x = layer
        made = modelopt_quantized(layer, {"method": "smoothquant", "alpha": 0.5}, config)
        theirs = 1 / made[0].input_quantizer._pre_quant_scale.flatten()  # type: ignore[index]
        ours = smooth_scale([weight], x.abs().amax(0), alpha=0.5)
        return {"largest_difference": float(((ours - theirs) / theirs).abs().max())}

    return run


# --- codes and packing ---


def compressed_tensors_codes(linear: LinearFormat) -> Callable[[Layer], dict[str, float]]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    args = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP, symmetric=linear.symmetric)

    def run(layer: Layer) -> dict[str, float]:
        _, weight, _ = layer
        ours = quantize_weight(weight, linear)
        zero = torch.zeros_like(ours.scale, dtype=torch.int8) if ours.zero is None else ours.zero
        codes = quantize(weight, ours.scale, zero, args, dtype=torch.int8)
        back = unpack_from_int32(pack_to_int32(ours.codes, 4), 4, torch.Size(ours.codes.shape))
        floats = dequantize(ours.codes, ours.scale, zero, args)
        return {
            "same": float((codes == ours.codes).float().mean()),
            "same_after_packing": float((back == ours.codes).float().mean()),
            "same_dequantized": float((floats == ours.dequantized()).float().mean()),
        }

    return run


def onnxruntime_codes(linear: LinearFormat) -> Callable[[Layer], dict[str, float]]:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=GROUP, is_symmetric=linear.symmetric)

    def run(layer: Layer) -> dict[str, float]:
        _, weight, x = layer
        hessian = hessian_of(x)
        packed, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(
            np.ascontiguousarray(weight.t().numpy())
        )
        scale = torch.from_numpy(scales).view(len(weight), -1)
        nibbles = torch.from_numpy(zeros).view(len(weight), -1)
        zero = torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(1)[:, : scale.shape[1]].to(torch.int8) - 8
        given = quantize_weight(weight, linear, scale=scale, zero=None if linear.symmetric else zero)
        same = pack_int4((given.codes + 8).to(torch.int8)) == torch.from_numpy(packed).view(len(weight), -1)
        result = compare(quantize_weight(weight, linear).dequantized(), given.dequantized(), weight, hessian)
        return {"error_ratio": result["error_ratio"], "same_bytes": float(same.float().mean())}

    return run


PEERS: tuple[tuple[str, str, str, Callable[[], Callable[[Layer], dict[str, float]]]], ...] = (
    ("llmcompressor", "GPTQ", "symmetric", lambda: llmcompressor_gptq(SYMMETRIC, False)),
    ("llmcompressor", "GPTQ", "symmetric, act-order", lambda: llmcompressor_gptq(SYMMETRIC, True)),
    ("llmcompressor", "GPTQ", "zero points, act-order", lambda: llmcompressor_gptq(ZERO_POINTS, True)),
    ("neural_compressor", "GPTQ", "zero points", lambda: neural_compressor_gptq(ZERO_POINTS, False)),
    ("neural_compressor", "GPTQ", "zero points, act-order", lambda: neural_compressor_gptq(ZERO_POINTS, True)),
    ("autoawq", "AWQ", "symmetric", lambda: autoawq(SYMMETRIC)),
    ("autoawq", "AWQ", "zero points", lambda: autoawq(ZERO_POINTS)),
    ("nvidia-modelopt", "AWQ scale", "symmetric", lambda: modelopt_awq("awq_lite")),
    ("nvidia-modelopt", "AWQ scale and clip", "symmetric", lambda: modelopt_awq("awq_full")),
    ("nvidia-modelopt", "SmoothQuant", "int8", modelopt_smoothquant),
    ("compressed-tensors", "codes", "symmetric", lambda: compressed_tensors_codes(SYMMETRIC)),
    ("compressed-tensors", "codes", "zero points", lambda: compressed_tensors_codes(ZERO_POINTS)),
    ("onnxruntime", "MatMulNBits", "symmetric", lambda: onnxruntime_codes(SYMMETRIC)),
    ("onnxruntime", "MatMulNBits", "zero points", lambda: onnxruntime_codes(ZERO_POINTS)),
)


def summarized(values: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        key: {
            "min": min(found),
            "median": statistics.median(found),
            "max": max(found),
        }
        for key in values[0]
        for found in [[value[key] for value in values]]
    }


def peers() -> None:
    layers = [layer for toy in TOYS for layer in layers_of(toy)]
    rows = []
    for package, what, kind, make in PEERS:
        try:
            version = importlib.metadata.version(package)
            run = make()
        except ImportError as error:
            print(f"{package} {what}: left out ({error})")
            continue
        row = {"package": package, "version": version, "what": what, "format": kind, "layers": len(layers)}
        rows.append(row | {"results": summarized([run(layer) for layer in layers])})
        print(json.dumps(rows[-1]), flush=True)
    data = {
        "command": "python benchmarks/quantization_peers.py",
        "torch": torch.__version__,
        "group": GROUP,
        "tokens": TOKENS,
        "rows": rows,
    }
    (RESULTS / "quantization_peers.json").write_text(json.dumps(data, indent=1) + "\n")


SHAPES = {"qkv": (12288, 4096), "attn.out": (4096, 4096), "gate and up": (22016, 4096), "mlp.out": (4096, 11008)}
"""Qwen-7B."""


def timing() -> None:
    linear, rows = LinearFormat(weight="int4", group=128), []
    for name, (out, width) in SHAPES.items():
        generator = torch.Generator(device="cuda").manual_seed(0)
        weight = torch.randn(out, width, generator=generator, device="cuda") * 0.02
        sizes = torch.randn(width, generator=generator, device="cuda").exp()
        x = torch.randn(8192, width, generator=generator, device="cuda") * sizes
        hessian = hessian_of(x)
        nearest = layer_error(weight, quantize_weight(weight, linear).dequantized(), hessian)
        sample = x[:512]
        scale = search_scale([weight], sample, [linear])
        row: dict[str, Any] = {"layer": name, "out": out, "in": width}
        runs: dict[str, Callable[[], Any]] = {
            "gptq": partial(gptq, weight, hessian, linear),
            "gptq_act_order": partial(gptq, weight, hessian, linear, act_order=True),
            "awq_scale": partial(search_scale, [weight], sample, [linear]),
            "awq_clip": partial(search_clip, weight, sample / scale.scale, linear),
            "hessian_of_8192_tokens": partial(hessian_of, x),
        }
        for label, run in runs.items():
            seconds = []
            for _ in range(3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                result = run()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            row[label] = {"seconds": min(seconds), "first": seconds[0]}
            if hasattr(result, "relative_error"):
                row[label]["error_over_nearest"] = result.error / nearest
        rows.append(row | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30})
        print(json.dumps(rows[-1]), flush=True)
        torch.cuda.reset_peak_memory_stats()
    data = {
        "command": "python benchmarks/quantization_peers.py --time",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "group": 128,
        "rows": rows,
    }
    (RESULTS / "quantization_time.json").write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="time a Qwen-7B layer on a GPU instead")
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if parser.parse_args().time:
        timing()
    else:
        peers()


if __name__ == "__main__":
    main()

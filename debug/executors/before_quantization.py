"""Quantized bundles in a diff: what their engine is to compute, and the model before quantization.

A bundle that `export` has quantized brings its checkpoint; the reference is then the model with those codes
(`quantized_source`), and the difference that quantization makes is none of the diff's.

With `--floats` it is all of the diff's.  AWQ and SmoothQuant fold scales into the weights before they round them.  The
unquantized model with the same scales folded (`folded_model`) computes the same function, and its tensors are
comparable with the quantized one's, layer by layer: the local error of a layer is then the error of its codes, on the
inputs that it really has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from export.quantization.checkpoint import read_folded, read_provenance
from export.quantization.fold import Site, fold
from refmodels.checkpoints.load import ModelSource, checkpoint_hash, load, moved, put_parameter
from refmodels.errors import LogitLockError
from refmodels.model import Decoder
from refmodels.spec import Numerics
from trt_runtime.bundle import Bundle


def check_floats(bundle: Bundle | None, source: ModelSource, text: str) -> Mapping[str, Tensor]:
    """The scales that were folded into a bundle's weights.

    Raises:
        LogitLockError: not a bundle that `export` quantized from this very model; one with a quantized cache.
    """
    if source.spec.quantization is not None:
        raise LogitLockError(f"{source.name} is quantized itself; --floats compares with the model before that")
    if bundle is None or bundle.quantized_path is None:
        raise LogitLockError(f"{text} is not a bundle that export has quantized (--precision int8, int4, ...)")
    if bundle.spec.cache_code is not None:
        raise LogitLockError(f"{text} has a {bundle.spec.cache_code} cache, whose codes are not comparable with floats")
    _check_origin(bundle, source)
    return read_folded(bundle.quantized_path)


def quantized_source(source: ModelSource, bundles: Iterable[Bundle]) -> ModelSource:
    """The model with the codes of a bundle that `export` has quantized itself: what its engine is to compute.

    Raises:
        LogitLockError: a bundle that was quantized from another checkpoint.
    """
    for bundle in bundles:
        if bundle.quantized_path is not None and source.spec.quantization is None:
            _check_origin(bundle, source)
            return moved(source, bundle.quantized_path)
    return source


def _check_origin(bundle: Bundle, source: ModelSource) -> None:
    """Raises where a bundle was quantized from another checkpoint of the model; another model is seen elsewhere."""
    assert bundle.quantized_path is not None
    made_of, ours = (read_provenance(bundle.quantized_path) or {}).get("checkpoint_hash"), checkpoint_hash(source)
    if replace(bundle.spec, quantization=None) == source.spec and made_of != ours:
        raise LogitLockError(
            f"{bundle.directory} was quantized from another checkpoint than {source.name}: its weights had SHA-256 "
            f"{str(made_of)[:12]}…, those of the model have {ours[:12]}…; export it again"
        )


def folded_model(
    source: ModelSource, folded: Mapping[str, Tensor], *, dtype: torch.dtype, numerics: Numerics = "exact"
) -> Decoder:
    """The model with scales folded into its weights.

    Args:
        source: not quantized; all of it is held in memory.
        folded: [width] by site, 'blocks.3.attn.qkv' or 'head'.
    """
    decoder = load(source, dtype=torch.float64 if dtype == torch.float64 else torch.float32, numerics=numerics)
    for name, scale in folded.items():
        prefix, site = _split(name)
        own = {n.removeprefix(prefix): p.data for n, p in decoder.named_parameters() if n.startswith(prefix)}
        for parameter, value in fold(source.spec, site, scale.to(decoder.dtype), own).items():
            put_parameter(decoder, f"{prefix}{parameter}", value)
    return decoder.to(dtype)


def _split(name: str) -> tuple[str, Site]:
    if not name.startswith("blocks."):
        return "", "head"
    _, layer, site = name.split(".", 2)
    return f"blocks.{layer}.", site  # type: ignore[return-value]

"""References for diffs of quantized bundles: the quantized model, or the model before quantization.

A bundle that `export` has quantized contains the quantized checkpoint.  The reference is then the model with these
quantized weights (`quantized_source`), and the diff does not show the error of quantization.

With `--floats`, it shows nothing else.  AWQ and SmoothQuant fold scales into the weights before rounding them.  The
unquantized model with the same scales folded (`folded_model`) computes the same function, and its tensors can be
compared with those of the quantized model, layer by layer: the local error of a layer is then its quantization error on
its real inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from export.quantization.checkpoint import read_folded, read_provenance
from export.quantization.fold import Site, fold
from refmodels.checkpoints.load import ModelSource, checkpoint_hash, load, put_parameter, with_directory
from refmodels.errors import LogitLockError
from refmodels.model import Decoder
from refmodels.spec import Numerics
from refmodels.taps import split_name
from trt_runtime.bundle import Bundle


def check_floats(bundle: Bundle | None, source: ModelSource, text: str) -> Mapping[str, Tensor]:
    """The scales that were folded into a bundle's weights.

    Raises:
        LogitLockError: `export` did not quantize this bundle from this model, or its cache is quantized.
    """
    if source.spec.quantization is not None:
        raise LogitLockError(f"{source.name} is quantized itself; --floats compares with the model before quantization")
    if bundle is None or bundle.quantized_path is None:
        raise LogitLockError(f"{text} is not a bundle that export quantized (--precision int8, int4, ...)")
    if bundle.spec.cache_code is not None:
        raise LogitLockError(f"{text} has a {bundle.spec.cache_code} cache, which no float cache can be compared with")
    _check_origin(bundle, source)
    return read_folded(bundle.quantized_path)


def quantized_source(source: ModelSource, bundles: Iterable[Bundle]) -> ModelSource:
    """The model with the quantized weights of a bundle that `export` quantized: the engine should compute the same.

    Raises:
        LogitLockError: the bundle was quantized from another checkpoint.
    """
    for bundle in bundles:
        if bundle.quantized_path is not None and source.spec.quantization is None:
            _check_origin(bundle, source)
            return with_directory(source, bundle.quantized_path)
    return source


def _check_origin(bundle: Bundle, source: ModelSource) -> None:
    """Raises if a bundle was quantized from another checkpoint of the model; another model is detected elsewhere."""
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
        source: a model that is not quantized; all of it is held in memory.
        folded: scales [width] by linear layer, 'blocks.3.attn.qkv' or 'head'.
    """
    decoder = load(source, dtype=torch.float64 if dtype == torch.float64 else torch.float32, numerics=numerics)
    for name, scale in folded.items():
        layer, site = split_name(name)
        prefix = "" if layer is None else f"blocks.{layer}."
        own = {n.removeprefix(prefix): p.data for n, p in decoder.named_parameters() if n.startswith(prefix)}
        for parameter, value in fold(source.spec, cast("Site", site), scale.to(decoder.dtype), own).items():
            put_parameter(decoder, f"{prefix}{parameter}", value)
    return decoder.to(dtype)

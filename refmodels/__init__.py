"""Numerical reference models: one decoder core for ChatGLM2, Baichuan, Qwen and GPT, configured by `ModelSpec`.

    import torch, refmodels

    model = refmodels.load("qwen", dtype=torch.float64)          # a family's bundled toy, a directory, or a hub id
    cache = model.new_cache(batch=1, capacity=64)
    with torch.no_grad():
        logits = model.step(ids, cache)                          # ids [1, tokens] int64 -> [1, tokens, vocabulary]

    spec.py        facts of an architecture       families/       Hugging Face config -> spec, names -> parameters
    model.py       the decoder                    ops.py          its fused operations
    cache.py       the explicit key/value cache   positions.py    RoPE, NTK, logn and ALiBi tables
    taps.py        naming and recording tensors   weights.py      checkpoint names as data
    checkpoint.py  resolve, stream, load          shards.py       the files of a checkpoint; hub.py: downloads
    tokenizer.py   text to ids and back           chat.py         prompts of each family
    toys/          trained toys, one a family

May import at module level: the standard library and torch.  Everything else (safetensors, tokenizers, huggingface_hub,
typer in cli.py ...) is imported where it is needed.  It never imports export, trt_runtime or debug.
"""

from __future__ import annotations

from refmodels.cache import KVCache, StepInputs
from refmodels.checkpoints.load import (
    DTYPES,
    ModelSource,
    checkpoint_hash,
    load,
    load_tokenizer_for,
    resolve,
    stream_parameters,
)
from refmodels.errors import LogitLockError
from refmodels.families import FAMILIES, spec_from_config
from refmodels.model import Decoder
from refmodels.recorder import Recorder, recording, tap
from refmodels.spec import ModelSpec, Numerics, spec_from_dict

__all__ = [
    "DTYPES",
    "FAMILIES",
    "Decoder",
    "KVCache",
    "LogitLockError",
    "ModelSource",
    "ModelSpec",
    "Numerics",
    "Recorder",
    "StepInputs",
    "checkpoint_hash",
    "load",
    "load_tokenizer_for",
    "recording",
    "resolve",
    "spec_from_config",
    "spec_from_dict",
    "stream_parameters",
    "tap",
]

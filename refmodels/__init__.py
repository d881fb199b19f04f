"""Numerical reference models: one decoder core for ChatGLM2, Baichuan, Qwen and GPT, configured by `ModelSpec`.

    import torch, refmodels

    model = refmodels.load("qwen", dtype=torch.float64)          # a family's bundled toy, a directory, or a hub id
    cache = model.new_cache(batch=1, capacity=64)
    with torch.no_grad():
        logits = model.step(ids, cache)                          # ids [1, tokens] int64 -> [1, tokens, vocabulary]

    spec.py       facts of an architecture          families/      Hugging Face config -> spec, names -> parameters
    model.py      the decoder                       ops.py         its fused operations
    attention.py  the inputs of attention           recorder.py    recording tensors by their names
    cache.py      the explicit key/value cache      positions.py   RoPE, NTK, logn and ALiBi tables
    taps.py       one name per tensor               toys/          one trained toy per family
    checkpoints/  resolve, stream and load weights  quantization/  formats and arithmetic of quantized layers
    text/         tokenizers, chats, prompts        errors.py      the error of bad input
    command.py    common part of command lines      cli.py         the verb models
    dtypes.py     one table of dtypes               lazy.py        public names of a package

May import at module level: the standard library and torch.  Everything else (safetensors, tokenizers, huggingface_hub,
typer in cli.py ...) is imported where it is needed.  It never imports export, trt_runtime or debug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refmodels.lazy import public_names

if TYPE_CHECKING:
    from refmodels.attention import AttentionFacts as AttentionFacts
    from refmodels.attention import AttentionInputs as AttentionInputs
    from refmodels.cache import KVCache as KVCache
    from refmodels.cache import StepInputs as StepInputs
    from refmodels.checkpoints.load import ModelSource as ModelSource
    from refmodels.checkpoints.load import checkpoint_hash as checkpoint_hash
    from refmodels.checkpoints.load import empty_decoder as empty_decoder
    from refmodels.checkpoints.load import load as load
    from refmodels.checkpoints.load import load_tokenizer as load_tokenizer
    from refmodels.checkpoints.load import resolve as resolve
    from refmodels.checkpoints.load import stream_parameters as stream_parameters
    from refmodels.checkpoints.load import tokenizer_in as tokenizer_in
    from refmodels.dtypes import DTYPES as DTYPES
    from refmodels.errors import LogitLockError as LogitLockError
    from refmodels.families import FAMILIES as FAMILIES
    from refmodels.families import spec_from_config as spec_from_config
    from refmodels.model import Decoder as Decoder
    from refmodels.ops import cached_attention as cached_attention
    from refmodels.ops import fused_rms_norm as fused_rms_norm
    from refmodels.positions import build_tables as build_tables
    from refmodels.positions import rope_table as rope_table
    from refmodels.recorder import Recorder as Recorder
    from refmodels.recorder import recording as recording
    from refmodels.recorder import tap as tap
    from refmodels.spec import ModelSpec as ModelSpec
    from refmodels.spec import Numerics as Numerics
    from refmodels.spec import spec_from_dict as spec_from_dict
    from refmodels.taps import is_cache_tap as is_cache_tap
    from refmodels.taps import tap_names as tap_names
    from refmodels.text.prompts import stop_ids_in as stop_ids_in
    from refmodels.text.tokenizer import Tokenizer as Tokenizer
    from refmodels.toys import toy_path as toy_path
    from refmodels.toys.tasks import toy_examples as toy_examples
else:
    __all__, __getattr__, __dir__ = public_names(globals())

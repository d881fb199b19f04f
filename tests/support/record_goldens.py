"""Makes the golden cases of Llama's kin: tiny random models of transformers, recorded by `logitlock record`.

python -m tests.support.record_goldens [NAME ...]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from debug.record import record_case
from tests.support.paths import GOLDENS

_SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 136,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Of the eight wavelengths one is kept, one interpolated, six divided.
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "llama3": ("Llama", {"head_dim": 16, "rope_theta": 500000.0, "rope_scaling": _LLAMA3}, (20, 13)),
    # As Granite code 3B and 8B: biases everywhere, a tied head.
    "granite_code_b1": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
        (20,),
    ),
    "mistral": ("Mistral", {"sliding_window": 7, "num_key_value_heads": 1}, (20, 13)),
}
"""Class, changes of the sizes, lengths of the prompts."""


def make(name: str) -> None:
    kind, changes, lengths = CASES[name]
    torch.manual_seed(sum(name.encode()))
    config = getattr(transformers, f"{kind}Config")(**_SIZES | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    for path, parameter in model.named_parameters():
        norm = "norm" in path and path.endswith("weight")
        # Large enough that a mistake anywhere shows in the logits.
        deviation = 0.1 if norm or path.endswith("bias") or "embed" in path else 0.2
        parameter.data.normal_(1.0 if norm else 0.0, deviation)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        record_case(Path(folder), GOLDENS / name, lengths=lengths, steps=8, half=("bf16",))


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case)

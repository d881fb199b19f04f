"""GLM-4-9B in transformers' own classes: GLM-4-9B-hf (glm) and GLM-4-0414 (glm4).

Upstream: transformers models/glm and models/glm4 (read at 5.24.0).  As Llama, with a part of each head rotated in
interleaved pairs and gate and up in one module; glm4 also normalizes what attention and MLP add to the residual stream.
The remote code of the same weights is in `refmodels/families/chatglm2.py`.
"""

from __future__ import annotations

from dataclasses import replace

from refmodels.families.config import LLAMA_LAYOUT, Config, Family
from refmodels.families.llama import llama_spec
from refmodels.spec import ModelSpec


def _spec(config: Config) -> ModelSpec:
    second = config.data.get("model_type") == "glm4"
    return llama_spec(
        config,
        family="glm",
        variant="glm4-0414" if second else "glm",
        qkv_bias=config.get(bool, "attention_bias", default=True),
        head_dim=128,
        kv_heads=2,
        rotated=0.5,
        interleaved=True,
        sandwich_norms=second,
    )


_LAYOUT = replace(LLAMA_LAYOUT, gate="mlp.gate_up_proj", up="mlp.gate_up_proj")


FAMILY = Family(
    name="glm",
    model_types={"glm": ("GlmForCausalLM",), "glm4": ("Glm4ForCausalLM",)},
    describes="GLM-4-9B in transformers' own class, GLM-4-0414 and GLM-Z1 (9B, 32B)",
    spec=_spec,
    layout=lambda spec: _LAYOUT,
    ignored=(r".*rotary_emb\.inv_freq",),
)

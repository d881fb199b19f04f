"""The keys of a config.json: used, harmless (read by upstream for something else than logits) and unknown.

What a family asks of its config is used.  A key that changes the result and is not served is refused where it is read
(`Config.require`, and `refuse_others` for keys of every family); what is left is unknown, and that is said.
"""

from __future__ import annotations

from dataclasses import dataclass

from refmodels.families.config import Config, Family

_NAMES = (
    # Identity and bookkeeping.
    "architectures", "model_type", "auto_map", "name_or_path", "transformers_version", "unsloth_version",
    "unsloth_fixed", "tokenizer_class", "tokenizer_type", "task_specific_params", "custom_pipelines", "license",
    # Other heads.
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "classifier_dropout",
    # Dtypes: the caller chooses.
    "torch_dtype", "dtype", "params_dtype", "bf16", "fp16", "fp32",
    # How upstream runs, not what it computes.
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "onnx_safe",
    "use_flash_attn", "use_cache_kernel", "chunk_size_feed_forward", "gradient_checkpointing", "pretraining_tp",
    "keys_to_ignore_at_inference", "bias_dropout_fusion", "is_decoder", "tie_encoder_decoder", "tf_legacy_loss",
    # Training.
    "initializer_range", "attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "hidden_dropout_prob",
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "attn_dropout_prob", "emb_dropout_prob", "residual_dropout",
    "embedding_dropout", "z_loss_weight", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj",
    # Ids and generation: `refmodels.text` reads them.
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "user_token_id",
    "assistant_token_id", "mask_token_id", "gmask_token_id", "do_sample", "temperature", "top_k", "top_p",
    "repetition_penalty", "max_length", "max_new_tokens", "min_length", "num_beams", "num_beam_groups", "typical_p",
    "diversity_penalty", "length_penalty", "early_stopping", "no_repeat_ngram_size", "num_return_sequences",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "prefix",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "output_scores", "return_dict_in_generate",
    # `refmodels.checkpoints.quantized_config` reads them.
    "quantization_config", "compression_config",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ConfigKeys:
    """Names, in the order of the file."""

    used: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def refuse_others(config: Config) -> None:
    """Raises LogitLockError for a model that is more than a decoder of text."""
    config.require("is_encoder_decoder", False, False)
    config.require("add_cross_attention", False, False)
    for key in ("vision_config", "visual", "audio_config"):
        config.require(key, None, None)
    config.require("pruned_heads", {}, {})


def sort_keys(config: Config, family: Family) -> ConfigKeys:
    """Where each key belongs, after the spec was made from the config; a key whose value is null says nothing."""
    harmless = {*_NAMES, *family.harmless}
    found: dict[str, list[str]] = {"used": [], "harmless": [], "unknown": []}
    for key, value in config.data.items():
        if key in config.used:
            kind = "used"
        else:
            kind = "harmless" if key in harmless or key.startswith("_") or value is None else "unknown"
        found[kind].append(key)
    return ConfigKeys(**{kind: tuple(names) for kind, names in found.items()})

"""A tokenizer.json like that of Llama 2 and Mistral."""

from __future__ import annotations

import tokenizers


def piece_bpe() -> tokenizers.Tokenizer:
    """A tokenizer as Llama 2's: U+2581 for blanks, bytes as fallback, a blank before every text."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581helowrd,!你"]
    merges = [("l", "l"), ("h", "e"), ("he", "ll"), ("\u2581", "hell"), ("\u2581", "w"), ("\u2581", "\u2581")]
    names += ["".join(pair) for pair in merges]
    vocabulary = {name: i for i, name in enumerate(names)}
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    )
    model.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    decoders = tokenizers.decoders
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return model

"""SentencePiece's BPE in a tokenizer.json: Llama 1 and 2, Mistral (see test_tokenizer.py as well)."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from refmodels.errors import LogitLockError
from refmodels.text.tokenizer import read_tokenizer
from tests.refmodels.text.test_tokenizer import TEXTS
from tests.support.piece_bpe import piece_bpe


def test_pieces_in_a_json_file_decode_as_the_library_does(tmp_path: Path) -> None:
    model = piece_bpe()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path, family="llama")
    assert tokenizer.prefix == (1,) and tokenizer.encode("hello world") == model.encode("hello world").ids
    for text in (*TEXTS, " hello  world", "你hello"):
        ids = tokenizer.encode(text)
        assert ids == model.encode(text).ids or "<|" in text
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special=skip) == model.decode(ids, skip_special_tokens=skip)
    other = tokenizers.Tokenizer.from_str(model.to_str())
    other.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Fuse()])
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(LogitLockError, match="BPE tokenizer with Sequence decoding; only byte-level BPE"):
        read_tokenizer(tmp_path, family="llama")


def test_a_blank_after_a_control_token_that_is_shown_stays(tmp_path: Path) -> None:
    model = piece_bpe()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path, family="llama")
    ids = [1, *model.encode("hell", add_special_tokens=False).ids]
    for skip, text in ((False, "<s> hell"), (True, "hell")):
        stream = tokenizer.stream(skip_special=skip)
        assert "".join(map(stream.push, ids)) == text == tokenizer.decode(ids, skip_special=skip)

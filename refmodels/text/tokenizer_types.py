"""The class `Tokenizer`, one subclass per file format, and the streaming decoder.

`refmodels.text.tokenizer` opens the files and is the module to import from.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from refmodels.errors import LogitLockError
from refmodels.text.chat_template import ChatTemplate

REPLACEMENT = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """Ids with a special meaning; None if the tokenizer does not define one.

    `user` and `assistant` are Baichuan's role markers, which have ids but no published names.
    """

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    unk: int | None = None
    user: int | None = None
    assistant: int | None = None


class Padded(NamedTuple):
    """A left-padded batch, rows of equal length: `attention_mask` is 1 at real tokens; positions are 0 on pads."""

    input_ids: list[list[int]]
    attention_mask: list[list[int]]
    position_ids: list[list[int]]


class Tokenizer(ABC):
    """Text to ids and back. Each subclass handles one file format; `read_tokenizer` makes the right one.

    `vocab_size` counts the ids that the tokenizer defines; a model's embedding may have more rows (padding of the
    vocabulary), and ids from there decode to nothing. `prefix` and `suffix` are what `encode` adds around a prompt.
    `chat_template` is the checkpoint's own, where the tokenizer can read the control tokens in its text.
    """

    chat_template: ChatTemplate | None = None
    restarts = True
    """Whether a new text starts after a control token that is shown."""

    def __init__(
        self,
        *,
        vocab_size: int,
        special: SpecialIds,
        hidden_ids: Iterable[int],
        parses_special: bool,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ) -> None:
        self.vocab_size = vocab_size
        self.special = special
        self.hidden_ids = frozenset(hidden_ids)
        self.parses_special = parses_special
        self.prefix = tuple(prefix)
        self.suffix = tuple(suffix)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool | None = None) -> list[int]:
        """The ids of `text`, deterministically; an empty text has only the ids of `add_special`.

        add_special: put the tokenizer's own `prefix` and `suffix` around the ids, as upstream does for a bare prompt.
        parse_special: True turns text that spells a control token into that token; False keeps it as text; None does as
            upstream does.
        Raises LogitLockError for text that is not valid Unicode (lone surrogates).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise LogitLockError(
                f"the text has no UTF-8 form: character {error.start} is a lone surrogate "
                f"(U+{ord(text[error.start]):04X}); give valid Unicode"
            ) from None
        ids = self._encode(text, self.parses_special if parse_special is None else parse_special)
        return [*self.prefix, *ids, *self.suffix] if add_special else ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids past the vocabulary become nothing.

        skip_special: leave control tokens out; otherwise they appear as their names. No clean-up of spaces is done.
        Raises LogitLockError for a negative id.
        """
        return self._decode(self._visible(ids, skip_special), skip_special)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """A decoder to be fed one id at a time, for one sequence of generated ids."""
        return TextStream(self, skip_special=skip_special)

    @abstractmethod
    def token_id(self, surface: str) -> int | None:
        """The id of the token that is written `surface`, control tokens included; None when there is none."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes (perhaps a part of a character) that a token in the middle of a text stands for."""

    def opening_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the last of `ids`, given that the ids before it begin a text and have no bytes."""
        return self.token_bytes(ids[-1])

    def pad_left(self, batch: Sequence[Sequence[int]]) -> Padded:
        """Rows of one length, padded on the left with the pad id; without a pad id, with eos or 0 (pads are masked)."""
        pad = self.special.pad if self.special.pad is not None else self.special.eos or 0
        width = max((len(row) for row in batch), default=0)
        gaps = [width - len(row) for row in batch]
        return Padded(
            input_ids=[[pad] * gap + list(row) for gap, row in zip(gaps, batch, strict=True)],
            attention_mask=[[0] * gap + [1] * (width - gap) for gap in gaps],
            position_ids=[[0] * gap + list(range(width - gap)) for gap in gaps],
        )

    @abstractmethod
    def _encode(self, text: str, parse_special: bool) -> list[int]:
        """The ids of a text, with nothing added around them."""

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def _visible(self, ids: Iterable[int], skip_special: bool) -> list[int]:
        numbers = [int(i) for i in ids]
        if numbers and min(numbers) < 0:
            raise LogitLockError(f"token ids start at 0, but one of the ids to decode is {min(numbers)}")
        return [i for i in numbers if i < self.vocab_size and not (skip_special and i in self.hidden_ids)]


class TextStream:
    """Turns ids into text one by one; text comes out as soon as its characters are complete.

    The pieces of one stream, `finish()` included, joined, are `decode(ids)` without U+FFFD: a character that spans
    tokens waits for its last byte, and bytes that can never become a character are dropped.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._opening: list[int] | None = []

    def push(self, token_id: int) -> str:
        """Take the next id; return the text that is now certain, or "" if there is none yet."""
        tokenizer = self._tokenizer
        if not tokenizer._visible([token_id], self._skip_special):
            return ""
        if token_id in tokenizer.hidden_ids:
            data, self._opening = tokenizer.token_bytes(token_id), [] if tokenizer.restarts else None
        elif self._opening is None:
            data = tokenizer.token_bytes(token_id)
        else:
            self._opening.append(token_id)
            data = tokenizer.opening_bytes(self._opening)
            if data:
                self._opening = None
        return self._utf8.decode(data).replace(REPLACEMENT, "")

    def finish(self) -> str:
        """End the sequence. An unfinished character is dropped, so this returns "" for any valid text."""
        return self._utf8.decode(b"", final=True).replace(REPLACEMENT, "")


class TiktokenTokenizer(Tokenizer):
    """Qwen v1 and GLM-4: byte BPE, over text in `normal_form` where that is given."""

    def __init__(
        self,
        encoding: Any,
        *,
        special: SpecialIds,
        control: Iterable[int],
        parses_special: bool,
        prefix: Sequence[int] = (),
        normal_form: Literal["NFC"] | None = None,
    ) -> None:
        super().__init__(
            vocab_size=encoding.n_vocab,
            special=special,
            hidden_ids=control,
            parses_special=parses_special,
            prefix=prefix,
        )
        self._encoding = encoding
        self._normal_form = normal_form

    def token_id(self, surface: str) -> int | None:
        try:
            return int(self._encoding.encode_single_token(surface))
        except KeyError:
            return None

    def token_bytes(self, token_id: int) -> bytes:
        try:
            return bytes(self._encoding.decode_single_token_bytes(token_id))
        except KeyError:
            return b""

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if self._normal_form is not None:
            text = unicodedata.normalize(self._normal_form, text)
        if parse_special:
            return list(self._encoding.encode(text, allowed_special="all"))
        return list(self._encoding.encode_ordinary(text))


class SentencePieceTokenizer(Tokenizer):
    """ChatGLM and Baichuan: a SentencePiece model, with `appended` control tokens numbered after its pieces.

    `parsed`: pieces that text can spell, by their surfaces; what stands between them is encoded by itself.
    """

    def __init__(
        self,
        processor: Any,
        *,
        special: SpecialIds,
        appended: Sequence[str] = (),
        parsed: Mapping[str, int] | None = None,
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ) -> None:
        self._processor = processor
        self._parsed = dict(parsed or {})
        self._pieces = int(processor.vocab_size())
        self._appended = {name: self._pieces + offset for offset, name in enumerate(appended)}
        named = (special.bos, special.eos, special.pad, special.unk)
        super().__init__(
            vocab_size=self._pieces + len(appended),
            special=special,
            hidden_ids={*self._appended.values(), *(i for i in named if i is not None)},
            parses_special=bool(self._parsed),
            prefix=prefix,
            suffix=suffix,
        )

    def token_id(self, surface: str) -> int | None:
        if surface in self._appended:
            return self._appended[surface]
        # For an unknown piece, SentencePiece returns the id of unk, so the name has to be read back.
        found = int(self._processor.piece_to_id(surface))
        return found if self._processor.id_to_piece(found) == surface else None

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self.hidden_ids:
            return self._name(token_id).encode()
        piece = str(self._processor.id_to_piece(token_id))
        if self._processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if self._processor.is_control(token_id):
            return b""
        return piece.replace("\u2581", " ").encode()

    def opening_bytes(self, ids: Sequence[int]) -> bytes:
        # Which leading spaces are the model's own dummy prefix depends on settings inside the model file: ask it.
        if self._processor.is_byte(ids[-1]):
            return self.token_bytes(ids[-1])
        return str(self._processor.decode(list(ids))).encode()

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special:
            return [int(i) for i in self._processor.encode(text)]
        if not self._parsed:
            raise LogitLockError("ChatGLM's tokenizer never reads control tokens from text: put their ids beside it")
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, self._parsed))})", text):
            if part in self._parsed:
                ids.append(self._parsed[part])
            elif part:
                ids += map(int, self._processor.encode(part))
        return ids

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        if skip_special:
            return str(self._processor.decode(ids)) if ids else ""
        parts: list[str] = []
        run: list[int] = []
        for i in [*ids, None]:
            if i is not None and i not in self.hidden_ids:
                run.append(i)
                continue
            if run:
                parts.append(str(self._processor.decode(run)))
                run = []
            if i is not None:
                parts.append(self._name(i))
        return "".join(parts)

    def _name(self, token_id: int) -> str:
        if token_id < self._pieces:
            return str(self._processor.id_to_piece(token_id))
        return list(self._appended)[token_id - self._pieces]


class ByteBpeTokenizer(Tokenizer):
    """Byte-level BPE through the `tokenizers` library: GPT-2, StarCoder, Qwen2 and the bundled toys."""

    def __init__(self, model: Any, *, special: SpecialIds, prefix: Sequence[int], suffix: Sequence[int]) -> None:
        vocabulary: dict[str, int] = model.get_vocab(with_added_tokens=True)
        added: dict[int, Any] = model.get_added_tokens_decoder()
        super().__init__(
            vocab_size=max(vocabulary.values(), default=-1) + 1,
            special=special,
            hidden_ids=[i for i, token in added.items() if token.special],
            parses_special=True,
            prefix=prefix,
            suffix=suffix,
        )
        self._model = model
        self._surfaces = {i: surface for surface, i in vocabulary.items()}

    def token_id(self, surface: str) -> int | None:
        found = self._model.token_to_id(surface)
        return None if found is None else int(found)

    def token_bytes(self, token_id: int) -> bytes:
        surface = self._surfaces.get(token_id, "")
        try:
            return bytes(_BYTE_OF[character] for character in surface)
        except KeyError:
            return surface.encode()

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        self._model.encode_special_tokens = not parse_special
        return list(self._model.encode(text, add_special_tokens=False).ids)


class PieceBpeTokenizer(ByteBpeTokenizer):
    """SentencePiece's BPE in a tokenizer.json: Llama 1 and 2, Mistral.

    A piece is text with U+2581 for blanks, or "<0xE4>" for a byte; `strips`: decoding takes one blank off the start.
    """

    restarts = False

    def __init__(
        self, model: Any, *, special: SpecialIds, prefix: Sequence[int], suffix: Sequence[int], strips: bool
    ) -> None:
        super().__init__(model, special=special, prefix=prefix, suffix=suffix)
        self._strips = strips

    def token_bytes(self, token_id: int) -> bytes:
        surface = self._surfaces.get(token_id, "")
        byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", surface)
        return bytes.fromhex(byte[1]) if byte else surface.replace("\u2581", " ").encode()

    def opening_bytes(self, ids: Sequence[int]) -> bytes:
        first = self.token_bytes(ids[-1])
        # A first piece of nothing but the blank leaves no bytes; the next one keeps its own.
        return first[1:] if self._strips and len(ids) == 1 and first.startswith(b" ") else first

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        text = super()._decode(ids, skip_special)
        return text[1:] if self._strips and text.startswith(" ") else text


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next character from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + n): byte for n, byte in enumerate(b for b in range(256) if b not in printable)})
    return table


_BYTE_OF = _byte_characters()

"""Text to token ids and back, for every family, without remote code.

Three file formats cover all families, and `read_tokenizer` chooses by the files that exist:

* `qwen.tiktoken` (Qwen v1), `tokenizer.model` of GLM-4: ranks of a byte BPE; special tokens follow them.
* `tokenizer.model` (ChatGLM2 and 3, Baichuan): SentencePiece; ChatGLM appends its special tokens after the pieces.
* `tokenizer.json`, or `vocab.json` and `merges.txt` (GPT, StarCoder, Qwen2, Llama 3, the bundled toys): byte-level BPE;
  `tokenizer.json` of Llama 1 and 2 and Mistral: SentencePiece's BPE.

All of them have the interface of one class, `Tokenizer`. Two switches of `encode` matter for fidelity: `add_special`
adds the tokens that the upstream tokenizer puts around a bare prompt (GLM: `[gMASK] sop`), and `parse_special` says
whether text that spells a control token becomes that token. Upstream is inconsistent here (Qwen's plain `encode` parses
control tokens, its chat prompt does not), so the default follows the upstream tokenizer, and `refmodels.text.chat`
turns parsing off in chats.

The libraries (`tiktoken`, `sentencepiece`, `tokenizers`) are imported when a file of their format is opened.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from refmodels.errors import LogitLockError, NoTokenizerError
from refmodels.files import read_bytes
from refmodels.json_records import read_json
from refmodels.text.chat_template import read_template
from refmodels.text.tokenizer_types import (
    ByteBpeTokenizer,
    Padded,
    PieceBpeTokenizer,
    SentencePieceTokenizer,
    SpecialIds,
    TextStream,
    TiktokenTokenizer,
    Tokenizer,
)

__all__ = [
    "ByteBpeTokenizer",
    "Padded",
    "PieceBpeTokenizer",
    "SentencePieceTokenizer",
    "SpecialIds",
    "TextStream",
    "TiktokenTokenizer",
    "Tokenizer",
    "read_tokenizer",
]

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen and Qwen2 split text before BPE, as published: GPT-4's pattern, but digits one by one."""

QWEN_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_SPECIAL: dict[str, tuple[str, ...]] = {
    "dec2023": (*QWEN_CONTROL, *(f"<|extra_{i}|>" for i in range(205))),
    "aug2023": (*QWEN_CONTROL, "<R>", "<S>", "<X>", "<mask>", "<sep>", *(f"<extra_{i}>" for i in range(200))),
}
"""Names of the ids that follow Qwen's ranks, by the revision that named them; both have 208."""

GLM4_PATTERN = QWEN_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
"""As Qwen's, but digits in threes."""

CHATGLM2_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
CHATGLM3_SPECIAL = (*CHATGLM2_SPECIAL, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GLM4_SPECIAL = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
"""Names of the ids that follow GLM-4's ranks, where tokenizer_config.json does not give them."""
GLM_PREFIX = {"chatglm2": ("[gMASK]", "sop"), "chatglm3": ("[gMASK]", "sop"), "glm4": ("[gMASK]", "<sop>")}
BAICHUAN_USER_ID, BAICHUAN_ASSISTANT_ID = 195, 196


def read_tokenizer(directory: str | Path, *, family: str, generation: str | None = None) -> Tokenizer:
    """The tokenizer of a model directory.

    family: the family's name or its chat format (`chatglm2`, `chatglm3`, `glm4`, `baichuan`, `qwen`, `qwen2`, `gpt` …);
        it decides what the files do not say: GLM's control tokens and prefix, Baichuan's role markers, how a bare
        vocabulary splits text.
    generation: which names Qwen v1's control tokens have, `dec2023` or `aug2023`; None reads it from `config.json`.
    Raises LogitLockError if there is no tokenizer file, a file is damaged, or its library is not installed.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise LogitLockError(f"no tokenizer can be loaded from {folder}: it is not a directory")
    tokenizer = _read(folder, family, generation)
    template = read_template(folder, _settings(folder))
    if tokenizer.parses_special:
        tokenizer.chat_template = template
    return tokenizer


def _read(folder: Path, family: str, generation: str | None) -> Tokenizer:
    if (folder / "qwen.tiktoken").is_file():
        return _load_tiktoken(folder, generation)
    pieces = folder / "tokenizer.model"
    if pieces.is_file() and family == "glm4":
        return _load_glm4(folder, pieces)
    if pieces.is_file() and family in GLM_PREFIX:
        return _load_chatglm(pieces, family)
    if pieces.is_file() and family.startswith("baichuan"):
        return _load_baichuan(folder, pieces)
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return _load_byte_bpe(folder, family)
    wanted = (
        "tokenizer.model or tokenizer.json"
        if family in GLM_PREFIX or family.startswith("baichuan")
        else (
            "qwen.tiktoken or tokenizer.json" if family == "qwen" else "tokenizer.json, or vocab.json with merges.txt"
        )
    )
    raise NoTokenizerError(f"{folder} has no tokenizer that the family {family} can use: expected {wanted}")


def _load_tiktoken(folder: Path, generation: str | None) -> Tokenizer:
    path = folder / "qwen.tiktoken"
    ranks = _read_ranks(path)
    declared = _read_json(folder / "generation_config.json").get("eos_token_id")
    if isinstance(declared, int) and declared != len(ranks):
        raise LogitLockError(
            f"{path} is damaged or of another model: after its {len(ranks)} ranks <|endoftext|> is {len(ranks)}, "
            f"but generation_config.json says eos_token_id {declared}"
        )
    if generation is None:
        # The config keys were renamed together with the tokens, between the first release and December 2023.
        generation = "aug2023" if "padded_vocab_size" in _read_json(folder / "config.json") else "dec2023"
    if generation not in QWEN_SPECIAL:
        raise LogitLockError(f"Qwen's tokenizer has no generation {generation!r}: use one of {', '.join(QWEN_SPECIAL)}")
    special = {name: len(ranks) + offset for offset, name in enumerate(QWEN_SPECIAL[generation])}
    encoding = _library("tiktoken", path).Encoding(
        "qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    end = special["<|endoftext|>"]
    return TiktokenTokenizer(
        encoding,
        special=SpecialIds(bos=end, eos=end, pad=end, unk=end),
        control=special.values(),
        parses_special=generation == "dec2023",
        normal_form="NFC",
    )


def _load_glm4(folder: Path, path: Path) -> Tokenizer:
    ranks, declared = _read_ranks(path), _added_tokens(folder)
    special = {surface: i for i, (surface, _) in declared.items()} or {
        name: len(ranks) + offset for offset, name in enumerate(GLM4_SPECIAL)
    }
    missing = [name for name in ("<|endoftext|>", *GLM_PREFIX["glm4"]) if name not in special]
    if missing or min(special.values()) < len(ranks):
        raise LogitLockError(
            f"{folder / 'tokenizer_config.json'} is not GLM-4's: "
            + (f"it lacks the token {missing[0]}" if missing else f"a control token lies among {len(ranks)} ranks")
        )
    encoding = _library("tiktoken", path).Encoding(
        "glm4", pat_str=GLM4_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    end = special["<|endoftext|>"]
    return TiktokenTokenizer(
        encoding,
        special=SpecialIds(eos=end, pad=end),
        control=special.values(),
        parses_special=True,
        prefix=[special[name] for name in GLM_PREFIX["glm4"]],
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The byte BPE of a file whose lines hold a token in base64 and its rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise LogitLockError(f"{path} is damaged: line {number} is not a base64 token and a rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise LogitLockError(f"{path} is damaged: its ranks must be 0, 1, 2 … without gaps and cover all 256 bytes")
    return ranks


def _load_sentencepiece(path: Path) -> Any:
    library = _library("sentencepiece", path)
    try:
        return library.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise LogitLockError(f"{path} is not a SentencePiece model (damaged or cut short?): {error}") from None


def _load_chatglm(path: Path, family: str) -> Tokenizer:
    processor = _load_sentencepiece(path)
    appended = CHATGLM3_SPECIAL if family == "chatglm3" else CHATGLM2_SPECIAL
    first = int(processor.vocab_size())
    unk = int(processor.unk_id())
    return SentencePieceTokenizer(
        processor,
        special=SpecialIds(bos=int(processor.bos_id()), eos=int(processor.eos_id()), pad=unk, unk=unk),
        appended=appended,
        prefix=[first + appended.index(name) for name in GLM_PREFIX[family]],
    )


def _load_baichuan(folder: Path, path: Path) -> Tokenizer:
    processor = _load_sentencepiece(path)
    special = SpecialIds(bos=int(processor.bos_id()), eos=int(processor.eos_id()), unk=int(processor.unk_id()))
    settings = _settings(folder)
    pad = _surface(settings.get("pad_token"))
    if pad is not None:
        special = replace(special, pad=int(processor.piece_to_id(pad)))
    if int(processor.vocab_size()) > BAICHUAN_ASSISTANT_ID:
        special = replace(special, user=BAICHUAN_USER_ID, assistant=BAICHUAN_ASSISTANT_ID)
    # The defaults are those of upstream's code; every published tokenizer_config.json says false to both.
    return SentencePieceTokenizer(
        processor,
        special=_declared_ids(folder, special),
        # Upstream's class, opened by from_pretrained, splits text at its special tokens (transformers 4.30.2, where
        # single_word of the published tokenizer_config.json has no effect yet).
        parsed={
            str(processor.id_to_piece(i)): i
            for i in (int(processor.unk_id()), int(processor.bos_id()), int(processor.eos_id()))
            if i >= 0
        },
        prefix=[int(processor.bos_id())] if settings.get("add_bos_token", True) else [],
        suffix=[int(processor.eos_id())] if settings.get("add_eos_token", False) else [],
    )


def _load_byte_bpe(folder: Path, family: str) -> Tokenizer:
    path = folder / "tokenizer.json"
    library = _library("tokenizers", path)
    settings = _settings(folder)
    pieces: list[str] | None = None
    if path.is_file():
        try:
            model = library.Tokenizer.from_file(str(path))
        except Exception as error:
            raise LogitLockError(f"{path} is not a tokenizer of the tokenizers library (damaged?): {error}") from error
        decoder = type(model.decoder).__name__
        pieces = _decoder_of_pieces(model) if decoder == "Sequence" else None
        if type(model.model).__name__ != "BPE" or (decoder != "ByteLevel" and pieces is None):
            raise LogitLockError(
                f"{path} is a {type(model.model).__name__} tokenizer with {decoder} decoding; only byte-level BPE "
                "(model BPE, decoder ByteLevel) and SentencePiece's BPE (decoder Replace, ByteFallback, Fuse, Strip) "
                "are supported"
            )
    else:
        model = _bpe_from_vocabulary(folder, settings, family, library)
    _check_distinct(model.get_vocab(with_added_tokens=True), path if path.is_file() else folder / "vocab.json")
    special = SpecialIds(
        **{
            name: model.token_to_id(surface)
            for name in ("bos", "eos", "pad", "unk")
            if (surface := _surface(settings.get(f"{name}_token"))) is not None
        }
    )
    around = list(model.encode("", add_special_tokens=True).ids)
    # Only around a text can the template's tokens before it be told from those after it.
    probe = list(model.encode("a", add_special_tokens=False).ids)
    framed = list(model.encode("a", add_special_tokens=True).ids)
    split = next((n for n in range(len(around) + 1) if framed == around[:n] + probe + around[n:]), len(around))
    prefix, suffix = around[:split], around[split:]
    if not around and family in GLM_PREFIX:
        found = [model.token_to_id(name) for name in GLM_PREFIX[family]]
        prefix = found if None not in found else []
    special = _declared_ids(folder, special)
    if pieces is None:
        return ByteBpeTokenizer(model, special=special, prefix=prefix, suffix=suffix)
    return PieceBpeTokenizer(model, special=special, prefix=prefix, suffix=suffix, strips="Strip" in pieces)


def _decoder_of_pieces(model: Any) -> list[str] | None:
    """The steps of a decoder as Llama 2's: blanks, bytes, fused, perhaps without the first blank; None: another one."""
    steps = json.loads(model.to_str())["decoder"]["decoders"]
    blanks = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    known = [blanks, {"type": "ByteFallback"}, {"type": "Fuse"}]
    stripped = [*known, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return [step["type"] for step in steps] if steps in (known, stripped) else None


def _check_distinct(vocabulary: Mapping[str, int], path: Path) -> None:
    tokens: dict[int, str] = {}
    for token, number in vocabulary.items():
        other = tokens.setdefault(number, token)
        if other != token:
            first, second = sorted((other, token))
            raise LogitLockError(f"{path} is damaged: the tokens {first!r} and {second!r} have the same id {number}")


def _bpe_from_vocabulary(folder: Path, settings: dict[str, Any], family: str, library: Any) -> Any:
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    if not merges.is_file():
        raise LogitLockError(f"{vocabulary} needs merges.txt beside it, and {merges} is missing")
    try:
        model = library.Tokenizer(library.models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:
        raise LogitLockError(f"{vocabulary} with {merges.name} is not a BPE vocabulary (damaged?): {error}") from error
    byte_level = library.pre_tokenizers.ByteLevel
    if family == "qwen2" or settings.get("tokenizer_class") == "Qwen2Tokenizer":
        model.normalizer = library.normalizers.NFC()
        model.pre_tokenizer = library.pre_tokenizers.Sequence(
            [
                library.pre_tokenizers.Split(library.Regex(QWEN_PATTERN), "isolated"),
                byte_level(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        model.pre_tokenizer = byte_level(add_prefix_space=bool(settings.get("add_prefix_space", False)))
    model.decoder = library.decoders.ByteLevel()
    added = _added_tokens(folder)
    named = [_surface(settings.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")]
    for i, (surface, is_special) in sorted(added.items()):
        model.add_tokens([library.AddedToken(surface, special=is_special, normalized=False)])
        if model.token_to_id(surface) != i:
            raise LogitLockError(
                f"{folder} declares the added token {surface!r} as id {i}, but after {vocabulary.name} it would be "
                f"{model.token_to_id(surface)}: the vocabulary is not the one of this model"
            )
    model.add_special_tokens([surface for surface in named if surface and model.token_to_id(surface) is not None])
    return model


def _added_tokens(folder: Path) -> dict[int, tuple[str, bool]]:
    """Tokens that the configs add to the vocabulary: id to surface and whether it is a control token."""
    found: dict[int, tuple[str, bool]] = {}
    settings, older = folder / "tokenizer_config.json", folder / "added_tokens.json"
    declared = _settings(folder).get("added_tokens_decoder") or {}
    entries = [
        *(
            (settings, i, token)
            for i, token in (declared.items() if isinstance(declared, dict) else [(None, declared)])
        ),
        *((older, i, {"content": surface, "special": True}) for surface, i in _read_json(older).items()),
    ]
    for file, i, token in entries:
        surface = _surface(token) if isinstance(token, dict) else None
        number = int(i) if isinstance(i, str) and re.fullmatch(r"\d{1,9}", i) else i
        if surface is None or not isinstance(number, int) or isinstance(number, bool):
            raise LogitLockError(f"{file} is damaged: an added token needs an id and its text, got {i!r}: {token!r}")
        found.setdefault(number, (surface, bool(token.get("special"))))
    return found


def _declared_ids(folder: Path, special: SpecialIds) -> SpecialIds:
    """`special` with the gaps, and Baichuan's role ids, filled from the ids that the directory's configs declare."""
    config = {**_read_json(folder / "config.json"), **_read_json(folder / "generation_config.json")}
    found: dict[str, int] = {}
    for name in ("bos", "eos", "pad", "user", "assistant"):
        declared = config.get(f"{name}_token_id")
        first = declared[0] if isinstance(declared, list) and declared else declared
        if isinstance(first, int) and (getattr(special, name) is None or name in ("user", "assistant")):
            found[name] = first
    return replace(special, **found)


def _settings(folder: Path) -> dict[str, Any]:
    return {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}


def _surface(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    if isinstance(content, str) and any("\ud800" <= letter <= "\udfff" for letter in content):
        raise LogitLockError(f"the special token {content!r} of tokenizer_config.json has no UTF-8 form")
    return content if isinstance(content, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file, because all of them are optional."""
    return read_json(path) if path.is_file() else {}


def _library(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise LogitLockError(
            f"reading {path} needs the package {name}, which is not installed: pip install {name}"
        ) from None

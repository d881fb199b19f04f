"""Tokenizers: the goldens of the real Qwen vocabulary, small trained files of every format, streaming, bad files."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmodels.errors import LogitLockError
from refmodels.text.tokenizer import QWEN_SPECIAL, Tokenizer, read_tokenizer
from tests.support.paths import GOLDENS, REAL
from tests.support.piece_bpe import piece_bpe

TOKENIZERS = GOLDENS / "_tokenizers"
REAL_QWEN = REAL / "Qwen-7B"
CORPUS = [
    "Hello, world! The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x ** 2  # squared\n",
    "你好，世界！今天天气不错，我们去公园吧。",
    "Numbers 1234567890 and 3.14159, it's we're they'll I'd",
    "world hello brown lazy fox dog the over jumps quick",
]
TEXTS = [
    "",
    "Hello, world!",
    " leading space",
    "trailing space ",
    "    four spaces",
    "tabs\tand\r\nCRLF\n\n\nmany",
    "你好，世界！ emoji 😀👍🏽 👨\u200d👩\u200d👧",
    "日本語と한국어 русский العربية",
    "It's 12345 <|im_end|>",
]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _tiktoken_folder(folder: Path) -> Path:
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell", b"hello", "é".encode(), "你".encode()[:2]]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model made as ChatGLM's and Baichuan's are: BPE, bytes as fallback, spaces kept."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 40), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def byte_bpe() -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>", "<pad>"], show_progress=False
    )
    model.train_from_iterator(CORPUS * 3, trainer)
    model.add_special_tokens(["[gMASK]", "sop", "<two words>"])
    return model


def _with_pieces(folder: Path, pieces: Path, *, settings: dict[str, Any] | None = None) -> Path:
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    if settings is not None:
        _write_json(folder / "tokenizer_config.json", settings)
    return folder


@pytest.fixture
def every_format(tmp_path: Path, pieces: Path, byte_bpe: tokenizers.Tokenizer) -> dict[str, Tokenizer]:
    names = ("qwen", "chatglm2", "baichuan", "gpt", "llama")
    for name in names:
        (tmp_path / name).mkdir()
    piece_bpe().save(str(tmp_path / "llama" / "tokenizer.json"))
    byte_bpe.save(str(tmp_path / "gpt" / "tokenizer.json"))
    _tiktoken_folder(tmp_path / "qwen")
    _with_pieces(tmp_path / "chatglm2", pieces)
    _with_pieces(tmp_path / "baichuan", pieces)
    return {name: read_tokenizer(tmp_path / name, family=name) for name in names}


# Qwen v1


@pytest.mark.slow
@pytest.mark.skipif(not REAL_QWEN.is_dir(), reason="the real Qwen vocabulary lies only in ../shared and is not shipped")
def test_real_qwen_vocabulary_gives_the_golden_ids_and_texts() -> None:
    golden = json.loads((TOKENIZERS / "qwen.json").read_text(encoding="utf-8"))
    tokenizer = read_tokenizer(REAL_QWEN, family="qwen")
    assert tokenizer.vocab_size == golden["special"]["n_vocab"]
    assert tokenizer.special.eos == golden["special"]["eod_id"]
    assert tokenizer.token_id("<|im_start|>") == golden["special"]["im_start_id"]
    assert tokenizer.token_id("<|im_end|>") == golden["special"]["im_end_id"]
    for case in golden["texts"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"], skip_special=False) == case["decoded"]
        stream = tokenizer.stream(skip_special=False)
        assert "".join([stream.push(i) for i in case["ids"]]) + stream.finish() == case["decoded"]


def test_qwen_normalizes_to_nfc_before_the_merges(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(_tiktoken_folder(tmp_path), family="qwen")
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9") == [260]


def test_qwen_control_tokens_are_read_from_plain_text_only_when_asked(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(_tiktoken_folder(tmp_path), family="qwen")
    end = tokenizer.token_id("<|im_end|>")
    assert end == 264
    assert tokenizer.encode("hello<|im_end|>") == [259, end]
    plain = tokenizer.encode("hello<|im_end|>", parse_special=False)
    assert end not in plain and tokenizer.decode(plain) == "hello<|im_end|>"
    assert tokenizer.decode([259, end]) == "hello"
    assert tokenizer.decode([259, end], skip_special=False) == "hello<|im_end|>"


def test_qwen_generations_differ_in_names_and_in_parsing(tmp_path: Path) -> None:
    folder = _tiktoken_folder(tmp_path)
    december = read_tokenizer(folder, family="qwen")
    _write_json(folder / "config.json", {"padded_vocab_size": 151936, "n_embd": 64})
    august = read_tokenizer(folder, family="qwen")
    assert all(len(names) == 208 for names in QWEN_SPECIAL.values())
    assert december.vocab_size == august.vocab_size == 262 + 208
    assert december.token_id("<|extra_204|>") == august.token_id("<extra_199>") == 262 + 207
    assert december.token_id("<|extra_0|>") == august.token_id("<R>") == 265
    assert december.token_id("<R>") is None
    assert august.token_id("<|im_end|>") not in august.encode("<|im_end|>")
    assert read_tokenizer(folder, family="qwen", generation="dec2023").token_id("<|extra_0|>") == 265
    with pytest.raises(LogitLockError, match="dec2023, aug2023"):
        read_tokenizer(folder, family="qwen", generation="2024")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda lines: [*lines[:-1], b"4pyT"], "line 262"),
        (lambda lines: [*lines[:-1], b"!!! 261"], "line 262"),
        (lambda lines: [*lines[:257], *lines[258:]], "without gaps"),
        (lambda lines: lines[:200], "256 bytes"),
        (lambda lines: [], "256 bytes"),
    ],
    ids=["no rank", "no base64", "gap", "cut short", "empty"],
)
def test_a_damaged_rank_file_is_one_clear_error(tmp_path: Path, damage: Any, says: str) -> None:
    path = _tiktoken_folder(tmp_path) / "qwen.tiktoken"
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())))
    with pytest.raises(LogitLockError, match=says):
        read_tokenizer(tmp_path, family="qwen")


def test_a_rank_file_cut_at_a_line_is_caught_by_the_declared_eos(tmp_path: Path) -> None:
    folder = _tiktoken_folder(tmp_path)
    _write_json(folder / "generation_config.json", {"eos_token_id": 262})
    assert read_tokenizer(folder, family="qwen").special.eos == 262
    path = folder / "qwen.tiktoken"
    path.write_bytes(b"\n".join(path.read_bytes().splitlines()[:-1]))
    with pytest.raises(LogitLockError, match="eos_token_id 262"):
        read_tokenizer(folder, family="qwen")


# SentencePiece


def test_chatglm_appends_its_control_tokens_and_starts_a_prompt_with_two(tmp_path: Path, pieces: Path) -> None:
    tokenizer = read_tokenizer(_with_pieces(tmp_path, pieces), family="chatglm2")
    size = sentencepiece.SentencePieceProcessor(model_file=str(pieces)).vocab_size()
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    assert [tokenizer.token_id(name) for name in names] == list(range(size, size + 5))
    assert tokenizer.vocab_size == size + 5
    special = tokenizer.special
    assert (special.unk, special.bos, special.eos, special.pad) == (0, 1, 2, 0)
    body = tokenizer.encode("hello", add_special=False)
    assert tokenizer.encode("hello") == [size + 1, size + 3, *body]
    assert tokenizer.decode([size + 1, size + 3, *body, 2]) == "hello"
    assert tokenizer.decode([size + 1, size + 3, *body, 2], skip_special=False) == "[gMASK]sophello</s>"


def test_chatglm3_has_four_more(tmp_path: Path, pieces: Path) -> None:
    folder = _with_pieces(tmp_path, pieces)
    named = read_tokenizer(folder, family="chatglm3")
    size = named.vocab_size - 9
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    assert [named.token_id(role) for role in roles] == list(range(size + 5, size + 9))
    assert read_tokenizer(folder, family="chatglm2").token_id("<|user|>") is None


def test_baichuan_follows_its_tokenizer_config(tmp_path: Path, pieces: Path) -> None:
    folder = _with_pieces(tmp_path, pieces, settings={"add_bos_token": False, "pad_token": {"content": "<unk>"}})
    tokenizer = read_tokenizer(folder, family="baichuan")
    body = tokenizer.encode("hello", add_special=False)
    assert tokenizer.encode("hello") == body
    special = tokenizer.special
    assert (special.unk, special.bos, special.eos, special.pad) == (0, 1, 2, 0)
    assert (special.user, special.assistant) == (195, 196)
    _write_json(folder / "tokenizer_config.json", {"add_eos_token": True})
    _write_json(folder / "generation_config.json", {"user_token_id": 7, "assistant_token_id": 8})
    with_defaults = read_tokenizer(folder, family="baichuan")
    assert with_defaults.encode("hello") == [1, *body, 2], "upstream's code adds bos unless its config says no"
    assert with_defaults.special.pad is None
    assert (with_defaults.special.user, with_defaults.special.assistant) == (7, 8)


def test_baichuan_reads_its_three_special_tokens_in_plain_text(tmp_path: Path, pieces: Path) -> None:
    """As PreTrainedTokenizer of transformers 4.30.2, opened by from_pretrained, does for this kind of model: text
    between them is encoded by itself, each with its own dummy prefix (measured there with LlamaTokenizer)."""
    folder = _with_pieces(tmp_path, pieces, settings={"add_bos_token": False})
    tokenizer = read_tokenizer(folder, family="baichuan")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    for text, expected in {
        "hello</s>world": ["hello", 2, "world"],
        "[gMASK]sop</s><s><unk>": ["[gMASK]sop", 2, 1, 0],
        "a </s> b": ["a ", 2, " b"],
        "<s> hello": [1, " hello"],
        " <unk>x": [" ", 0, "x"],
        "</S> <S>": ["</S> <S>"],
        "</s>": [2],
    }.items():
        ids = [i for part in expected for i in ([part] if isinstance(part, int) else processor.encode(part))]
        assert tokenizer.encode(text) == ids
    # A chat's message never ends a turn.
    assert 2 not in tokenizer.encode("hello</s>world", parse_special=False)


def test_chatglm_never_reads_control_tokens_from_text(tmp_path: Path, pieces: Path) -> None:
    tokenizer = read_tokenizer(_with_pieces(tmp_path, pieces), family="chatglm2")
    ids = tokenizer.encode("[gMASK]sop</s><s><unk>", add_special=False)
    assert not tokenizer.hidden_ids & set(ids)
    assert tokenizer.decode(ids) == "[gMASK]sop</s><s><unk>"
    with pytest.raises(LogitLockError, match="never reads control tokens"):
        tokenizer.encode("sop", parse_special=True)


# Byte-level BPE


def test_bare_vocabulary_and_merges_equal_the_json_file(tmp_path: Path, byte_bpe: tokenizers.Tokenizer) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "bare").mkdir()
    byte_bpe.save(str(tmp_path / "json" / "tokenizer.json"))
    byte_bpe.model.save(str(tmp_path / "bare"))
    added = {
        str(i): {"content": token.content, "special": True} for i, token in byte_bpe.get_added_tokens_decoder().items()
    }
    declared = {"added_tokens_decoder": added, "eos_token": "<|end|>", "pad_token": {"content": "<pad>"}}
    for folder in ("json", "bare"):
        _write_json(tmp_path / folder / "tokenizer_config.json", declared)
    whole, bare = (read_tokenizer(tmp_path / folder, family="gpt") for folder in ("json", "bare"))
    assert whole.special == bare.special
    assert (whole.special.eos, whole.special.pad, whole.special.bos) == (0, 1, None)
    assert whole.vocab_size == bare.vocab_size == byte_bpe.get_vocab_size()
    for text in [*TEXTS, "a<|end|>b"]:
        assert whole.encode(text) == bare.encode(text) == byte_bpe.encode(text).ids
        assert whole.encode(text, parse_special=False) == bare.encode(text, parse_special=False)
    assert whole.encode("<|end|>") == [0]
    assert 0 not in whole.encode("<|end|>", parse_special=False)


def test_an_added_token_with_another_id_than_declared_is_an_error(
    tmp_path: Path, byte_bpe: tokenizers.Tokenizer
) -> None:
    byte_bpe.model.save(str(tmp_path))
    _write_json(tmp_path / "added_tokens.json", {"<new>": 5000})
    with pytest.raises(LogitLockError, match="'<new>' as id 5000"):
        read_tokenizer(tmp_path, family="gpt")


def test_an_added_token_with_a_space_keeps_it(tmp_path: Path, byte_bpe: tokenizers.Tokenizer) -> None:
    byte_bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path, family="gpt")
    ids = tokenizer.encode("a<two words>b")
    assert len(ids) == 3
    assert tokenizer.decode(ids, skip_special=False) == "a<two words>b"
    assert tokenizer.decode(ids) == "ab"


def test_qwen2_vocabulary_splits_digits_and_normalizes(tmp_path: Path, byte_bpe: tokenizers.Tokenizer) -> None:
    byte_bpe.model.save(str(tmp_path))
    qwen2, gpt = (read_tokenizer(tmp_path, family=family) for family in ("qwen2", "gpt"))
    digits = [gpt.token_id(digit) for digit in "1234567890"]
    assert qwen2.encode("1234567890") == digits != gpt.encode("1234567890")
    assert qwen2.encode("e\u0301") == qwen2.encode("\u00e9") == gpt.encode("\u00e9") != gpt.encode("e\u0301")


def test_the_prefix_comes_from_the_template_or_from_the_family(tmp_path: Path, byte_bpe: tokenizers.Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    byte_bpe.save(str(path))
    mask, sop = byte_bpe.token_to_id("[gMASK]"), byte_bpe.token_to_id("sop")
    assert read_tokenizer(tmp_path, family="gpt").prefix == ()
    assert read_tokenizer(tmp_path, family="chatglm2").prefix == (mask, sop)
    framed = tokenizers.Tokenizer.from_file(str(path))
    framed.post_processor = tokenizers.processors.TemplateProcessing(
        single="[gMASK] sop $A <|end|>", special_tokens=[("[gMASK]", mask), ("sop", sop), ("<|end|>", 0)]
    )
    framed.save(str(path))
    for family in ("gpt", "chatglm2"):
        tokenizer = read_tokenizer(tmp_path, family=family)
        assert (tokenizer.prefix, tokenizer.suffix) == ((mask, sop), (0,))
        assert tokenizer.encode("hello") == framed.encode("hello").ids
        assert tokenizer.encode("hello", add_special=False) == byte_bpe.encode("hello").ids


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_byte_bpe_decodes_any_ids_as_the_library_does(tmp_path: Path, byte_bpe: Any, data: st.DataObject) -> None:
    byte_bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path, family="gpt")
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special=skip) == byte_bpe.decode(ids, skip_special_tokens=skip)


# Every format


def test_text_survives_encode_and_decode(every_format: dict[str, Tokenizer]) -> None:
    for name, tokenizer in every_format.items():
        for text in TEXTS:
            ids = tokenizer.encode(text, parse_special=False)
            assert tokenizer.decode(ids) == text, name
            assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_stream_gives_the_text_and_never_half_a_character(every_format: dict[str, Tokenizer]) -> None:
    for name, tokenizer in every_format.items():
        for text in TEXTS:
            stream = tokenizer.stream()
            told = ""
            for i in tokenizer.encode(text, parse_special=False):
                told += stream.push(i)
                assert text.startswith(told), name
            assert told == text, "a complete text must not have to wait for finish()"
            assert stream.finish() == ""


def test_a_character_of_several_tokens_comes_out_with_its_last_one(every_format: dict[str, Tokenizer]) -> None:
    for name in ("qwen", "chatglm2", "gpt"):
        tokenizer = every_format[name]
        stream = tokenizer.stream()
        pushed = [stream.push(i) for i in tokenizer.encode("😀", add_special=False)]
        assert len(pushed) >= 4
        assert "".join(pushed[:-1]) == "" and pushed[-1] == "😀", name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_stream_of_any_ids_is_decode_without_replacement_characters(
    every_format: dict[str, Tokenizer], data: st.DataObject
) -> None:
    for tokenizer in every_format.values():
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=12))
        for skip in (True, False):
            stream = tokenizer.stream(skip_special=skip)
            told = [stream.push(i) for i in ids] + [stream.finish()]
            assert "".join(told) == tokenizer.decode(ids, skip_special=skip).replace("\ufffd", "")


def test_left_padding_equals_the_chatglm_golden_batch(every_format: dict[str, Tokenizer]) -> None:
    golden = json.loads((TOKENIZERS / "chatglm2.json").read_text(encoding="utf-8"))
    batch = every_format["chatglm2"].pad_left([chat["ids"] for chat in golden["chats"]])
    assert batch._asdict() == golden["special"]["padded_batch"]
    assert every_format["chatglm2"].pad_left([]) == ([], [], [])


def test_ids_out_of_range(every_format: dict[str, Tokenizer]) -> None:
    for tokenizer in every_format.values():
        assert tokenizer.decode([tokenizer.vocab_size + 100]) == ""
        with pytest.raises(LogitLockError, match="-1"):
            tokenizer.decode([-1])


def test_a_lone_surrogate_is_a_clear_error(every_format: dict[str, Tokenizer]) -> None:
    for tokenizer in every_format.values():
        with pytest.raises(LogitLockError, match=r"character 2 is a lone surrogate \(U\+D800\)"):
            tokenizer.encode("ab\ud800")


# Bad directories


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("qwen", "qwen.tiktoken"),
        ("chatglm2", "tokenizer.model"),
        ("baichuan", "tokenizer.model"),
        ("gpt", "merges.txt"),
    ],
)
def test_a_directory_without_tokenizer_names_the_file_it_wants(tmp_path: Path, family: str, wanted: str) -> None:
    with pytest.raises(LogitLockError, match=f"family {family} can use: expected .*{wanted}"):
        read_tokenizer(tmp_path, family=family)
    with pytest.raises(LogitLockError, match="not a directory"):
        read_tokenizer(tmp_path / "nowhere", family=family)


@pytest.mark.parametrize("keep", [0, 10, -3])
def test_a_cut_piece_file_is_a_clear_error(tmp_path: Path, pieces: Path, keep: int) -> None:
    (tmp_path / "tokenizer.model").write_bytes(pieces.read_bytes()[:keep])
    for family in ("chatglm2", "baichuan"):
        with pytest.raises(LogitLockError, match="not a SentencePiece model"):
            read_tokenizer(tmp_path, family=family)


def test_damaged_json_files_are_clear_errors(tmp_path: Path, byte_bpe: tokenizers.Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(LogitLockError, match=r"tokenizer\.json is not a tokenizer"):
        read_tokenizer(tmp_path, family="gpt")
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    other.save(str(path))
    with pytest.raises(LogitLockError, match="WordLevel"):
        read_tokenizer(tmp_path, family="gpt")
    byte_bpe.save(str(path))
    for content, says in (("{", "not valid JSON"), ("[]", "must hold a JSON object")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(LogitLockError, match=says):
            read_tokenizer(tmp_path, family="gpt")


def test_vocabulary_without_merges_is_a_clear_error(tmp_path: Path, byte_bpe: tokenizers.Tokenizer) -> None:
    byte_bpe.model.save(str(tmp_path))
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(LogitLockError, match=r"merges\.txt is missing"):
        read_tokenizer(tmp_path, family="gpt")


@pytest.mark.parametrize(
    ("family", "library"), [("qwen", "tiktoken"), ("chatglm2", "sentencepiece"), ("gpt", "tokenizers")]
)
def test_a_missing_library_is_named_with_its_pip_command(
    tmp_path: Path,
    pieces: Path,
    byte_bpe: tokenizers.Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    library: str,
) -> None:
    if family == "qwen":
        _tiktoken_folder(tmp_path)
    elif family == "chatglm2":
        _with_pieces(tmp_path, pieces)
    else:
        byte_bpe.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(LogitLockError, match=f"pip install {library}"):
        read_tokenizer(tmp_path, family=family)


@pytest.mark.parametrize("ids", [lambda i: 0, lambda i: min(i, 300)])
def test_tokens_with_the_same_id_are_refused(
    ids: Callable[[int], int], byte_bpe: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    byte_bpe.save(str(path))
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {token: ids(i) for token, i in content["model"]["vocab"].items()}
    path.write_text(json.dumps(content))
    with pytest.raises(LogitLockError, match=r"tokenizer\.json is damaged: the tokens .* have the same id"):
        read_tokenizer(tmp_path, family="gpt")

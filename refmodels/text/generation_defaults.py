"""A checkpoint's defaults for generation: generation_config.json, else the keys of config.json, as in transformers.

Upstream: transformers generation/utils.py, `_prepare_generation_config` and `_get_logits_processor` (read at 5.24.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refmodels.errors import LogitLockError
from refmodels.json_records import read_json

SAMPLING_DEFAULTS: Mapping[str, float] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""The defaults of transformers where do_sample is true and a key is absent."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "encoder_repetition_penalty", "guidance_scale"), (1,)),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha"), (0,)),
    **dict.fromkeys(("bad_words_ids", "force_words_ids", "suppress_tokens", "begin_suppress_tokens"), ([],)),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty", "stop_strings", "watermarking_config"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "dola_layers", "constraints"), ()),
}
"""Keys that change which tokens are chosen and that are not served, with the values that change nothing."""
_NEUTRAL_OF_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
}
"""Those that act only where do_sample is true."""


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """The defaults of a checkpoint, which a user's options override.

    Attributes:
        file: where it is said; None: nowhere.
        eos: ids that end a text: of generation_config.json, else of config.json; () where neither has any.
        eos_file: which of the two says them.
        samples: do_sample.
        values: temperature, top_k, top_p and repetition_penalty, as far as they are given.
        max_new_tokens: maximum number of new tokens; None: not given.
        unserved: the keys that change the result and are not served, with their values.
    """

    file: Path | None = None
    eos: tuple[int, ...] = ()
    eos_file: Path | None = None
    samples: bool = False
    values: Mapping[str, float] = field(default_factory=dict)
    max_new_tokens: int | None = None
    unserved: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises LogitLockError where a key is not served."""
        for key, value in self.unserved.items():
            raise LogitLockError(
                f"{self.file} sets {key} to {value!r}, which is not supported: --no-generation-config leaves out how "
                "the file chooses tokens"
            )


def generation_defaults(directory: Path) -> GenerationDefaults:
    """The defaults in the files of a checkpoint or bundle.

    Raises:
        LogitLockError: a damaged file, or a value of another type.
    """
    files = [directory / name for name in ("generation_config.json", "config.json")]
    said = {path: read_json(path) for path in files if path.is_file()}
    eos_file, eos = next(((path, ids) for path, content in said.items() if (ids := _ids(content, path))), (None, ()))
    if not said:
        return GenerationDefaults()
    file, content = next(iter(said.items()))
    samples = content.get("do_sample") or False
    if not isinstance(samples, bool):
        raise LogitLockError(f"{file}: do_sample is {samples!r}; it must be true or false")
    kinds = {"temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float}
    acting = {**_NEUTRAL, **(_NEUTRAL_OF_SAMPLING if samples else {})}
    return GenerationDefaults(
        file=file,
        eos=eos,
        eos_file=eos_file,
        samples=samples,
        values={
            key: _number(content[key], kind, f"{file}: {key}")
            for key, kind in kinds.items()
            if content.get(key) is not None
        },
        max_new_tokens=_most_new(content, file),
        unserved={
            key: content[key]
            for key, neutral in acting.items()
            if content.get(key) is not None and content[key] not in neutral
        },
    )


def _ids(content: Mapping[str, Any], file: Path) -> tuple[int, ...]:
    declared = content.get("eos_token_id")
    values = declared if isinstance(declared, list) else [] if declared is None else [declared]
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise LogitLockError(f"{file}: eos_token_id is {declared!r}; it must be a token id or a list of them")
    return tuple(dict.fromkeys(values))


def _most_new(content: Mapping[str, Any], file: Path) -> int | None:
    value = content.get("max_new_tokens")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise LogitLockError(f"{file}: max_new_tokens is {value!r}; it must be an integer of at least 1")
    return value


def _number(value: object, kind: type[int] | type[float], where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        raise LogitLockError(f"{where} is {value!r}; it must be {'an integer' if kind is int else 'a number'}")
    return value

"""Reading Hugging Face configs with errors that name the file and the key."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from refmodels.checkpoints.beside import Beside
from refmodels.checkpoints.weights import Layout, WeightMap, weight_map
from refmodels.errors import LogitLockError
from refmodels.spec import Activation, ModelSpec

T = TypeVar("T", int, float, bool, str)

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_fast",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


LLAMA_LAYOUT = Layout(
    embed="model.embed_tokens",
    block="model.layers.{i}",
    attn_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attn_out="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    mlp_out="mlp.down_proj",
    final_norm="model.norm",
    head="lm_head",
)
"""The module names that most families inherited from Llama's Hugging Face code."""


@dataclass(frozen=True)
class Config:
    """A parsed config.json; every getter takes aliases, the first one present wins.

    Attributes:
        variant: facts that the caller gives, because no key says them.
        where: how errors name the file.
        beside: the other files of the model's directory.
        facts: what tells which model this is, where more than one key does; in sentences.
        warnings: what the user should know of how the config is understood.
        used: the keys that were asked for.
    """

    data: Mapping[str, Any]
    variant: Mapping[str, Any]
    where: str
    beside: Beside = field(default_factory=Beside)
    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def raw(self, key: str) -> Any:
        """The value of a key, of whatever type; None where it is absent."""
        self.used.add(key)
        return self.data.get(key)

    def has(self, key: str) -> bool:
        return self.raw(key) is not None

    def option(self, key: str) -> Any:
        """A fact that upstream has no key for, from the variant or from the config; None: neither says it."""
        said, given = self.raw(key), self.variant.get(key)
        return said if given is None else given

    def told(self, key: str, options: Collection[str], facts: Iterable[tuple[str, str]]) -> str | None:
        """A property of the checkpoint for which upstream has no key: the value of `key`, else that of agreeing facts.

        Args:
            key: ours, in the variant or the config.
            options: what it may be.
            facts: pairs of an option and a clause that says what speaks for it.
        Returns: an option; None where nothing tells.
        Raises:
            LogitLockError: the key says something else, or facts contradict each other.
        """
        said = self.option(key)
        if said is not None:
            if said not in options:
                raise LogitLockError(f"{self.where}: {key} is {said!r}; it must be one of {', '.join(options)}")
            return str(said)
        found: dict[str, str] = {}
        for option, fact in facts:
            found.setdefault(option, fact)
        if len(found) > 1:
            both = "; ".join(f"{fact}, as in {option}" for option, fact in found.items())
            named = " or ".join(f'"{option}"' for option in found)
            raise LogitLockError(f'{self.where} contradicts itself: {both}; add "{key}": {named} to it')
        for option, fact in found.items():
            self.facts.append(f"{option}, because {fact}")
            return option
        return None

    def get(self, kind: type[T], *keys: str, default: T | None = None, minimum: int = 1, maximum: int = 1 << 40) -> T:
        """The value of the first key present (null counts as absent).

        Raises:
            LogitLockError: no key present and no default, a value of another type, NaN or infinity, or an integer
                that is not from `minimum` to `maximum`.
        """
        self.used.update(keys)
        for key in keys:
            value = self.raw(key)
            if value is None:
                continue
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise LogitLockError(f"{self.where}: {key} is {value!r}; it must be of type {kind.__name__}")
            if isinstance(value, int) and not isinstance(value, bool) and value < minimum:
                raise LogitLockError(f"{self.where}: {key} is {value!r}; it must be at least {minimum}")
            if isinstance(value, int) and value > maximum:
                raise LogitLockError(f"{self.where}: {key} is {value!r}; it must be at most {maximum}")
            if isinstance(value, float) and not math.isfinite(value):
                raise LogitLockError(f"{self.where}: {key} is {value!r}; it must be a finite number")
            return value
        if default is None:
            raise LogitLockError(f"{self.where} lacks the key {' or '.join(map(repr, keys))}")
        return default

    def require(self, key: str, expected: object, default: object) -> None:
        """Refuse a setting that changes the mathematics and is not implemented."""
        value = self.raw(key)
        if value is None:
            value = default
        if value != expected:
            raise LogitLockError(f"{self.where}: {key} = {value!r} is not supported; only {expected!r} is")

    def one_of(self, key: str, known: Collection[str | None]) -> None:
        """Refuse a setting that is none of the known ones; None stands for an absent key."""
        if self.raw(key) not in known:
            named = ", ".join(repr(value) for value in known if value is not None)
            raise LogitLockError(f"{self.where}: {key} = {self.raw(key)!r} is not supported; only {named} are")

    def activation(self, *keys: str, default: str | None = None) -> Activation:
        name = self.get(str, *keys, default=default)
        if name not in _ACTIVATIONS:
            raise LogitLockError(
                f"{self.where}: activation {name!r} is not supported; known ones: {', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]

    def divided(self, width: int, heads: int) -> int:
        if width % heads:
            raise LogitLockError(f"{self.where}: hidden size {width} is not a multiple of {heads} attention heads")
        return width // heads


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Attributes:
        name: as on the command line; also the name of the bundled toy.
        model_types: values of `model_type` in config.json that this family reads, each with the classes that
            `architectures` names for it.
        describes: the published models it covers, for `logitlock models`.
        spec: config -> facts.
        layout: facts -> the names in its checkpoints.
        ignored: regular expressions of checkpoint tensors that are buffers, not weights.
        harmless: keys of its configs that do not change its logits (see `refmodels.families.config_keys`).
    """

    name: str
    model_types: Mapping[str, tuple[str, ...]]
    describes: str
    spec: Callable[[Config], ModelSpec]
    layout: Callable[[ModelSpec], Layout]
    ignored: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()

    def weights(self, spec: ModelSpec) -> WeightMap:
        """Where each parameter comes from."""
        return weight_map(spec, self.layout(spec))

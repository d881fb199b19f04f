"""Any engine as a model of lm-evaluation-harness (the package `lm_eval`), for the standard tasks.

    python -m debug.evaluate.harness --model logitlock --model_args side=engines/qwen-fp16,model=qwen --tasks …

is the harness's own command with this model added.  In Python, give `EngineModel` to `lm_eval.simple_evaluate`.  The
harness finds the data of its tasks on the Hugging Face hub, or in files named by your own tasks.

This module alone imports lm_eval (`pip install 'logitlock[lm-eval]'`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from debug.evaluate.answers import continue_prompts
from debug.evaluate.passages import Passage
from debug.evaluate.run import check_executor
from debug.evaluate.scoring import PassageScore, score
from debug.executors.open import open_executor
from debug.sides import source_of
from refmodels.checkpoints.load import load_tokenizer
from refmodels.errors import LogitLockError
from refmodels.text.prompts import stop_ids_in
from refmodels.text.tokenizer import Tokenizer
from trt_runtime.engine import Engine
from trt_runtime.generation import GenerationConfig
from trt_runtime.sampling import Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_ARGUMENTS = ("side", "model", "batch_size", "max_length", "emulate_rounding", "trust_remote_code", "device")


@register_model("logitlock")
class EngineModel(TemplateLM):  # type: ignore[misc]
    """An engine and its tokenizer with the harness's interface.

    Args:
        engine: the engine that runs the model.
        tokenizer: the model's tokenizer; its prompt prefix begins every context.
        stop_ids: ids that end a generated answer, in addition to a task's stop strings.
        batch_size: number of rows per batch.
        max_length: number of tokens per forward pass; None: all positions of the engine.  Longer contexts lose their
            beginning (but not the tokenizer's prefix), as in the harness's own models.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        stop_ids: Sequence[int] = (),
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.engine, self._tokenizer = engine, tokenizer
        self.stop_ids, self.batch_size = tuple(stop_ids), batch_size
        self.max_length = engine.max_positions if max_length is None else min(max_length, engine.max_positions)
        self._device = engine.device

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> EngineModel:
        """Open the executor that `--model_args` names.

        Args:
            arg_dict: side (as `logitlock eval` names it) and model; batch_size, max_length, emulate_rounding,
                trust_remote_code and device, all optional.
            additional_config: additions of the harness: batch_size and device, and settings that are not for engines.
        Raises:
            LogitLockError: side is missing, an argument is unknown, or the executor cannot be opened.
        """
        extra = {key: value for key, value in (additional_config or {}).items() if value is not None}
        given = {key: extra[key] for key in ("batch_size", "device") if key in extra} | arg_dict
        unknown = sorted(set(given) - set(_ARGUMENTS))
        if unknown or "side" not in given:
            said = f"unknown {', '.join(unknown)}" if unknown else "no side"
            raise LogitLockError(f"--model_args: {said}; they are {', '.join(_ARGUMENTS)}, and side is required")
        side = str(given["side"])
        source = source_of(given.get("model"), [side])
        engine = open_executor(
            side,
            source=source,
            emulate_rounding=bool(given.get("emulate_rounding", True)),
            trust_remote_code=bool(given.get("trust_remote_code", False)),
            decode=True,
            device=given.get("device"),
        )
        check_executor(side, engine, source)
        tokenizer = load_tokenizer(source)
        try:
            batch_size = int(given.get("batch_size", 16))
        except ValueError:
            raise LogitLockError(f"batch_size is {given['batch_size']!r}; it must be a number") from None
        return cls(
            engine,
            tokenizer,
            stop_ids=stop_ids_in(source.directory, source.spec, tokenizer, chat=False),
            batch_size=batch_size,
            max_length=given.get("max_length"),
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> EngineModel:
        """As `create_from_arg_obj`, from `side=…,model=…`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def tokenizer_name(self) -> str:
        return self.engine.spec.variant

    @property
    def eot_token_id(self) -> int:
        special = self._tokenizer.special
        known = [i for i in (special.eos, *self.stop_ids, special.bos) if i is not None]
        if not known:
            raise LogitLockError(f"the tokenizer of {self.engine.spec.variant} has no token that ends a text")
        return known[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a text without a context: the last of the tokenizer's own prefix, or bos, or eos."""
        if self._tokenizer.prefix:
            return self._tokenizer.prefix[-1]
        bos = self._tokenizer.special.bos
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._tokenizer.encode(string, add_special=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self._score([(context, continuation) for _, context, continuation in requests])
        found = []
        for (key, _, _), each in zip(requests, scores, strict=True):
            found.append((float(each.log_probability.sum()), bool(each.greedy.all())))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[list[int], list[int]]] = []
        counts = []
        longest = self.max_length - len(self._tokenizer.prefix)
        for (text,) in (request.args for request in requests):
            ids = self._tokenizer.encode(text, add_special=False)
            rolling = get_rolling_token_windows(
                ids, prefix_token=self.prefix_token_id, max_seq_len=longest, context_len=1
            )
            pairs = [make_disjoint_window(pair) for pair in rolling]
            counts.append(len(pairs))
            windows += pairs
        sums = [float(each.log_probability.sum()) for each in self._score(windows)]
        found = []
        for request, count in zip(requests, counts, strict=True):
            found.append(sum(sums[:count]))
            del sums[:count]
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1]), []).append(i)
        found = [""] * len(requests)
        for (until, count, temperature, top_k, top_p), indices in groups.items():
            if count >= self.max_length:
                raise LogitLockError(
                    f"a task asks for {count} new tokens, and the model has {self.max_length} positions in all"
                )
            config = GenerationConfig(
                max_new_tokens=count,
                sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
                stop_ids=self.stop_ids,
                stop_strings=until,
            )
            prompts = [self._cut(self._tokenizer.encode(requests[i].args[0]), self.max_length - count) for i in indices]
            results = continue_prompts(self.engine, self._tokenizer, prompts, config, batch_size=self.batch_size)
            for i, result in zip(indices, results, strict=True):
                found[i] = result.text
                self.cache_hook.add_partial("generate_until", requests[i].args, result.text)
        return found

    def _score(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[PassageScore]:
        """Log-likelihood of the second ids of each pair, after the first."""
        passages = []
        for context, continuation in pairs:
            ids = self._cut([*self._begun(context), *continuation], self.max_length + 1)
            if len(continuation) >= len(ids):
                raise LogitLockError(
                    f"a continuation of {len(continuation)} tokens does not fit into the {self.max_length} positions "
                    "of the model"
                )
            passages.append(Passage(ids=ids, first=len(ids) - len(continuation)))
        scores = score(self.engine, passages, batch_size=self.batch_size) if passages else []
        return [each.after(passage.first) for each, passage in zip(scores, passages, strict=True)]

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """The last `room` ids, with the tokenizer's prefix kept at the beginning."""
        prefix = self._tokenizer.prefix
        return ids if len(ids) <= room else [*prefix, *ids[len(ids) - room + len(prefix) :]]

    def _begun(self, context: list[int]) -> list[int]:
        """A context with the tokenizer's whole prefix, of which the harness knows only one token."""
        prefix = list(self._tokenizer.prefix)
        if context == prefix[-1:]:
            return prefix
        return context if context[: len(prefix)] == prefix else [*prefix, *context]


def _settings(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Stop strings, new tokens, temperature, top_k and top_p of a request."""
    known = normalize_gen_kwargs(arguments)
    until = tuple(text for text in known["until"] if text)
    return (
        until,
        int(known["max_gen_toks"]),
        float(known.get("temperature", 0.0)),
        int(known.get("top_k", 0)),
        float(known.get("top_p", 1.0)),
    )


def main() -> None:
    """The harness's command, with `--model logitlock` added."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LogitLockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

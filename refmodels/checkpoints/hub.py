"""Model directories from the Hugging Face hub, through `huggingface_hub` (imported when it is needed)."""

from __future__ import annotations

from pathlib import Path

from refmodels.errors import LogitLockError

_TEXT = ["*.json", "*.jinja", "*.tiktoken", "tokenizer.model", "vocab.txt", "merges.txt"]
_SAFETENSORS = ["model*.safetensors", "gptq_model*.safetensors"]


def download(repository: str) -> Path:
    """The snapshot directory of a hub model: configuration, tokenizer and weights; never code.

    Downloads resume where they stopped; files in the cache are not fetched again.

    Raises:
        LogitLockError: no such repository, no access to it, or no connection and nothing in the cache.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise LogitLockError(f"to fetch {repository} from the hub, install huggingface_hub") from error
    try:
        # Only the top folder: repositories keep ONNX, GGUF or original weights in folders below.
        found = snapshot_download(repository, allow_patterns=[*_TEXT, *_SAFETENSORS], ignore_patterns=["*/*"])
        if not any(file for pattern in _SAFETENSORS for file in Path(found).glob(pattern)):
            found = snapshot_download(
                repository, allow_patterns=[*_TEXT, "pytorch_model*.bin"], ignore_patterns=["*/*"]
            )
    except GatedRepoError as error:
        raise LogitLockError(
            f"the hub model {repository} is gated: accept its terms on huggingface.co and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise LogitLockError(
            f"{repository} is neither a family name, nor a directory, nor a model on the hub"
        ) from error
    except LocalEntryNotFoundError as error:
        raise LogitLockError(
            f"{repository} is neither a family name nor a directory, and as a hub model it is not in the cache and the "
            "hub cannot be reached (offline?)"
        ) from error
    except Exception as error:
        # Network errors come as the classes of whichever HTTP library huggingface_hub uses.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LogitLockError(f"fetching {repository} from the hub failed: {reason}") from error
    return Path(found)

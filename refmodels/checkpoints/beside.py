"""The files in a model's directory beside config.json: facts that the config leaves out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from refmodels.checkpoints.shards import StoredTensor, WeightFiles, find_weights
from refmodels.files import read_bytes, read_text
from refmodels.json_records import read_json


class Beside:
    """The other files of a model's directory, each read when a family asks for it.

    Args:
        directory: None where there is only a config: then nothing lies beside it.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory

    def has(self, name: str) -> bool:
        return self.directory is not None and (self.directory / name).is_file()

    def json(self, name: str) -> Mapping[str, Any]:
        """The object in a JSON file; {} where there is no such file."""
        return read_json(self.directory / name) if self.directory is not None and self.has(name) else {}

    def text(self, name: str) -> str:
        """The contents of a text file; "" where there is no such file."""
        return read_text(self.directory / name) if self.directory is not None and self.has(name) else ""

    def bytes(self, name: str) -> bytes:
        """The contents of a file; b"" where there is no such file."""
        return read_bytes(self.directory / name) if self.directory is not None and self.has(name) else b""

    @cached_property
    def weights(self) -> WeightFiles | None:
        """The checkpoint's weight files, declared but not read; None where there are none.

        Raises:
            LogitLockError: as `WeightFiles`.
        """
        if self.directory is None or find_weights(self.directory) is None:
            return None
        return WeightFiles(self.directory)

    @cached_property
    def tensor_names(self) -> Collection[str]:
        """Names of the checkpoint's tensors, from its index if it has one; none where there are no weights."""
        file = None if self.directory is None else find_weights(self.directory)
        if file is not None and file.suffix == ".json":
            return self.json(file.name).get("weight_map") or {}
        return self.tensors

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """The checkpoint's tensors by name; {} where there are no weights."""
        return {} if self.weights is None else self.weights.tensors

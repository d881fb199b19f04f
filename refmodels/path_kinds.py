"""The kind of a path, for errors about a path of the wrong kind."""

from __future__ import annotations

from pathlib import Path

MODEL = "a Hugging Face model: name it with --model, or run it with transformers as hf:DIR"
_DIRECTORIES = (
    ("bundle.json", "a bundle, made by logitlock export: name it with --bundle, or as an executor of diff"),
    ("adapter_config.json", "a PEFT adapter: merge it into its base model first"),
    ("io.safetensors", "a golden case, made by logitlock record: verify takes it, and diff as an executor"),
    ("genai_config.json", "a model of onnxruntime-genai: name its model.onnx as an executor of diff"),
    ("config.json", MODEL),
    ("params.json", "a checkpoint in its authors' own format: convert it to the Hugging Face format first"),
)
_FILES = (
    (b"GGUF", "a GGUF file: LogitLock reads the Hugging Face format, which the model was converted from"),
    (b"PK\x03\x04", "a PyTorch or NumPy archive"),
)
_SUFFIXES = {
    ".onnx": "an ONNX file: name it as an executor of diff",
    ".engine": "a TensorRT plan by itself: LogitLock runs plans inside the bundles that it exports",
    ".plan": "a TensorRT plan by itself: LogitLock runs plans inside the bundles that it exports",
    ".safetensors": "a file of tensors: a model is the directory that holds it, a trace is an executor of diff",
}


def hint(path: str | Path, *, but: str = "") -> str:
    """'; it is …' for the end of an error, or '' where there is nothing to say or where that is the kind `but`."""
    path = Path(path)
    try:
        kind = _directory(path) if path.is_dir() else _file(path) if path.is_file() else ""
    except (OSError, ValueError):
        return ""
    return f"; it is {kind}" if kind and kind != but else ""


def _directory(path: Path) -> str:
    for name, kind in _DIRECTORIES:
        if (path / name).is_file():
            return kind
    inside = sorted(entry.name for entry in path.iterdir())
    if not inside:
        return "an empty directory"
    ggufs = [name for name in inside if name.endswith(".gguf")]
    if ggufs:
        return f"a directory with {ggufs[0]}, {_FILES[0][1]}"
    return "" if len(inside) > 1 else f"a directory that holds only {inside[0]}: name that"


def _file(path: Path) -> str:
    if (path.parent / "bundle.json").is_file():
        return f"a file of the bundle {path.parent}: name the bundle"
    with path.open("rb") as stream:
        start = stream.read(4)
    return next((kind for magic, kind in _FILES if start == magic), _SUFFIXES.get(path.suffix, ""))

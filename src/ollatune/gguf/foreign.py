"""Name what a file is that should have been a GGUF and is not."""

from __future__ import annotations

_CONVERT_HINT = (
    "Convert it with llama.cpp's convert_hf_to_gguf.py, or name a model that Ollama holds."
)
_DOWNLOAD_HINT = "Download the file itself again."

_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a git-lfs pointer, not the model itself",
        "Run `git lfs pull` in that repository.",
    ),
    (b"FUGG", "a byte-swapped GGUF", "Only little-endian files can be read."),
    (b"PK\x03\x04", "a zip archive or PyTorch checkpoint, not a GGUF", _CONVERT_HINT),
    (b"\x80\x02", "a Python pickle, not a GGUF", "It is not opened: unpickling runs code."),
    (b"\x1f\x8b", "a gzip archive, not a GGUF", "Unpack it first."),
    (b"\x28\xb5\x2f\xfd", "a zstd archive, not a GGUF", "Unpack it first."),
    (b"lmgg", "the old ggml format, not a GGUF", "Download a current build of the model."),
    (b"fmgg", "the old ggmf format, not a GGUF", "Download a current build of the model."),
    (b"tjgg", "the old ggjt format, not a GGUF", "Download a current build of the model."),
    (b"algg", "an old ggla adapter, not a GGUF", "Convert the adapter anew."),
)


def recognise(beginning: bytes) -> tuple[str, str]:
    """Reason and hint for a file that starts with `beginning` and is no GGUF."""
    if not beginning:
        return "the file is empty", _DOWNLOAD_HINT
    for prefix, reason, hint in _BEGINNINGS:
        if beginning.startswith(prefix):
            return reason, hint
    if beginning[8:9] == b"{" and int.from_bytes(beginning[:8], "little") < 1 << 32:
        return "a safetensors file, not a GGUF", _CONVERT_HINT
    text = beginning.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "a web page, not a GGUF (an error or login page was saved in its place)",
            _DOWNLOAD_HINT,
        )
    if text.startswith((b"{", b"[")):
        return "a JSON file, not a GGUF", "Name the .gguf file, or an Ollama model by its name."
    if not any(beginning):
        return "the file begins with zeros: a download that never finished", _DOWNLOAD_HINT
    shown = beginning[:4].hex(" ")
    return f"it begins with {shown}, a GGUF begins with 'GGUF' (47 47 55 46)", _DOWNLOAD_HINT

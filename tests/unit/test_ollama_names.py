"""Ollama's naming rules: verdicts on names, display forms, digests."""

from __future__ import annotations

import random
import re

import pytest

from ollatune.base.errors import InputError, UsageError
from ollatune.ollama.names import ModelName, digest_hex

PART80, PART81 = "8" * 80, "8" * 81
HOST350, HOST351 = "3" * 350, "3" * 351

# Verdicts of Ollama's ParseName: (host, namespace, model, tag), or None where it refuses.
FIXED: dict[str, tuple[str, str, str, str] | None] = {
    "llama3.2": ("registry.ollama.ai", "library", "llama3.2", "latest"),
    "llama3.2:3b": ("registry.ollama.ai", "library", "llama3.2", "3b"),
    "someone/model": ("registry.ollama.ai", "someone", "model", "latest"),
    "hf.co/org/repo.GGUF:Q4_K_M": ("hf.co", "org", "repo.GGUF", "Q4_K_M"),
    "host:5000/ns/m:t": ("host:5000", "ns", "m", "t"),
    "host:5000/ns/m": ("host:5000", "ns", "m", "latest"),
    "http://host:5000/ns/m": ("host:5000", "ns", "m", "latest"),
    "https://host:5000/ns/m:t": ("host:5000", "ns", "m", "t"),
    "scheme://host:port/namespace/model:tag": ("host:port", "namespace", "model", "tag"),
    "host:https/namespace/model:tag": ("host:https", "namespace", "model", "tag"),
    "_why/_the/_lucky:_stiff": ("_why", "_the", "_lucky", "_stiff"),
    "h/n/m:t": ("h", "n", "m", "t"),
    "dolphin-mistral:7b-v2.6-dpo-laser-q6_K": (
        "registry.ollama.ai", "library", "dolphin-mistral", "7b-v2.6-dpo-laser-q6_K",
    ),
    f"{HOST350}/{PART80}/{PART80}:{PART80}": (HOST350, PART80, PART80, PART80),
    "a.": ("registry.ollama.ai", "library", "a.", "latest"),
    "a..b": ("registry.ollama.ai", "library", "a..b", "latest"),
    "CON": ("registry.ollama.ai", "library", "CON", "latest"),
    "localhost:8080": ("registry.ollama.ai", "library", "localhost", "8080"),
    # refused
    "": None,
    " ": None,
    " llama3": None,
    "llama3 ": None,
    "llama3\n": None,
    "llama 3": None,
    "model:": None,
    "n/m:": None,
    ":tag": None,
    "/": None,
    "//": None,
    "//mm": None,
    "/nn/mm": None,
    "hh//": None,
    "hh//mm": None,
    "^": None,
    "@": None,
    "m@d": None,
    "@sha256:" + "1" * 64: None,
    "model@sha256:" + "1" * 64: None,
    "a/b/c/d": None,
    "https://model": None,
    "https://host/model": None,
    "host/name:space/model:tag": None,
    "name.space/model": None,
    "m:t:u": None,
    "-m": None,
    ".m": None,
    "-hh/nn/mm:tt": None,
    "hh/-nn/mm:tt": None,
    "hh/nn/-mm:tt": None,
    "hh/nn/mm:-tt": None,
    "hh/nn/mm:.tt": None,
    PART81: None,
    f"m:{PART81}": None,
    f"{PART81}/m": None,
    f"{HOST351}/n/m": None,
    "x" * 10_240: None,
    "..": None,
    "../..": None,
    "../../etc/passwd": None,
    "..%2f..%2fetc": None,
    "a/../b": None,
    "a/..": None,
    "~/m": None,
    "m\x00": None,
    "m\x1b[31m": None,
    "C:\\models\\m": None,
    "\\\\srv\\share": None,
    "a\\b": None,
    "modèle": None,
    "a\u2215b": None,
    "a\uff0fb": None,
    "m\u200b": None,
    "\ud800": None,
    "١": None,
    "m+q4": None,
    "$(id)": None,
    "m;rm": None,
    "!MISSING!": None,
}  # fmt: skip


def test_there_are_enough_fixed_names() -> None:
    assert len(FIXED) >= 60


@pytest.mark.parametrize("text", FIXED, ids=lambda text: ascii(text)[:40])
def test_fixed_names(text: str) -> None:
    expected = FIXED[text]
    if expected is None:
        assert not ModelName.is_valid(text)
        with pytest.raises(UsageError) as caught:
            ModelName.parse(text)
        assert "is not a model name" in str(caught.value)
        assert len(str(caught.value)) < 600
        assert "\x1b" not in str(caught.value)
    else:
        assert ModelName.parse(text).parts == expected


def reference_verdict(text: str) -> tuple[str, str, str, str] | None:
    """Ollama's rules as one pattern, written independently of the parser under test."""
    first, rest = "[A-Za-z0-9_]", "[A-Za-z0-9_.-]"
    matched = re.fullmatch(
        rf"(?:(?:(?:(?!.*://.*://)[^/]*://)?(?P<host>{first}[A-Za-z0-9_.:-]{{0,349}})/)?"
        rf"(?P<namespace>{first}[A-Za-z0-9_-]{{0,79}})/)?"
        rf"(?P<model>{first}{rest}{{0,79}})(?::(?P<tag>{first}{rest}{{0,79}}))?",
        text,
        re.DOTALL,
    )
    if matched is None:
        return None
    return (
        matched["host"] or "registry.ollama.ai", matched["namespace"] or "library",
        matched["model"], matched["tag"] or "latest",
    )  # fmt: skip


PIECES = (
    "a", "B", "7", "_", "-", ".", "..", ":", "/", "//", "://", "@", " ", "\\", "é", "\x00", "lib", "x" * 79, "hf.co",
)  # fmt: skip


def test_ten_thousand_random_names_get_the_verdict_of_the_rules() -> None:
    # A plain seeded loop: hypothesis takes a hundred times as long for so many examples.
    generator = random.Random(20261123)
    num_valid = 0
    for _ in range(10_000):
        text = "".join(generator.choices(PIECES, k=generator.randrange(9)))
        expected = reference_verdict(text)
        try:
            found = ModelName.parse(text).parts
        except UsageError:
            found = None
        assert found == expected, text
        num_valid += found is not None
    assert num_valid > 500


def test_every_form_reads_back_as_the_same_name() -> None:
    generator = random.Random(7)
    for _ in range(1000):
        host, namespace, model, tag = (
            generator.choice("aZ_0") + "".join(generator.choices("bY_1-", k=generator.randrange(9)))
            for _ in range(4)
        )
        name = ModelName(host, namespace, model, tag)
        assert ModelName.parse(str(name)) == name
        assert ModelName.parse(name.short).matches(name)
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name.slug)


@pytest.mark.parametrize(
    ("text", "short", "slug"),
    [
        ("llama3.2", "llama3.2:latest", "llama3.2"),
        ("registry.ollama.ai/library/m:tag", "m:tag", "m-tag"),
        ("registry.ollama.ai/me/m:tag", "me/m:tag", "me-m-tag"),
        ("host/library/m:tag", "host/library/m:tag", "host-library-m-tag"),
        ("hf.co/o/r:Q4_K_M", "hf.co/o/r:Q4_K_M", "hf.co-o-r-Q4_K_M"),
        ("h:1/o/r:t.", "h:1/o/r:t.", "h-1-o-r-t"),
        ("con", "con:latest", "_con"),
        ("Nul.x:latest", "Nul.x:latest", "_Nul.x"),
        ("console", "console:latest", "console"),
    ],
)
def test_short_form_and_file_name(text: str, short: str, slug: str) -> None:
    name = ModelName.parse(text)
    assert (name.short, name.slug) == (short, slug)


def test_comparison_ignores_case_and_keeps_it() -> None:
    upper = ModelName.parse("Mistral:7B-Instruct")
    assert upper.matches(ModelName.parse("mistral:7b-instruct"))
    assert upper != ModelName.parse("mistral:7b-instruct")
    assert upper.short == "Mistral:7B-Instruct"


@pytest.mark.parametrize(
    ("text", "is_cloud"),
    [("gpt-oss:120b-cloud", True), ("kimi:cloud", True), ("cloud:7b", False), ("m:cloudy", False)],
)
def test_cloud_tags(text: str, is_cloud: bool) -> None:
    assert ModelName.parse(text).is_cloud is is_cloud


def test_digests() -> None:
    digits = "0123456789abcdef" * 4
    assert digest_hex(f"sha256:{digits}") == digits
    assert digest_hex(f"sha256-{digits}") == digits


@pytest.mark.parametrize(
    "digest",
    [
        "", "sha256:", "sha256:" + "0" * 63, "sha256:" + "0" * 65, "sha256:" + "G" * 64, "sha256:" + "A" * 64,
        "sha512:" + "0" * 64, "0" * 64, "sha256/" + "0" * 64, "sha256:../../" + "0" * 58,
        "sha256:" + "0" * 64 + "\n", " sha256:" + "0" * 64, "sha256:" + "0" * 63 + "/",
        "/etc/passwd", "sha256-" + "٠" * 64,
    ],
)  # fmt: skip
def test_what_is_no_digest(digest: str) -> None:
    with pytest.raises(InputError, match="is not a blob digest"):
        digest_hex(digest)

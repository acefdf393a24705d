"""The model registry: its facts, the names it corrects, and what a mistake in the file says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ollatune.base.errors import UsageError
from ollatune.catalog import Catalog, load_catalog, registry_path

# Published parameter counts (model cards and safetensors headers); the registry computes them from shapes.
PUBLISHED_PARAMETERS = {
    "llama3.2:1b": 1_235_814_400,
    "llama3.2:3b": 3_212_749_824,
    "llama3.1:8b": 8_030_261_248,
    "llama3.1:70b": 70_553_706_496,
    "llama3.1:405b": 405_853_388_800,
    "mistral:7b": 7_248_023_552,
    "mistral-nemo:12b": 12_247_782_400,
    "mistral-small:24b": 23_572_403_200,
    "mixtral:8x7b": 46_702_792_704,
    "mixtral:8x22b": 140_630_071_296,
    "gemma2:2b": 2_614_341_888,
    "gemma2:9b": 9_241_705_984,
    "gemma2:27b": 27_227_128_320,
    "gemma3:270m": 268_098_176,
    "gemma3:1b": 999_885_952,
    "qwen2.5:0.5b": 494_032_768,
    "qwen2.5:7b": 7_615_616_512,
    "qwen2.5:72b": 72_706_203_648,
    "qwen3:0.6b": 596_049_920,
    "qwen3:8b": 8_190_735_360,
    "qwen3:30b": 30_532_122_624,
    "qwen3:235b": 235_093_634_560,
    "phi3:3.8b": 3_821_079_552,
    "phi3:14b": 13_960_238_080,
    "phi4:14b": 14_659_507_200,
    "phi4-mini:3.8b": 3_836_021_760,
    "neural-chat:7b": 7_241_732_096,
    "smollm2:135m": 134_515_008,
    "smollm2:1.7b": 1_711_376_384,
    "tinyllama:1.1b": 1_100_048_384,
}
SPECIFIED_FAMILIES = {
    "llama3.2", "llama3.1", "llama3.3", "mistral", "mixtral", "gemma2", "gemma3", "qwen2.5", "qwen3",
    "phi3", "phi3.5", "phi4", "phi4-mini", "neural-chat", "smollm2", "tinyllama",
}  # fmt: skip


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


def test_every_family_of_the_specification_is_there(catalog: Catalog) -> None:
    assert set(catalog.families) >= SPECIFIED_FAMILIES


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_shapes_give_the_published_parameter_counts(catalog: Catalog, name: str) -> None:
    entry = catalog.entry(name)
    assert entry is not None
    assert entry.parameters == PUBLISHED_PARAMETERS[name]


def test_downloads_fit_their_quantization(catalog: Catalog) -> None:
    bits = {"F16": (15.5, 17), "Q8_0": (8.2, 9), "Q4_K_M": (4.5, 7.1), "Q4_0": (4.2, 5.2)}
    for entry in catalog.entries():
        low, high = bits[entry.quantization]
        assert low < 8 * entry.download_bytes / entry.parameters < high, entry.name


def test_lora_size_of_a_known_adapter(catalog: Catalog) -> None:
    # PEFT prints 41,943,040 trainable parameters for rank 16 on all linear layers of Llama-3.1-8B.
    entry = catalog.entry("llama3.1:8b")
    assert entry is not None
    assert entry.lora_parameters(16) == 41_943_040


def test_training_memory_grows_with_the_method(catalog: Catalog) -> None:
    for entry in catalog.entries():
        packed, dense, full = (
            entry.training_memory_bytes(method) for method in ("lora-packed", "lora-bf16", "full")
        )
        if entry.quantization != "F16":
            assert packed < dense, entry.name
        assert dense < full, entry.name
    entry = catalog.entry("llama3.1:8b")
    assert entry is not None
    # 8B in 16 GB of GPU memory as the specification promises, when the weights stay packed.
    assert entry.training_memory_bytes("lora-packed") < 12e9
    assert entry.training_memory_bytes("lora-packed", rank=64) > entry.training_memory_bytes(
        "lora-packed"
    )


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("llama3.2:8b", "llama3.1:8b"),
        ("llama3.2:70b", "llama3.1:70b"),
        ("llama3.2:405b", "llama3.1:405b"),
        ("Llama3.2:8B", "llama3.1:8b"),
        ("library/llama3.2:8b", "llama3.1:8b"),
        ("llama3.2:8b-instruct-q4_K_M", "llama3.1:8b-instruct-q4_K_M"),
    ],
)
def test_names_that_do_not_exist_are_corrected_with_a_notice(
    catalog: Catalog, written: str, meant: str
) -> None:
    resolution = catalog.resolve(written)
    assert resolution.name == meant
    assert resolution.entry is not None
    assert resolution.entry.family == "llama3.1"
    assert resolution.notice is not None
    assert f"`{written}` is not in Ollama's library; using `{meant}`" in resolution.notice


def test_every_alias_leads_to_an_entry_and_hides_none(catalog: Catalog) -> None:
    for written, alias in catalog.aliases.items():
        assert catalog.entry(written) is None, written
        assert catalog.entry(alias.name) is not None, alias.name


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("llama3.2", "llama3.2:3b"),
        ("llama3.2:latest", "llama3.2:3b"),
        ("mistral:7b-instruct-v0.3-q4_K_M", "mistral:7b"),
        ("registry.ollama.ai/library/Qwen3:0.6b", "qwen3:0.6b"),
        ("phi3:mini", "phi3:3.8b"),
        ("phi3:medium-128k-instruct-q4_0", "phi3:14b"),
        ("embedded:smollm2-135m", "smollm2:135m"),
    ],
)
def test_listed_names_are_kept(catalog: Catalog, name: str, entry: str) -> None:
    resolution = catalog.resolve(name)
    assert (resolution.name, resolution.notice, resolution.suggestion) == (name, None, None)
    assert resolution.entry is not None
    assert resolution.entry.name == entry


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("lama3.2:3b", "llama3.2:3b"),
        ("llama-3.2", "llama3.2"),
        ("mistrall", "mistral"),
        ("qwen3:9b", "qwen3:8b"),
        ("phi-4", "phi4"),
        ("hf.co/someone/something:Q4_K_M", None),
        ("my-own-model", None),
    ],
)
def test_unknown_names_come_back_with_the_nearest(
    catalog: Catalog, name: str, suggestion: str | None
) -> None:
    resolution = catalog.resolve(name)
    assert (resolution.name, resolution.entry) == (name, None)
    assert resolution.suggestion == suggestion


def test_settings_follow_the_size(catalog: Catalog) -> None:
    small, large = catalog.entry("smollm2:135m"), catalog.entry("llama3.3")
    assert small is not None
    assert large is not None
    assert small.recommended.lora_learning_rate > large.recommended.lora_learning_rate
    assert all(entry.recommended.max_parameters >= entry.parameters for entry in catalog.entries())


def test_architectures_we_cannot_train_say_so(catalog: Catalog) -> None:
    experts, dense = catalog.entry("qwen3:30b"), catalog.entry("qwen3:8b")
    assert experts is not None
    assert dense is not None
    assert (experts.architecture, experts.is_trainable) == ("qwen3moe", False)
    assert (dense.architecture, dense.is_trainable) == ("qwen3", True)


def test_unknown_key_names_file_line_and_the_nearest(tmp_path: Path) -> None:
    text = registry_path().read_text(encoding="utf-8")
    broken = text.replace("    publisher: Meta\n", "    publisherr: Meta\n", 1)
    line = broken.splitlines().index("    publisherr: Meta") + 1
    path = tmp_path / "model_registry.yaml"
    path.write_text(broken, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_catalog(path)
    message = str(caught.value)
    assert f"{path}:{line}: families.llama3.2.publisherr" in message
    assert "Did you mean `publisher`?" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [", "is not YAML"),
        ("", "model_registry.yaml:1: "),
        (
            "trainable_architectures: []\nrecommended: []\naliases: {}\nfamilies: {x: 3}\n",
            ":4: families.x",
        ),
    ],
)
def test_broken_registry_is_one_error(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "model_registry.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_catalog(path)
    assert expected in str(caught.value)


def test_missing_registry(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot read the model registry"):
        load_catalog(tmp_path / "none.yaml")


def test_a_default_size_has_to_exist(tmp_path: Path) -> None:
    text = (
        registry_path()
        .read_text(encoding="utf-8")
        .replace("default_size: 3b", "default_size: 4b", 1)
    )
    path = tmp_path / "model_registry.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="size `4b` is not among 1b, 3b"):
        load_catalog(path)


def test_loads_without_torch() -> None:
    code = "import sys, ollatune.catalog as c; c.load_catalog(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The store on disk: real layouts, lookup, and what a damaged or foreign model says."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from ollatune.base.errors import InputError, OllatuneError, StorageError
from ollatune.ollama.names import ModelName
from ollatune.ollama.store import LocalStore, find_local, store_roots

RECORDED_STORE = Path(__file__).parents[1] / "data" / "ollama-store.json"
MEDIA = "application/vnd.ollama.image."


class StoreBuilder:
    """Writes a store as Ollama does: blobs named by digest, a manifest per tag."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True)
        (root / "manifests").mkdir()

    def blob(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        (self.root / "blobs" / f"sha256-{digest}").write_bytes(content)
        return f"sha256:{digest}"

    def layer(self, kind: str, content: bytes) -> dict[str, Any]:
        return {"mediaType": MEDIA + kind, "digest": self.blob(content), "size": len(content)}

    def manifest(
        self, name: str, layers: list[dict[str, Any]], config: dict[str, Any] | None = None
    ) -> Path:
        config = {"model_format": "gguf", "model_family": "llama"} if config is None else config
        content = json.dumps(config).encode()
        path = self.root.joinpath("manifests", *ModelName.parse(name).parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(
                {
                    "schemaVersion": 2,
                    "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
                    "config": {
                        "mediaType": "application/vnd.docker.container.image.v1+json",
                        "digest": self.blob(content),
                        "size": len(content),
                    },
                    "layers": layers,
                }
            )
        )
        return path

    def model(self, name: str, weights: bytes = b"GGUF weights") -> Path:
        return self.manifest(name, [self.layer("model", weights)])


@pytest.fixture
def builder(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "models")


@pytest.fixture
def store(builder: StoreBuilder) -> LocalStore:
    return LocalStore(builder.root)


@pytest.mark.parametrize("version", ["0.24.0", "0.32.15"])
def test_reads_a_store_that_a_real_server_wrote(tmp_path: Path, version: str) -> None:
    recorded = json.loads(RECORDED_STORE.read_text())[version]
    root = tmp_path / "models"
    manifest_path = root / recorded["manifest_path"]
    manifest_path.parent.mkdir(parents=True)
    manifest_path.write_text(json.dumps(recorded["manifest"]))
    (root / "blobs").mkdir()
    for digest, content in recorded["small_blobs"].items():
        (root / "blobs" / digest.replace(":", "-")).write_text(content, newline="")
    weights = recorded["manifest"]["layers"][0]
    with (root / "blobs" / weights["digest"].replace(":", "-")).open("wb") as stream:
        stream.truncate(weights["size"])  # a hole of the right size stands for the weights

    model = LocalStore(root).find("rec-a")

    assert model is not None
    assert model.name.short == "rec-a:latest"
    assert model.require_gguf().name == weights["digest"].replace(":", "-")
    assert model.system == "Be brief."
    assert model.params == {"num_ctx": 512, "stop": ["<|im_end|>"], "temperature": 0}
    assert model.messages == (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    )
    assert model.licenses == ("Apache-2.0",)
    assert model.template is not None
    assert model.template.startswith("{{ if .System }}<|im_start|>system\n")
    assert model.template.endswith("<|im_start|>assistant\n")
    assert model.config["file_type"] == "Q4_1"
    assert model.config["model_type"] == "134.52M"
    assert model.manifest_digest == hashlib.sha256(manifest_path.read_bytes()).hexdigest()
    assert model.size_bytes == sum(layer["size"] for layer in recorded["manifest"]["layers"])
    with pytest.raises(InputError, match="is damaged: its sha256 is"):
        model.verify()


def test_lookup_ignores_case_and_keeps_what_is_stored(
    builder: StoreBuilder, store: LocalStore
) -> None:
    builder.model("Mistral:7B-Instruct")
    found = store.find("mistral:7b-INSTRUCT")
    assert found is not None
    assert found.name.short == "Mistral:7B-Instruct"
    assert store.find("mistral:7b") is None
    assert store.find("mistral") is None


def test_exact_case_is_preferred(builder: StoreBuilder, store: LocalStore) -> None:
    builder.model("Name", b"GGUF upper")
    builder.model("name", b"GGUF lower")
    for name in ("Name", "name"):
        found = store.find(name)
        assert found is not None
        assert found.name.model == name


def test_a_folder_of_the_other_case_does_not_hide_the_tag(
    builder: StoreBuilder, store: LocalStore
) -> None:
    builder.model("name:a")
    builder.model("NAME:b")
    found = store.find("name:b")
    assert found is not None
    assert found.name.short == "NAME:b"


def test_hub_names_and_listing(builder: StoreBuilder, store: LocalStore) -> None:
    for name in ("hf.co/org/repo:Q4_K_M", "zeta", "me/alpha:v1"):
        builder.model(name)
    (builder.root / "manifests" / "stray").write_text("x")
    bad = builder.root / "manifests" / "registry.ollama.ai" / "library" / "zeta" / "-bad"
    bad.write_text("{}")
    assert [name.short for name in store.names()] == [
        "hf.co/org/repo:Q4_K_M",
        "me/alpha:v1",
        "zeta:latest",
    ]
    assert [model.name.short for model in store.list()] == [n.short for n in store.names()]


def test_listing_leaves_out_a_damaged_model(
    builder: StoreBuilder, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    builder.model("good")
    builder.model("bad").write_text("{")
    with caplog.at_level("WARNING", logger="ollatune"):
        assert [model.name.short for model in store.list()] == ["good:latest"]
    assert "bad:latest is left out: Damaged Ollama store" in caplog.text


def test_split_weights_and_projector(builder: StoreBuilder, store: LocalStore) -> None:
    layers = [
        builder.layer("model", b"GGUF 1"),
        builder.layer("model", b"GGUF 2"),
        builder.layer("projector", b"GGUF p"),
    ]
    builder.manifest("split", layers)
    model = store.find("split")
    assert model is not None
    assert [path.read_bytes() for path in model.gguf_paths] == [b"GGUF 1", b"GGUF 2"]
    assert [path.read_bytes() for path in model.projector_paths] == [b"GGUF p"]
    model.verify()
    assert model.require_gguf() == model.gguf_paths[0]


def test_config_fields(builder: StoreBuilder, store: LocalStore) -> None:
    config = {
        "model_format": "gguf",
        "renderer": "qwen3-coder",
        "parser": "qwen3-coder",
        "requires": "0.14.0",
        "capabilities": ["completion", "tools"],
    }
    builder.manifest("m", [builder.layer("model", b"GGUF")], config)
    model = store.find("m")
    assert model is not None
    assert (model.renderer, model.parser, model.requires) == (
        "qwen3-coder",
        "qwen3-coder",
        "0.14.0",
    )
    assert model.capabilities == ("completion", "tools")
    assert (model.template, model.system, model.params) == (None, None, {})


def test_a_model_with_an_adapter_needs_its_blob(builder: StoreBuilder, store: LocalStore) -> None:
    builder.manifest(
        "tuned", [builder.layer("model", b"GGUF"), builder.layer("adapter", b"GGUF a")]
    )
    model = store.find("tuned")
    assert model is not None
    assert model.require_gguf() == model.gguf_paths[0]
    assert [path.read_bytes() for path in model.adapter_paths] == [b"GGUF a"]
    model.adapter_paths[0].unlink()
    with pytest.raises(InputError, match="needs the blob"):
        model.require_gguf()


def test_safetensors_and_cloud_models_are_refused_by_name(
    builder: StoreBuilder, store: LocalStore
) -> None:
    builder.manifest("mlx", [builder.layer("tensor", b"x")], {"model_format": "safetensors"})
    builder.manifest(
        "big:cloud", [], {"remote_host": "https://ollama.com:443", "remote_model": "b"}
    )
    builder.manifest("empty", [])
    for name, expected in (
        ("mlx", "mlx:latest holds MLX safetensors, a GGUF was expected"),
        (
            "big:cloud",
            "big:cloud runs on https://ollama.com:443; its weights are not on this machine",
        ),
        ("empty", "empty:latest holds no weights"),
    ):
        model = store.find(name)
        assert model is not None
        with pytest.raises(InputError, match=expected):
            model.require_gguf()


def test_missing_and_short_blobs(builder: StoreBuilder, store: LocalStore) -> None:
    builder.model("gone")
    model = store.find("gone")
    assert model is not None
    path = model.gguf_paths[0]
    path.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="has 4 bytes, 12 were expected"):
        model.require_gguf()
    path.unlink()
    with pytest.raises(InputError, match="which is not there") as caught:
        model.require_gguf()
    assert "ollama pull gone:latest" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (b"", "not JSON"),
        (b"[]", "a JSON object was expected"),
        (b'{"layers": 3}', "`layers` is not a list"),
        (b'{"layers": [3]}', "a layer without a digest"),
        (b'{"layers": [{"digest": "sha256:../../../../etc/passwd"}]}', "is not a blob digest"),
        (b'{"config": {"digest": "sha256:%s"}}' % (b"1" * 64), "the file is missing"),
        (b"[" * 100_000, "not JSON"),
        (b'{"layers": [{"mediaType": "%ssystem", "digest": "sha256:%s"}]}' % (MEDIA.encode(), b"2" * 64),
         "the file is missing"),
        (b'{"a": "\xff"}', "not JSON"),
    ],
)  # fmt: skip
def test_damaged_manifests(
    builder: StoreBuilder, store: LocalStore, change: bytes, expected: str
) -> None:
    builder.model("m").write_bytes(change)
    with pytest.raises(InputError, match=expected):
        store.find("m")


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("params", b"[]", "a JSON object was expected"),
        ("params", b"{", "not JSON"),
        ("messages", b"{}", "a JSON list of objects was expected"),
        ("messages", b'["x"]', "a JSON list of objects was expected"),
        ("system", b"\xff\xfe", "not UTF-8 at byte 0"),
    ],
)
def test_damaged_layers(
    builder: StoreBuilder, store: LocalStore, kind: str, content: bytes, expected: str
) -> None:
    builder.manifest("m", [builder.layer("model", b"GGUF"), builder.layer(kind, content)])
    with pytest.raises(InputError, match=expected):
        store.find("m")


def test_mutated_manifests_give_only_our_errors(builder: StoreBuilder, store: LocalStore) -> None:
    path = builder.manifest("m", [builder.layer("model", b"GGUF"), builder.layer("params", b"{}")])
    original = path.read_bytes()
    generator = random.Random(1)
    num_refused = 0
    for _ in range(150):
        content = bytearray(original)
        for _ in range(generator.randrange(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(
            content[: generator.choice((len(content), generator.randrange(len(content))))]
        )
        try:
            model = store.find("m")
            if model is not None:
                model.require_gguf()
        except OllatuneError:
            num_refused += 1
    assert num_refused > 100


def test_a_large_text_layer_is_refused(
    builder: StoreBuilder, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollatune.ollama.blobs._MAX_SMALL_BYTES", 1 << 20)
    builder.manifest("m", [builder.layer("system", b"x" * ((1 << 20) + 1))])
    with pytest.raises(InputError, match="more than 1 MiB"):
        store.find("m")


def test_a_blob_that_links_out_of_the_store_is_not_opened(
    builder: StoreBuilder, store: LocalStore, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    digest = hashlib.sha256(b"x").hexdigest()
    (builder.root / "blobs" / f"sha256-{digest}").symlink_to(secret)
    builder.manifest("m", [{"mediaType": MEDIA + "system", "digest": f"sha256:{digest}"}])
    with pytest.raises(InputError, match="leads out of the store"):
        store.find("m")
    link = builder.root / "manifests" / "registry.ollama.ai" / "library" / "m" / "linked"
    link.symlink_to(secret)
    with pytest.raises(InputError, match="leads out of the store"):
        store.find("m:linked")


def test_blobs_may_lie_on_another_disk(
    builder: StoreBuilder, store: LocalStore, tmp_path: Path
) -> None:
    builder.model("m")
    (builder.root / "blobs").rename(tmp_path / "elsewhere")
    (builder.root / "blobs").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    model = store.find("m")
    assert model is not None
    assert model.require_gguf().read_bytes() == b"GGUF weights"


def test_only_files_of_the_store_are_opened(builder: StoreBuilder, store: LocalStore) -> None:
    builder.model("m")
    opened: list[str] = []
    watching = True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(arguments[0], str):
            opened.append(arguments[0])

    sys.addaudithook(audit)
    try:
        store.find("m")
        for name in ("nope", "m:other", "hf.co/a/b"):
            store.find(name)
    finally:
        watching = False
    assert opened
    assert all(Path(path).is_relative_to(builder.root) for path in opened)


def test_a_missing_store_has_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "none")
    assert not store.exists()
    assert store.find("m") is None
    assert store.names() == []
    assert store.list() == []


def _refuse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `path` unreadable; root reads everything, so there the operating system's answer is imitated."""
    if os.geteuid() != 0:
        path.chmod(0)
        return
    original = Path.is_dir

    def is_dir(self: Path, **options: Any) -> bool:
        if self == path or path in self.parents:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, **options)

    monkeypatch.setattr(Path, "is_dir", is_dir)


def test_a_store_without_permission_says_how_to_get_it(
    builder: StoreBuilder, store: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    builder.model("m")
    with monkeypatch.context() as patch:
        _refuse(builder.root, patch)
        with pytest.raises(StorageError, match="No permission to read Ollama's store") as caught:
            store.find("m")
        assert "usermod -aG ollama" in str(caught.value)
        other = StoreBuilder(tmp_path / "other")
        other.model("m")
        found = find_local("m", [builder.root, other.root])
        assert found is not None
        assert found.root == other.root
        with pytest.raises(StorageError):
            find_local("absent", [builder.root, other.root])
    builder.root.chmod(stat.S_IRWXU)


def test_roots_in_order() -> None:
    home = Path("/home/me")
    assert store_roots({}, platform="linux", home=home) == [
        home / ".ollama/models",
        Path("/usr/share/ollama/.ollama/models"),
        Path("/root/.ollama/models"),
    ]
    assert store_roots({}, platform="darwin", home=home) == [home / ".ollama/models"]
    assert store_roots({}, platform="win32", home=home) == [home / ".ollama/models"]
    assert store_roots({"OLLAMA_MODELS": ' "/big/models" '}, platform="darwin", home=home) == [
        Path("/big/models"),
        home / ".ollama/models",
    ]
    root = Path("/root")
    assert (
        store_roots({"OLLAMA_MODELS": ""}, platform="linux", home=root)[0]
        == root / ".ollama/models"
    )
    assert len(store_roots({}, platform="linux", home=root)) == 2


def test_find_local_asks_each_store(tmp_path: Path) -> None:
    first, second = StoreBuilder(tmp_path / "1"), StoreBuilder(tmp_path / "2")
    second.model("m")
    found = find_local("m", [first.root, second.root])
    assert found is not None
    assert found.root == second.root
    assert find_local("n", [first.root, second.root]) is None

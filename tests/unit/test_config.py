"""Configuration: types from the schema, every mistake with its place, precedence."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollatune.base.errors import OllatuneError, UsageError
from ollatune.config.load import dump_config, load_config, parse_yaml
from ollatune.config.schema import Config


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_a_number_without_a_dot_is_a_number(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "training:\n  learning_rate: 1e-5\n"))
    assert config.training.learning_rate == 1e-5


def test_quoted_numbers_stay_text(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, 'model:\n  base_model: "1e5"\n'))
    assert config.model.base_model == "1e5"


def test_unknown_keys_get_the_nearest_name_and_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\n  base_model: x\ntraining:\n  epcohs: 3\n")
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}:4: unknown key `training.epcohs`. Did you mean `epochs`?"


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "training:\n  epochs: 0\n  batch_size: four\nadvanced:\n  lora_rnk: 2\n")
    with pytest.raises(UsageError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{n}" for n in (2, 3, 5)]
    assert "`training.epochs` should be greater than 0. Found 0." in lines[0]


def test_precedence(tmp_path: Path) -> None:
    path = write(tmp_path, "training:\n  epochs: 5\n  seed: 7\n  batch_size: 2\n")
    config = load_config(
        path, assignments=["training.epochs=6", "training.seed=8"], overrides={"training.seed": 9}
    )
    assert (config.training.epochs, config.training.seed, config.training.batch_size) == (6, 9, 2)
    assert config.training.warmup_steps == Config().training.warmup_steps


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("training: [1, 2", "not valid YAML"),
        ("a: &x 1\nb: *x\n", "aliases are not supported"),
        ("training:\n  seed: 1\n  seed: 2\n", "already set in line 2"),
        ("- a\n", "expected a mapping"),
        ("training:\n  seed: !!python/object:os.system x\n", "is not supported"),
    ],
)
def test_refused_documents(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        load_config(write(tmp_path, text))


def test_set_errors_name_the_flag() -> None:
    with pytest.raises(UsageError, match=r"--set training\.warmup_step: unknown key"):
        load_config(assignments=["training.warmup_step=3"])
    with pytest.raises(UsageError, match=r"expected section\.key=value"):
        load_config(assignments=["nonsense"])


def test_a_list_by_set() -> None:
    config = load_config(assignments=["advanced.lora_target_modules=[q_proj, v_proj]"])
    assert config.advanced.lora_target_modules == ["q_proj", "v_proj"]


def test_the_resolved_config_is_input(tmp_path: Path) -> None:
    config = load_config(assignments=["training.learning_rate=3e-4", "data.system='Hi: \"you\"'"])
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no configuration file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        load_config(tmp_path)


@given(st.text(max_size=200))
def test_any_text_parses_or_is_our_error(text: str) -> None:
    with contextlib.suppress(OllatuneError):
        parse_yaml(text, "x")


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("data: a.jsonl", [("a.jsonl", 1.0)]),
        ("data:\n  - {path: a.jsonl, weight: 2}\n  - b/", [("a.jsonl", 2.0), ("b/", 1.0)]),
        ("data: {sources: [a.jsonl, {path: b/, weight: 0.5}]}", [("a.jsonl", 1.0), ("b/", 0.5)]),
    ],
)
def test_sources_may_be_written_short(text: str, sources: list[tuple[str, float]]) -> None:
    config = load_config(parse_yaml(text, "c.yaml"), assignments=["data.skip_bad=true"])
    assert [(source.path, source.weight) for source in config.data.sources] == sources
    assert config.data.skip_bad


@pytest.mark.parametrize(
    "text", ["data=a.jsonl", "data.sources=[a.jsonl]", "data=[{path: a.jsonl}]"]
)
def test_sources_may_be_set_short(text: str) -> None:
    config = load_config(assignments=[text], overrides={"data.sources": [{"path": "b"}]})
    assert [source.path for source in config.data.sources] == ["b"]
    config = load_config(assignments=[text])
    assert [source.path for source in config.data.sources] == ["a.jsonl"]


def test_a_mistake_in_a_short_list_of_sources_has_its_line() -> None:
    text = "data:\n  - path: a.jsonl\n    wieght: 2\n"
    with pytest.raises(UsageError, match=r"c\.yaml:3: .*`?data.*wieght"):
        load_config(parse_yaml(text, "c.yaml"))

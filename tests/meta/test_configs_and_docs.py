"""Shipped configurations load, every field is used, and generated docs are current."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from ollatune.catalog import load_catalog
from ollatune.config.load import dump_config, load_config
from ollatune.config.schema import Config
from ollatune.modeling.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
RUN_CONFIGS = sorted(
    path for path in (ROOT / "configs").glob("*.yaml") if path.name != "model_registry.yaml"
)


def test_there_are_configs() -> None:
    assert {"model_config.yaml", "demo.yaml"} <= {path.name for path in RUN_CONFIGS}


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config))
    assert load_config(resolved) == config


def fields() -> list[str]:
    names: list[str] = []
    for info in Config.model_fields.values():
        section: Any = info.annotation
        for key, inner in section.model_fields.items():
            names.append(key)
            for member in get_args(inner.annotation):
                if isinstance(member, type) and issubclass(member, BaseModel):
                    names += list(member.model_fields)
    return sorted(set(names))


def attributes_read() -> set[str]:
    read: set[str] = set()
    for path in (ROOT / "src" / "ollatune").rglob("*.py"):
        if "config" in path.parts[-2:-1]:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
    return read


def test_every_config_field_is_read_somewhere() -> None:
    assert len(fields()) > 50
    unread = set(fields()) - attributes_read()
    assert not unread, f"settings that do nothing: {sorted(unread)}"


def test_generated_docs_are_current() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import make_docs
    finally:
        sys.path.pop(0)
    for name, make in make_docs.PAGES.items():
        assert (ROOT / name).read_text() == make(), f"{name} is stale: run `make docs`"


def test_the_catalog_trains_what_the_code_can() -> None:
    assert set(load_catalog().trainable_architectures) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_settings_that_are_written_about_exist(path: Path) -> None:
    sections = ("data", "training", "validation", "distributed", "distillation", "advanced")
    pattern = rf"(?<![\w./-])({'|'.join(sections)})\.([a-z_]+)(?![\w(./-])"
    for section, key in re.findall(pattern, path.read_text("utf-8")):
        model: Any = Config.model_fields[section].annotation
        assert key in model.model_fields, f"{section}.{key}"

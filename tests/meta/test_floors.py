"""The house stands: a module imports from lower floors or its own folder only, and help stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "ollatune"
FLOORS = {
    "base": 0, "config": 1, "catalog": 1, "data": 2, "gguf": 2, "ollama": 2, "templates": 2,
    "tracking": 2, "modeling": 3, "checkpoint": 3, "training": 4, "export": 4, "evaluation": 4,
    "search": 5, "report": 5, "commands": 6, "cli": 7, "__main__": 8,
}  # fmt: skip
HEAVY = {"torch", "transformers", "ray", "accelerate", "numpy", "pyarrow", "httpx", "ollama"}


def modules() -> list[Path]:
    found = [path for path in SOURCE.rglob("*.py") if path.name != "__init__.py"]
    assert len(found) > 100
    return found


def imports_of(tree: ast.AST) -> list[str]:
    """Names of our modules that are imported anywhere in the tree, functions included."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.startswith("ollatune.")]


def place_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    place = place_of(path)
    for name in imports_of(ast.parse(path.read_text())):
        target = name.split(".")[1]
        if target == place:
            continue
        assert FLOORS[target] < FLOORS[place], f"{place} imports {name}"


def test_light_floors_import_nothing_heavy_at_module_level() -> None:
    for path in modules():
        place = place_of(path)
        if FLOORS[place] > 1 and place not in ("cli",):
            continue
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            roots = {name.split(".")[0] for name in names}
            assert not roots & HEAVY, f"{path} imports {roots & HEAVY}"


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from ollatune.cli import main; code = main(['train', '--help']);"
        "heavy = sorted({'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules));"
        "print(code, heavy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip().splitlines()[-1] == "0 []"

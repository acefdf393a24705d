"""Write docs/config.md and docs/cli.md from the code, so that they cannot drift. A test compares them.

python scripts/make_docs.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "train", "create-modelfile", "verify", "evaluate", "preprocess", "data", "models list",
    "models show", "models pull", "demo", "bench",
)  # fmt: skip


def config_page() -> str:
    """Every section, key, type, default and meaning of the configuration."""
    from ollatune.config.schema import Config

    lines = [
        "# Configuration reference", "",
        "Generated from `src/ollatune/config/schema.py` by `make docs`. Precedence: default < file < `--set"
        " section.key=value` < named flag. Unknown keys are errors.", "",
    ]  # fmt: skip
    for name, field in Config.model_fields.items():
        section: Any = field.annotation
        lines += [
            f"## `{name}`",
            "",
            "| key | type | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        for key, inner in section.model_fields.items():
            default = inner.get_default(call_default_factory=True)
            shown = "required" if inner.is_required() else f"`{_plain(default)}`"
            lines.append(f"| `{key}` | {_type(inner.annotation)} | {shown} | {inner.description} |")
        lines.append("")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _type(annotation: Any) -> str:
    members = get_args(annotation)
    if not members:
        names = {"NoneType": "null", "str": "text", "int": "integer", "float": "number", "bool": "true/false",
                 "Path": "path"}  # fmt: skip
        name = getattr(annotation, "__name__", str(annotation))
        return names.get(name, name)
    if getattr(annotation, "__origin__", None) in (list, dict):
        return {"list": "list", "dict": "mapping"}[annotation.__origin__.__name__]
    shown = [f"`{m}`" if isinstance(m, str) else _type(m) for m in members if isinstance(m, str | type)
             or get_args(m)]  # fmt: skip
    return " or ".join(dict.fromkeys(shown))


def cli_page() -> str:
    """The help of every command, as a terminal of 100 columns shows it."""
    import io
    from contextlib import redirect_stdout

    os.environ["COLUMNS"] = "100"
    from ollatune.cli import main

    lines = ["# Command reference", "", "Generated from the commands' own help by `make docs`.", ""]
    for command in COMMANDS:
        captured = io.StringIO()
        with redirect_stdout(captured):
            main([*command.split(), "--help"])
        text = "\n".join(line.rstrip() for line in captured.getvalue().strip().splitlines())
        lines += [f"## `ollatune {command}`", "", "```", text, "```", ""]
    return "\n".join(lines)


PAGES = {"docs/config.md": config_page, "docs/cli.md": cli_page}


def main() -> int:
    sys.path.insert(0, str(ROOT / "src"))
    for name, make in PAGES.items():
        (ROOT / name).write_text(make(), encoding="utf-8")
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

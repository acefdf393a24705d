"""`ollatune preprocess`: raw files → a clean, split data folder; with a model named, also its token counts."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollatune.config.load import load_config
from ollatune.config.schema import DataSource


@dataclass(frozen=True)
class PreprocessOptions:
    """The flags of `ollatune preprocess`. Without `raw`, `data.sources` of the configuration are read."""

    raw: Path | None
    output: Path = Path("data/processed")
    config: Path | None = None
    assignments: tuple[str, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)
    count_tokens: bool = False
    overwrite: bool = False
    show_progress: bool = True


def run_preprocess(options: PreprocessOptions) -> dict[str, Any]:
    """Validate, deduplicate, split and convert. Returns the result that `--json` prints."""
    from ollatune.data.load import data_sources
    from ollatune.data.prepare import prepare
    from ollatune.data.progress import BuildBar

    config = load_config(options.config, assignments=options.assignments, overrides=options.flags)
    with BuildBar("Preparing", is_shown=options.show_progress) as bar:
        prepared = prepare(
            config.data,
            data_sources(config.data, options.raw),
            options.output,
            seed=config.training.seed,
            overwrite=options.overwrite,
            progress=bar,
        )
    result = prepared.as_dict()
    if options.count_tokens:
        from ollatune.commands.data import load_for_base

        values = config.model_dump()
        values["data"]["sources"] = [DataSource(path=str(options.output)).model_dump()]
        if prepared.form == "text":
            values["training"]["method"] = "continued-pretraining"
        loaded = load_for_base(
            type(config).model_validate(values), show_progress=options.show_progress
        )
        result["base"] = loaded.base.source.name
        result["tokens"] = loaded.splits.report.as_dict()
        result["warnings"] += loaded.splits.report.warnings
    return result


def preprocess_text(result: dict[str, Any]) -> str:
    """The result in words."""
    counts = ", ".join(f"{name} {count}" for name, count in result["num_records"].items() if count)
    lines = [
        f"{result['num_read']} records read, written to {result['output']}: {counts} ({result['form']} form).",
        *(f"  {path}: {form}" for path, form in result["source_forms"].items()),
    ]
    for name, split in result.get("tokens", {}).get("splits", {}).items():
        lines.append(
            f"  {name}: {split['num_tokens']} tokens, {split['num_target_tokens']} of them targets "
            f"({split['target_share']:.0%}); longest {split['length_percentiles']['p100']}."
        )
    lines += [f"Warning: {warning}" for warning in result["warnings"]]
    method = " --set training.method=continued-pretraining" if result["form"] == "text" else ""
    lines.append(f"Next: ollatune train --data {shlex.quote(result['output'])}{method}")
    return "\n".join(lines)

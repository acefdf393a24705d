"""What the speed benchmark leaves behind: a dated JSON file, the table as Markdown, the loss curves as a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.speed_data import LENGTHS


def result_path(result: dict[str, Any], folder: Path, kind: str) -> Path:
    """`KIND-DATE-MACHINE.json` in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = re.sub(r"[^a-z0-9]+", "-", result["machine"].lower()).strip("-")
    return folder / f"{kind}-{result['date']}-{machine}.json"


def save(result: dict[str, Any], folder: Path) -> Path:
    """Write `speed-DATE-MACHINE.json`, `.md` and (where there are curves) `.svg`; returns the first."""
    path = result_path(result, folder, "speed")
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(result))
    if result.get("losses"):
        plot(result["losses"], path.with_suffix(".svg"))
    return path


def table(result: dict[str, Any]) -> str:
    """The rows and ratios as Markdown."""
    lines = [
        f"{result['date']}, {result['machine']}.",
        "",
        "| batch | system | setting | tokens/s | spread | peak MB | loss | s per 1,000 records |",
        "| --- | --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['case']} | {row['system']} | {row['setting']} | {row['tokens_per_second']:.0f} "
        f"| {row['spread'][0]:.0f}-{row['spread'][1]:.0f} | {row['peak_mb']:.0f} | {row['loss']:.3f} "
        f"| {row['seconds_per_epoch']:.0f} |"
        for row in sorted(result["rows"], key=lambda r: (r["case"], -r["tokens_per_second"]))
    ]
    lines.append("")
    lines += [
        f"- `{name}`: {value}"
        for name, value in result.items()
        if name.startswith(("ratio_", "memory_ratio", "best_", "ceiling_"))
    ]
    lines += [f"- not measured: {name}: {why}" for name, why in result["not_measured"].items()]
    return "\n".join(lines) + "\n"


def plot(losses: dict[str, list[float]], path: Path) -> None:
    """Loss against tokens trained on, one line for each system."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    styles = ("-", "--", ":")
    for index, (name, values) in enumerate(losses.items()):
        tokens = [sum(LENGTHS) * (step + 1) for step in range(len(values))]
        axes.plot(tokens, values, styles[index % 3], label=name, linewidth=2.2 - 0.5 * index)
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("loss per target token")
    axes.set_title("The same batches and the same first adapter")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

"""What the speed benchmark leaves behind: a dated JSON file, the tables, the loss curves as a picture.

python benchmarks/speed_report.py [RESULT.json]             # prints the README's block from the newest result
python benchmarks/speed_report.py [RESULT.json] --write     # puts it into README.md and docs/speed.md
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if not __package__:  # run as a script: the folder has a file named gguf.py
    sys.path[0] = str(HERE.parent)

from benchmarks.speed_plan import CURVES, DEFAULT, OURS, TRAINER  # noqa: E402

MARKS = ("<!-- speed: benchmarks/speed_report.py --write -->", "<!-- /speed -->")
_WORDS = {
    "default": "defaults",
    "single": "one example at a time",
    "grouped": "grouped by length",
    "eager": "eager attention",
    "flex": "flex attention",
    "compile": "`torch_compile`",
    "checkpointing": "activation checkpointing",
}
_KEY = ("system", "setting", "case")
_REFERENCE = f"{CURVES[0].system} {CURVES[0].setting}"


def ratios(rows: list[dict[str, Any]]) -> dict[str, float | str | None]:
    """The comparisons that the goals are about; None where a side was not measured."""

    def of(system: str, case: str, setting: str | None = None) -> list[dict[str, Any]]:
        return [
            row
            for row in rows
            if (row["system"] == OURS) == (system == OURS)
            and row["case"] == case
            and setting in (None, row["setting"])
        ]

    def fastest(found: list[dict[str, Any]]) -> dict[str, Any] | None:
        return max(found, key=lambda row: row["tokens_per_second"], default=None)

    def ratio(key: str, above: dict[str, Any] | None, below: dict[str, Any] | None) -> float | None:
        return None if above is None or below is None else round(above[key] / below[key], 3)

    ours, shared = fastest(of(OURS, "mixed")), fastest(of(OURS, "shared"))
    best, default = fastest(of("peers", "mixed")), fastest(of("peers", "mixed", DEFAULT))
    best_shared = fastest(of("peers", "shared"))
    speed = "tokens_per_second"
    return {
        "best_peer": None if best is None else f"{best['system']} {best['setting']}",
        "best_peer_shared": None
        if best_shared is None
        else f"{best_shared['system']} {best_shared['setting']}",
        "ratio_best_peer": ratio(speed, ours, best),
        "ratio_trainer_default": ratio(speed, ours, default),
        "ratio_shared_context": ratio(speed, shared, best_shared),
        "memory_ratio": ratio("peak_mb", ours, best),
        "memory_ratio_trainer_default": ratio("peak_mb", ours, default),
        "memory_ratio_shared_context": ratio("peak_mb", shared, best_shared),
        "memory_ratio_beyond_imports": ratio("beyond", _beyond(ours), _beyond(best)),
    }


def _beyond(row: dict[str, Any] | None) -> dict[str, Any] | None:
    """Its peak beyond what the imports alone take."""
    return None if row is None else {"beyond": row["peak_mb"] - row["imports_mb"]}


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """`new` laid over `old`, with ratios of all rows: a row takes the place of its like, other rows and curves stay."""
    old = old or {}
    rows = {tuple(row[key] for key in _KEY): row for row in old.get("rows", [])}
    rows |= {tuple(row[key] for key in _KEY): row for row in new["rows"]}
    measured = {" ".join(key) for key in rows}
    result = old | new | {"rows": list(rows.values()), **ratios(list(rows.values()))}
    result["not_measured"] = {
        name: why
        for name, why in (old.get("not_measured", {}) | new["not_measured"]).items()
        if name not in measured
    }
    losses = old.get("losses", {}) | new.get("losses", {})
    if losses:
        result["losses"], result["loss_differences"] = losses, _differences(losses)
    ceiling = result.get("ceiling_tokens_per_second")
    ours = [row for row in result["rows"] if row["system"] == OURS and row["case"] == "mixed"]
    if ceiling and ours:
        speed = max(row["tokens_per_second"] for row in ours)
        result["ceiling_share"] = round(speed / max(ceiling.values()), 3)
    return result


def _differences(losses: dict[str, list[float]]) -> dict[str, float]:
    """The largest difference of any step's loss to that of Transformers in fp32."""
    reference = losses.get(_REFERENCE, [])
    return {
        name: round(max(abs(a - b) for a, b in zip(values, reference, strict=False)), 6)
        for name, values in losses.items()
        if reference and name != _REFERENCE
    }


def result_path(result: dict[str, Any], folder: Path, kind: str) -> Path:
    """`KIND-DATE-MACHINE.json` in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = re.sub(r"[^a-z0-9]+", "-", result["machine"].lower()).strip("-")
    return folder / f"{kind}-{result['date']}-{machine}.json"


def save(result: dict[str, Any], folder: Path) -> tuple[Path, dict[str, Any]]:
    """Add to `speed-DATE-MACHINE.json`, write `.md` and (where there are curves) `.svg`; returns the first, and all."""
    path = result_path(result, folder, "speed")
    merged = merge(json.loads(path.read_text()) if path.is_file() else None, result)
    path.write_text(json.dumps(merged, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(merged))
    if merged.get("losses"):
        tokens = int(re.search(r"\((\d+) in all", merged["batches"]["quarter"])[1])  # type: ignore[index]
        plot(merged["losses"], tokens, path.with_suffix(".svg"))
    return path, merged


def words_of(row: dict[str, Any]) -> str:
    """Its setting for a reader: `bf16, packed, eager attention`."""
    return ", ".join(_WORDS.get(word, word) for word in row["setting"].split("-"))


def table(result: dict[str, Any]) -> str:
    """All rows and ratios as Markdown."""
    rounds = sorted({row["rounds"] for row in result["rows"]})
    lines = [
        f"{result['date']}, {result['machine']}; alternating rounds: {', '.join(map(str, rounds)) or 'none'}.",
        "",
        "| batch | system | setting | tokens/s | spread | peak MB | beyond imports | loss | s per 1,000 records |",
        "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['case']} | {row['system']} | {words_of(row)} | {row['tokens_per_second']:.0f} "
        f"| {row['spread'][0]:.0f}-{row['spread'][1]:.0f} | {row['peak_mb']:.0f} "
        f"| {row['peak_mb'] - row['imports_mb']:.0f} | {row['loss']:.3f} | {row['seconds_per_epoch']:.0f} |"
        for row in sorted(result["rows"], key=lambda r: (r["case"], -r["tokens_per_second"]))
    ]
    lines.append("")
    lines += [
        f"- `{name}`: {value}"
        for name, value in result.items()
        if name.startswith(("ratio_", "memory_ratio", "best_", "ceiling_", "loss_diff"))
    ]
    lines += [f"- not measured: {name}: {why}" for name, why in result["not_measured"].items()]
    return "\n".join(lines) + "\n"


def block(result: dict[str, Any]) -> str:
    """What the README shows: ours, the fastest setting of each other system, the defaults, and the goals' ratios."""
    mixed = sorted(
        (row for row in result["rows"] if row["case"] == "mixed"),
        key=lambda row: -float(row["tokens_per_second"]),
    )
    shown, seen = [], set()
    for row in mixed:
        if row["system"] not in seen or (row["system"], row["setting"]) == (TRAINER, DEFAULT):
            shown.append(row)
        seen.add(row["system"])
    ours = next(row for row in shown if row["system"] == OURS)
    rounds = ours["rounds"]
    lines = [
        "SmolLM2-135M, LoRA rank 8 on all linear layers, four examples of 24-512 tokens a batch, 40 % of them targets;",
        f"real tokens (padding does not count); {result['machine']}, {result['date']}, "
        f"{rounds} alternating round{'s' if rounds != 1 else ''}; of every other system the fastest setting found:",
        "",
        "| system | setting | tokens/s | peak MB | Ollatune is | of its memory |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in shown:
        ratio = f"{ours['tokens_per_second'] / row['tokens_per_second']:.1f} ×"
        share = f"{100 * ours['peak_mb'] / row['peak_mb']:.0f} %"
        words = f"defaults: {words_of(row)}" if row["setting"] == DEFAULT else words_of(row)
        lines.append(
            f"| {row['system']} | {words} | {row['tokens_per_second']:.0f} | {row['peak_mb']:.0f} "
            f"| {'' if row is ours else ratio} | {'' if row is ours else share} |"
        )
    shared = [row for row in result["rows"] if row["case"] == "shared"]
    if result.get("ratio_shared_context"):
        best = max(
            (r for r in shared if r["system"] != OURS), key=lambda r: float(r["tokens_per_second"])
        )
        mine = max(r["tokens_per_second"] for r in shared if r["system"] == OURS)
        lines += [
            "",
            f"Eight questions about one context of 400 tokens: {mine:.0f} tokens/s against "
            f"{best['tokens_per_second']:.0f} of the best other setting ({best['system']}, {words_of(best)}): "
            f"{result['ratio_shared_context']:.1f} ×.",
        ]
    if "ceiling_share" in result:
        lines += [
            f"The bare matrix products of the step would allow "
            f"{max(result['ceiling_tokens_per_second'].values()):.0f} tokens/s; "
            f"{100 * result['ceiling_share']:.0f} % of that is reached.",
        ]
    return "\n".join(lines)


def replaced(text: str, new: str) -> str:
    """`text` with what lies between MARKS replaced. Raises ValueError where they are not there once each."""
    if any(text.count(mark) != 1 for mark in MARKS):
        raise ValueError(f"the lines {MARKS[0]} and {MARKS[1]} must be there once each")
    before, _, rest = text.partition(MARKS[0])
    return f"{before}{MARKS[0]}\n{new.strip()}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


def plot(losses: dict[str, list[float]], tokens_per_step: int, path: Path) -> None:
    """Loss against tokens trained on, one line for each system, and its difference to the first below."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "ollatune"
    figure, (axes, below) = plt.subplots(2, figsize=(7, 6), layout="constrained", sharex=True)
    styles = ("-", "--", ":")
    reference = losses.get(_REFERENCE) or next(iter(losses.values()))
    for index, (name, values) in enumerate(losses.items()):
        tokens = [tokens_per_step * (step + 1) for step in range(len(values))]
        look = {"linestyle": styles[index % 3], "linewidth": max(0.8, 2.4 - 0.4 * index)}
        axes.plot(tokens, values, label=name, **look)
        apart = [a - b for a, b in zip(values, reference, strict=False)]
        below.plot(tokens[: len(apart)], apart, **look)
    below.set_xlabel("tokens trained on")
    axes.set_ylabel("loss per target token")
    below.set_ylabel(f"less that of\n{_REFERENCE}", fontsize="small")
    axes.set_title("The same batches and the same first adapter")
    axes.legend(frameon=False, fontsize="small")
    for one in (axes, below):
        one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def newest(folder: Path) -> Path:
    """The last result file by its date. Raises FileNotFoundError."""
    found = sorted(folder.glob("speed-*.json"), key=lambda path: path.name[:16])
    if not found:
        raise FileNotFoundError(f"no speed-*.json in {folder}; run benchmarks/speed.py --save")
    return found[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", type=Path, help="default: the newest one")
    parser.add_argument("--write", action="store_true", help="into README.md and docs/speed.md")
    options = parser.parse_args()
    try:
        result = json.loads((options.result or newest(HERE / "results")).read_text())
    except FileNotFoundError as error:
        parser.error(str(error))
    makers: dict[str, Callable[[dict[str, Any]], str]] = {
        "README.md": block,
        "docs/speed.md": table,
    }
    for name, make in makers.items() if options.write else ():
        page = HERE.parent / name
        page.write_text(replaced(page.read_text(), make(result)))
        print(f"Wrote {name}", file=sys.stderr)
    if not options.write:
        print(block(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

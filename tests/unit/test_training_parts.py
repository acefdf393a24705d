"""Schedules, optimisers, early stopping, overfitting watch, seeds, rotation: exact values."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from ollatune.checkpoint.format import Checkpoint, read_checkpoint
from ollatune.checkpoint.store import CheckpointStore, newest_checkpoint
from ollatune.config.schema import Config, TrainingConfig
from ollatune.training.changes import classify_changes
from ollatune.training.optimizer import build_optimizer, set_learning_rate
from ollatune.training.schedule import Schedule, ScheduleName
from ollatune.training.state import random_states, restore_random_states, seed_everything, seed_step
from ollatune.training.stopping import EarlyStopping, OverfittingWatch

# ----- schedule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("polynomial", [0.25, 0.5, 0.75, 1.0, 0.5625, 0.25, 0.0625]),
    ],
)
def test_schedule_values(name: ScheduleName, expected: list[float]) -> None:
    schedule = Schedule(name, 8.0, warmup_steps=3, total_steps=7, power=2.0)
    assert [schedule.at(step) for step in range(7)] == pytest.approx([8 * e for e in expected])


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(
    ("name", "called", "settings"),
    [
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("constant", "constant_with_warmup", {}),
        ("polynomial", "polynomial", {"lr_end": 0.0, "power": 2.0}),
        ("polynomial", "polynomial", {"lr_end": 0.03, "power": 1.0}),
        ("cosine", "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ],
)
def test_schedules_are_transformers_after_the_warmup(
    name: ScheduleName, called: str, settings: dict[str, float], warmup: int
) -> None:
    """In the warm-up ours is one part of warmup + 1 ahead: their first step has the rate 0 and teaches nothing."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(called, optimizer, warmup, 20, scheduler_specific_kwargs=settings)
    end = settings.get("min_lr_rate", settings.get("lr_end", 0.0) / 0.3)
    ours = Schedule(name, 0.3, warmup, 20, end, settings.get("power", 1.0))
    for step in range(20):
        expected = theirs.get_last_lr()[0]
        if step < warmup:
            assert expected == pytest.approx(0.3 * step / warmup)
            expected = 0.3 * (step + 1) / (warmup + 1)
        assert ours.at(step) == pytest.approx(expected)
        optimizer.step()
        theirs.step()


def test_schedule_ends_at_its_fraction() -> None:
    schedule = Schedule("cosine", 2.0, 0, 10, end_fraction=0.1)
    assert schedule.at(10) == schedule.at(99) == pytest.approx(0.2)


# ----- optimisers ----------------------------------------------------------------------------------------------------


def _step(optimizer_name: str, **settings: float) -> torch.Tensor:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
    config = TrainingConfig.model_validate(
        {"optimizer": optimizer_name, "learning_rate": 1.0, **settings}
    )
    optimizer = build_optimizer([("layer.weight", weight)], config)
    for _ in range(2):
        weight.grad = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
        set_learning_rate(optimizer, 0.1)
        optimizer.step()
    return weight.detach()


def test_sgd_with_momentum() -> None:
    start, gradient = (
        torch.tensor([[1.0, -2.0], [3.0, 0.5]]),
        torch.tensor([[0.5, -1.0], [2.0, 0.0]]),
    )
    assert torch.allclose(_step("sgd", weight_decay=0.0), start - 0.1 * gradient * (1 + 1.9))


def test_adam_takes_steps_of_the_learning_rate_and_never_decays() -> None:
    """With equal gradients the ratio of Adam's moments is the sign; where there is none, nothing moves."""
    expected = torch.tensor([[1.0 - 0.2, -2.0 + 0.2], [3.0 - 0.2, 0.5]])
    assert torch.allclose(_step("adam", weight_decay=0.9), expected, atol=1e-5)


def test_adamw_decays_besides() -> None:
    plain, decayed = _step("adamw", weight_decay=0.0), _step("adamw", weight_decay=0.5)
    assert float(plain[1, 1]) == 0.5
    assert float(decayed[1, 1]) == pytest.approx(0.5 * 0.95**2)


def test_adafactor_is_torchs() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
    optimizer = torch.optim.Adafactor([{"params": [weight], "weight_decay": 0.01}], lr=0.1)
    for _ in range(2):
        weight.grad = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
        optimizer.step()
    assert torch.equal(_step("adafactor"), weight.detach())


# ----- stopping ------------------------------------------------------------------------------------------------------


def test_early_stopping_counts_what_does_not_improve_enough() -> None:
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    seen = [(stopping.update(loss), stopping.should_stop) for loss in (1.0, 0.95, 0.8, 0.79, 0.78)]
    assert seen == [(True, False), (True, False), (True, False), (True, False), (True, True)]


def test_slow_but_steady_improvement_is_measured_from_where_it_began() -> None:
    stopping = EarlyStopping(patience=3, min_delta=0.1)
    for loss in (1.0, 0.95, 0.89):
        stopping.update(loss)
    assert stopping.num_bad == 0  # 0.89 is more than 0.1 below 1.0


def test_overfitting_needs_both_trends() -> None:
    watch = OverfittingWatch(patience=2)
    assert [watch.update(*pair) for pair in ((1.0, 1.0), (0.9, 1.1), (0.95, 1.2))] == [None] * 3
    watch = OverfittingWatch(patience=2)
    advice = [watch.update(*pair) for pair in ((1.0, 1.0), (0.9, 1.1), (0.8, 1.3))]
    assert advice[:2] == [None, None]
    assert "(gap 0.5000)" in str(advice[2])


# ----- seeds ---------------------------------------------------------------------------------------------------------


def test_dropout_depends_on_seed_position_and_rank_alone() -> None:
    def draw(*key: int) -> float:
        seed_step(*key)
        return float(torch.rand(()))

    assert draw(42, 8, 0) == draw(42, 8, 0)
    assert len({draw(42, 8, 0), draw(42, 8, 1), draw(42, 16, 0), draw(43, 8, 0)}) == 4


def test_random_states_come_back() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.standard_normal()), float(torch.rand(()))

    seed_everything(7, deterministic=True)
    draw()
    states = random_states(torch.device("cpu"))
    expected = draw()
    draw()
    restore_random_states(states, torch.device("cpu"))
    assert draw() == expected


# ----- rotation ------------------------------------------------------------------------------------------------------


def _checkpoint(step: int, val_loss: float | None, *, finite: bool = True) -> Checkpoint:
    return Checkpoint(
        epoch=step, step=step, model_state_dict={"w": torch.tensor([1.0 if finite else math.nan])},
        optimizer_state_dict={}, scheduler_state_dict={}, train_loss=1.0, val_loss=val_loss,
        config={}, timestamp=f"2026-01-{step:02}", run_id="r", base={},
    )  # fmt: skip


def test_rotation_keeps_the_best_the_last_and_the_last_finite(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_best=1, run_id="r")
    for step, loss, finite in (
        (1, 0.9, True),
        (2, 0.5, True),
        (3, 0.7, True),
        (4, 0.8, True),
        (5, None, False),
    ):
        store.save(_checkpoint(step, loss, finite=finite), f"epoch_{step}.pt")
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == [
        "epoch_2.pt",
        "epoch_4.pt",
        "epoch_5.pt",
    ]


def test_rotation_removes_only_after_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep_best=1, run_id="r")
    store.save(_checkpoint(1, 0.9), "epoch_1.pt")
    removed: list[str] = []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        assert read_checkpoint(tmp_path / "epoch_2.pt").epoch == 2
        removed.append(path.name)

    monkeypatch.setattr(Path, "unlink", unlink)
    store.save(_checkpoint(2, 0.5), "epoch_2.pt")
    assert removed == ["epoch_1.pt"]


def test_what_a_kill_left_beside_the_index_is_neither_newest_nor_forgotten(tmp_path: Path) -> None:
    """Killed between the index and the removal of what it no longer names."""
    store = CheckpointStore(tmp_path, keep_best=1, run_id="r")
    store.save(_checkpoint(1, 0.9), "epoch_1.pt")
    superseded = (tmp_path / "epoch_1.pt").read_bytes()
    store.save(_checkpoint(2, 0.5), "epoch_2.pt")
    (tmp_path / "epoch_1.pt").write_bytes(superseded)
    assert newest_checkpoint(tmp_path)[0].name == "epoch_2.pt"
    resumed = CheckpointStore(tmp_path, keep_best=1, run_id="r")
    assert resumed.adopt(2) == []
    resumed.save(_checkpoint(3, 0.4), "epoch_3.pt")
    assert [p.name for p in tmp_path.glob("*.pt")] == ["epoch_3.pt"]


def test_a_checkpoint_renamed_but_not_yet_in_the_index_is_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_best=3, run_id="r")
    store.save(_checkpoint(1, 0.9), "epoch_1.pt")
    index = (tmp_path / "index.json").read_bytes()
    store.save(_checkpoint(2, 0.5), "step_2.pt")
    (tmp_path / "index.json").write_bytes(index)
    assert newest_checkpoint(tmp_path)[0].name == "step_2.pt"


# ----- changed settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "section", "key", "value"),
    [
        ("free", "training", "keep_checkpoints", 9),
        ("warn", "training", "max_steps", 5),
        ("free", "training", "on_non_finite", "skip"),
        ("free", "training", "on_loss_spike", "off"),
        ("free", "training", "overfitting_patience", None),
        ("free", "validation", "batch_size", 1),
        ("free", "output", "logs", "elsewhere"),
        ("warn", "training", "learning_rate", 0.5),
        ("warn", "training", "epochs", 9),
        ("warn", "training", "scheduler", "linear"),
        ("warn", "training", "adam_beta2", 0.9),
        ("warn", "advanced", "lora_dropout", 0.5),
        ("warn", "distillation", "weight", 0.1),
        ("refuse", "training", "seed", 1),
        ("refuse", "training", "optimizer", "sgd"),
        ("refuse", "advanced", "lora_rank", 3),
        ("refuse", "model", "base_model", "other"),
        ("refuse", "model", "context_window", 100),
        ("refuse", "distillation", "teacher", "other"),
        ("refuse", "data", "shuffle", False),
    ],
)
def test_which_changes_a_resume_takes(kind: str, section: str, key: str, value: object) -> None:
    before, after = (Config().model_dump(mode="json") for _ in range(2))
    after[section][key] = value
    change = f"{section}.{key}: {before[section][key]!r} → {value!r}"
    expected = {"free": [], "warn": [], "refuse": []} | {kind: [change]}
    assert classify_changes(before, after) == expected

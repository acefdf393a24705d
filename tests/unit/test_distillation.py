"""A teacher in the loss: its values and gradients against torch's own, and in whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from ollatune.base.errors import UsageError
from ollatune.checkpoint.format import read_checkpoint
from ollatune.config.load import load_config
from ollatune.gguf.tokenizer import GGUFTokenizer
from ollatune.modeling.base import resolve_base
from ollatune.modeling.distillation import check_same_vocabulary
from ollatune.modeling.fast import loss as loss_module
from ollatune.modeling.fast.loss import HeadSettings, Lesson, head_loss_sum
from ollatune.modeling.load import load_base_model
from ollatune.modeling.opened import open_base
from ollatune.modeling.trained import load_trained
from ollatune.training.build import make_loader, read_data
from ollatune.training.distributed import Processes
from tests.run_helpers import (
    assert_same_weights,
    inject,
    run,
    steps_of,
    tiny_base,
    train_command,
)
from tests.tiny_models import ascii_vocabulary


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twice as wide, other weights, the same vocabulary."""
    return tiny_base(tmp_path_factory.mktemp("teacher"), hidden_size=128, seed=7)


def distil(student: Path, teacher: Path, data: Path, output: Path, *more: str) -> list[str]:
    return train_command(
        student, data, output, "--set", f"distillation.teacher={teacher}",
        "--set", "validation.samples=0", *more,
    )  # fmt: skip


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("teacher_size", [50, 57, 41], ids=["same", "padded more", "padded less"])
def test_the_loss_is_cross_entropy_and_divergence(
    softcap: float | None, smoothing: float, teacher_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 50 * 7)  # four chunks of seven positions
    torch.manual_seed(0)
    head, other = nn.Linear(16, 50, bias=False), nn.Linear(24, teacher_size, bias=False)
    hidden, theirs = torch.randn(23, 16, requires_grad=True), torch.randn(23, 24)
    targets = torch.randint(0, 40, (23,))
    logits = capped(head(hidden), softcap)
    with torch.no_grad():
        wanted = capped(other(theirs), 3.0)[:, :50]
        wanted = functional.pad(wanted, (0, 50 - wanted.shape[1]), value=-1e30)
    hard = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    soft = functional.kl_div(
        functional.log_softmax(logits / 2.5, 1), functional.log_softmax(wanted / 2.5, 1),
        reduction="sum", log_target=True,
    )  # fmt: skip
    expected = 0.7 * hard + 0.3 * 2.5**2 * soft
    expected_gradients = torch.autograd.grad(expected, (hidden, head.weight))
    lesson = Lesson(theirs, other, 3.0, weight=0.3, temperature=2.5)
    loss = head_loss_sum(hidden, head, targets, HeadSettings(softcap, smoothing), lesson)
    gradients = torch.autograd.grad(loss, (hidden, head.weight))
    torch.testing.assert_close(loss, expected)
    for found, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, right)


def test_the_first_step_of_a_run_by_other_hands(
    student: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    """Transformers' own forward pass of both models, torch's cross-entropy and divergence."""
    settings = ("--max-steps", "1", "--set", "distillation.weight=0.25")
    assert run(distil(student, teacher, data, tmp_path, *settings)) == 0
    config = load_config(tmp_path / "config.yaml")
    base = open_base(resolve_base(str(student)))
    models = [
        load_base_model(opened.gguf) for opened in (base, open_base(resolve_base(str(teacher))))
    ]
    step = next(make_loader(config, read_data(config, base), Processes()).steps())
    total = 0.0
    with torch.no_grad():
        for index in [int(i) for ids in step.micro_batch_ids for i in ids]:
            example = step.loader.examples[index]
            ids = torch.from_numpy(example.token_ids.astype("int64"))
            places = torch.from_numpy(example.is_target).nonzero().flatten()
            mine, theirs = (m(input_ids=ids[None]).logits[0, places - 1] for m in models)
            hard = functional.cross_entropy(mine, ids[places], reduction="sum")
            soft = functional.kl_div(
                functional.log_softmax(mine / 2, 1),
                functional.softmax(theirs / 2, 1),
                reduction="sum",
            )
            total += float(0.75 * hard + 0.25 * 4 * soft)
    assert steps_of(tmp_path)[0]["loss"] == pytest.approx(total / step.num_target_tokens, rel=1e-5)
    saved = read_checkpoint(tmp_path / "best_model.pt")
    assert saved.base["teacher"] == str(teacher)


def divergence(student: Any, teacher: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        mine, theirs = (
            functional.log_softmax(m(input_ids=ids).logits[0], 1) for m in (student, teacher)
        )
        return float(functional.kl_div(mine, theirs, reduction="batchmean", log_target=True))


def test_the_student_comes_to_speak_like_its_teacher(
    student: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    """All weights follow the teacher alone: the divergence falls by more than half, the answers count for nothing."""
    settings = (
        "--set", "distillation.weight=1", "--set", "distillation.temperature=1", "--epochs", "12",
        "--set", "advanced.lora_enabled=false", "--learning-rate", "5e-3",
    )  # fmt: skip
    assert run(distil(student, teacher, data, tmp_path, *settings)) == 0
    config = load_config(tmp_path / "config.yaml")
    base = open_base(resolve_base(str(student)))
    theirs = load_base_model(open_base(resolve_base(str(teacher))).gguf)
    newest = read_checkpoint(tmp_path / "checkpoints" / "epoch_12.pt").model_state_dict
    example = read_data(config, base).train[0]
    ids = torch.from_numpy(example.token_ids.astype("int64"))[None]
    before = divergence(load_trained(base, None, config), theirs, ids)
    after = divergence(load_trained(base, newest, config), theirs, ids)
    assert after < 0.5 * before


def test_packed_teacher_shared_beginnings_and_plain_path_are_the_same_run(
    student: Path, data: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    packed = tiny_base(tmp_path_factory.mktemp("q8"), tensor_type="Q8_0", hidden_size=128, seed=7)
    losses = []
    for name, more in {
        "packed": ("--set", "distillation.quantization=as-served"),
        "dense": ("--set", "distillation.quantization=none"),
        "plain": ("--set", "training.fast_path=false"),
    }.items():
        command = distil(student, packed, data, tmp_path / name, "--set", "advanced.lora_dropout=0")
        assert run([*command, *more]) == 0
        losses.append([step["loss"] for step in steps_of(tmp_path / name)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_resumed_run_has_the_same_teacher(
    student: Path, teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(distil(student, teacher, data, tmp_path / "whole")) == 0
    with inject("train.step:interrupt@3"):
        assert run(distil(student, teacher, data, tmp_path / "cut")) == 130
    resume = ("--resume", "auto")
    assert run(distil(student, student, data, tmp_path / "cut", *resume)) == 2
    assert "distillation.teacher" in capsys.readouterr().err
    content = teacher.read_bytes()
    try:
        teacher.write_bytes(tiny_base(tmp_path / "other", hidden_size=128, seed=8).read_bytes())
        assert run(distil(student, teacher, data, tmp_path / "cut", *resume)) == 2
        assert "the teacher differs" in capsys.readouterr().err
    finally:
        teacher.write_bytes(content)
    assert run(distil(student, teacher, data, tmp_path / "cut", *resume)) == 0
    assert_same_weights(*(tmp_path / n / "checkpoints" / "epoch_2.pt" for n in ("whole", "cut")))


def vocabulary(change: Any) -> GGUFTokenizer:
    values = {key: value for key, (value, _) in ascii_vocabulary().items()}
    tokens, types = list(values["tokenizer.ggml.tokens"]), list(values["tokenizer.ggml.token_type"])
    tokens[-1] = "wo"  # what the one merge makes
    change(tokens, types)
    return GGUFTokenizer.from_metadata(
        values | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    )


def test_which_vocabularies_are_the_same() -> None:
    plain = vocabulary(lambda tokens, types: None)

    def pad(tokens: list[str], types: list[int]) -> None:
        tokens += ["[PAD0]", "[PAD1]"]
        types += [5, 5]

    def more(tokens: list[str], types: list[int]) -> None:
        tokens += ["extra"]
        types += [1]

    def swap(tokens: list[str], types: list[int]) -> None:
        tokens[200], tokens[201] = tokens[201], tokens[200]

    check_same_vocabulary(plain, vocabulary(pad), "a", "b")
    check_same_vocabulary(vocabulary(pad), plain, "a", "b")
    with pytest.raises(UsageError, match="`extra` is in one only"):
        check_same_vocabulary(plain, vocabulary(more), "a", "b")
    with pytest.raises(UsageError, match=r"token 200 is `word70` in a and `word71` in b"):
        check_same_vocabulary(plain, vocabulary(swap), "a", "b")

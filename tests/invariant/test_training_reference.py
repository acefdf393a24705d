"""The same steps by other hands: Transformers' own forward pass on padded batches, PEFT's adapters, torch's AdamW."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from ollatune.checkpoint.format import read_checkpoint
from ollatune.config.load import load_config
from ollatune.config.schema import Config
from ollatune.data.loader import Step
from ollatune.data.store import Example
from ollatune.modeling.base import resolve_base
from ollatune.modeling.load import load_base_model
from ollatune.modeling.lora import adapter_state, inject_lora
from ollatune.modeling.opened import OpenBase, open_base
from ollatune.modeling.trained import load_trained, lora_settings
from ollatune.training.build import make_loader, read_data
from ollatune.training.distributed import Processes
from tests.run_helpers import run, steps_of, train_command, write_records

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
NUM_STEPS = 20
VARIANTS = {
    "lora": (),
    "rslora": ("--set", "advanced.use_rslora=true"),
    "dora": ("--set", "advanced.use_dora=true"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data"), train=40, validation=2, test=0)


@pytest.fixture(scope="module", params=list(VARIANTS))
def output(
    request: pytest.FixtureRequest, base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run of 20 steps without dropout and warm-up."""
    folder = tmp_path_factory.mktemp(request.param)
    command = train_command(
        base, data, folder, "--set", "advanced.lora_dropout=0", "--set", "training.warmup_steps=0",
        "--set", "training.max_grad_norm=0.5", *VARIANTS[request.param],
    )  # fmt: skip
    assert run(command) == 0
    return folder


def opened(config: Config) -> OpenBase:
    return open_base(resolve_base(config.model.base_model))


def peft_model(base: OpenBase, config: Config) -> Any:
    """PEFT's adapter on the same base, with our initial values copied in."""
    ours = load_base_model(base.gguf, mode="dense")
    names = inject_lora(ours, lora_settings(config), seed=config.training.seed)
    model = peft.get_peft_model(
        load_base_model(base.gguf, mode="dense"),
        peft.LoraConfig(
            r=config.advanced.lora_rank, lora_alpha=config.advanced.lora_alpha,
            target_modules=names, use_rslora=config.advanced.use_rslora,
            use_dora=config.advanced.use_dora, task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    with torch.no_grad():
        for name, tensor in adapter_state(ours).items():
            key = name if name in theirs else f"{name}.weight"
            theirs.pop(key).copy_(tensor)
    assert not theirs
    return model


def padded(examples: list[Example], side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and labels [B, T]; labels are -100 but on targets."""
    width = max(len(example.token_ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        count = len(example.token_ids)
        where = slice(0, count) if side == "right" else slice(width - count, width)
        tokens = torch.from_numpy(example.token_ids.astype("int64"))
        ids[row, where], mask[row, where] = tokens, 1
        labels[row, where] = tokens.where(torch.from_numpy(example.is_target), torch.tensor(-100))
    return ids, mask, labels


def reference_step(model: Any, step: Step, side: str) -> float:
    """Forward and backward of one optimiser batch; returns its mean loss."""
    total = 0.0
    for ids_of_batch in step.micro_batch_ids:
        examples = [step.loader.examples[int(i)] for i in ids_of_batch]
        ids, mask, labels = padded(examples, side)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        loss = functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
        )
        (loss / step.num_target_tokens).backward()
        total += loss.item()
    return total / step.num_target_tokens


def reference_run(config: Config, side: str) -> Iterator[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    from transformers import get_cosine_schedule_with_warmup

    base = opened(config)
    model = peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() == 2], "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=1e-2, fused=False
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, NUM_STEPS)
    loader = make_loader(config, read_data(config, base), Processes())
    for step, _ in zip(loader.steps(), range(NUM_STEPS), strict=False):
        optimizer.zero_grad()
        loss = reference_step(model, step, side)
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        schedule.step()
        yield loss, float(norm)


@pytest.mark.parametrize("side", ["right", "left"])
def test_twenty_steps_of_transformers_and_peft(output: Path, side: str) -> None:
    """Packed rows against padded ones, either side; our adapters against PEFT's, forward and backward."""
    config = load_config(output / "config.yaml")
    if side == "left" and (config.advanced.use_dora or config.advanced.use_rslora):
        pytest.skip("the padding side has nothing to do with the kind of adapter")
    expected = list(reference_run(config, side))
    steps = steps_of(output)
    assert len(steps) == len(expected) == NUM_STEPS
    assert [s["loss"] for s in steps] == pytest.approx([e[0] for e in expected], rel=1e-5)
    assert [s["grad_norm"] for s in steps] == pytest.approx([e[1] for e in expected], rel=1e-3)


def test_peft_loads_what_a_run_wrote(output: Path) -> None:
    config = load_config(output / "config.yaml")
    base = opened(config)
    theirs = peft.PeftModel.from_pretrained(
        load_base_model(base.gguf, mode="dense"), str(output)
    ).eval()
    ours = load_trained(base, read_checkpoint(output / "best_model.pt").model_state_dict, config)
    plain = load_trained(base, None, config)
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        logits = ours(input_ids=ids).logits
        assert torch.allclose(theirs(input_ids=ids).logits, logits, atol=2e-5)
        assert torch.allclose(theirs.merge_and_unload()(input_ids=ids).logits, logits, atol=2e-5)
        assert not torch.allclose(plain(input_ids=ids).logits, logits, atol=1e-2)
    settings = json.loads((output / "adapter_config.json").read_text())
    assert settings["use_dora"] is config.advanced.use_dora
    assert math.isclose(settings["lora_alpha"], config.advanced.lora_alpha)

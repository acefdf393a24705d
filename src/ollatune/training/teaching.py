"""The step of a run, and its teacher: found, checked, loaded."""

from __future__ import annotations

from torch import nn

from ollatune.base.errors import OllatuneError
from ollatune.base.log import get_logger
from ollatune.config.schema import Config
from ollatune.modeling.base import FindRemote, resolve_base
from ollatune.modeling.distillation import Teacher, check_same_vocabulary
from ollatune.modeling.fast.forward import CausalStep
from ollatune.modeling.load import Mode, load_base_model
from ollatune.modeling.opened import OpenBase, open_base
from ollatune.modeling.training_step import TrainingStep
from ollatune.training.environment import DTYPES
from ollatune.training.placement import Placement, comfortable_mode, computes_on_blocks


def open_teacher(
    config: Config, student: OpenBase, find_remote: FindRemote | None
) -> OpenBase | None:
    """The teacher's file, or None where the configuration names none. Raises UsageError for another vocabulary."""
    name = config.distillation.teacher
    if name is None:
        return None
    try:
        source = resolve_base(name, models_folder=config.ollama.models, find_remote=find_remote)
        teacher = open_base(source)
    except OllatuneError as error:
        error.message = f"distillation.teacher: {error.message.removeprefix('--model ')}"
        raise
    check_same_vocabulary(
        student.tokenizer, teacher.tokenizer, student.source.name, teacher.source.name
    )
    return teacher


def teacher_mode(config: Config, opened: OpenBase, placement: Placement) -> Mode:
    """How the teacher's weights are held."""
    if config.distillation.quantization == "auto":
        if computes_on_blocks(config, opened.gguf, placement.dtype, placement.device):
            return "packed"
        return comfortable_mode(opened, placement.dtype, placement.device, "Teacher")
    return "packed" if config.distillation.quantization == "as-served" else "dense"


def load_teacher(config: Config, opened: OpenBase, placement: Placement) -> Teacher:
    """The teacher's model, frozen, on the student's device in the student's number type."""
    settings = config.distillation
    mode = teacher_mode(config, opened, placement)
    model = load_base_model(
        opened.gguf, mode=mode, dtype=DTYPES[placement.dtype], device=placement.device
    )
    get_logger("training").info(
        "Teacher %s: weight %g, temperature %g.",
        opened.source.name, settings.weight, settings.temperature,
    )  # fmt: skip
    step_function = CausalStep(model, use_fast_path=config.training.fast_path)
    return Teacher(step_function, settings.weight, settings.temperature)


def make_step_function(
    config: Config, model: nn.Module, placement: Placement, teacher: OpenBase | None
) -> TrainingStep:
    """What computes the loss of a row. All weights are trained in fp32, with products in the run's number type."""
    training = config.training
    mixed = not config.advanced.lora_enabled and placement.dtype != "fp32"
    return TrainingStep(
        model,
        label_smoothing=training.label_smoothing,
        use_fast_path=training.fast_path,
        recompute=training.activation_checkpointing,
        teacher=None if teacher is None else load_teacher(config, teacher, placement),
        autocast=DTYPES[placement.dtype] if mixed else None,
    )

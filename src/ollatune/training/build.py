"""The composition root: configuration + base model + data → a run that is ready to start."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ollatune.base.errors import UsageError
from ollatune.base.log import get_logger
from ollatune.base.text import format_count
from ollatune.config.schema import AdvancedConfig, Config, DataConfig
from ollatune.data.dataset import load_dataset
from ollatune.data.load import DatasetSplits, make_order
from ollatune.data.loader import BatchLoader, LoaderSettings
from ollatune.data.progress import BuildBar
from ollatune.modeling.compiled import compile_layers, warm_up
from ollatune.modeling.fast.decoder import is_supported
from ollatune.modeling.load import Mode, load_base_model
from ollatune.modeling.lora import (
    count_parameters,
    inject_lora,
    trainable_parameters,
)
from ollatune.modeling.opened import OpenBase, renderer_parts
from ollatune.modeling.trained import lora_settings
from ollatune.training.backends import require_dtype, shards_weights, sharing_class
from ollatune.training.batch_plan import BatchPlan, configured_plan, probed_plan
from ollatune.training.distributed import Processes
from ollatune.training.environment import DTYPES
from ollatune.training.length import make_schedule, total_steps
from ollatune.training.loop import TrainingRun
from ollatune.training.loss_scale import LossScale
from ollatune.training.optimizer import build_optimizer
from ollatune.training.placement import Placement
from ollatune.training.reports import Hooks
from ollatune.training.spikes import SpikeWatch
from ollatune.training.state import RunState, seed_everything
from ollatune.training.stopping import EarlyStopping, OverfittingWatch
from ollatune.training.teaching import make_step_function


def context_window(config: Config, base: OpenBase) -> int:
    """The configured window, capped at what the base supports (with a note)."""
    wanted, supported = config.model.context_window, base.context_length
    if supported is not None and wanted > supported:
        get_logger("training").info(
            "model.context_window is %d; %s supports %d, which is used.",
            wanted, base.source.name, supported,
        )  # fmt: skip
        return supported
    return wanted


def data_settings(config: Config, base: OpenBase) -> DataConfig:
    """The data settings with the base's own system message where none is configured: it is what is served."""
    if config.data.system is None and base.source.system:
        return config.data.model_copy(update={"system": base.source.system})
    return config.data


def read_data(config: Config, base: OpenBase, *, show_progress: bool = True) -> DatasetSplits:
    """Read, render and split the data for `base` (see `data.dataset.load_dataset`)."""
    with BuildBar(is_shown=show_progress) as progress:
        return load_dataset(
            data_settings(config, base),
            base.tokenizer,
            base.template,
            make_parts=partial(renderer_parts, base.source),
            max_length=context_window(config, base),
            method=config.training.method,
            seed=config.training.seed,
            num_workers=config.data.num_workers,
            progress=progress,
        )


def load_data(config: Config, base: OpenBase, *, show_progress: bool = True) -> DatasetSplits:
    """`read_data`, with its report logged."""
    splits = read_data(config, base, show_progress=show_progress)
    logger = get_logger("data")
    for name, split in splits.report.splits.items():
        logger.info(
            "%s: %d records, %s tokens, %s of them targets.",
            name.capitalize(), split.num_records, format_count(split.num_tokens),
            format_count(split.num_target_tokens),
        )  # fmt: skip
    for warning in splits.report.warnings:
        logger.warning("%s", warning)
    return splits


def build_model(
    config: Config, base: OpenBase, *, dtype: str, mode: Mode, device: torch.device
) -> nn.Module:
    """The base model with what the method trains made trainable."""
    settings = config.advanced
    if not settings.lora_enabled and mode != "dense":
        raise UsageError(
            f"All weights cannot be trained while they stay {'packed' if mode == 'packed' else 'in NF4'}.",
            hint="Set model.quantization: none, or train an adapter (advanced.lora_enabled: true).",
        )
    compute = DTYPES[dtype]
    if not settings.lora_enabled:
        compute = torch.float32  # small updates vanish in 8 bits of mantissa; products are autocast
    model: nn.Module = load_base_model(
        base.gguf, mode=mode, dtype=compute, device=device,
        serving_context=context_window(config, base),
    )  # fmt: skip
    if settings.lora_enabled:
        inject_lora(model, lora_settings(config), seed=config.training.seed)
    else:
        _warn_of_unused_lora_settings(settings)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    training = config.training
    if training.torch_compile:
        compile_layers(model, recompute=training.activation_checkpointing)
    elif training.activation_checkpointing and not uses_fast_path(config, model):
        _recompute_activations(model)
    return model


def _warn_of_unused_lora_settings(settings: AdvancedConfig) -> None:
    """Say what is set for an adapter where there is none: rank, alpha and dropout stand in every configuration."""
    default = AdvancedConfig()
    names = ("lora_layers", "lora_target_modules", "use_dora", "use_rslora")
    unused = [name for name in names if getattr(settings, name) != getattr(default, name)]
    if unused:
        get_logger("training").warning(
            "advanced.lora_enabled is false: all weights are trained, advanced.%s has no effect.",
            " and advanced.".join(unused),
        )


def _without_fast_path(config: Config) -> Config:
    """It goes past the modules' own forward passes: those are compiled, and in them a backend gathers its weights."""
    training = config.training.model_copy(update={"fast_path": False})
    return config.model_copy(update={"training": training})


def uses_fast_path(config: Config, model: nn.Module) -> bool:
    """Whether the fused forward pass runs; it recomputes activations by itself."""
    return config.training.fast_path and is_supported(model)


def _recompute_activations(model: nn.Module) -> None:
    """Activation checkpointing of Transformers' own layers, under the name its version has for it."""
    transformers_model: Any = model
    settings = {"use_reentrant": False}
    if hasattr(transformers_model, "activation_checkpointing_enable"):
        transformers_model.activation_checkpointing_enable(settings)
    else:
        transformers_model.gradient_checkpointing_enable(settings)
    transformers_model.enable_input_require_grads()


def make_loader(
    config: Config, splits: DatasetSplits, processes: Processes, plan: BatchPlan | None = None
) -> BatchLoader:
    """The training stream of this process, cut as `plan` says (None: as configured)."""
    plan = plan or configured_plan(config)
    order = make_order(
        splits.train, config.data, seed=config.training.seed, sources=config.data.sources,
        group_size=plan.batch_size,
    )  # fmt: skip
    return BatchLoader(
        splits.train,
        order,
        LoaderSettings(
            batch_size=plan.batch_size,
            accumulation_steps=plan.accumulation_steps,
            token_budget=config.data.tokens_per_batch,
            rank=processes.rank,
            world_size=processes.count,
        ),
    )


def build_run(
    config: Config,
    base: OpenBase,
    splits: DatasetSplits,
    placement: Placement,
    processes: Processes,
    hooks: Hooks,
    plan: BatchPlan | None = None,
    teacher: OpenBase | None = None,
) -> TrainingRun:
    """Model, optimiser, schedule and loader of a new run; `checkpointing.restore` turns it into a resumed one.

    `teacher` takes part in the loss. Without a `plan` the optimiser batch is cut as configured, or by probing where
    that says `auto`.
    """
    seed_everything(config.training.seed, deterministic=config.training.deterministic)
    share, device = sharing_class(config, processes), placement.device
    require_dtype(config, placement.dtype, processes)
    is_sharded, compiles = shards_weights(config, processes), config.training.torch_compile
    if is_sharded or compiles:
        config = _without_fast_path(config)
    if is_sharded:
        device = torch.device("cpu")  # a whole model may not fit anywhere else
    model = build_model(config, base, dtype=placement.dtype, mode=placement.mode, device=device)
    parameters = trainable_parameters(model)
    get_logger("training").info(
        "Training %s of %s parameters.",
        format_count(count_parameters(parameters)),
        format_count(sum(p.numel() for p in model.parameters())),
    )
    step_function = make_step_function(config, model, placement, teacher)
    trained = [parameter for _, parameter in parameters]
    loader = make_loader(config, splits, processes, plan)
    if compiles and not is_sharded:
        warm_up(step_function, trained)
    if plan is None and config.training.batch_size == "auto":
        plan = probed_plan(
            configured_plan(config), step_function, loader, trained, processes
        )  # fmt: skip
        loader = make_loader(config, splits, processes, plan)
    num_steps = total_steps(config, loader)
    sharing = share(
        step_function, parameters, partial(build_optimizer, settings=config.training), processes,
        config,
    )  # fmt: skip
    if compiles and is_sharded:
        warm_up(sharing.step_function, sharing.parameters)
    return TrainingRun(
        config=config,
        sharing=sharing,
        schedule=make_schedule(config, num_steps),
        loader=loader,
        state=RunState(),
        early_stopping=EarlyStopping(
            config.training.early_stopping_patience, config.training.early_stopping_min_delta
        ),
        loss_scale=LossScale.for_dtype(placement.dtype),
        overfitting=OverfittingWatch(
            config.training.overfitting_patience, config.training.overfitting_gap
        ),
        spikes=SpikeWatch(),
        hooks=hooks,
        processes=processes,
        device=placement.device,
        total_steps=num_steps,
    )

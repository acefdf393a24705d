"""From configuration and data to what validates a run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ollatune.base.errors import UsageError
from ollatune.base.log import get_logger
from ollatune.config.schema import Config
from ollatune.data.conversation import Conversation
from ollatune.data.load import DatasetSplits
from ollatune.data.loader import LoaderSettings, evaluation_batches
from ollatune.modeling.opened import OpenBase
from ollatune.templates.messages import Message
from ollatune.training.loop import TrainingRun
from ollatune.training.validation import Metric, SamplePrompt, Validator


def sample_prompts(splits: DatasetSplits, base: OpenBase, limit: int | None) -> list[SamplePrompt]:
    """Validation conversations as prompts: everything before the last answer, and that answer."""
    prompts: list[SamplePrompt] = []
    for sample in splits.samples.get("validation", ()):
        if limit is not None and len(prompts) >= limit:
            break
        if not isinstance(sample, Conversation) or sample.messages[-1].role != "assistant":
            continue
        messages = [Message(m.role, m.content) for m in sample.messages[:-1]]
        prompt = base.template.render_prompt(messages)
        ids = base.tokenizer.encode(prompt, add_bos=base.tokenizer.add_bos)
        prompts.append(SamplePrompt(ids, prompt, sample.messages[-1].content))
    return prompts


def _warn_of_missing_validation(config: Config) -> None:
    """Say which settings want validation records, of which the data has none."""
    training = config.training
    wanted = {
        "training.early_stopping_patience": training.early_stopping_patience,
        "training.evaluate_every_steps": training.evaluate_every_steps,
        "validation.metrics": config.validation.metrics,
    }
    named = [name for name, value in wanted.items() if value]
    if named:
        get_logger("training").warning(
            "There are no validation records: %s has no effect, and the last model counts as the best. "
            "Add a file whose name begins with `validation`, or raise data.validation_fraction.",
            " and ".join(named),
        )


def build_validator(
    run: TrainingRun, base: OpenBase, splits: DatasetSplits, metrics: Mapping[str, Metric]
) -> Validator | None:
    """What validates `run`, or None where the data has no validation part."""
    if splits.validation is None:
        _warn_of_missing_validation(run.config)
        return None
    settings = run.config.validation
    loader_settings = LoaderSettings(
        batch_size=settings.batch_size, rank=run.processes.rank, world_size=run.processes.count
    )
    if run.config.training.method == "fine-tuning":
        prompts = sample_prompts(splits, base, None if metrics else settings.samples)
    elif metrics:
        raise UsageError(
            "validation.metrics score answers; continued pre-training has none.",
            hint="Leave validation.metrics empty.",
        )
    else:
        prompts = []
    return Validator(
        sharing=run.sharing,
        batches=partial(evaluation_batches, splits.validation, loader_settings),
        prompts=prompts,
        num_samples=settings.samples,
        metrics=dict(metrics),
        decode=base.tokenizer.decode,
        stop_ids=base.tokenizer.end_of_generation_ids,
        max_new_tokens=settings.max_new_tokens,
        device=run.device,
    )

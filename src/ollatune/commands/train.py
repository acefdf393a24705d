"""`ollatune train`: fine-tune a model. Flags → config → checks → build → run → what it wrote."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollatune.base.errors import InputError, UsageError
from ollatune.base.files import refuse_unwritable
from ollatune.base.folders import expanded
from ollatune.base.imports import first_import_of
from ollatune.base.leaving import (
    first_process_speaks,
    is_first_process,
    is_one_of_several,
)
from ollatune.config.load import ParsedYaml, load_config
from ollatune.config.schema import Config, OutputConfig

if TYPE_CHECKING:
    from ollatune.checkpoint.format import Checkpoint

DEFAULT_DATA = "data/processed"


@dataclass(frozen=True)
class TrainOptions:
    """The flags of `ollatune train`, before any of them is looked at."""

    config: Path | None = None
    assignments: tuple[str, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)
    resume: str | None = None
    overwrite: bool = False
    force: bool = False
    dry_run: bool = False
    debug: bool = False
    profile: bool = False
    distributed: bool = False
    show_progress: bool = True


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to go on from."""

    path: Path
    checkpoint: Checkpoint


def resolve(options: TrainOptions) -> tuple[Config, Resumed | None, dict[str, Any]]:
    """The configuration of the run, the checkpoint it goes on from, and the overrides to remember in its own.

    On resume the flags of the original run still hold unless a flag or `--set` of this one says otherwise; a
    configuration file is read anew, so edits in it count.
    """
    sets, flags = list(options.assignments), dict(options.flags)
    if options.resume is None:
        config = _with_default_data(load_config(options.config, assignments=sets, overrides=flags))
        return config, None, {"set": sets, "flags": _plain(flags)}
    resumed = _find_checkpoint(options)
    earlier = resumed.checkpoint.resume.get("overrides", {"set": [], "flags": {}})
    assigned = {assignment.partition("=")[0].strip() for assignment in sets}
    kept = {key: value for key, value in earlier["flags"].items() if key not in assigned}
    sets = [*earlier["set"], *sets]
    flags = {**kept, **flags}
    source: Path | ParsedYaml = options.config or ParsedYaml(
        str(resumed.path), _nested_copy(resumed.checkpoint.config)
    )
    config = _with_default_data(load_config(source, assignments=sets, overrides=flags))
    return config, resumed, {"set": sets, "flags": _plain(flags)}


def _plain(flags: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in flags.items()}


def _nested_copy(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _nested_copy(value) if isinstance(value, dict) else value
        for key, value in values.items()
    }


def _with_default_data(config: Config) -> Config:
    if config.data.sources:
        return config
    values = config.model_dump()
    values["data"]["sources"] = [{"path": DEFAULT_DATA}]
    return Config.model_validate(values)


def checkpoint_folder(config: Config) -> Path:
    """`output.checkpoints`; where neither it nor the output folder was chosen, the specification's `checkpoints/`."""
    output = config.output
    if output.checkpoints is not None:
        return output.checkpoints
    if output.folder == OutputConfig().folder:
        return Path("checkpoints")
    return output.folder / "checkpoints"


def _find_checkpoint(options: TrainOptions) -> Resumed:
    from ollatune.checkpoint.folders import is_checkpoint_folder
    from ollatune.checkpoint.store import checkpoints_in, load_checkpoint, newest_checkpoint

    assert options.resume is not None
    if options.resume == "auto":
        config = load_config(
            options.config, assignments=options.assignments, overrides=options.flags
        )
        path, checkpoint = newest_checkpoint(checkpoint_folder(config), with_tensors=False)
        return Resumed(path, checkpoint)
    path = Path(options.resume)
    if path.is_dir() and not is_checkpoint_folder(path):
        if not checkpoints_in(path) and (path / "checkpoints").is_dir():
            path /= "checkpoints"  # an output folder
        path, checkpoint = newest_checkpoint(path, with_tensors=False)
        return Resumed(path, checkpoint)
    return Resumed(path, load_checkpoint(path, with_tensors=False))


def run_train(options: TrainOptions) -> dict[str, Any]:
    """Train, or with `dry_run` say what would be done. Returns the result that `--json` prints."""
    started = time.perf_counter()
    with first_process_speaks():
        _check_flags(options)
        config, resumed, overrides = resolve(options)
        check_inputs(config)
        _check_folders(config, starts=not options.dry_run)
    if options.dry_run:
        from ollatune.commands.dry_run import plan_training

        return plan_training(config, checkpoint_folder(config))
    with first_import_of("torch"):
        from ollatune.training.session import Session

    session = Session(
        config=config,
        checkpoints=checkpoint_folder(config),
        overrides=overrides,
        resume_from=None if resumed is None else (resumed.path, resumed.checkpoint),
        overwrite=options.overwrite,
        force=options.force,
        debug=options.debug,
        profile=options.profile,
        distributed=options.distributed,
        show_progress=options.show_progress,
        started=started,
        metrics=_metrics(config),
        find_remote=_find_remote(config),
    )
    return session.run()


def _check_flags(options: TrainOptions) -> None:
    if options.resume is not None and options.overwrite:
        raise UsageError(
            f"--resume {options.resume} goes on with a run that --overwrite would remove.",
            hint="Give one of them; --overwrite without --resume starts anew.",
        )
    if is_one_of_several() and not options.distributed:
        raise UsageError(
            f"{os.environ['WORLD_SIZE']} processes were started together, but --distributed was not given: "
            "each would do the whole run.",
            hint="Add --distributed, or start one process.",
        )


def check_inputs(config: Config) -> None:
    """What can be wrong before anything heavy is imported."""
    for source in config.data.sources:
        if not expanded(source.path).exists():
            raise InputError(
                f"There is no data at {source.path}.",
                hint="Pass --data with a file or folder of records (JSONL, JSON, Parquet, CSV, text).",
            )


def _check_folders(config: Config, *, starts: bool) -> None:
    """See that the run can write where it has to; where it starts now, that no other one does."""
    if not is_first_process():
        return  # of several processes only the first one writes
    for folder in (config.output.folder, checkpoint_folder(config), config.output.logs):
        refuse_unwritable(folder)
    if starts:
        from ollatune.training.run_folder import RunFolder

        RunFolder(config.output.folder).refuse_owned()


def _metrics(config: Config) -> dict[str, Any]:
    if not config.validation.metrics:
        return {}
    from ollatune.evaluation.metrics import find_metric

    def one_answer(name: str) -> Any:
        metric = find_metric(name)
        return lambda answer, expected: metric.value(metric.rows([answer], [expected]))

    return {name: one_answer(name) for name in config.validation.metrics}


def _find_remote(config: Config) -> Any:
    from ollatune.commands.remote import remote_finder

    return remote_finder(config)

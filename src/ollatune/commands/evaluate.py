"""`ollatune evaluate`: held-out records through the served model, base against tuned, forgetting, and a gate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError, UsageError, VerificationError
from ollatune.base.files import make_folder, write_json
from ollatune.base.log import get_logger
from ollatune.commands.verify import (
    engine_context,
    held_out_samples,
    load_run,
    serve_export,
)
from ollatune.data.conversation import Document, Sample
from ollatune.evaluation.engine import LlamaCppEngine, is_engine_installed
from ollatune.evaluation.forgetting import GENERAL_TEXT, Forgetting, text_perplexity
from ollatune.evaluation.gate import Requirement, require
from ollatune.evaluation.likelihood import (
    Target,
    answer_targets,
    served_rows,
    text_targets,
    trained_rows,
)
from ollatune.evaluation.metrics import PERPLEXITY, find_metric
from ollatune.evaluation.score import (
    EvaluationItem,
    ScoreComparison,
    ScoreReport,
    compare_scores,
    evaluation_items,
    score,
    with_likelihood,
)
from ollatune.evaluation.served import LlamaCppServed, OllamaServed, ServedModel
from ollatune.evaluation.statistics import Rows
from ollatune.modeling.opened import OpenBase

REPORT_NAME = "evaluation.json"
DEFAULT_PERPLEXITY_RECORDS = 16
_PARALLEL = 4
_NUM_SAMPLES = 3


@dataclass(frozen=True)
class EvaluateOptions:
    """The flags of `ollatune evaluate`. With `model`, tags on an Ollama server are asked instead of the files."""

    checkpoint: Path
    export: Path = Path("models/ollama")
    data: Path | None = None
    model: str | None = None
    base_model: str | None = None
    host: str | None = None
    metrics: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    max_tokens: int = 256
    base: str | None = None
    perplexity_records: int = DEFAULT_PERPLEXITY_RECORDS
    general_text: Path | None = None
    forgetting: bool = True


@dataclass
class _Likelihoods:
    """What is measured on tokens rather than on answers: of the base, of the export, and of the trainer's model."""

    base: Rows | None = None
    tuned: Rows | None = None
    trained_perplexity: float | None = None
    general: list[float] = field(default_factory=list)

    @property
    def forgetting(self) -> Forgetting | None:
        return Forgetting(*self.general) if len(self.general) == 2 else None


def score_served(
    served: ServedModel,
    samples: Sequence[Sample],
    metrics: Sequence[str] = (),
    *,
    max_tokens: int = 96,
) -> ScoreReport:
    """Ask a served model every question of `samples`."""
    chosen = [find_metric(name) for name in metrics] or None
    return score(served, evaluation_items(samples), chosen, max_tokens=max_tokens)


def run_evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Score base and tuned; writes evaluation.json. Raises VerificationError (exit 9) when a requirement is not met."""
    requirements = [Requirement.parse(text) for text in options.requirements]
    for name in options.metrics:
        find_metric(name)  # an unknown one is named before any question is asked
    general = _general_text(options)
    run = load_run(options.checkpoint, options.base)
    samples = held_out_samples(run[1], options.data)
    texts = [sample.text for sample in samples if isinstance(sample, Document)]
    items = [] if len(texts) == len(samples) else evaluation_items(samples)
    if not items and options.perplexity_records == 0:
        raise UsageError(
            "The held-out records are plain texts, whose perplexity alone can be measured, and that was switched off.",
            hint="Leave out --perplexity 0.",
        )
    if items:
        base_report, tuned_report = _answers(options, run, samples)
    else:
        base_report = ScoreReport(run[2].source.name, (), (), (), {})
        tuned_report = ScoreReport(options.model or str(options.export), (), (), (), {})
    found = _likelihoods(options, run, items, texts, general)
    if found.base is not None and found.tuned is not None:
        base_report = with_likelihood(base_report, found.base)
        tuned_report = with_likelihood(tuned_report, found.tuned)
    elif not items:
        raise UsageError(
            "The held-out records are plain texts, whose perplexity alone can be measured; here it cannot be.",
            hint="pip install 'ollatune[engine]', and name the export's folder with --export.",
        )
    comparison = compare_scores(base_report, tuned_report)
    result = _result(comparison, found)
    write_json(make_folder(options.export) / REPORT_NAME, result)
    try:
        require(requirements, result["values"])
    except VerificationError:
        # What was measured is worth seeing then, too.
        get_logger("evaluation").info("%s", result["text"])
        raise
    return result


def _result(comparison: ScoreComparison, found: _Likelihoods) -> dict[str, Any]:
    values, lines = comparison.values(), [comparison.table()]
    if found.trained_perplexity is not None and found.tuned is not None:
        values["trained.perplexity"] = found.trained_perplexity
        lines.append(
            f"perplexity on {len(found.tuned)} records: {found.trained_perplexity:.4g} as trained, "
            f"{values['perplexity']:.4g} as served"
        )
    forgetting = found.forgetting
    if forgetting is not None:
        values |= {
            "forgetting": forgetting.ratio,
            "general_perplexity": forgetting.tuned_perplexity,
        }
        values["base.general_perplexity"] = forgetting.base_perplexity
        lines.append(str(forgetting))
    samples = comparison.samples(_NUM_SAMPLES)
    text = "\n".join(lines) + (f"\n\n{samples}" if samples else "")
    return comparison.to_dict() | {"values": values, "text": text}


def _answers(
    options: EvaluateOptions, run: Any, samples: Sequence[Sample]
) -> tuple[ScoreReport, ScoreReport]:
    """What the base and the tuned model answer, and what it is worth."""
    _, config, base = run
    with ExitStack() as stack:
        if options.model is not None:
            from ollatune.ollama.client import OllamaClient

            client = stack.enter_context(OllamaClient(options.host or config.ollama.host))
            base_tag = _base_tag(options, base)
            for name in (options.model, base_tag):
                client.show(name)  # an unknown tag is named before any question is asked
            tuned_served: ServedModel = OllamaServed(client, options.model)
            base_served: ServedModel = OllamaServed(client, base_tag)
        else:
            context = engine_context(config)
            engine, local = serve_export(options.export, base, parallel=_PARALLEL, context=context)
            stack.enter_context(engine)
            base_engine = stack.enter_context(
                LlamaCppEngine(base.source.path, context=context, parallel=_PARALLEL)
            )
            tuned_served, base_served = local, _as_base(local, base_engine)
        tuned = score_served(tuned_served, samples, options.metrics, max_tokens=options.max_tokens)
        before = score_served(base_served, samples, options.metrics, max_tokens=options.max_tokens)
    return before, tuned


def _as_base(tuned: LlamaCppServed, engine: LlamaCppEngine) -> LlamaCppServed:
    """The base behind the template, stops and system message of the tuned model."""
    return LlamaCppServed(engine, tuned.template, stops=tuned.stops, system=tuned.system)


def _likelihoods(
    options: EvaluateOptions,
    run: Any,
    items: Sequence[EvaluationItem],
    texts: Sequence[str],
    general: str | None,
) -> _Likelihoods:
    """Perplexities of the files, one model at a time. Needs the engine and, with --model, the export beside it."""
    checkpoint, config, base = run
    found = _Likelihoods()
    limit = options.perplexity_records
    if limit == 0 and general is None:
        return found
    if not is_engine_installed() or not (options.export / "Modelfile").is_file():
        missing = (
            f"the export in {options.export} is not there"
            if is_engine_installed()
            else "the `engine` extra is not installed"
        )
        get_logger("evaluation").warning(
            "Perplexity and forgetting are left out: they are measured on the files, and %s.",
            missing,
        )
        return found
    targets: list[Target] = []
    tuned_engine, tuned = serve_export(options.export, base, context=engine_context(config))
    with tuned_engine:
        if limit:
            targets = (
                answer_targets(tuned, items[:limit], end_text=base.template.end_of_turn())
                if items
                else text_targets(tuned_engine, texts[:limit])
            )
            found.tuned = served_rows(tuned_engine, targets)
        if general is not None:
            found.general.append(text_perplexity(tuned_engine, general))
    with LlamaCppEngine(base.source.path, context=engine_context(config)) as base_engine:
        if limit:
            found.base = served_rows(base_engine, targets)
        if general is not None:
            found.general.insert(0, text_perplexity(base_engine, general))
    if limit:
        found.trained_perplexity = _trained_perplexity(checkpoint, config, base, targets)
    return found


def _trained_perplexity(
    checkpoint: Any, config: Any, base: OpenBase, targets: Sequence[Target]
) -> float:
    from ollatune.modeling.trained import TrainedLogprobs, load_trained
    from ollatune.training.placement import checking_mode

    mode = checking_mode(config, base, num_models=1)
    model = load_trained(base, checkpoint.model_state_dict, config, mode=mode)
    return PERPLEXITY.value(trained_rows(TrainedLogprobs(model), targets))


def _general_text(options: EvaluateOptions) -> str | None:
    """The prose to measure forgetting on; None where that is switched off."""
    if not options.forgetting:
        return None
    if options.general_text is None:
        return GENERAL_TEXT.read_text(encoding="utf-8")
    try:
        return options.general_text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--general-text {options.general_text} cannot be read: {error}.",
            hint="Name a UTF-8 text of some hundred words.",
        ) from error


def _base_tag(options: EvaluateOptions, base: OpenBase) -> str:
    """The base's tag on the server. Raises UsageError where it is a file, which the server has under no known name."""
    if options.base_model is None and not base.source.is_ollama:
        raise UsageError(
            f"The run was trained on {base.source.name}, which is no tag that the server could be asked for.",
            hint="Name the base's tag with --base-model, or leave out --model to score the export's own files.",
        )
    return options.base_model or base.source.name


def evaluation_text(result: dict[str, Any]) -> str:
    """Table and sample answers for a terminal."""
    return str(result["text"])

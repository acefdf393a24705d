"""`ollatune evaluate`: held-out questions through the served model, base against tuned, with a gate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollatune.base.errors import UsageError
from ollatune.base.files import make_folder, write_json
from ollatune.commands.verify import (
    engine_context,
    held_out_samples,
    load_run,
    serve_export,
)
from ollatune.data.conversation import Sample
from ollatune.evaluation.engine import LlamaCppEngine
from ollatune.evaluation.gate import Requirement, require
from ollatune.evaluation.metrics import find_metric
from ollatune.evaluation.score import ScoreReport, compare_scores, evaluation_items, score
from ollatune.evaluation.served import LlamaCppServed, OllamaServed, ServedModel
from ollatune.modeling.opened import OpenBase

REPORT_NAME = "evaluation.json"
_PARALLEL = 4


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
    _, config, base = load_run(options.checkpoint, options.base)
    samples = held_out_samples(config, options.data)
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
            tuned_served = local
            base_served = LlamaCppServed(
                base_engine, local.template, stops=local.stops, system=local.system
            )
        tuned = score_served(tuned_served, samples, options.metrics, max_tokens=options.max_tokens)
        before = score_served(base_served, samples, options.metrics, max_tokens=options.max_tokens)
    comparison = compare_scores(before, tuned)
    result = comparison.to_dict() | {
        "values": comparison.values(),
        "text": f"{comparison.table()}\n\n{comparison.samples(3)}",
    }
    write_json(make_folder(options.export) / REPORT_NAME, result)
    require(requirements, comparison.values())
    return result


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

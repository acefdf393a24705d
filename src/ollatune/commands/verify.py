"""`ollatune verify`: is what is served what was trained? With llama.cpp in process, or a tag on an Ollama server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError, UsageError, VerificationError
from ollatune.base.files import write_json
from ollatune.base.log import get_logger
from ollatune.checkpoint.format import Checkpoint
from ollatune.config.load import ParsedYaml, load_config
from ollatune.config.schema import Config, DataSource
from ollatune.data.conversation import Conversation, Document, Sample
from ollatune.data.forms import Seen
from ollatune.data.load import iter_samples, source_files
from ollatune.data.rejects import Rejections
from ollatune.evaluation.compare import limits_for
from ollatune.evaluation.engine import LlamaCppEngine
from ollatune.evaluation.observe import TrainedModel
from ollatune.evaluation.served import LlamaCppServed, OllamaServed, ServedModel, with_system
from ollatune.evaluation.verify import VerifyReport, verify
from ollatune.modeling.base import resolve_base
from ollatune.modeling.opened import OpenBase, open_base
from ollatune.modeling.trained import TrainedLogprobs, load_trained
from ollatune.ollama.answers import ShownModel
from ollatune.ollama.modelfile import Modelfile
from ollatune.templates.chat import load_chat_template
from ollatune.templates.messages import Message
from ollatune.training.placement import checking_mode

REPORT_NAME = "verify.json"
DEFAULT_PROMPTS = 6
_CONTEXT_MARGIN_TOKENS = 256
_BEGINNING_CHARACTERS = 200


@dataclass(frozen=True)
class VerifyOptions:
    """The flags of `ollatune verify`. `model` names a tag on an Ollama server instead of the export's own file."""

    checkpoint: Path
    export: Path = Path("models/ollama")
    data: Path | None = None
    model: str | None = None
    host: str | None = None
    num_prompts: int = DEFAULT_PROMPTS
    base: str | None = None


def load_run(
    checkpoint_path: Path, base_model: str | None = None
) -> tuple[Checkpoint, Config, OpenBase]:
    """A checkpoint with the configuration and the base model it was trained with.

    `base_model`: where the base is now, if no longer under the name that it was trained by. Raises InputError for
    another base than that.
    """
    from ollatune.checkpoint.store import load_checkpoint
    from ollatune.commands.create_modelfile import base_name
    from ollatune.commands.remote import remote_finder

    checkpoint = load_checkpoint(checkpoint_path)
    config = load_config(ParsedYaml(str(checkpoint_path), checkpoint.config))
    source = resolve_base(
        base_model or base_name(checkpoint.base),
        models_folder=config.ollama.models,
        find_remote=remote_finder(config),
    )
    base = open_base(source)
    from ollatune.export.bundle import require_same_base

    require_same_base(base, checkpoint)
    return checkpoint, config, base


def held_out_samples(config: Config, path: Path | None, split: str = "test") -> list[Sample]:
    """Records of the test files (validation where there are none) of `path` or of the configured data.

    Raises InputError where neither exists.
    """
    sources = [DataSource(path=str(path))] if path is not None else list(config.data.sources)
    method = config.training.method
    by_split: dict[str | None, list[Sample]] = {}
    for source in sources:
        rejections = Rejections(skip_bad=config.data.skip_bad)
        for sample, _, found in iter_samples(source, config.data, method, rejections, Seen()):
            by_split.setdefault(found, []).append(sample)
    wanted: list[str | None] = [split, "validation"]
    if path is not None and len([f for s in sources for f in source_files(s, method)]) == 1:
        wanted += [None, "train"]  # a single file was named: it is the test set, whatever its name
    for name in wanted:
        if by_split.get(name):
            return by_split[name]
    raise InputError(
        f"There are no {split} records in {', '.join(s.path for s in sources)}.",
        hint="Name a file with --data, or put a test.jsonl beside the training data.",
    )


def conversations(samples: Sequence[Sample], limit: int | None = None) -> list[list[Message]]:
    """The questions: each conversation up to its last answer; of a plain text, its beginning."""
    found: list[list[Message]] = []
    for sample in samples:
        if isinstance(sample, Document) and sample.text.strip():
            found.append([Message("user", sample.text.strip()[:_BEGINNING_CHARACTERS])])
        elif isinstance(sample, Conversation) and sample.messages[-1].role == "assistant":
            found.append([Message(m.role, m.content) for m in sample.messages[:-1]])
        if limit is not None and len(found) >= limit:
            break
    return found


def serve_export(
    folder: Path, base: OpenBase, *, parallel: int = 1, context: int = 2048
) -> tuple[LlamaCppEngine, LlamaCppServed]:
    """The export in llama.cpp, behind the template, system message and stops of its own Modelfile."""
    modelfile = read_modelfile(folder)
    if modelfile.adapter is None:
        path, adapter = folder / modelfile.source, None
    else:
        path, adapter = base.source.path, folder / modelfile.adapter
    engine = LlamaCppEngine(path, context=context, parallel=parallel, adapter=adapter)
    tokenizer = base.tokenizer
    template = load_chat_template(
        go_text=modelfile.template,
        bos_text="" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id),
        eos_text="" if tokenizer.eos_id is None else tokenizer.token_text(tokenizer.eos_id),
        adds_bos=False,
        end_of_turn_texts=base.template.end_of_turn_texts,
    )
    stops = modelfile.parameters.get("stop", [])
    served = LlamaCppServed(engine, template, stops=stops, system=modelfile.system or "")
    return engine, served


def read_modelfile(folder: Path) -> Modelfile:
    """The Modelfile of an export folder. Raises InputError where there is none."""
    path = folder / "Modelfile"
    try:
        return Modelfile.parse(path.read_bytes(), path=str(path))
    except OSError as error:
        raise InputError(
            f"{folder} holds no Modelfile.",
            hint="Make an export first: ollatune create-modelfile --checkpoint … --output …",
        ) from error


def check(
    checkpoint: Checkpoint,
    config: Config,
    base: OpenBase,
    served: ServedModel,
    export: dict[str, Any],
    samples: Sequence[Sample],
    *,
    num_prompts: int,
) -> VerifyReport:
    """Compare trainer and server on the first `num_prompts` questions, under the SYSTEM of `export` (its report)."""
    system = export.get("system", config.data.system or base.source.system)
    mode = checking_mode(config, base, num_models=2)
    trained_model = load_trained(base, checkpoint.model_state_dict, config, mode=mode)
    base_model = load_trained(base, None, config, mode=mode)
    trained = TrainedModel(
        render=lambda messages: base.template.render_prompt(with_system(messages, system or "")),
        tokenizer=base.tokenizer,
        logprobs=TrainedLogprobs(trained_model),
        base_logprobs=TrainedLogprobs(base_model),
        end_texts=tuple(base.template.end_of_turn_texts),
    )
    tensors = export.get("tensors", [])
    written = {t["type_after"] for t in tensors if t["recovery"] is not None}
    kept = {t["type_after"] for t in tensors if t["recovery"] is None}
    if isinstance(served, OllamaServed):
        kept.add("F16")  # the type of its attention cache, whatever the file's
    recoveries = {t["name"]: t["recovery"] for t in tensors if t["recovery"] is not None}
    return verify(
        trained,
        served,
        conversations(samples, num_prompts),
        limits=limits_for(written, kept),
        recoveries=recoveries or None,
    )


def read_export(folder: Path) -> dict[str, Any]:
    """export.json of an export folder. Raises InputError where it is missing or damaged."""
    path = folder / "export.json"
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read: {error}.", hint="Make the export again with create-modelfile."
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not an export report.")
    return value


def require_export_of(export: dict[str, Any], checkpoint: Checkpoint, folder: Path) -> None:
    """Raise InputError where an export was made from another run or step than `checkpoint`."""
    made_from = export.get("checkpoint") or {}
    found = (made_from.get("run_id"), made_from.get("step"))
    wanted = (checkpoint.run_id, checkpoint.step)
    if found != wanted:
        raise InputError(
            f"{folder} was exported from run {found[0]}, step {found[1]}; the checkpoint is of run {wanted[0]}, "
            f"step {wanted[1]}.",
            hint="Pass the checkpoint that was exported, or export this one again with create-modelfile.",
        )


def _require_adapters_base(shown: ShownModel, base: OpenBase, folder: Path) -> None:
    """Raise VerificationError where a tag has its adapter on other weights than it was trained on."""
    found = Path(shown.blob_path).name.removeprefix("sha256-")
    if found in ("", base.source.digest):
        return
    advice = (
        f"The adapter was trained on {base.source.name} (sha256 {base.source.digest[:12]}): create the tag from that, "
        "or export the merged model (--format gguf)."
    )
    write_json(
        folder / REPORT_NAME,
        {"passed": False, "cause": "wrong_base", "advice": advice, "served_by": shown.name},
    )
    raise VerificationError(
        f"What {shown.name} serves is not what was trained: its weights are sha256 {found[:12]}.",
        hint=advice,
    )


def run_verify(options: VerifyOptions) -> dict[str, Any]:
    """Verify an export or a served tag; writes verify.json beside the export. Raises VerificationError (exit 9)."""
    export = read_export(options.export)
    if export.get("format") == "hf":
        raise UsageError(
            f"{options.export} holds an export for Transformers, which no Ollama serves.",
            hint="Verify a GGUF export: ollatune create-modelfile --format gguf --output …",
        )
    checkpoint, config, base = load_run(options.checkpoint, options.base)
    require_export_of(export, checkpoint, options.export)
    samples = held_out_samples(config, options.data)
    if options.model is not None:
        from ollatune.ollama.client import OllamaClient

        with OllamaClient(options.host or config.ollama.host) as client:
            shown = client.show(options.model)  # an unknown tag is named before models are loaded
            if export.get("format") == "adapter":
                _require_adapters_base(shown, base, options.export)
            report = check(
                checkpoint, config, base, OllamaServed(client, options.model), export, samples,
                num_prompts=options.num_prompts,
            )  # fmt: skip
    else:
        engine, served = serve_export(options.export, base, context=engine_context(config))
        with engine:
            report = check(
                checkpoint, config, base, served, export, samples, num_prompts=options.num_prompts
            )
    result = report.to_dict()
    write_json(options.export / REPORT_NAME, result)
    get_logger("evaluation").info("%s", report.table())
    report.require()
    return result


def engine_context(config: Config) -> int:
    """Context for checks: what answers to test questions need, not the model's whole window."""
    return min(config.model.context_window, 4096) + _CONTEXT_MARGIN_TOKENS

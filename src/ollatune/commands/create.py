"""`create-modelfile --create NAME`: the export into Ollama, proved before the tag appears."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ollatune.base.files import write_json
from ollatune.base.log import get_logger
from ollatune.commands.verify import (
    DEFAULT_PROMPTS,
    REPORT_NAME,
    check,
    held_out_samples,
    load_run,
    read_export,
)
from ollatune.config.schema import Config
from ollatune.evaluation.served import OllamaServed
from ollatune.export.bundle import Bundle
from ollatune.ollama.client import OllamaClient
from ollatune.ollama.publish import ModelToPublish, publish

if TYPE_CHECKING:
    from ollatune.commands.create_modelfile import ExportOptions


def create_in_ollama(options: ExportOptions, config: Config, bundle: Bundle) -> dict[str, Any]:
    """Upload the export and create `options.create`; the tag appears only after `verify` has passed on the server.

    Raises ServiceError (no server), UsageError (the tag exists), VerificationError (served differently).
    """
    assert options.create is not None
    client = OllamaClient(config.ollama.host)
    checkpoint, run_config, base = load_run(options.checkpoint)
    samples = held_out_samples(run_config, None, split="test")
    reports: list[dict[str, Any]] = []

    def prove(name: str) -> None:
        report = check(
            checkpoint, run_config, base, OllamaServed(client, name), read_export(bundle.folder),
            samples, num_prompts=DEFAULT_PROMPTS,
        )  # fmt: skip
        get_logger("export").info("%s", report.table())
        write_json(bundle.folder / REPORT_NAME, report.to_dict())
        report.require()
        reports.append(report.to_dict())

    serving = bundle.serving
    published = publish(
        client,
        options.create,
        ModelToPublish(
            gguf=bundle.gguf_path,
            template=serving.conversion.text,
            system=serving.system,
            parameters=serving.parameters,
            licenses=serving.licences,
            messages=base.source.messages,
            requires=base.source.requires,
            identity={"ollatune.export": bundle.result.sha256},
        ),
        force=options.force,
        check=prove,
    )
    get_logger("export").info("Created %s (%s).", published.name, published.digest[:19])
    return {
        "name": published.name,
        "digest": published.digest,
        "was_there": published.was_there,
        "verified": True,
    }

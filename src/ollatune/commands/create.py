"""`create-modelfile --create NAME`: the export into Ollama, proved before the tag appears."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollatune.base.errors import InputError
from ollatune.base.files import write_json
from ollatune.base.log import get_logger
from ollatune.commands.remote import PullBars
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
from ollatune.export.adapter_bundle import AdapterBundle
from ollatune.export.bundle import Bundle
from ollatune.export.identity import IDENTITY_KEY
from ollatune.export.serving import JINJA_KEY
from ollatune.modeling.opened import OpenBase
from ollatune.ollama.client import OllamaClient
from ollatune.ollama.failures import ModelMissing
from ollatune.ollama.publish import ModelToPublish, publish

if TYPE_CHECKING:
    from ollatune.commands.create_modelfile import ExportOptions

_MERGED_HINT = "Export the merged model instead: --format gguf."


def merged_model(bundle: Bundle, base: OpenBase) -> ModelToPublish:
    """What is sent to the server for a merged export."""
    serving = bundle.serving
    return ModelToPublish(
        gguf=bundle.gguf_path,
        template=serving.conversion.text,
        system=serving.system,
        parameters=serving.parameters,
        licenses=serving.licences,
        requires=base.source.requires,
        identity={IDENTITY_KEY: bundle.identity},
    )


def adapter_model(bundle: AdapterBundle, base: OpenBase, config: Config) -> ModelToPublish:
    """What is sent for an adapter, once the server is known to serve it on the very base that was trained on.

    Raises InputError, with the reason, where it would be served wrong; ServiceError without a server.
    """
    source = base.source
    if not source.is_ollama:
        raise InputError(
            f"An adapter is served on a model that the server has; {source.name} is a file.",
            hint=f"{_MERGED_HINT} Or run `ollama create` with the Modelfile that was written.",
        )
    with OllamaClient(config.ollama.host) as client:
        if bundle.needs_go_template and client.version().runs_jinja:
            raise InputError(
                f"{bundle.gguf_path.name} would not be served right: Ollama {client.version()} prefers the "
                f"{JINJA_KEY} of {source.name} to the TEMPLATE that was trained with.",
                hint=_MERGED_HINT,
            )
        try:
            blob = Path(client.show(source.name).blob_path).name
        except ModelMissing as error:
            raise InputError(
                f"The server has no {source.name}, which the adapter belongs to.", hint=_MERGED_HINT
            ) from error
    if blob.removeprefix("sha256-") != source.digest:
        raise InputError(
            f"The server's {source.name} is {blob[:19]}; the adapter was trained on sha256-{source.digest[:12]}.",
            hint=_MERGED_HINT,
        )
    serving = bundle.serving
    return ModelToPublish(
        adapter=bundle.gguf_path,
        base=source.name,
        architecture=base.architecture,
        template=serving.conversion.text,
        system=serving.system,
        parameters=serving.parameters,
        licenses=(config.export.licence,) if config.export.licence else (),
        requires=source.requires,
    )


def create_in_ollama(
    options: ExportOptions, config: Config, folder: Path, model: ModelToPublish
) -> dict[str, Any]:
    """Upload the export and create `options.create`; the tag appears only after `verify` has passed on the server.

    Raises ServiceError (no server), UsageError (the tag exists), VerificationError (served differently).
    """
    assert options.create is not None
    checkpoint, run_config, base = load_run(options.checkpoint, options.model)
    samples = held_out_samples(run_config, options.data)

    with PullBars() as bars, OllamaClient(config.ollama.host) as client:

        def prove(name: str) -> None:
            report = check(
                checkpoint, config, base, OllamaServed(client, name), read_export(folder),
                samples, num_prompts=DEFAULT_PROMPTS,
            )  # fmt: skip
            get_logger("export").info("%s", report.table())
            write_json(folder / REPORT_NAME, report.to_dict())
            report.require()

        published = publish(
            client, options.create, model,
            force=options.force, check=prove, progress=bars.update,
        )  # fmt: skip
    what = "is there already, the very same" if published.was_there else "was created"
    get_logger("export").info("%s %s (%s).", published.name, what, published.digest[:19])
    return {
        "name": published.name,
        "digest": published.digest,
        "was_there": published.was_there,
        "verified": True,
    }

"""The export folder of an adapter: `adapter.gguf`, a Modelfile that puts it on its base, export.json.

A model made FROM a tag inherits all that the tag has, and nothing inherited can be cleared, so whatever of the base was
not trained with rules this format out. The merged GGUF has none of these limits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ollatune.base.errors import InputError
from ollatune.base.files import make_folder, write_json, write_text
from ollatune.base.log import get_logger
from ollatune.checkpoint.format import Checkpoint
from ollatune.config.schema import Config
from ollatune.export.adapter_gguf import AdapterResult, write_adapter
from ollatune.export.apply import REPORT_NAME
from ollatune.export.bundle import MODELFILE_NAME, origin_facts, rendered
from ollatune.export.checkpoint_updates import has_lora, lora_factors
from ollatune.export.serving import JINJA_KEY, Serving, plan_serving, served_modelfile
from ollatune.modeling.architectures import architecture_of
from ollatune.modeling.architectures.updates import lora_in_gguf_order
from ollatune.modeling.opened import OpenBase
from ollatune.modeling.trained import lora_settings
from ollatune.ollama.modelfile import Modelfile

ADAPTER_NAME = "adapter.gguf"
_MERGED_HINT = "Export the merged model instead (--format gguf): it can say everything."


@dataclass(frozen=True)
class AdapterBundle:
    """What was written into the export folder. `needs_go_template`: only servers that run no Jinja show the prompt
    that was trained."""

    folder: Path
    result: AdapterResult
    serving: Serving
    modelfile: Modelfile
    needs_go_template: bool

    @property
    def gguf_path(self) -> Path:
        return self.result.path


def write_adapter_bundle(
    base: OpenBase, checkpoint: Checkpoint, config: Config, folder: Path, *, context: int
) -> AdapterBundle:
    """Write `adapter.gguf`, `Modelfile` and `export.json` into `folder`.

    Raises InputError, with the reason, where an adapter cannot say what was trained; StorageError. An adapter that was
    there before is then untouched.
    """
    settings = lora_settings(config)
    serving = plan_serving(base, config, context)
    _require_expressible(base, checkpoint, config, serving)
    architecture = architecture_of(base.gguf.metadata, base.gguf.tensors)
    factors = lora_in_gguf_order(architecture, lora_factors(checkpoint.model_state_dict, settings))
    needs_go_template = bool(serving.edits)
    if needs_go_template:
        note = (
            f"Ollama from 0.30 on prefers the base's own {JINJA_KEY} to the TEMPLATE that was trained with, so this "
            "adapter serves right before 0.30 only."
        )
        serving = replace(serving, notes=(*serving.notes[: -len(serving.edits)], note), edits=())
    make_folder(folder)
    report = {
        "format": "adapter",
        "file": ADAPTER_NAME,
        **origin_facts(base, checkpoint),
        **serving.to_json(),
        "template_source": base.template.source,
        "tensors": [
            {"name": name, "type_after": info.type.name, "recovery": None}
            for name, info in base.gguf.tensors.items()
        ],
        "tuned": sorted(factors),
    }
    write_json(folder / REPORT_NAME, report)  # before the adapter: a file of ours is never unowned
    result = write_adapter(base.gguf, factors, folder / ADAPTER_NAME)
    own_licences = (config.export.licence,) if config.export.licence else ()
    in_store = (
        base.source.is_ollama
    )  # then the base's licences are inherited, and would be there twice
    modelfile = served_modelfile(
        base.source.name if in_store else str(base.source.path.absolute()),
        replace(serving, licences=own_licences if in_store else serving.licences),
        adapter=f"./{ADAPTER_NAME}",
        requires=base.source.requires,
    )
    write_text(folder / MODELFILE_NAME, rendered(modelfile, base, checkpoint))
    write_json(
        folder / REPORT_NAME,
        {**report, "sha256": result.sha256, "size_bytes": result.size_bytes},
    )
    for note in serving.notes:
        get_logger("export").info("%s", note)
    return AdapterBundle(folder, result, serving, modelfile, needs_go_template)


def _require_expressible(
    base: OpenBase, checkpoint: Checkpoint, config: Config, serving: Serving
) -> None:
    """Raise InputError where a GGUF adapter on this base would not be what was trained."""
    source = base.source
    reason = ""
    if not has_lora(checkpoint):
        reason = "the run trained all weights, and holds no adapter"
    elif config.advanced.use_dora:
        reason = "DoRA rescales every row of a weight, which a GGUF adapter cannot express"
    elif source.num_merged:
        reason = f"{source.name} carries {source.num_merged} adapter(s) already, and was trained on with them merged in"
    elif len(base.gguf.paths) > 1:
        reason = "Ollama takes no adapter on a split base"
    elif source.renderer or source.parser:
        built_in = source.renderer or source.parser
        reason = (
            f"{source.name} is served through `{built_in}`, built into the server, which an adapter on it inherits "
            "and which was not trained with"
        )
    elif source.messages:
        reason = (
            f"{source.name} puts {len(source.messages)} MESSAGE(s) before every chat, which an adapter on it inherits "
            "and which were not trained with"
        )
    elif source.system and not serving.system:
        reason = f"the system message of {source.name} is inherited, and cannot be cleared"
    if reason:
        raise InputError(f"No adapter can be exported: {reason}.", hint=_MERGED_HINT)

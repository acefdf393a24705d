"""The export folder: merged GGUF, Modelfile, export.json - everything that serving needs, and what was done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ollatune.base.errors import InputError
from ollatune.base.files import make_folder, write_json, write_text
from ollatune.base.log import get_logger
from ollatune.checkpoint.format import Checkpoint
from ollatune.config.schema import Config
from ollatune.export.apply import REPORT_NAME, ExportResult, apply_export
from ollatune.export.checkpoint_updates import tensor_updates
from ollatune.export.identity import IDENTITY_KEY, export_identity
from ollatune.export.metadata_edits import SetKey
from ollatune.export.plan import ExportPlan, plan_export
from ollatune.export.serving import Serving, plan_serving, served_modelfile
from ollatune.gguf.types import ValueType
from ollatune.modeling.architectures import architecture_of
from ollatune.modeling.opened import OpenBase
from ollatune.modeling.trained import lora_settings
from ollatune.ollama.modelfile import Modelfile

MODEL_NAME = "model.gguf"
MODELFILE_NAME = "Modelfile"
BOS_KEY = "tokenizer.ggml.add_bos_token"


@dataclass(frozen=True)
class Bundle:
    """What was written into the export folder."""

    folder: Path
    result: ExportResult
    serving: Serving
    modelfile: Modelfile
    identity: str

    @property
    def gguf_path(self) -> Path:
        return self.result.path


def plan_bundle(base: OpenBase, checkpoint: Checkpoint, config: Config) -> ExportPlan:
    """The GGUF part of `write_bundle`, as a plan that can be printed."""
    architecture = architecture_of(base.gguf.metadata, base.gguf.tensors)
    edits = plan_serving(base, config, config.model.context_window).edits
    identity = SetKey(IDENTITY_KEY, bundle_identity(base, checkpoint, config), ValueType.STRING)
    return plan_export(
        base.gguf,
        tensor_updates(architecture, checkpoint, config),
        tensor_type=config.export.tensor_type,
        metadata_edits=[*edits, *_bos_edits(base), identity],
    )


def _bos_edits(base: OpenBase) -> list[SetKey]:
    """Whether prompts begin with BOS, said where the base leaves it open: servers guess differently then."""
    if BOS_KEY in base.gguf.metadata:
        return []
    return [SetKey(BOS_KEY, base.tokenizer.add_bos, ValueType.BOOL)]


def bundle_identity(base: OpenBase, checkpoint: Checkpoint, config: Config) -> str:
    """What stands under `IDENTITY_KEY` in the merged export of this checkpoint with these settings."""
    settings = {
        "lora": asdict(lora_settings(config)),
        "tensor_type": config.export.tensor_type,
        "accept_recovery": config.export.accept_recovery,
    }
    return export_identity(base.source.digest, checkpoint, settings)


def write_bundle(
    base: OpenBase, checkpoint: Checkpoint, config: Config, folder: Path, *, context: int
) -> Bundle:
    """Write `model.gguf`, `Modelfile` and `export.json` into `folder`.

    Raises InputError, VerificationError (an update would not survive its type) or StorageError; a GGUF that was there
    before is then untouched.
    """
    make_folder(folder)
    serving = plan_serving(base, config, context)
    plan = plan_bundle(base, checkpoint, config)
    result = apply_export(plan, folder / MODEL_NAME, accept_recovery=config.export.accept_recovery)
    modelfile = served_modelfile(f"./{MODEL_NAME}", serving, requires=base.source.requires)
    write_text(folder / MODELFILE_NAME, rendered(modelfile, base, checkpoint))
    identity = bundle_identity(base, checkpoint, config)
    report = result.to_json() | {
        "format": "gguf",
        "identity": identity,
        **origin_facts(base, checkpoint),
        **serving.to_json(),
        "template_source": base.template.source,
    }
    write_json(folder / REPORT_NAME, report)
    for note in serving.notes:
        get_logger("export").info("%s", note)
    return Bundle(folder, result, serving, modelfile, identity)


def origin_facts(base: OpenBase, checkpoint: Checkpoint) -> dict[str, Any]:
    """What every export.json says of base and checkpoint."""
    return {
        "base_name": base.source.name,
        "base_digest": base.source.digest,
        "checkpoint": {
            "run_id": checkpoint.run_id,
            "epoch": checkpoint.epoch,
            "step": checkpoint.step,
        },
    }


def rendered(modelfile: Modelfile, base: OpenBase, checkpoint: Checkpoint) -> str:
    """The Modelfile's text, under a comment that says where it came from."""
    comment = (
        f"Trained by ollatune from {base.source.name} (sha256 {base.source.digest[:12]}), "
        f"run {checkpoint.run_id}, step {checkpoint.step}."
    )
    return modelfile.render(comment=comment)


def require_same_base(base: OpenBase, checkpoint: Checkpoint) -> None:
    """Raise InputError when `base` is not the file that the checkpoint was trained on."""
    expected = str(checkpoint.base["digest"])
    if base.source.digest != expected:
        raise InputError(
            f"{base.source.name} has sha256 {base.source.digest[:12]}; this checkpoint was trained on {expected[:12]}.",
            hint="An adapter fits its own base only: pass the base it was trained on with --model.",
        )

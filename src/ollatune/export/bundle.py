"""The export folder: merged GGUF, Modelfile, export.json - everything that serving needs, and what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ollatune.base.errors import InputError
from ollatune.base.files import make_folder, write_json, write_text
from ollatune.base.log import get_logger
from ollatune.checkpoint.format import Checkpoint
from ollatune.config.schema import Config
from ollatune.export.apply import REPORT_NAME, ExportResult, apply_export
from ollatune.export.metadata_edits import DropKey, MetadataEdit
from ollatune.export.plan import ExportPlan, plan_export
from ollatune.modeling.architectures import Architecture, architecture_of
from ollatune.modeling.architectures.updates import (
    LoraFactors,
    TunedTensor,
    export_updates,
    lora_in_gguf_order,
)
from ollatune.modeling.lora import LoRASettings
from ollatune.modeling.opened import OpenBase
from ollatune.modeling.trained import lora_settings
from ollatune.ollama.modelfile import Modelfile
from ollatune.ollama.parameters import checked_parameters
from ollatune.templates.precedence import prefers_jinja
from ollatune.templates.to_go import GoConversion, to_go_template

MODEL_NAME = "model.gguf"
MODELFILE_NAME = "Modelfile"
_JINJA_KEY = "tokenizer.chat_template"


def lora_factors(state: Mapping[str, Tensor], settings: LoRASettings) -> dict[str, LoraFactors]:
    """A [r, in], B [out, r] and scale by module name, from a checkpoint's adapter tensors."""
    scale = settings.alpha / (settings.rank**0.5 if settings.use_rslora else settings.rank)
    modules = [
        name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")
    ]
    return {
        module: (state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"], scale)
        for module in modules
    }


def tensor_updates(
    architecture: Architecture, checkpoint: Checkpoint, config: Config
) -> list[TunedTensor]:
    """What the checkpoint changes, named and ordered as in the GGUF file. Raises InputError where it does not fit."""
    state = checkpoint.model_state_dict
    if not any(name.endswith(".lora_A.weight") for name in state):
        return export_updates(architecture, parameters=state)
    settings = lora_settings(config)
    factors = lora_factors(state, settings)
    updates = export_updates(architecture, lora=factors)
    if not settings.use_dora:
        return updates
    # The magnitude of a row goes where the row goes: it is carried through the same mapping as a B of rank one.
    magnitudes = lora_in_gguf_order(
        architecture,
        {
            module: (
                torch.ones(1, a.shape[1]),
                state[f"{module}.lora_magnitude_vector"][:, None],
                1.0,
            )
            for module, (a, _, _) in factors.items()
        },
    )
    return [_with_magnitude(update, magnitudes[update.name][1][:, 0]) for update in updates]


def _with_magnitude(update: TunedTensor, magnitude_O: Tensor) -> TunedTensor:
    def apply(base_OI: Tensor) -> Tensor:
        merged_OI: Tensor = update.apply(base_OI)
        gain_O: Tensor = magnitude_O / merged_OI.norm(dim=1).clamp_min(1e-12)
        return merged_OI * gain_O[:, None]

    return replace(update, apply=apply)


@dataclass(frozen=True)
class Serving:
    """How the export is to be served: the template that renders what was trained, and the parameters."""

    conversion: GoConversion
    parameters: dict[str, Any]
    system: str | None
    licences: tuple[str, ...]
    edits: tuple[MetadataEdit, ...]
    notes: tuple[str, ...]


def plan_serving(base: OpenBase, config: Config, context: int) -> Serving:
    """Template, stops, system message and parameters. Raises InputError where the template cannot be expressed."""
    conversion = to_go_template(base.template)
    notes, edits = list(conversion.notes), list[MetadataEdit]()
    jinja = base.gguf.metadata.get(_JINJA_KEY)
    if isinstance(jinja, str) and prefers_jinja(conversion.text, jinja):
        edits.append(DropKey(_JINJA_KEY))
        notes.append(
            f"{_JINJA_KEY} is left out of the file: Ollama from 0.30 on would prefer it to the TEMPLATE, "
            "which renders what was trained."
        )
    stops = config.export.stop if config.export.stop is not None else list(conversion.stops)
    inherited = {k: v for k, v in base.source.parameters.items() if k != "stop"}
    parameters = {
        # Written out because the servers' own defaults differ from version to version.
        "repeat_penalty": 1.0,
        **inherited,
        "num_ctx": context,
        **({"stop": stops} if stops else {}),
        **config.export.parameters,
    }
    system = config.export.system
    if system is None:
        system = config.data.system if config.data.system is not None else base.source.system
    licences = (config.export.licence,) if config.export.licence else base.source.licences
    return Serving(
        conversion, checked_parameters(parameters), system, licences, tuple(edits), tuple(notes)
    )


@dataclass(frozen=True)
class Bundle:
    """What was written into the export folder."""

    folder: Path
    result: ExportResult
    serving: Serving
    modelfile: Modelfile

    @property
    def gguf_path(self) -> Path:
        return self.result.path


def plan_bundle(base: OpenBase, checkpoint: Checkpoint, config: Config) -> ExportPlan:
    """The GGUF part of `write_bundle`, as a plan that can be printed."""
    architecture = architecture_of(base.gguf.metadata, base.gguf.tensors)
    return plan_export(
        base.gguf,
        tensor_updates(architecture, checkpoint, config),
        tensor_type=config.export.tensor_type,
        metadata_edits=plan_serving(base, config, config.model.context_window).edits,
    )


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
    modelfile = Modelfile.build(
        f"./{MODEL_NAME}",
        template=serving.conversion.text,
        system=serving.system,
        parameters=serving.parameters,
        licenses=serving.licences,
    )
    write_text(folder / MODELFILE_NAME, _rendered(modelfile, base, checkpoint))
    report = result.to_json() | {
        "base_name": base.source.name,
        "base_digest": base.source.digest,
        "checkpoint": {
            "run_id": checkpoint.run_id,
            "epoch": checkpoint.epoch,
            "step": checkpoint.step,
        },
        "template_source": base.template.source,
        "template": serving.conversion.text,
        "system": serving.system,
        "parameters": serving.parameters,
        "notes": list(serving.notes),
    }
    write_json(folder / REPORT_NAME, report)
    for note in serving.notes:
        get_logger("export").info("%s", note)
    return Bundle(folder, result, serving, modelfile)


def _rendered(modelfile: Modelfile, base: OpenBase, checkpoint: Checkpoint) -> str:
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

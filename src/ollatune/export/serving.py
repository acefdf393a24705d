"""How an export is to be served: the TEMPLATE that renders what was trained, parameters, system message, licences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollatune.base.errors import InputError
from ollatune.base.log import get_logger
from ollatune.config.schema import Config
from ollatune.export.metadata_edits import DropKey, MetadataEdit
from ollatune.modeling.base import BaseSource
from ollatune.modeling.opened import OpenBase
from ollatune.ollama.modelfile import Modelfile
from ollatune.ollama.parameters import NOT_IN_MODELS, PARAMETER_KINDS, checked_parameters
from ollatune.templates.precedence import prefers_jinja
from ollatune.templates.to_go import GoConversion, to_go_template

JINJA_KEY = "tokenizer.chat_template"
_NO_PENALTY = {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(frozen=True)
class Serving:
    """How the export is to be served: the template that renders what was trained, and the parameters."""

    conversion: GoConversion
    parameters: dict[str, Any]
    system: str | None
    licences: tuple[str, ...]
    edits: tuple[MetadataEdit, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "template": self.conversion.text,
            "system": self.system,
            "parameters": self.parameters,
            "notes": list(self.notes),
        }


def plan_serving(base: OpenBase, config: Config, context: int) -> Serving:
    """Template, stops, system message and parameters. Raises InputError where the template cannot be expressed."""
    conversion = to_go_template(base.template)
    notes, edits = list(conversion.notes), list[MetadataEdit]()
    jinja = base.gguf.metadata.get(JINJA_KEY)
    if isinstance(jinja, str) and prefers_jinja(conversion.text, jinja):
        edits.append(DropKey(JINJA_KEY))
        notes.append(
            f"{JINJA_KEY} is left out of the file: Ollama from 0.30 on would prefer it to the TEMPLATE, "
            "which renders what was trained."
        )
    stops = config.export.stop
    if stops is None:  # the base's own, and the end of turn that was trained
        stops = list(dict.fromkeys([*_stops_of(base.source.parameters), *conversion.stops]))
    inherited, left_out = inherited_parameters(base.source.parameters)
    notes += left_out
    parameters = {
        # Written out because the servers' own defaults differ from version to version.
        "repeat_penalty": _NO_PENALTY["repeat_penalty"],
        **inherited,
        "num_ctx": context,
        **({"stop": stops} if stops else {}),
        **config.export.parameters,
    }
    trained_system = config.data.system if config.data.system is not None else base.source.system
    system = trained_system if config.export.system is None else config.export.system
    if system != trained_system:
        notes.append("The SYSTEM message is another than the one that was trained with.")
    licences = (config.export.licence,) if config.export.licence else base.source.licences
    notes += inherited_notes(base.source)
    return Serving(
        conversion, checked_parameters(parameters), system, licences, tuple(edits), tuple(notes)
    )


def _stops_of(parameters: Mapping[str, Any]) -> list[str]:
    """The stop texts of a base; a single one that was stored as a text counts, though no server runs with it."""
    given = parameters.get("stop") or []
    return [str(stop) for stop in (given if isinstance(given, list | tuple) else [given])]


def inherited_parameters(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The base's parameters that its tuned model takes over, and a note for each that it does not."""
    taken: dict[str, Any] = {}
    notes: list[str] = []
    for key, value in given.items():
        if key == "stop":
            continue  # joined with those of the template that was trained with
        if key in _NO_PENALTY and value != _NO_PENALTY[key]:
            taken[key] = _NO_PENALTY[key]  # said, for a model made FROM the base would inherit it
            notes.append(
                f"The base's {key} {value} is not taken over: penalties move the answers away from what was trained. "
                f"Set export.parameters.{key} to have it."
            )
        elif key in NOT_IN_MODELS:
            notes.append(
                f"The base's {key} {value} is left out: newer servers take it with a request only, and refuse to "
                "create a model that has it."
            )
        elif key not in PARAMETER_KINDS:
            notes.append(
                f"The base's parameter {key} is left out: Ollama does not know it any more."
            )
        else:
            taken[key] = value
    return taken, notes


def inherited_notes(source: BaseSource) -> list[str]:
    """What a base in Ollama has that the export leaves out, because training did not see it."""
    notes: list[str] = []
    if source.renderer or source.parser:
        built_in = " and ".join(
            f"{kind} `{name}`"
            for kind, name in (("renderer", source.renderer), ("parser", source.parser))
            if name
        )
        notes.append(
            f"The base's {built_in}, built into the server, is left out: the model was trained on the explicit "
            "TEMPLATE, which would not be used beside it."
        )
    if source.messages:
        notes.append(
            f"The base's {len(source.messages)} MESSAGE(s), which the server puts before every chat, are left out: "
            "the model was not trained with them. Add them to the Modelfile if they are wanted."
        )
    if source.num_merged:
        notes.append(f"The base's {source.num_merged} LoRA adapter(s) are merged into the weights.")
    if source.has_projector:
        notes.append(
            "The base's projector is left out: the export reads text only, which is all it was trained on."
        )
    return notes


def printable_licence(text: str) -> str | None:
    """`text` as a Modelfile can hold it: without the characters that Ollama's parser drops; None where it cannot."""
    kept = "".join(
        c if c.isprintable() or c in "\t\r\n" else " " if c.isspace() else "" for c in text
    )
    try:
        Modelfile.build("x", licenses=[kept]).render()
    except InputError:
        return None
    return kept


def served_modelfile(
    source: str, serving: Serving, *, adapter: str | None = None, requires: str = ""
) -> Modelfile:
    """The Modelfile of an export. A licence that no Modelfile can hold is left to `/api/create`, and said."""
    licences = {text: printable_licence(text) for text in serving.licences}
    if None in licences.values():
        get_logger("export").warning(
            "A licence of the base holds three quotes in a row, which no Modelfile can express; it is not in the "
            "Modelfile, but --create passes it on."
        )
    return Modelfile.build(
        source,
        adapter=adapter,
        template=serving.conversion.text,
        system=serving.system,
        parameters=serving.parameters,
        licenses=[text for text in licences.values() if text is not None],
        requires=requires,
    )

"""`ollatune data`: what training will see - the first batch with its loss mask, counts, lengths, the template."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollatune.base.text import printable
from ollatune.config.load import load_config
from ollatune.config.schema import Config

if TYPE_CHECKING:
    from ollatune.data.load import DatasetSplits
    from ollatune.data.store import Example
    from ollatune.modeling.opened import OpenBase

_SHOWN_CHARACTERS = 4000
_BAR_WIDTH = 40


@dataclass(frozen=True)
class DataOptions:
    """The flags of `ollatune data`. Without `path`, `data.sources` of the configuration are read."""

    path: Path | None
    config: Path | None = None
    assignments: tuple[str, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)
    num_examples: int | None = None
    """How many examples to show; by default one micro-batch."""
    show_progress: bool = True


@dataclass(frozen=True)
class LoadedData:
    """A data set rendered for a base model."""

    base: OpenBase
    splits: DatasetSplits
    config: Config
    max_length: int


def load_for_base(config: Config, *, show_progress: bool = True) -> LoadedData:
    """The configured data, rendered for the configured base model."""
    from ollatune.commands.remote import remote_finder
    from ollatune.modeling.base import resolve_base
    from ollatune.modeling.opened import open_base
    from ollatune.training.build import context_window, read_data

    source = resolve_base(
        config.model.base_model,
        models_folder=config.ollama.models,
        find_remote=remote_finder(config),
    )
    base = open_base(source)
    splits = read_data(config, base, show_progress=show_progress)
    return LoadedData(base, splits, config, context_window(config, base))


def run_data(options: DataOptions) -> dict[str, Any]:
    """Render the data as training would. Returns the result that `--json` prints."""
    from ollatune.data.load import make_order
    from ollatune.data.report import length_histogram

    flags = dict(options.flags)
    if options.path is not None:
        flags["data.sources"] = [{"path": str(options.path)}]
    config = load_config(options.config, assignments=options.assignments, overrides=flags)
    loaded = load_for_base(config, show_progress=options.show_progress)
    train = loaded.splits.train
    batch_size = config.training.batch_size if isinstance(config.training.batch_size, int) else 4
    order = make_order(
        train,
        config.data,
        seed=config.training.seed,
        sources=config.data.sources,
        group_size=batch_size,
    )
    count = min(options.num_examples or batch_size, order.epoch_size)
    shown = [int(index) for index in order.of_epoch(0, 0, count)]
    template = loaded.base.template
    return {
        "schema": 1,
        "base": loaded.base.source.name,
        "template": {
            "source": template.source,
            "digest": template.digest,
            "text": template.text,
        },
        "max_length": loaded.max_length,
        "report": loaded.splits.report.as_dict(),
        "num_examples": len(train),
        "length_histogram": length_histogram(train.lengths),
        "batch": [_example_as_dict(loaded.base, train[index], index) for index in shown],
    }


def _example_as_dict(base: OpenBase, example: Example, index: int) -> dict[str, Any]:
    tokens = zip(example.token_ids.tolist(), example.is_target.tolist(), strict=True)
    pieces = []
    for is_target, run in groupby(tokens, key=lambda token: token[1]):
        ids = [token_id for token_id, _ in run]
        text = base.tokenizer.decode(ids, is_continuation=True)
        pieces.append({"text": text, "is_target": is_target, "num_tokens": len(ids)})
    return {
        "index": index,
        "num_tokens": len(example),
        "num_target_tokens": example.num_targets,
        "pieces": pieces,
    }


def data_text(result: dict[str, Any], *, color: bool = False) -> str:
    """The result in words; targets in green, or between ⟦ and ⟧ where there is no colour."""
    template = result["template"]
    lines = [f"Template: {template['source']} ({template['digest'][:12]}), of {result['base']}"]
    for number, example in enumerate(result["batch"], start=1):
        lines.append(
            f"--- example {number} (no. {example['index']}): {example['num_tokens']} tokens, "
            f"{example['num_target_tokens']} targets"
        )
        lines.append("".join(_piece_text(piece, color) for piece in example["pieces"]))
    lines.append("--- the whole data")
    for path, form in result["report"]["forms"].items():
        unused = result["report"]["unused_fields"].get(path)
        names = ", ".join(f"`{printable(name, limit=40)}`" for name in unused or ())
        lines.append(f"{path}: {form}" + (f" (not trained on: {names})" if names else ""))
    for name, split in result["report"]["splits"].items():
        lines.append(
            f"{name}: {split['num_records']} examples, {split['num_tokens']} tokens, "
            f"{split['num_target_tokens']} targets ({split['target_share']:.0%})"
        )
    lines += _histogram_lines(result["length_histogram"])
    lines += [f"Warning: {warning}" for warning in result["report"]["warnings"]]
    return "\n".join(lines)


def _piece_text(piece: dict[str, Any], color: bool) -> str:
    text = printable(piece["text"], limit=_SHOWN_CHARACTERS)
    if color:
        return f"\x1b[{'1;32' if piece['is_target'] else '2'}m{text}\x1b[0m"
    return f"⟦{text}⟧" if piece["is_target"] else text


def _histogram_lines(bins: list[dict[str, int]]) -> list[str]:
    if not bins:
        return []
    most = max(item["count"] for item in bins)
    width = len(str(bins[-1]["to"] - 1))
    lines = ["tokens per training example:"]
    first = next(i for i, item in enumerate(bins) if item["count"])
    for item in bins[first:]:
        bar = "█" * round(_BAR_WIDTH * item["count"] / most) or ("▏" if item["count"] else "")
        lines.append(
            f"  {item['from']:>{width}}-{item['to'] - 1:<{width}} {item['count']:>7} {bar}".rstrip()
        )
    return lines

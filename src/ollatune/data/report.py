"""What was found in the data: counts, lengths, and warnings about what usually spoils a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ollatune.data.forms import Seen
from ollatune.data.rejects import Rejections
from ollatune.data.sources import Split
from ollatune.data.split import Leakage, Rows, find_leakage, num_distinct
from ollatune.data.store import TokenStore

_MANY_DUPLICATES = 0.5
_FEW_TARGETS = 0.02
_MANY_CUT = 0.1
_PERCENTILES = (0, 25, 50, 75, 90, 95, 99, 100)


@dataclass(frozen=True)
class SplitStatistics:
    """Token counts of one split."""

    num_records: int
    num_tokens: int
    num_target_tokens: int
    length_percentiles: dict[str, int]

    @property
    def target_share(self) -> float:
        """Target tokens over all tokens."""
        return self.num_target_tokens / max(1, self.num_tokens)


@dataclass
class RenderCounts:
    """What rendering had to do, summed over samples."""

    num_truncated: int = 0
    num_answers_cut: int = 0
    num_tokens_cut: int = 0
    longest_before: int = 0
    num_ends: int = 0
    """End-of-generation tokens that are targets."""
    num_early_ends: int = 0
    """Those of them that stand inside an answer."""
    num_hidden_system: int = 0
    num_hidden_turns: int = 0
    num_hidden_thinking: int = 0
    """Records of which the template shows no system message, not every other message, no thinking."""

    def add(self, other: RenderCounts) -> None:
        """Add another worker's counts."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "longest_before" else mine + value)


@dataclass(frozen=True)
class DataReport:
    """Everything `ollatune data --json` and `run.json` say about a data set."""

    forms: dict[str, str]
    """Record form of each source."""
    unused_fields: dict[str, list[str]]
    """Fields of each source's records that are not trained on (the first 50)."""
    splits: dict[str, SplitStatistics]
    rendering: RenderCounts
    num_duplicates: int
    num_rejected: int
    leakage: list[Leakage]
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        value = asdict(self)
        for name, split in self.splits.items():
            value["splits"][name]["target_share"] = round(split.target_share, 6)
        num_targets = sum(split.num_target_tokens for split in self.splits.values())
        value["end_share_of_targets"] = round(self.rendering.num_ends / max(1, num_targets), 6)
        return value


def split_statistics(store: TokenStore, rows: Rows) -> SplitStatistics:
    """Counts over the given rows."""
    lengths = store.lengths[rows]
    marks = (
        [int(v) for v in np.percentile(lengths, _PERCENTILES, method="lower")] if len(rows) else []
    )
    return SplitStatistics(
        len(rows),
        int(lengths.sum()),
        int(store.num_targets[rows].sum()),
        {f"p{p}": v for p, v in zip(_PERCENTILES, marks, strict=bool(marks))},
    )


def make_report(
    store: TokenStore,
    splits: dict[Split, Rows],
    *,
    seen: Mapping[str, Seen],
    rendering: RenderCounts,
    rejections: Rejections,
    max_length: int,
) -> DataReport:
    """The report on a tokenised data set, warnings included."""
    statistics: dict[str, SplitStatistics] = {
        name: split_statistics(store, rows) for name, rows in splits.items() if len(rows)
    }
    digests = store.digests[store.is_record_start]
    num_duplicates = len(digests) - num_distinct(digests)
    leakage = find_leakage(splits, store.digests, store.prompt_digests)
    report = DataReport(
        {path: ", ".join(sorted(met.forms)) for path, met in seen.items()},
        {path: sorted(met.unused) for path, met in seen.items() if met.unused},
        statistics,
        rendering,
        num_duplicates,
        len(rejections.errors),
        leakage,
    )
    first_rejected = rejections.errors[0].message if rejections.errors else ""
    report.warnings.extend(_warnings(report, len(digests), max_length, first_rejected))
    return report


def _warnings(
    report: DataReport, num_records: int, max_length: int, first_rejected: str
) -> list[str]:
    found = []
    rendering = report.rendering
    if report.num_rejected:
        found.append(
            f"{report.num_rejected} bad records were set aside, the first: {first_rejected}"
        )
    if report.num_duplicates:
        share = report.num_duplicates / num_records
        strength = "More than half of the records are" if share > _MANY_DUPLICATES else "There are"
        found.append(
            f"{strength} exact duplicates: {report.num_duplicates} of {num_records} ({share:.1%}). "
            "`ollatune preprocess` removes them."
        )
    if rendering.num_truncated:
        share = rendering.num_truncated / num_records
        advice = " Raise model.context_window or shorten them." if share > _MANY_CUT else ""
        found.append(
            f"{rendering.num_truncated} records ({share:.1%}) are longer than {max_length} tokens (the longest has "
            f"{rendering.longest_before}) and lose {rendering.num_tokens_cut} tokens of context.{advice}"
        )
    if rendering.num_answers_cut:
        found.append(
            f"{rendering.num_answers_cut} records are longer than {max_length} tokens even without context: only the "
            "ends of their answers are trained."
        )
    if rendering.num_early_ends:
        found.append(
            f"{rendering.num_early_ends} end-of-generation tokens stand inside answers: their text looks like the "
            "chat template's own markup, and the model learns to stop there."
        )
    for what, count in (
        ("a system message", rendering.num_hidden_system),
        ("a user or tool message", rendering.num_hidden_turns),
        ("thinking", rendering.num_hidden_thinking),
    ):
        if count:
            found.append(
                f"{count} records have {what} that the base model's chat template does not show: it is not trained "
                "on, and the served model would not see it either."
            )
    for leak in report.leakage:
        if leak.num_same_record:
            found.append(
                f"{leak.num_same_record} of {leak.num_rows} {leak.split} records are also in the training data: "
                "the score on them says nothing."
            )
        elif leak.num_same_prompt:
            found.append(
                f"{leak.num_same_prompt} of {leak.num_rows} {leak.split} questions are also asked in the training data."
            )
    train = report.splits.get("train")
    if train and train.target_share < _FEW_TARGETS:
        found.append(f"Only {train.target_share:.1%} of the training tokens are targets.")
    return found


def length_histogram(lengths: npt.NDArray[np.integer], num_bins: int = 12) -> list[dict[str, int]]:
    """Counts of lengths in bins of equal, round width: [{"from", "to", "count"}, …], upper ends exclusive."""
    if not len(lengths):
        return []
    top = int(lengths.max()) + 1
    width = max(1, -(-top // num_bins))
    magnitude = 10 ** max(0, len(str(width)) - 1)
    width = -(-width // magnitude) * magnitude
    counts = np.bincount(lengths // width)
    return [
        {"from": i * width, "to": (i + 1) * width, "count": int(count)}
        for i, count in enumerate(counts)
    ]

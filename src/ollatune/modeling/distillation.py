"""Knowledge distillation: a larger model of the same vocabulary has a say in the loss.

The teacher is another GGUF, frozen, dense or packed. It sees the same rows; its hidden states at the target positions
are kept for one micro-batch, its logits for one chunk of them (see `fast.loss.Lesson`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ollatune.base.errors import UsageError
from ollatune.base.text import printable
from ollatune.gguf.tokenizer import GGUFTokenizer
from ollatune.gguf.vocabulary import Kind
from ollatune.modeling.fast.forward import CausalStep, PackedRow
from ollatune.modeling.fast.loss import Lesson


@dataclass(frozen=True)
class Teacher:
    """A frozen model and how much it counts. `weight` and `temperature` as in `Lesson`."""

    step_function: CausalStep
    weight: float
    temperature: float

    @torch.no_grad()
    def lesson(self, row: PackedRow) -> Lesson:
        """What the teacher says about `row`."""
        step = self.step_function
        return Lesson(
            step.hidden(row), step.head, step.settings.softcap, self.weight, self.temperature
        )


def check_same_vocabulary(
    student: GGUFTokenizer, teacher: GGUFTokenizer, student_name: str, teacher_name: str
) -> None:
    """Raise UsageError unless each id means the same token to both; unused ids at the end may differ in number."""
    mine, theirs = student.vocabulary, teacher.vocabulary
    hint = "A teacher must be a larger model of the same family and generation."
    common = min(len(mine.tokens), len(theirs.tokens))
    if mine.tokens[:common] != theirs.tokens[:common]:
        first = next(i for i in range(common) if mine.tokens[i] != theirs.tokens[i])
        raise UsageError(
            f"The teacher has another vocabulary: token {first} is `{printable(mine.tokens[first])}` in "
            f"{student_name} and `{printable(theirs.tokens[first])}` in {teacher_name}.",
            hint=hint,
        )
    longer = mine if len(mine.tokens) > common else theirs
    used = [i for i in range(common, len(longer.tokens)) if not longer.kinds[i] & Kind.UNUSED]
    if used:
        raise UsageError(
            f"The teacher has another vocabulary: {len(mine.tokens)} tokens in {student_name}, "
            f"{len(theirs.tokens)} in {teacher_name}; `{printable(longer.tokens[used[0]])}` is in one only.",
            hint=hint,
        )
    if mine.model != theirs.model or mine.pre != theirs.pre or mine.merges != theirs.merges:
        raise UsageError(
            f"The teacher splits text in another way: {student_name} is `{mine.model}`/`{mine.pre}` with "
            f"{len(mine.merges)} merges, {teacher_name} `{theirs.model}`/`{theirs.pre}` with "
            f"{len(theirs.merges)}.",
            hint=hint,
        )

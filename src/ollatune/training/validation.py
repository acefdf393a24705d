"""Validation during training: loss, perplexity, token accuracy, generated samples, task metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ollatune.base.faults import fault_point
from ollatune.data.batching import Batch
from ollatune.modeling.fast.forward import evaluation_mode
from ollatune.training.reports import ValidationLeftError
from ollatune.training.rows import row_of
from ollatune.training.sharing import Sharing

Metric = Callable[[str, str], float]
"""From (answer, expected answer) to a score between 0 and 1."""


@dataclass(frozen=True)
class SamplePrompt:
    """A validation record as the served model would see it: prompt ids, and the answer that was wanted."""

    prompt_ids: list[int]
    prompt: str
    expected: str


@dataclass(frozen=True)
class ValidationReport:
    """Losses are means per target token; `samples` hold prompt, expected and generated texts."""

    loss: float
    perplexity: float
    token_accuracy: float
    num_targets: int
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


def _leave_if(is_to_stop: bool) -> None:
    if is_to_stop:
        raise ValidationLeftError


@dataclass
class Validator:
    """Validates one model on fixed data.

    `batches` makes the batches anew each time. `prompts` are answered greedily: all of them when there are metrics,
    else the first `num_samples`.
    """

    sharing: Sharing
    batches: Callable[[], Iterable[Batch]]
    prompts: Sequence[SamplePrompt]
    num_samples: int
    metrics: dict[str, Metric]
    decode: Callable[[Sequence[int]], str]
    stop_ids: frozenset[int]
    max_new_tokens: int
    device: torch.device

    def validate(self, is_to_stop: Callable[[], bool] = lambda: False) -> ValidationReport:
        """Loss over all batches; answers where there are prompts. Every process calls it, and learns the same.

        Raises ValidationLeftError as soon as `is_to_stop` says so, which asks all processes.
        """
        step_function, processes = self.sharing.step_function, self.sharing.processes
        loss_sum, num_correct, num_targets = 0.0, 0, 0
        with evaluation_mode(self.sharing.model):
            for batch in self.batches():
                _leave_if(is_to_stop())
                row = row_of(batch, share=step_function.can_share).to(self.device)
                if not row.num_targets and not self.sharing.needs_all:
                    continue  # others may need this process to compute with them all the same
                loss, correct = step_function.evaluate(row)
                loss_sum += loss
                num_correct += correct
                num_targets += row.num_targets
        totals = torch.tensor([loss_sum, num_correct, num_targets], dtype=torch.float64)
        loss_sum, correct_sum, target_sum = processes.sum_tensor(
            totals.to(processes.device)
        ).tolist()
        loss = loss_sum / max(1.0, target_sum)
        answers = self._answers(is_to_stop)
        scores = {
            name: sum(metric(a["answer"], a["expected"]) for a in answers) / len(answers)
            for name, metric in self.metrics.items()
            if answers
        }
        return ValidationReport(
            loss,
            math.exp(min(loss, 700.0)),
            correct_sum / max(1.0, target_sum),
            int(target_sum),
            scores,
            answers[: self.num_samples],
        )

    def _answers(self, is_to_stop: Callable[[], bool]) -> list[dict[str, Any]]:
        prompts = self.prompts if self.metrics else self.prompts[: self.num_samples]
        answers = []
        count = self.sharing.processes.count  # so many are answered at once, one by each
        for first in range(0, len(prompts), count):
            fault_point("train.answer")
            _leave_if(is_to_stop())
            answers += self.sharing.answers(
                [prompt.prompt_ids for prompt in prompts[first : first + count]],
                max_new_tokens=self.max_new_tokens,
                stop_ids=self.stop_ids,
            )
        return [
            {"prompt": prompt.prompt, "expected": prompt.expected, "answer": self.decode(answer)}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

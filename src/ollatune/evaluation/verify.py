"""The proof that what is served is what was trained, and the likeliest cause where it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ollatune.base.errors import UsageError, VerificationError
from ollatune.evaluation.compare import Difference, Limits, summary
from ollatune.evaluation.observe import Observation, TrainedModel, observe
from ollatune.evaluation.served import ServedModel
from ollatune.evaluation.update_share import update_share
from ollatune.templates import Message

MAX_ANSWER_TOKENS = 48
MIN_RECOVERY = 0.5
"""A tensor that keeps less of its update than this counts as left untuned."""

_UNTOUCHED_SIZE = 0.2
"""A served model nearer to the base than this share of the trained change is the base, but for rounding."""

_MIN_ALIGNMENT = 0.5
"""Where some tensors are left untuned, what the others do still points much the same way; another base does not."""


@dataclass(frozen=True)
class Check:
    """One question of the verdict. `passed` is None where the server gives no means to ask it."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """The verdict with all it rests on. `cause` is "" where it passed, else template, bos, tokenizer, recovery,
    wrong_base, weights (one of the last two), stop or parameters; `advice` says what that means and what to do."""

    served_by: str
    checks: tuple[Check, ...]
    difference: Difference
    limits: Limits
    cause: str
    advice: str
    observations: tuple[Observation, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def require(self) -> None:
        """Raise VerificationError, naming the cause, unless everything passed."""
        if not self.passed:
            failed = "; ".join(
                f"{check.name}: {check.detail}" for check in self.checks if check.passed is False
            )
            raise VerificationError(
                f"What {self.served_by} serves is not what was trained ({failed}).",
                hint=self.advice,
            )

    def to_dict(self) -> dict[str, Any]:
        """The content of verify.json."""
        return {
            "passed": self.passed,
            "cause": self.cause,
            "advice": self.advice,
            "served_by": self.served_by,
            "checks": [vars(check) for check in self.checks],
            "difference": _json_numbers(self.difference.to_dict()),
            "limits": vars(self.limits),
            "prompts": [_json_numbers(seen.to_dict()) for seen in self.observations],
        }

    def table(self) -> str:
        """One line per check, for a terminal."""
        marks = {True: "pass", False: "FAIL", None: "  - "}
        lines = [f"{marks[check.passed]}  {check.name:<13} {check.detail}" for check in self.checks]
        return "\n".join([*lines, *([f"Cause: {self.cause}. {self.advice}"] if self.cause else [])])


def verify(
    trained: TrainedModel,
    served: ServedModel,
    conversations: Sequence[Sequence[Message]],
    *,
    limits: Limits,
    max_tokens: int = MAX_ANSWER_TOKENS,
    recoveries: Mapping[str, float] | None = None,
) -> VerifyReport:
    """Compare prompts, tokens, next-token distributions and greedy answers on held-out conversations.

    `conversations` end with what the model is to answer. `recoveries`: per tuned tensor the share of its update found
    in the served file, where that can be read: it shows a single tensor left untuned, which the answers may hide.
    Raises UsageError without conversations, and what the server raises.
    """
    if not conversations:
        raise UsageError(
            "Nothing to verify with: no prompts.", hint="Name a data file with prompts."
        )
    seen = [
        observe(trained, served, messages, limits=limits, max_tokens=max_tokens)
        for messages in conversations
    ]
    difference = summary(
        [kl for one in seen for kl in one.kls],
        [same for one in seen for same in one.is_same_argmax],
        [gap for one in seen for gap in one.gaps],
    )
    checks = (
        _check_prompts(seen),
        _check_tokens(seen),
        _check_difference(seen, difference, limits),
        _check_answers(seen),
        _check_endings(seen),
        *_check_recoveries(recoveries),
    )
    cause, advice = _diagnose(trained, seen, {check.name: check for check in checks})
    return VerifyReport(served.description, checks, difference, limits, cause, advice, tuple(seen))


def _check_prompts(seen: Sequence[Observation]) -> Check:
    known = [one for one in seen if one.is_same_prompt is not None]
    if not known:
        return Check("prompt", None, "this server does not show the prompts it makes")
    wrong = [one for one in known if not one.is_same_prompt]
    if wrong:
        return Check(
            "prompt", False, f"{_share(wrong, known)} differ, {wrong[0].prompt_difference}"
        )
    return Check("prompt", True, f"{len(known)} rendered prompts are the same, byte for byte")


def _check_tokens(seen: Sequence[Observation]) -> Check:
    known = [
        one for one in seen if one.is_same_tokens is not None and one.is_same_prompt is not False
    ]
    if not known:
        return Check("tokens", None, "not compared")
    wrong = [one for one in known if not one.is_same_tokens]
    if wrong:
        first = wrong[0]
        counts = f"trained with {first.num_prompt_tokens} tokens, served with {first.served_num_prompt_tokens}"
        return Check(
            "tokens", False, f"{_share(wrong, known)} differ, {first.token_difference or counts}"
        )
    return Check(
        "tokens", True, f"{sum(one.num_prompt_tokens for one in known)} prompt tokens are the same"
    )


def _check_difference(seen: Sequence[Observation], difference: Difference, limits: Limits) -> Check:
    if not any(one.kls for one in seen):
        return Check("distribution", None, "no logprobs, or the prompts differ")
    detail = (
        f"{difference.num_positions} positions: KL max {difference.max_kl:.2g} (limit {limits.max_kl:g}), "
        f"mean {difference.mean_kl:.2g} (limit {limits.mean_kl:g}), same argmax {difference.argmax_agreement:.1%}"
    )
    return Check("distribution", difference.within(limits), detail)


def _check_answers(seen: Sequence[Observation]) -> Check:
    known = [
        one for one in seen if one.is_same_prompt is not False and one.is_same_tokens is not False
    ]
    if not known:
        return Check("answers", None, "the prompts differ")
    wrong = [one for one in known if one.disagreement]
    if wrong:
        return Check("answers", False, f"{_share(wrong, known)} differ, {wrong[0].disagreement}")
    return Check("answers", True, f"{len(known)} greedy answers are what the trained model says")


def _check_endings(seen: Sequence[Observation]) -> Check:
    known = [one for one in seen if one.ending != "unknown"]
    if not known:
        return Check(
            "endings", None, "no answer ended within the tokens allowed, or the prompts differ"
        )
    for ending, what in (("runs_on", "run on past their end"), ("cut_short", "end too early")):
        wrong = [one for one in known if one.ending == ending]
        if wrong:
            return Check(
                "endings", False, f"{_share(wrong, known)} {what}, e.g. {wrong[0].answer!r}"
            )
    return Check("endings", True, f"{len(known)} answers end where the trained model ends them")


def _check_recoveries(recoveries: Mapping[str, float] | None) -> tuple[Check, ...]:
    if recoveries is None:
        return ()
    lost = sorted(
        (name for name, value in recoveries.items() if not value >= MIN_RECOVERY),
        key=recoveries.__getitem__,
    )
    if lost:
        worst = ", ".join(f"{name} {recoveries[name]:.0%}" for name in lost[:3])
        return (
            Check(
                "recovery",
                False,
                f"{_share(lost, recoveries)} tensors have lost their update: {worst}",
            ),
        )
    least = min(recoveries.values(), default=1.0)
    return (
        Check(
            "recovery", True, f"{len(recoveries)} tensors keep at least {least:.0%} of their update"
        ),
    )


def _diagnose(
    trained: TrainedModel,
    seen: Sequence[Observation],
    checks: Mapping[str, Check],
) -> tuple[str, str]:
    """The likeliest cause, from the earliest step that went wrong: each makes all later ones differ as well."""
    failed = {name for name, check in checks.items() if check.passed is False}
    if not failed:
        return "", ""
    if "prompt" in failed:
        return _prompt_cause(seen)
    if "tokens" in failed:
        return _token_cause(seen)
    if "recovery" in failed:
        return (
            "recovery",
            "Write these tensors at a finer type (q8_0, f16), or export again: they were left untuned.",
        )
    if failed & {"distribution", "answers"}:
        if "distribution" not in failed and checks["distribution"].passed:
            return (
                "parameters",
                "The distributions are the same but other tokens are chosen: a parameter of the served model, such as "
                "repeat_penalty, interferes. Set `PARAMETER repeat_penalty 1`.",
            )
        return _weights_cause(trained, seen)
    return (
        "stop",
        "The model ends its answers, the server does not, or at another place: check the PARAMETER stop lines and "
        "the end-of-generation tokens in the GGUF.",
    )


def _prompt_cause(seen: Sequence[Observation]) -> tuple[str, str]:
    if all(one.differs_by_bos for one in seen if one.is_same_prompt is False):
        return "bos", (
            "The template writes the beginning-of-text token, which the tokenizer puts before the prompt as well: "
            "remove it from the TEMPLATE."
        )
    return "template", (
        "The served TEMPLATE (or SYSTEM) is not the one trained with: export again, or set it in the Modelfile."
    )


def _token_cause(seen: Sequence[Observation]) -> tuple[str, str]:
    wrong = [one for one in seen if one.is_same_tokens is False]
    if all(one.differs_by_bos for one in wrong):
        is_more = (wrong[0].served_num_prompt_tokens or 0) > wrong[0].num_prompt_tokens
        return "bos", (
            f"Prompts are served with one beginning-of-text token {'more' if is_more else 'less'} than they were "
            "trained with: correct tokenizer.ggml.add_bos_token in the GGUF, or take the token out of the TEMPLATE."
        )
    return "tokenizer", (
        "The same text becomes other tokens: the GGUF's vocabulary, merges or pre-tokenizer are not the base's."
    )


def _weights_cause(trained: TrainedModel, seen: Sequence[Observation]) -> tuple[str, str]:
    """From where the served model lies, seen from the base."""
    found = None if trained.base_logprobs is None else update_share(trained, seen)
    if found is None:
        return "weights", (
            "Prompts and tokens are the same, the weights are not: a part of the update is missing, or the served "
            "base is another."
        )
    if found.size < _UNTOUCHED_SIZE:
        return "recovery", (
            "The base model is served: nothing of the training arrived. Is the adapter applied, the merged file used?"
        )
    if found.alignment >= _MIN_ALIGNMENT:
        return "recovery", (
            f"The served model went {found.share:.0%} of the way from the base to the trained one: some tensors were "
            "left untuned or lost their update to quantisation. Write them at a finer type (q8_0, f16)."
        )
    return "wrong_base", (
        "The served model is neither the trained one nor between it and its base: the adapter was put on another "
        "model. Check the FROM line."
    )


def _share(part: Sequence[Any], whole: Sequence[Any] | Mapping[str, Any]) -> str:
    return f"{len(part)} of {len(whole)}"


def _json_numbers(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: they become null."""
    return {
        key: None if isinstance(value, float) and not np.isfinite(value) else value
        for key, value in values.items()
    }

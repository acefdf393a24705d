"""One conversation, asked of the served model and followed by the trained one: everything that can be told apart.

The served model answers greedily; the trained model is shown that very answer in one forward pass. Where it would have
chosen each token itself, and would have ended where the served model ended, the two answer alike: no second decoding
is needed, and each position of the answer is a distribution to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ollatune.evaluation.align import (
    Logprobs,
    TrainedTokenizer,
    aligned_tokens,
    answer_ids_of,
    compare_positions,
    shown_token,
    text_difference,
    token_difference,
)
from ollatune.evaluation.compare import Limits
from ollatune.evaluation.served import ServedAnswer, ServedModel, ServedToken
from ollatune.templates import Message

LogprobsFunction = Callable[[Sequence[int], Sequence[int]], Logprobs]
"""`function(token_ids, positions)`: logprobs [len(positions), vocabulary] of the token after each of the positions."""


@dataclass(frozen=True)
class TrainedModel:
    """The trainer's side. `base_logprobs`, of the model before training, sharpens the diagnosis of a failure.

    `end_texts`: texts that were trained to end an answer beside the tokenizer's end-of-generation tokens.
    """

    render: Callable[[Sequence[Message]], str]
    tokenizer: TrainedTokenizer
    logprobs: LogprobsFunction
    base_logprobs: LogprobsFunction | None = None
    end_texts: tuple[str, ...] = ()

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids that were trained with for a rendered prompt."""
        return self.tokenizer.encode(prompt, add_bos=self.tokenizer.add_bos)


Ending = Literal["same", "runs_on", "cut_short", "unknown"]


@dataclass(frozen=True)
class Observation:
    """What one conversation showed. `kls` and so on have one entry per compared position of the answer.

    `disagreement`: the first token that the trained model would clearly not have chosen, or "". `differs_by_bos`: the
    prompts, or their tokens, are the same but for a beginning-of-text token that one has and the other has not.
    """

    prompt: str
    prompt_difference: str
    is_same_prompt: bool | None
    num_prompt_tokens: int
    served_num_prompt_tokens: int | None
    token_difference: str
    is_same_tokens: bool | None
    differs_by_bos: bool
    answer: str
    disagreement: str
    ending: Ending
    kls: tuple[float, ...]
    is_same_argmax: tuple[bool, ...]
    gaps: tuple[float, ...]
    trained_ids: tuple[int, ...]
    positions: tuple[int, ...]
    served_tokens: tuple[ServedToken, ...]

    def to_dict(self) -> dict[str, Any]:
        """For verify.json."""
        return {
            "prompt": self.prompt,
            "prompt_difference": self.prompt_difference,
            "prompt_tokens": self.num_prompt_tokens,
            "served_prompt_tokens": self.served_num_prompt_tokens,
            "token_difference": self.token_difference,
            "answer": self.answer,
            "disagreement": self.disagreement,
            "ending": self.ending,
            "positions": len(self.kls),
            "max_kl": max(self.kls, default=None),
        }


def observe(
    trained: TrainedModel,
    served: ServedModel,
    messages: Sequence[Message],
    *,
    limits: Limits,
    max_tokens: int,
) -> Observation:
    """Ask both models. Raises what the server raises."""
    prompt = trained.render(messages)
    prompt_ids = trained.encode_prompt(prompt)
    served_prompt = served.render(messages)
    served_ids = None if served_prompt is None else served.tokenize(served_prompt)
    answer = served.answer(messages, max_tokens=max_tokens, with_logprobs=True)
    served_count = _reliable_count(answer, served_ids, len(prompt_ids))
    is_same_tokens = _is_same_tokens(prompt_ids, served_ids, served_count)

    answer_ids = answer_ids_of(trained.tokenizer, answer)
    ids = [*prompt_ids, *answer_ids]
    is_comparable = is_same_tokens is not False and served_prompt in (None, prompt)
    positions = list(range(len(prompt_ids) - 1, len(ids))) if is_comparable else []
    trained_PV = trained.logprobs(ids, positions) if positions else np.empty((0, 0))
    tokens = aligned_tokens(trained.tokenizer, answer_ids, answer.tokens)[: len(positions)]
    kls, same, gaps = compare_positions(trained.tokenizer, trained_PV, tokens)
    disagreement, ending = "", "unknown"
    if is_comparable:
        disagreement, ending = _follow(trained, trained_PV, answer_ids, answer, limits.max_tie_gap)
    differs_by_bos = _differs_by_bos(
        trained.tokenizer, (prompt, served_prompt), (prompt_ids, served_ids), served_count
    )
    return Observation(
        prompt=prompt,
        prompt_difference="" if served_prompt is None else text_difference(prompt, served_prompt),
        is_same_prompt=None if served_prompt is None else served_prompt == prompt,
        num_prompt_tokens=len(prompt_ids),
        served_num_prompt_tokens=served_count,
        token_difference=""
        if served_ids is None
        else token_difference(trained.tokenizer, prompt_ids, served_ids),
        is_same_tokens=is_same_tokens,
        differs_by_bos=differs_by_bos,
        answer=answer.text,
        disagreement=disagreement,
        ending=ending,  # type: ignore[arg-type]
        kls=kls,
        is_same_argmax=same,
        gaps=gaps,
        trained_ids=tuple(ids),
        positions=tuple(positions[: len(tokens)]),
        served_tokens=tuple(tokens),
    )


def _reliable_count(
    answer: ServedAnswer, served_ids: list[int] | None, num_expected: int
) -> int | None:
    """The served prompt's token count, unless the server counted only what its cache did not hold."""
    if served_ids is not None:
        return len(served_ids)
    count = answer.num_prompt_tokens
    return count if count is not None and count >= num_expected - 1 else None


def _is_same_tokens(
    trained_ids: list[int], served_ids: list[int] | None, served_count: int | None
) -> bool | None:
    if served_ids is not None:
        return served_ids == trained_ids
    return None if served_count is None else served_count == len(trained_ids)


def _differs_by_bos(
    tokenizer: TrainedTokenizer,
    prompts: tuple[str, str | None],
    ids: tuple[list[int], list[int] | None],
    served_count: int | None,
) -> bool:
    bos = tokenizer.bos_id
    if bos is None:
        return False
    prompt, served_prompt = prompts
    if served_prompt is not None and served_prompt != prompt:
        return served_prompt == tokenizer.token_bytes(bos).decode(errors="replace") + prompt
    trained_ids, served_ids = ids
    if served_ids is None:  # only their number is known
        return served_count is not None and abs(served_count - len(trained_ids)) == 1
    return served_ids == [bos, *trained_ids] or trained_ids == [bos, *served_ids]


def _follow(
    trained: TrainedModel,
    rows_PV: Logprobs,
    answer_ids: Sequence[int],
    answer: ServedAnswer,
    max_tie_gap: float,
) -> tuple[str, Ending]:
    """Whether the trained model would have said this, and ended here."""
    ends = sorted(trained.tokenizer.end_of_generation_ids)
    if any(text in answer.text for text in trained.end_texts if text):
        return "", "runs_on"
    for index, token in enumerate(answer_ids):
        row_V = rows_PV[index]
        if token in trained.tokenizer.end_of_generation_ids:
            return "", "runs_on"  # the end token was said, and was not taken for the end
        own = int(row_V.argmax())
        gap = float(row_V[own] - row_V[token])
        if gap > max_tie_gap:
            if own in trained.tokenizer.end_of_generation_ids:
                return "", "runs_on"
            return (
                f"at token {index} of the answer: trained {shown_token(trained.tokenizer, [own], 0)}, "
                f"served {shown_token(trained.tokenizer, [token], 0)}, {gap:.2f} less probable"
            ), "unknown"
    if answer.finish_reason == "length":
        return "", "unknown"
    last_V = rows_PV[len(answer_ids)]
    gap = float(last_V.max() - last_V[ends].max()) if ends else np.inf
    is_end_text = any(
        text.encode().startswith(trained.tokenizer.token_bytes(int(last_V.argmax())))
        for text in trained.end_texts
    )
    return "", "same" if gap <= max_tie_gap or is_end_text else "cut_short"

"""One conversation, asked of the served model and followed by the trained one: everything that can be told apart.

The served model answers greedily; the trained model is shown that very answer in one forward pass. Where it would have
chosen each token itself, and would have ended where the served model ended, the two answer alike: no second decoding
is needed, and each position of the answer is a distribution to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ollatune.evaluation.compare import Limits, top_gap, top_kl_divergence
from ollatune.evaluation.served import ServedAnswer, ServedModel, ServedToken
from ollatune.templates import Message

Logprobs = npt.NDArray[np.floating]
LogprobsFunction = Callable[[Sequence[int], Sequence[int]], Logprobs]
"""`function(token_ids, positions)`: logprobs [len(positions), vocabulary] of the token after each of the positions."""

_CONTEXT_CHARACTERS = 40


class TrainedTokenizer(Protocol):
    """What is needed of the trainer's tokenizer; `gguf.tokenizer.GGUFTokenizer` has it."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def end_of_generation_ids(self) -> frozenset[int]: ...

    def encode(
        self,
        text: str,
        *,
        add_bos: bool = False,
        parse_special: bool = True,
        is_continuation: bool = False,
    ) -> list[int]: ...
    def token_bytes(self, token_id: int, /) -> bytes: ...


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

    answer_ids = _answer_ids(trained.tokenizer, answer)
    ids = [*prompt_ids, *answer_ids]
    is_comparable = is_same_tokens is not False and served_prompt in (None, prompt)
    positions = list(range(len(prompt_ids) - 1, len(ids))) if is_comparable else []
    trained_PV = trained.logprobs(ids, positions) if positions else np.empty((0, 0))
    tokens = _aligned(trained.tokenizer, answer_ids, answer.tokens)[: len(positions)]
    kls, same, gaps = _compare(trained.tokenizer, trained_PV, tokens)
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
        else _token_difference(trained.tokenizer, prompt_ids, served_ids),
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


@dataclass(frozen=True)
class UpdateShare:
    """Where the served model lies, seen from the base towards the trained one, over the served top tokens' logprobs.

    `share`: how much of the way it went; `alignment`: the cosine between its change and the trained one; `size`: the
    length of its change over that of the trained one.
    """

    share: float
    alignment: float
    size: float


def update_share(trained: TrainedModel, observations: Iterable[Observation]) -> UpdateShare | None:
    """Measure it at every compared position; None where training changed nothing there, or nothing was compared."""
    assert trained.base_logprobs is not None
    along, trained_square, served_square = 0.0, 0.0, 0.0
    for seen in observations:
        if not seen.kls:
            continue
        tuned_PV = trained.logprobs(seen.trained_ids, seen.positions)
        base_PV = trained.base_logprobs(seen.trained_ids, seen.positions)
        for tuned_V, base_V, token in zip(tuned_PV, base_PV, seen.served_tokens, strict=True):
            top = _by_id(trained.tokenizer, tuned_V, token.top_logprobs)
            ids = list(top)
            change = _centred(tuned_V[ids] - base_V[ids])
            served_change = _centred(np.fromiter(top.values(), np.float64) - base_V[ids])
            along += float(change @ served_change)
            trained_square += float(change @ change)
            served_square += float(served_change @ served_change)
    if trained_square == 0.0:
        return None
    alignment = along / (trained_square * served_square) ** 0.5 if served_square else 0.0
    return UpdateShare(along / trained_square, alignment, (served_square / trained_square) ** 0.5)


def _centred(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Without the mean: logits are known up to a constant only."""
    exact = values.astype(np.float64)
    return exact - (exact.mean() if len(exact) else 0.0)


def text_difference(trained: str, served: str) -> str:
    """Where two texts part, with what stands there in each; "" for equal texts."""
    if trained == served:
        return ""
    shorter = min(len(trained), len(served))
    at = next((i for i in range(shorter) if trained[i] != served[i]), shorter)
    start = max(0, at - _CONTEXT_CHARACTERS // 2)
    excerpts = [text[start : at + _CONTEXT_CHARACTERS] for text in (trained, served)]
    return f"at character {at}: trained with {excerpts[0]!r}, served with {excerpts[1]!r}"


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


def _token_difference(
    tokenizer: TrainedTokenizer, trained_ids: list[int], served_ids: list[int]
) -> str:
    if trained_ids == served_ids:
        return ""
    shorter = min(len(trained_ids), len(served_ids))
    at = next((i for i in range(shorter) if trained_ids[i] != served_ids[i]), shorter)
    return (
        f"at token {at}: trained with {_shown(tokenizer, trained_ids, at)}, "
        f"served with {_shown(tokenizer, served_ids, at)} ({len(trained_ids)} and {len(served_ids)} tokens)"
    )


def _shown(tokenizer: TrainedTokenizer, ids: Sequence[int], at: int) -> str:
    if at >= len(ids):
        return "nothing"
    return f"{ids[at]} {tokenizer.token_bytes(ids[at]).decode(errors='replace')!r}"


def _answer_ids(tokenizer: TrainedTokenizer, answer: ServedAnswer) -> list[int]:
    """The answer's ids: the server's where it gives them, else the text tokenised as training does."""
    known = [token.token_id for token in answer.tokens if token.raw != b""]
    if known and all(token is not None for token in known):
        return [token for token in known if token is not None]
    return tokenizer.encode(answer.text, is_continuation=True) if answer.text else []


def _aligned(
    tokenizer: TrainedTokenizer, answer_ids: Sequence[int], tokens: Sequence[ServedToken]
) -> list[ServedToken]:
    """The served positions up to the first whose token is not the one at that place of `answer_ids`.

    A server may leave positions out, and a text may be tokenised otherwise than it was generated.
    """
    aligned: list[ServedToken] = []
    for index, token in enumerate(tokens):
        aligned.append(token)  # its distribution depends on the tokens before it only
        if index >= len(answer_ids):
            break
        expected = answer_ids[index]
        if token.token_id is None and token.raw != tokenizer.token_bytes(expected):
            aligned.pop()  # a position was left out before this one, perhaps
            break
    return aligned


def _compare(
    tokenizer: TrainedTokenizer, rows_PV: Logprobs, tokens: Sequence[ServedToken]
) -> tuple[tuple[float, ...], tuple[bool, ...], tuple[float, ...]]:
    kls, same, gaps = [], [], []
    for row_V, token in zip(rows_PV, tokens, strict=False):
        top = _by_id(tokenizer, row_V, token.top_logprobs)
        if top:
            kls.append(top_kl_divergence(row_V, top))
            same.append(max(top, key=lambda key: top[key]) == int(row_V.argmax()))
            gaps.append(top_gap(row_V, top))
    return tuple(kls), tuple(same), tuple(gaps)


def _by_id(tokenizer: TrainedTokenizer, row_V: Logprobs, top: Any) -> dict[int, float]:
    """Alternatives by id. Bytes are looked up among the trained model's most probable tokens, the likeliest first."""
    if not top or isinstance(next(iter(top)), int):
        return dict(top)
    ids_by_bytes: dict[bytes, int] = {}
    likely = np.argsort(row_V)[::-1][: 50 * len(top)]
    for token in likely:
        ids_by_bytes.setdefault(tokenizer.token_bytes(int(token)), int(token))
    return {ids_by_bytes[raw]: value for raw, value in top.items() if raw in ids_by_bytes}


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
                f"at token {index} of the answer: trained {_shown(trained.tokenizer, [own], 0)}, "
                f"served {_shown(trained.tokenizer, [token], 0)}, {gap:.2f} less probable"
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

"""From a conversation or document to token ids and a target mask, exactly as the model will be served."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ollatune.base.errors import InputError
from ollatune.data.conversation import Conversation, Document, Sample
from ollatune.data.position import Position, RecordError
from ollatune.data.protocols import PromptTemplate, SegmentLike, Tokenizer
from ollatune.data.shown import NOTHING_HIDDEN, Hidden, find_hidden
from ollatune.data.store import Example, Mask, TokenIds
from ollatune.data.truncate import FitSearch, num_characters, shortened

Targets = Literal["all", "last"]
Truncation = Literal["middle", "left", "error"]


@dataclass(frozen=True)
class Rendered:
    """An example, and what had to be done to it."""

    example: Example
    num_tokens_before: int
    is_truncated: bool
    is_answer_cut: bool = False
    num_ends: int = 0
    """End-of-generation tokens that are targets: one an answer, and `num_early_ends`."""
    num_early_ends: int = 0
    """End-of-generation tokens inside answers, before their end: text that looks like the template's own."""
    hidden: Hidden = NOTHING_HIDDEN
    """What the template left out of the record; of several examples of one record, the first says it."""


class Renderer:
    """Renders samples for one base model. Stateless apart from its settings; one per thread or process."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        *,
        max_length: int,
        targets: Targets = "all",
        truncation: Truncation = "middle",
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.targets = targets
        self.truncation = truncation
        self._is_end = np.zeros(tokenizer.vocab_size, np.bool_)
        self._is_end[list(tokenizer.end_of_generation_ids)] = True

    def __call__(self, sample: Sample, position: Position) -> list[Rendered]:
        """One example, or one per answer where the template needs that.

        Raises RecordError where the sample cannot be rendered or has nothing to learn.
        """
        if isinstance(sample, Document):
            return [self._document(sample)]
        found = self._segments(sample, position, self.targets)
        hidden = find_hidden(sample, found, position, is_last_only=self.targets == "last")
        rendered = self._examples(sample, found, position)
        if hidden is not NOTHING_HIDDEN:
            rendered[0] = replace(rendered[0], hidden=hidden)
        return rendered

    def _examples(
        self, sample: Conversation, found: Sequence[Sequence[SegmentLike]], position: Position
    ) -> list[Rendered]:
        if len(found) == 1:
            return [self._conversation(sample, found[0], position, self.targets)]
        rendered = []
        for last in (i for i, m in enumerate(sample.messages) if m.role == "assistant"):
            if sample.messages[last].is_trained:
                part = replace(sample, messages=sample.messages[: last + 1])
                (segments,) = self._segments(part, position, "last")
                rendered.append(self._conversation(part, segments, position, "last"))
        return rendered

    def _document(self, document: Document) -> Rendered:
        """BOS (if the model is served with one), the text, EOS: every token but BOS is a target."""
        text_ids = self.tokenizer.encode(document.text, parse_special=False)
        has_bos = self.tokenizer.add_bos and self.tokenizer.bos_id is not None and document.begins
        has_eos = self.tokenizer.eos_id is not None and document.ends
        head = [self.tokenizer.bos_id] if has_bos else []
        tail = [self.tokenizer.eos_id] if has_eos else []
        ids = np.asarray([*head, *text_ids, *tail], np.int32)
        mask = np.ones(len(ids), np.bool_)
        mask[: len(head)] = False
        return Rendered(Example(ids, mask), len(ids), False, num_ends=int(has_eos))

    def _conversation(
        self,
        conversation: Conversation,
        segments: Sequence[SegmentLike],
        position: Position,
        targets: Targets,
    ) -> Rendered:
        ids, mask = self._encode(conversation, segments, position, targets)
        num_tokens_before = len(ids)
        if num_tokens_before > self.max_length:
            if self.truncation == "error":
                raise RecordError(
                    position,
                    f"{num_tokens_before} tokens, at most {self.max_length} fit",
                    "Raise model.context_window, shorten the record, or set data.truncation to middle or left.",
                )
            ids, mask = self._shortened(conversation, ids, mask, position, targets)
        is_answer_cut = len(ids) > self.max_length
        if is_answer_cut:
            ids, mask = self._tail(ids, mask)
        num_ends, num_early_ends = self._check_ends(ids, mask, position)
        example = Example(ids, mask)
        if not example.num_targets:
            raise RecordError(position, "no token to learn is left", "Shorten the record.")
        is_truncated = num_tokens_before > self.max_length
        return Rendered(
            example, num_tokens_before, is_truncated, is_answer_cut, num_ends, num_early_ends
        )

    def _shortened(
        self,
        conversation: Conversation,
        ids: TokenIds,
        mask: Mask,
        position: Position,
        targets: Targets,
    ) -> tuple[TokenIds, Mask]:
        """Ids and mask with less context, short enough if there is enough context to cut."""
        search = FitSearch(self.max_length, len(ids), num_characters(conversation))
        shortest, is_found = (ids, mask), False
        while (cut := search.next_cut()) is not None:
            shorter = shortened(conversation, cut, self.truncation)
            if shorter is None:
                break
            (segments, *others) = self._segments(shorter, position, targets)
            assert not others, "a shorter conversation has no more answers"
            trial = self._encode(shorter, segments, position, targets)
            fits = search.tell(cut, len(trial[0]))
            if fits or not is_found:
                shortest, is_found = trial, fits
        return shortest

    def _encode(
        self,
        conversation: Conversation,
        segments: Sequence[SegmentLike],
        position: Position,
        targets: Targets,
    ) -> tuple[TokenIds, Mask]:
        """Ids and mask of the whole conversation, BOS once if the model is served with one.

        Prompts and answers are tokenised separately: at serving the prompt is tokenised before there is an answer.
        """
        texts: list[str] = []
        kinds: list[bool] = []
        for is_target, pieces in itertools.groupby(segments, lambda segment: segment.is_target):
            if text := "".join([piece.text for piece in pieces]):
                texts.append(text)
                kinds.append(is_target)
        found = self.tokenizer.encode_segments(texts)
        bos = self.tokenizer.bos_id
        if bos is not None and self.tokenizer.add_bos:
            found, kinds = [[bos], *found], [False, *kinds]
        ids = np.fromiter(itertools.chain.from_iterable(found), np.int32)
        mask = np.repeat(np.asarray(kinds, np.bool_), [len(piece) for piece in found])
        while bos is not None and ids[:2].tolist() == [bos, bos]:  # the template writes it too
            ids, mask = ids[1:], mask[1:]
        if len(mask) and mask[0]:
            raise RecordError(
                position,
                "the template puts nothing before the answer, so its first token cannot be learned",
                "Use a template with a prompt.",
            )
        if not all(message.is_trained for message in conversation.messages):
            self._mask_untrained(conversation, mask, position, targets)
        return ids, mask

    def _segments(
        self, conversation: Conversation, position: Position, targets: Targets
    ) -> Sequence[Sequence[SegmentLike]]:
        tools: Any = conversation.tools or None
        messages = conversation.messages
        try:
            return self.template.render_training_examples(messages, tools, targets)
        except InputError as error:
            cure = error.hint or "Correct the record, or leave it out."
            if messages[1 if messages[0].role == "system" else 0].role == "assistant":
                cure = "The chat begins with the assistant: put a user message first, or remove that turn."
            raise RecordError(
                position,
                f"the chat template cannot render this record: {error.message.rstrip('.')}",
                cure,
            ) from error

    def _mask_untrained(
        self, conversation: Conversation, mask: Mask, position: Position, targets: Targets
    ) -> None:
        """Take the answers whose weight is 0 out of the mask."""
        runs = _runs(mask)
        answers = [m for m in conversation.messages if m.role == "assistant"]
        if targets == "last":
            answers = answers[-1:]
        if len(runs) != len(answers):
            raise RecordError(
                position,
                "the template joins answers, so a weight of 0 cannot be kept apart",
                "Remove the weights.",
            )
        for (start, end), answer in zip(runs, answers, strict=True):
            if not answer.is_trained:
                mask[start:end] = False
        if not mask.any():
            raise RecordError(
                position,
                "only the last answer is learned (data.targets: last), and its weight is 0",
                "Give it the weight 1, remove the record, or set data.targets: all.",
            )

    def _tail(self, ids: TokenIds, mask: Mask) -> tuple[TokenIds, Mask]:
        """The last `max_length` tokens, BOS kept: the end of the answer and its EOS always stay."""
        keeps_bos = self.tokenizer.add_bos and self.tokenizer.bos_id == ids[0]
        head = 1 if keeps_bos else 0
        cut = len(ids) - (self.max_length - head)
        ids = np.concatenate([ids[:head], ids[cut:]])
        mask = np.concatenate([mask[:head], mask[cut:]])
        mask[0] = False
        return ids, mask

    def _check_ends(self, ids: TokenIds, mask: Mask, position: Position) -> tuple[int, int]:
        """How many end-of-generation tokens are targets, and how many of them stand inside answers.

        Every answer must end with one; what follows it is never generated and is taken out of the mask.
        """
        num_ends = num_early = 0
        for start, end in _runs(mask):
            found = np.flatnonzero(self._is_end[ids[start:end]])
            if not len(found):
                raise RecordError(
                    position,
                    "the rendered answer does not end with an end-of-generation token, so the model would never stop",
                    "Use the base model's own template; `ollatune data` shows what is rendered.",
                )
            if not found[0] and len(found) == 1:
                raise RecordError(
                    position,
                    "the chat template shows nothing of an answer: the model would learn to say nothing",
                    "Write the answer's `content`; its thinking or tool calls alone are not rendered.",
                )
            num_ends += len(found)
            num_early += len(found) - 1
            mask[start + int(found[-1]) + 1 : end] = False
        return num_ends, num_early


def _runs(mask: Mask) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive targets."""
    borders = (np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist()
    if len(mask) and mask[0]:
        borders.insert(0, 0)
    if len(mask) and mask[-1]:
        borders.append(len(mask))
    return list(zip(borders[::2], borders[1::2], strict=True))

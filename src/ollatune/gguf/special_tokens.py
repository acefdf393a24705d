"""Find special tokens in text: the step before words and merges (llama.cpp, `tokenizer_st_partition`).

llama.cpp takes the special tokens one by one, longest first, and cuts each out of the text fragments that are left.
One leftmost-longest search finds the same tokens unless an occurrence of one can reach into an occurrence of another;
whether that is possible is decided once, from the tokens' texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from ollatune.gguf.vocabulary import Kind, Vocabulary

_ASCII_SPACES = " \t\n\v\f\r"

Fragment = str | int
"""Plain text, or the id of a special token."""


class SpecialTokens:
    """Cuts text at its special tokens: USER_DEFINED ones always, CONTROL and UNKNOWN ones on request."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        wanted = int(Kind.CONTROL | Kind.USER_DEFINED | Kind.UNKNOWN)
        hidden = int(Kind.CONTROL | Kind.UNKNOWN)
        every = [i for i, kind in enumerate(vocabulary.kinds) if kind & wanted]
        always = [i for i in every if not vocabulary.kinds[i] & hidden]
        self._strips_right = {i for i in every if vocabulary.kinds[i] & Kind.STRIPS_RIGHT}
        self._every = _Splitter(vocabulary, every)
        self._always = _Splitter(vocabulary, always)

    def split(self, text: str, *, parse_special: bool) -> list[Fragment]:
        """`text` as plain text (never empty) and special ids in order."""
        splitter = self._every if parse_special else self._always
        return splitter.split(text) if text else []

    def without_swallowed_space(self, text: str, previous: int) -> str:
        """`text` as it is read behind the special token `previous`, which may take the white space after it."""
        return text.lstrip(_ASCII_SPACES) if previous in self._strips_right else text


class _Splitter:
    """Cuts text at a fixed set of tokens."""

    def __init__(self, vocabulary: Vocabulary, token_ids: Iterable[int]) -> None:
        self._ids = {vocabulary.tokens[i]: i for i in token_ids}
        longest_first = sorted(self._ids, key=lambda text: -len(text.encode()))
        self._order = {text: rank for rank, text in enumerate(longest_first)}
        self._strips_right = {
            text for text, i in self._ids.items() if vocabulary.kinds[i] & Kind.STRIPS_RIGHT
        }
        self._pattern = re.compile(f"({_alternation(self._ids)})") if self._ids else None
        self._can_overlap = bool(self._strips_right) or _can_overlap(self._ids)

    def split(self, text: str) -> list[Fragment]:
        if self._pattern is None:
            return [text]
        if not self._can_overlap:
            parts = self._pattern.split(text)
            if len(parts) == 1:
                return [text]
            ids = self._ids
            # odd places hold the tokens that were found, even ones the text between them
            return [ids[part] if i % 2 else part for i, part in enumerate(parts) if part]
        fragments: list[Fragment] = [text]
        for token in self._occurring(text, self._pattern):
            fragments = self._cut(fragments, token)
        return fragments

    def _occurring(self, text: str, pattern: re.Pattern[str]) -> list[str]:
        """The tokens that occur anywhere in `text`, longest (in bytes) first."""
        longest_here: set[str] = set()
        match = pattern.search(text)
        while match:
            longest_here.add(match.group())
            match = pattern.search(text, match.start() + 1)
        found = {
            token[:length]
            for token in longest_here
            for length in range(1, len(token) + 1)
            if token[:length] in self._order
        }
        return sorted(found, key=self._order.__getitem__)

    def _cut(self, fragments: Sequence[Fragment], token: str) -> list[Fragment]:
        """Replace every `token` in the plain fragments by its id."""
        token_id = self._ids[token]
        strips_right = token in self._strips_right
        result: list[Fragment] = []
        for fragment in fragments:
            if isinstance(fragment, int) or token not in fragment:
                result.append(fragment)
                continue
            before, *others = fragment.split(token)
            result += (before,) if before else ()
            for rest in others:
                result.append(token_id)
                plain = rest.lstrip(_ASCII_SPACES) if strips_right else rest
                result += (plain,) if plain else ()
        return result


def _alternation(texts: Iterable[str]) -> str:
    """An expression that matches the longest of `texts` at a place, in time that hardly grows with their number."""
    branches: list[str] = []
    for _, group in groupby(sorted(texts), key=lambda text: text[0]):
        same_start = list(group)
        prefix = _common_prefix(same_start[0], same_start[-1])  # sorted: of all of them
        longer = [text[len(prefix) :] for text in same_start if text != prefix]
        optional = "?" if len(longer) < len(same_start) else ""
        branches.append(re.escape(prefix) + (_alternation(longer) + optional if longer else ""))
    return f"(?:{'|'.join(branches)})"


def _common_prefix(one: str, other: str) -> str:
    length = 0
    while one[length : length + 1] == other[length : length + 1] != "":
        length += 1
    return one[:length]


def _can_overlap(texts: Iterable[str]) -> bool:
    """Whether an occurrence of one text may begin inside an occurrence of another, other than inside a run.

    Runs of one character (Gemma has them for blanks and line ends) overlap themselves, but leftmost-longest and
    longest-first cut a run alike, as long as nothing else begins with that character.
    """
    runs = {text[0] for text in texts if len(text) > 1 and text == text[0] * len(text)}
    others = [text for text in texts if text != text[0] * len(text) or len(text) == 1]
    first_characters = runs | {text[0] for text in others}
    if any(text[0] in runs and len(text) > 1 for text in others):
        return True
    return any(not first_characters.isdisjoint(text[1:]) for text in others)

"""Find special tokens in text: the step before words and merges (llama.cpp, `tokenizer_st_partition`).

llama.cpp takes the special tokens one by one, longest first, and cuts each out of the text fragments that are left.
A leftmost-longest search, as Hugging Face's, gives the same except where tokens overlap; here it only finds out
which tokens occur at all, so that the exact procedure has few to go through.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ollatune.gguf.vocabulary import Kind, Vocabulary

_ASCII_SPACES = " \t\n\v\f\r"

Fragment = str | int
"""Plain text, or the id of a special token."""


class SpecialTokens:
    """Cuts text at its special tokens: USER_DEFINED ones always, CONTROL and UNKNOWN ones on request."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = vocabulary.ids
        self._kinds = vocabulary.kinds
        wanted = int(Kind.CONTROL | Kind.USER_DEFINED | Kind.UNKNOWN)
        hidden = int(Kind.CONTROL | Kind.UNKNOWN)
        every = [i for i, kind in enumerate(vocabulary.kinds) if kind & wanted]
        always = [i for i in every if not vocabulary.kinds[i] & hidden]
        self._every = _Finder([vocabulary.tokens[i] for i in every])
        self._always = _Finder([vocabulary.tokens[i] for i in always])

    def split(self, text: str, *, parse_special: bool) -> list[Fragment]:
        """`text` as plain text (never empty) and special ids in order."""
        if not text:
            return []
        finder = self._every if parse_special else self._always
        fragments: list[Fragment] = [text]
        for token in finder.occurring(text):
            fragments = self._cut(fragments, token)
        return fragments

    def _cut(self, fragments: Sequence[Fragment], token: str) -> list[Fragment]:
        token_id = self._ids[token]
        strips_right = bool(self._kinds[token_id] & Kind.STRIPS_RIGHT)
        result: list[Fragment] = []
        for fragment in fragments:
            if isinstance(fragment, int) or token not in fragment:
                result.append(fragment)
                continue
            rest = fragment
            while True:
                before, found, rest = rest.partition(token)
                if before:
                    result.append(before)
                if not found:
                    break
                result.append(token_id)
                if strips_right:
                    rest = rest.lstrip(_ASCII_SPACES)
        return result


class _Finder:
    """Which of `texts` occur in a text, longest (in bytes) first."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = frozenset(texts)
        self._order = {
            text: rank
            for rank, text in enumerate(sorted(texts, key=lambda text: -len(text.encode())))
        }
        by_first: dict[str, list[str]] = {}
        for text in self._order:  # longest first within a first character
            by_first.setdefault(text[0], []).append(re.escape(text[1:]))
        alternatives = (
            f"{re.escape(first)}(?:{'|'.join(rests)})" for first, rests in by_first.items()
        )
        # a lookahead finds overlapping tokens too: at each place the longest that begins there
        self._longest_here = re.compile(f"(?=({'|'.join(alternatives)}))") if texts else None

    def occurring(self, text: str) -> list[str]:
        if self._longest_here is None:
            return []
        longest = {match.group(1) for match in self._longest_here.finditer(text)}
        if not longest:
            return []
        found = {
            token[:length]
            for token in longest
            for length in range(1, len(token) + 1)
            if token[:length] in self._texts
        }
        return sorted(found, key=self._order.__getitem__)

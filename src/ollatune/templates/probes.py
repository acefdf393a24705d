"""Conversations by which two templates are compared."""

from __future__ import annotations

from ollatune.templates.messages import Message

_ODD_TEXTS = (
    "Zażółć gęślą jaźń, 日本語, 👩‍👩‍👧 and \u00a0 a hard space",
    '{{ .System }} {% if x %} {{"{{"}} <|im_end|> </s> [INST] "quotes" \\n `ticks`',
    "  two blanks before, a line end after\n",
    "\n\n\tlines\n\n  and blanks  \n\n",
    "A second\n\nparagraph; { a: [1, 2], b: '%s' } & <b>tags</b>",
)
SYSTEM = "You answer briefly."


def _user(text: str) -> Message:
    return Message("user", text)


def _assistant(text: str) -> Message:
    return Message("assistant", text)


def probe_conversations() -> list[list[Message]]:
    """Prompts with and without a system message, of one to four turns, with contents that trip template engines."""
    system = Message("system", SYSTEM)
    multi_turn = [
        _user("One?"),
        _assistant("1"),
        _user("Two?"),
        _assistant("2"),
        _user("Three?"),
    ]
    conversations = [
        [_user("Hello")],
        [system, _user("Hello")],
        multi_turn[:3],
        multi_turn,
        [system, *multi_turn[:3]],
        [system, *multi_turn],
        [*multi_turn, _assistant("3"), _user("Four?")],
        [_user("First line\nsecond line"), _assistant("Yes.\n\nReally."), _user("Why?")],
        [Message("system", ""), _user("Hello")],
        [_user("")],
    ]
    thinking = Message("assistant", "Four.", thinking="Two and two.")
    conversations += [
        [_user("2 + 2?"), thinking, _user("Sure?")],
        [system, _user("2 + 2?"), thinking, _user("Sure?"), thinking, _user("Really?")],
    ]
    for text in _ODD_TEXTS:
        conversations += [
            [_user(text)],
            [Message("system", text), _user("Hello")],
            [Message("system", text), _user(text)],
            [_user("Hello"), _assistant(text), _user(text)],
            [_user(text), _assistant(text), _user("Hello"), _assistant(text), _user("Bye")],
        ]
    conversations += [
        [_user("Hello"), _assistant("Hi"), Message("system", "Now be formal."), _user("Go on")],
        [
            system,
            _user("Hello"),
            _assistant("Hi"),
            Message("system", "Now be formal."),
            _user("Go on"),
        ],
    ]
    return conversations

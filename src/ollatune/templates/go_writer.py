"""A chat style in Go's template language, as a TEMPLATE for Ollama."""

from __future__ import annotations

from ollatune.templates.go.printf import is_printable, quoted
from ollatune.templates.style import ChatStyle, Wrapper

# Python's str.strip and Jinja's trim remove these; Go's templates have no trim, but can look at bytes.
_ASCII_SPACE = "32 9 10 11 12 13 28 29 30 31"
_TWO_BYTE_SPACE = r'"\u0085" "\u00a0"'
_THREE_BYTE_SPACE = " ".join(
    f'"\\u{code:04x}"'
    for code in (0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
)
# Calls itself with one character less at either end until none of white space is left. `$z`, `$y` and `$x` are where
# the last one, two and three bytes begin: Go's templates cannot subtract, but `len (slice . 2)` is two less than the
# length.
_TRIM = (
    '{{ define "trim" }}{{ if . }}{{ $n := len . }}{{ $z := len (slice . 1) }}'
    f"{{{{ if eq (index . 0) {_ASCII_SPACE} }}}}"
    '{{ template "trim" (slice . 1) }}'
    f"{{{{ else if eq (index . $z) {_ASCII_SPACE} }}}}"
    '{{ template "trim" (slice . 0 $z) }}'
    "{{ else }}{{ $y := 0 }}{{ $x := 0 }}"
    "{{ if ge $n 2 }}{{ $y = len (slice . 2) }}{{ end }}"
    "{{ if ge $n 3 }}{{ $x = len (slice . 3) }}{{ end }}"
    f'{{{{ if and (ge $n 2) (eq (slice . 0 2) {_TWO_BYTE_SPACE}) }}}}{{{{ template "trim" (slice . 2) }}}}'
    f'{{{{ else if and (ge $n 3) (eq (slice . 0 3) {_THREE_BYTE_SPACE}) }}}}{{{{ template "trim" (slice . 3) }}}}'
    f'{{{{ else if and (ge $n 2) (eq (slice . $y) {_TWO_BYTE_SPACE}) }}}}{{{{ template "trim" (slice . 0 $y) }}}}'
    f'{{{{ else if and (ge $n 3) (eq (slice . $x) {_THREE_BYTE_SPACE}) }}}}{{{{ template "trim" (slice . 0 $x) }}}}'
    "{{ else }}{{ . }}{{ end }}{{ end }}{{ end }}{{ end }}"
)
_FIRST = "{{ $first := index .Messages 0 }}"
_LAST_USER = (
    "{{ $last := 0 }}{{ range $i, $_ := .Messages }}"
    '{{ if eq .Role "user" }}{{ $last = $i }}{{ end }}{{ end }}'
)


def write_template(style: ChatStyle) -> str:
    """`style` in Go's template language."""
    is_own = style.system_place == "own"
    later = style.later_system
    thinking = style.thinking
    counts_users = thinking is not None and not thinking.is_always_shown
    is_inside_user = style.system_place in ("first_user", "last_user")
    has_positions = counts_users or is_inside_user or (is_own and later != style.system)
    wrappers = [style.user, style.assistant, style.system, *([later] if later else [])]
    opening = _literal(style.opening)
    if is_own and opening:
        test = 'ne $first.Role "system"'
        if not style.writes_empty_system:
            test = 'not (and (eq $first.Role "system") $first.Content)'
        opening = f"{{{{ if {test} }}}}{opening}{{{{ end }}}}"
    pieces = [
        _TRIM if any(wrapper.is_trimmed for wrapper in wrappers) else "",
        _FIRST if is_inside_user or (is_own and opening) else "",
        _LAST_USER if counts_users else "",
        opening,
        "{{ range $i, $_ := .Messages }}" if has_positions else "{{ range .Messages }}",
        '{{ if eq .Role "user" }}' + _user(style),
        '{{ else if eq .Role "assistant" }}' + _assistant(style),
        _system(style) if is_own else "",
        "{{ end }}{{ end }}" + _literal(style.generation),
    ]
    if thinking is not None and thinking.switched_off:
        off = _literal(thinking.switched_off)
        pieces.append(f"{{{{ if and .IsThinkSet (not .Think) }}}}{off}{{{{ end }}}}")
    return "".join(pieces)


def _system(style: ChatStyle) -> str:
    later = style.later_system
    test = 'eq .Role "system"' if style.writes_empty_system else 'and (eq .Role "system") .Content'
    turn = _wrapped(style.system)
    if later is None:
        test = f"and ({test}) (eq $i 0)"
    elif later != style.system:
        turn = f"{{{{ if eq $i 0 }}}}{turn}{{{{ else }}}}{_wrapped(later)}{{{{ end }}}}"
    return f"{{{{ else if {test} }}}}{turn}"


def _user(style: ChatStyle) -> str:
    """A user's turn, with the system message inside the first or the last one where it belongs there."""
    inner = ""
    if style.system_place in ("first_user", "last_user"):
        is_first = style.system_place == "first_user"
        is_there = "eq $i 1" if is_first else "eq (len (slice $.Messages $i)) 1"
        system = _wrapped(style.system, "$first.Content")
        inner = f'{{{{ if and (eq $first.Role "system") ({is_there}) }}}}{system}{{{{ end }}}}'
    return _wrapped(style.user, inner=inner)


def _assistant(style: ChatStyle) -> str:
    """An assistant's turn, with its thinking where the style shows it."""
    thinking = style.thinking
    if thinking is None:
        return _wrapped(style.assistant)
    test = ".Thinking" if thinking.is_always_shown else "and .Thinking (gt $i $last)"
    shown = f"{_literal(thinking.before)}{{{{ .Thinking }}}}{_literal(thinking.after)}"
    return _wrapped(style.assistant, inner=f"{{{{ if {test} }}}}{shown}{{{{ end }}}}")


def _wrapped(wrapper: Wrapper, content: str = ".Content", *, inner: str = "") -> str:
    """The content in its wrapper, with `inner` directly before it."""
    shown = f'{{{{ template "trim" {content} }}}}' if wrapper.is_trimmed else f"{{{{ {content} }}}}"
    return _literal(wrapper.before) + inner + shown + _literal(wrapper.after)


def _literal(text: str) -> str:
    """Text outside actions. Braces that would begin one, and what a Modelfile drops, stand in a string constant."""
    shown = ""
    for character in reversed(text):
        is_kept = is_printable(character) or character in "\n\t"
        if not is_kept or (character == "{" and shown[:1] in ("{", "")):
            shown = "{{ " + quoted(character) + " }}" + shown
        else:
            shown = character + shown
    return shown

"""Templates that would run code, hang or eat memory: refused with InputError, quickly, and nothing runs."""

from __future__ import annotations

import datetime
import resource
from pathlib import Path

import pytest

from ollatune.base.errors import InputError
from ollatune.templates import jinja, jinja_sandbox
from ollatune.templates.jinja import JinjaTemplate
from ollatune.templates.messages import Message

TODAY = datetime.date(2024, 7, 26)
LONGEST_SECONDS = 6.0

# Each is refused. CANARY is a file that must not come into being.
HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested ranges with output": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "three ranges": (
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{{ a }}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "range beyond the sandbox": "{{ range(99999999)|list|length }}",
    "repeated text": "{{ 'a' * 3000000000 }}",
    "repeated text, other way round": "{{ 3000000000 * 'a' }}",
    "repeated list": "{{ ([0] * 999999999)|length }}",
    "repeated again and again": "{% set a = 'x' * 999999 %}{% set b = a * 999999 %}{{ b }}",
    "wide number format": "{{ '%0999999999d' % 1 }}",
    "wide text format": "{{ '%999999999s' % 'a' }}",
    "format filter": "{{ '%0999999999d'|format(1) }}",
    "str.format": "{{ '{:>2999999999}'.format(1) }}",
    "ljust": "{{ 'a'.ljust(3000000000)|length }}",
    "rjust": "{{ 'a'.rjust(3000000000)|length }}",
    "center": "{{ 'a'.center(3000000000)|length }}",
    "center filter": "{{ 'a'|center(3000000000) }}",
    "zfill": "{{ 'a'.zfill(3000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(3000000000) }}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "nested power": "{{ (9 ** (9 ** 9)) % 7 }}",
    "doubling": (
        "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
    ),
    "replace growth": "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "join growth": "{{ range(99999)|join('b' * 99999)|length }}",
    "endless macro": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "regular output": "{% for a in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    "include": "{% include 'CANARY' %}",
    "import": "{% import 'CANARY' as canary %}",
    "extends": "{% extends 'CANARY' %}",
    "cycler globals": (
        "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}"
    ),
    "cycler init": "{{ cycler.__init__ }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "lipsum globals": "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "namespace dunder": "{{ namespace(__class__='x') }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "format attribute": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "raise MemoryError by lipsum": "{{ lipsum(n=9999999, html=False)|length }}",
    "changes its input": "{{ messages.append(messages[0]) }}",
    "not Jinja at all": "{% for %}",
}  # fmt: skip
QUICK = ("cycler globals", "include", "nested ranges", "repeated text", "wide number format")


def processor_seconds() -> float:
    """Of the child processes that have ended; a busy machine is not the template's fault."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def refusal(name: str, folder: Path) -> tuple[str, float]:
    canary = folder / "canary"
    template = JinjaTemplate(HOSTILE[name].replace("CANARY", str(canary)), today=TODAY)
    started = processor_seconds()
    with pytest.raises(InputError) as caught:
        template.render([Message("user", "Hello")], add_generation_prompt=True)
    seconds = processor_seconds() - started
    assert not canary.exists()
    assert template.digest not in jinja._tried
    return str(caught.value), seconds


@pytest.mark.parametrize("name", QUICK)
def test_hostile_templates_are_refused(name: str, tmp_path: Path) -> None:
    _, seconds = refusal(name, tmp_path)
    assert seconds <= LONGEST_SECONDS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ cycler.__init__ }}", "it reaches for `__init__` of a type"),
        ("{{ messages.append(1) }}", "it reaches for `append` of a list"),
        ("{% for a in range(400) %}{% for b in range(400) %}{% endfor %}{% endfor %}", "it loops more than"),
        ("{% for a in range(30) %}{{ 'x' * 100000 }}{% endfor %}", "it writes more than"),
        ("{{ 'a' * 1000001 }}", "it repeats a value"),
        ("{{ 2 ** 4097 }}", "it computes a number"),
        ("{{ '%99999d' % 1 }}", "it formats text wider"),
        ("{{ 'a'.ljust(10001) }}", "it pads text"),
        ("{{ namespace(__a=1) }}", "it stores `__a` on a namespace"),
        ("{% include 'x' %}", "it includes or imports another template"),
        ("{% if %}", "it does not parse"),
    ],
)  # fmt: skip
def test_each_guard_names_its_reason(text: str, reason: str) -> None:
    request = {"template": text, "now": "2024-07-26", "conversations": [{"messages": []}]}
    assert reason in jinja_sandbox.refusal(request)


def test_the_child_process_may_not_use_much_memory() -> None:
    text = "{{ ('a' * 20000) | replace('a', 'b' * 99999) | length }}"
    with pytest.raises(InputError, match="MemoryError"):
        JinjaTemplate(text, today=TODAY).render(
            [Message("user", "Hello")], add_generation_prompt=True
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(HOSTILE) - set(QUICK)))
def test_every_hostile_template_is_refused(name: str, tmp_path: Path) -> None:
    assert len(HOSTILE) >= 32
    _, seconds = refusal(name, tmp_path)
    assert seconds <= LONGEST_SECONDS

"""Templates are programs from strangers: bounded in time and memory, and they reach nothing but their input."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from osync.engine.goparse import TemplateError
from osync.engine.gotemplate import GoTemplate
from osync.engine.template import ChatTemplate
from osync.errors import BadRequest, ModelUnusable

MANY = [{"role": str(number), "content": "c" * 20_000} for number in range(60)]
NESTED = "{{ range $.Messages }}"
DOUBLING = '{{ $x := "ab" }}' + NESTED + "{{ $x = print $x $x }}{{ end }}{{ len $x }}"
JOINING = "{{ $x := json $.Messages }}{{ print" + " $x" * 400 + " }}"


@pytest.mark.parametrize(
    "source",
    [
        NESTED * 6 + "{{ end }}" * 6,
        NESTED * 6 + "x" + "{{ end }}" * 6,
        NESTED * 2 + "{{ $x := len (json $.Messages) }}" + "{{ end }}" * 2 + "y",
        NESTED * 2 + "{{ $x := json (json (json $)) }}" + "{{ end }}" * 2,
        NESTED * 3 + "{{ $x := slice $.Messages 0 }}" + "{{ end }}" * 3,
        NESTED * 2 + "{{ $x := eq (json $) (json $) }}" + "{{ end }}" * 2,
        DOUBLING,
        NESTED + "{{ json $ }}" + "{{ end }}",
        JOINING,
        "{{ " + "(" * 499 + " }}",
        "{{ " + "(" * 240 + ".System" + ")" * 240 + " }}",
        "{{ .System" + "| len " * 240 + "}}",
        "{{ if 1 }}{{ else if 1 }}" * 2000,
        "{{ with . }}" * 2000 + "{{ end }}" * 2000,
        "{{ slice .Messages " + "9" * 5000 + " }}",
        "{{ range 7 }}{{ end }}",
        "x" * (2 << 20),
    ],
)
def test_hostile_go_templates_end_soon_with_an_error(source):
    began = time.process_time()
    with pytest.raises(TemplateError):
        GoTemplate(source).render(MANY)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("source", [DOUBLING, JOINING])
def test_hostile_go_templates_take_little_memory(source):
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            GoTemplate(source).render(MANY)
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ .System.__class__ }}{{ .Messages.__len__ }}{{ $.__globals__ }}.", "."),
        ("{{ len .Messages }}{{ .Messages.append }}", "60"),
        ("{{ index .Messages 0 }}", None),
        ('{{ index .System "__class__" }}', None),
        ("{{ call .System }}", None),
        ("{{ printf .System }}", None),
        ("{{ html .System }}", None),
        ("{{ index .Messages -99 }}", None),
    ],
)
def test_go_templates_reach_only_what_they_are_given(source, text):
    if source == "{{ index .Messages 0 }}":
        assert GoTemplate(source).render([{"role": "user", "content": "hi"}]) == '{"Role":"user","Content":"hi"}'
    elif text is None:
        with pytest.raises(TemplateError):
            GoTemplate(source).render(MANY)
    else:
        assert GoTemplate(source).render(MANY) == text


def test_a_long_honest_conversation_is_within_the_budget():
    talk = [{"role": ("user", "assistant")[number % 2], "content": "word " * 50} for number in range(2000)]
    source = (
        '{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}{{ if eq .Role "user" }}'
        "<u>{{ .Content }}{{ else }}<a>{{ .Content }}{{ end }}{{ if $last }}<end>{{ end }}{{ end }}"
    )
    assert GoTemplate(source).render(talk).endswith("word <end>")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ ''['__class__'] }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{m.__class__}'.format_map({'m': messages}) }}",
        "{{ lipsum.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ namespace.__init__ }}",
        "{{ messages|map(attribute='__class__')|list }}",
        "{{ messages.append({}) }}{{ messages|length }}",
        "{% import 'os' as os %}{{ os }}",
        "{% include '/etc/hostname' %}",
        "{% set x = joiner.__init__.__globals__ %}{{ x.os.popen('id').read() }}",
    ],
)
async def test_jinja_templates_reach_no_python(source):
    pytest.importorskip("jinja2")
    template = ChatTemplate(jinja=source)
    try:
        text = await template.render([{"role": "user", "content": "hi"}])
    except (ModelUnusable, BadRequest):
        return
    finally:
        await template.close()
    assert not any(word in text for word in ("class", "module", "function", "builtins", "uid=", "os")), text
    assert len(text) < 50

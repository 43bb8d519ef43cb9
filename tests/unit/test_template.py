"""Chat templates: Go's, jinja in its own process, and ChatML."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.engine.goparse import TemplateError
from osync.engine.gotemplate import GoTemplate
from osync.engine.template import ChatTemplate, parse_template
from osync.errors import BadRequest, ModelUnusable

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "more"},
]
CHATML = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
)

# Ollama's own templates for ChatML, mistral-instruct, llama3 and phi-like models.
GO_CHATML = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}
{{- end }}"""


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (GO_CHATML, CHATML),
        (
            ("{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ if .Prompt }}<|im_start|>user\n"
            "{{ .Prompt }}<|im_end|>\n{{ end }}<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"),
            CHATML,
        ),
        ("[INST] {{ if .System }}{{ .System }} {{ end }}{{ .Prompt }} [/INST]",
         "[INST] S hi [/INST]yo[INST] more [/INST]"),
        (('{{ range .Messages }}{{ if eq .Role "system" }}<s>{{ .Content }}{{ else if eq .Role "user" }}'
         "<u>{{ .Content }}{{ else }}<a>{{ .Content }}{{ end }}{{ end }}<a>"), "<s>S<u>hi<a>yo<u>more<a>"),
        ("{{ $s := .System }}{{ with $s }}{{ . }}{{ end }}{{ if .Tools }}T{{ end }}{{ len .Messages }}", "S4"),
        ("{{/* nothing */}}{{ $n := 0 }}{{ range .Messages }}{{ $n = len .Content }}{{ end }}{{ $n }}", "4"),
        ('{{ .Messages | len | printf }}', None),
        ("{{ template \"x\" }}", None),
        ("{{ if .System }}", None),
        ("{{ end }}", None),
        ("{{ nope .System }}", None),
        ("{{ .System", None),
    ],
)  # fmt: skip
def test_go_templates(source, text):
    if text is None:
        with pytest.raises(TemplateError):
            GoTemplate(source)
    else:
        assert GoTemplate(source).render(TALK) == text


def test_a_go_template_stays_within_its_budget():
    loop = "{{ range .Messages }}" * 6 + "x" + "{{ end }}" * 6
    inner = loop.replace("{{ range .Messages }}", "{{ range $.Messages }}")
    with pytest.raises(TemplateError, match="too long"):
        GoTemplate(inner).render([{"role": str(i), "content": "c"} for i in range(20)])


@given(st.text(alphabet='{}.|()$:=-"`abcSystem irangeifend ', max_size=80))
def test_any_text_is_a_go_template_or_an_error(source):
    try:
        GoTemplate("{{" + source + "}}").render(TALK)
    except TemplateError:
        pass


def test_a_requests_template_that_cannot_be_parsed_is_a_bad_request():
    with pytest.raises(BadRequest):
        parse_template("{{ if }}")


async def render(messages=TALK, **kwargs) -> str:
    template = ChatTemplate(**kwargs)
    try:
        await template.start()
        return await template.render(messages)
    finally:
        await template.close()


JINJA = (
    "{% for message in messages %}\n{{ '<|im_start|>' + message['role'] + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}\n"
)


async def test_jinja_as_transformers_renders_it():
    pytest.importorskip("jinja2")
    assert await render(jinja=JINJA) == CHATML
    assert await render(jinja="{{ bos_token }}|{{ messages[1] | tojson }}", bos="<s>") == (
        '<s>|{"role": "user", "content": "hi"}'
    )
    assert (
        await render(jinja="{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}x{% endfor %}") == "x"
    )


async def test_without_any_template_it_is_chatml_with_its_stop():
    assert await render() == CHATML
    assert ChatTemplate().stops == ("<|im_end|>",)
    assert await render(go="{{ template }}") == CHATML  # not understood


async def test_a_last_word_of_the_assistant_is_continued():
    assert (await render([*TALK, {"role": "assistant", "content": "Well"}], jinja=JINJA)).endswith("assistant\nWell")


async def test_a_template_that_refuses_system_messages_gets_them_merged():
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    assert await render(jinja=refuses) == "S\n\nhi"
    with pytest.raises(BadRequest, match="no system"):
        await render([TALK[0]], jinja=refuses)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ range(10**9) | list }}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
        "{{ ().__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ undefined.attribute }}",
    ],
)
async def test_hostile_templates_end_in_time_with_an_error(source):
    pytest.importorskip("jinja2")
    template = ChatTemplate(jinja=source, deadline_s=0.3)
    await template.start()
    began = time.monotonic()
    with pytest.raises(ModelUnusable, match="chat template"):
        await template.render(TALK)
    assert time.monotonic() - began < 10
    with pytest.raises(ModelUnusable):  # and again: a new process took the old one's place
        await template.render(TALK)
    await template.close()


async def test_a_template_with_a_fault_says_so_at_the_start():
    pytest.importorskip("jinja2")
    with pytest.raises(ModelUnusable, match="TemplateSyntaxError"):
        await render(jinja="{% for %}")

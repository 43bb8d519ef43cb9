"""Model names: Ollama's rules for reading, comparing and showing them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.errors import BadRequest
from osync.wire import names

FIRST = "abcXYZ019_"
PART = st.builds(lambda a, b: a + b, st.sampled_from(FIRST), st.text(FIRST + "-.", max_size=20))
NAMESPACE = st.builds(lambda a, b: a + b, st.sampled_from(FIRST), st.text(FIRST + "-", max_size=20))
HOST = st.builds(lambda h, p: h + p, PART, st.sampled_from(["", ":5000"]))
TAG = PART.filter(lambda t: t.lower() not in {"cloud", "local"} and not t.lower().endswith("-cloud"))


@st.composite
def written(draw: st.DrawFn) -> str:
    text = draw(PART)
    if draw(st.booleans()):
        text = f"{draw(NAMESPACE)}/{text}"
        if draw(st.booleans()):
            text = f"{draw(HOST)}/{text}"
    return f"{text}:{draw(TAG)}" if draw(st.booleans()) else text


@pytest.mark.parametrize(
    ("text", "canonical", "display"),
    [
        ("smol", "registry.ollama.ai/library/smol:latest", "smol:latest"),
        ("Smol:135M", "registry.ollama.ai/library/smol:135m", "Smol:135M"),
        ("library/smol", "registry.ollama.ai/library/smol:latest", "smol:latest"),
        ("LIBRARY/smol", "registry.ollama.ai/library/smol:latest", "smol:latest"),
        ("me/smol:x", "registry.ollama.ai/me/smol:x", "me/smol:x"),
        ("registry.ollama.ai/library/smol:latest", "registry.ollama.ai/library/smol:latest", "smol:latest"),
        ("hf.co/Org/Repo-GGUF:Q4_K_M", "hf.co/org/repo-gguf:q4_k_m", "hf.co/Org/Repo-GGUF:Q4_K_M"),
        ("localhost:5000/ns/m", "localhost:5000/ns/m:latest", "localhost:5000/ns/m:latest"),
        ("http://localhost:5000/ns/m:x", "localhost:5000/ns/m:x", "localhost:5000/ns/m:x"),
        ("smol:local", "registry.ollama.ai/library/smol:latest", "smol:latest"),
        ("smol:q8_0:local", "registry.ollama.ai/library/smol:q8_0", "smol:q8_0"),
        (" smol ", "registry.ollama.ai/library/smol:latest", "smol:latest"),
        ("oss:120b-cloud", "registry.ollama.ai/library/oss:120b-cloud", "oss:120b-cloud"),
    ],
)
def test_names_are_read_as_ollama_reads_them(text: str, canonical: str, display: str) -> None:
    assert names.canonical(text) == canonical
    assert names.display(text) == display


@pytest.mark.parametrize(
    "text",
    ["", " ", ":", "m:", ":tag", "/m", "ns//m", "a/b/c/d", "-m", ".m", "m:-t", "m@sha256:00", "mö", "n.s/m",
     "m m", "m:a:b", "h:1:2/n\n/m", "m" * 81, "m:" + "t" * 81, "h" * 351 + "/n/m", "ftp://h/n/m", "m\n"[:1] + "\x00"],
)  # fmt: skip
def test_what_is_no_name_is_refused_in_ollamas_words(text: str) -> None:
    with pytest.raises(BadRequest, match=r"^invalid model name$"):
        names.parse(text)


def test_longest_parts_are_allowed() -> None:
    name = names.parse(f"{'h' * 350}/{'n' * 80}/{'m' * 80}:{'t' * 80}")
    assert (len(name.host), len(name.namespace), len(name.model), len(name.tag)) == (350, 80, 80, 80)


@given(written())
def test_display_and_canonical_name_the_same_model(text: str) -> None:
    assert names.same(text, names.display(text))
    assert names.canonical(names.canonical(text)) == names.canonical(text)
    assert names.display(names.display(text)) == names.display(text)
    assert names.same(text.swapcase(), text)
    assert ":" in names.display(text).rpartition("/")[2]


@given(st.text(max_size=60))
def test_any_text_has_a_key_and_never_another_error(text: str) -> None:
    assert names.key(names.key(text)) == names.key(text)
    try:
        parsed = names.parse(text)
    except BadRequest:
        return
    assert names.parse(parsed.canonical).canonical == parsed.canonical


@pytest.mark.parametrize(
    ("text", "bare", "source"),
    [
        ("m", "m", ""),
        ("m:7b", "m:7b", ""),
        ("m:cloud", "m", "cloud"),
        ("m:CLOUD", "m", "cloud"),
        ("m:120b-cloud", "m:120b", "cloud"),
        ("ns/m:local", "ns/m", "local"),
        ("m-cloud", "m-cloud", ""),
        ("host:5000/x-cloud", "host:5000/x-cloud", ""),
    ],
)
def test_sources_are_split_off(text: str, bare: str, source: str) -> None:
    assert names.split_source(text) == (bare, source)
    assert names.is_cloud(text) == (source == "cloud")


@pytest.mark.parametrize("text", ["m:cloud:local", "m:7b-cloud:local", "m:local:cloud"])
def test_two_sources_contradict(text: str) -> None:
    with pytest.raises(BadRequest, match="use either :local or :cloud, not both"):
        names.parse(text)

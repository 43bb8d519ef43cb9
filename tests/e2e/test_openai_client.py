"""The official `openai` client against engine nodes: the gateway translates."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.daemons import Process
from tests.e2e.conftest import MODEL

pytestmark = pytest.mark.engine
QUESTION = [{"role": "user", "content": "What color is the sky?"}]


@pytest.fixture
def client(engine: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_chat_completion(client: openai.OpenAI):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
    assert "blue" in (answer.choices[0].message.content or "")
    assert answer.object == "chat.completion" and answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_completion_stream_with_usage(client: openai.OpenAI):
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
    stream = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=24, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage and chunks[-1].choices == []
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")


def test_text_completion(client: openai.OpenAI):
    answer = client.completions.create(model=MODEL, prompt="Say hello.", temperature=0, max_tokens=8)
    assert answer.choices[0].text and answer.usage and answer.usage.completion_tokens <= 8


def test_models(client: openai.OpenAI):
    assert MODEL in [m.id for m in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def test_an_absent_model_is_openais_error(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nothing", messages=QUESTION)
    assert "nothing" in caught.value.message

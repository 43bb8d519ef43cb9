"""Model names as Ollama reads, compares and writes them: `[host/][namespace/]model[:tag]`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from osync.errors import BadRequest

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

Source = Literal["", "local", "cloud"]

_INVALID = "invalid model name"
_FIRST = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_REST = _FIRST | frozenset("-.")
_CHARSET = {"host": _REST | {":"}, "namespace": _REST - {"."}, "model": _REST, "tag": _REST}
_MAX_LENGTH = {"host": 350, "namespace": 80, "model": 80, "tag": 80}
_MAX_NAME = 350 + 3 * 80 + len("https://") + 3


@dataclass(frozen=True, slots=True)
class ModelName:
    """A valid name with its defaults filled in, in the spelling that it was given."""

    model: str
    tag: str = DEFAULT_TAG
    namespace: str = DEFAULT_NAMESPACE
    host: str = DEFAULT_HOST
    scheme: str = "https"

    @property
    def canonical(self) -> str:
        """All four parts, case-folded: equal exactly for names that Ollama takes for the same."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}".lower()

    @property
    def display(self) -> str:
        """The shortest form, always with the tag, spelling kept."""
        name = f"{self.model}:{self.tag}"
        if self.host.lower() != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{name}"
        if self.namespace.lower() != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{name}"
        return name


def parse(text: str) -> ModelName:
    """Read a name; a `:local` suffix is taken off. Raises BadRequest in Ollama's words."""
    bare, source = split_source(text)
    return _parse(bare if source == "local" else text.strip())


@lru_cache(maxsize=4096)
def _parse(text: str) -> ModelName:
    if len(text) > _MAX_NAME:
        raise BadRequest(_INVALID)
    rest, tag = text, DEFAULT_TAG
    namespace, host, scheme = DEFAULT_NAMESPACE, DEFAULT_HOST, "https"
    if rest.rfind(":") > rest.rfind("/"):
        rest, _, tag = rest.rpartition(":")
    rest, slash, model = rest.rpartition("/")
    if slash:
        rest, slash, namespace = rest.rpartition("/")
        if slash:
            before, separator, after = rest.partition("://")
            scheme, host = (before, after) if separator else ("https", before)
    for kind, part in (("host", host), ("namespace", namespace), ("model", model), ("tag", tag)):
        if not (0 < len(part) <= _MAX_LENGTH[kind] and part[0] in _FIRST and _CHARSET[kind].issuperset(part)):
            raise BadRequest(_INVALID)
    if scheme.lower() not in {"http", "https"}:
        raise BadRequest(_INVALID)
    return ModelName(model, tag, namespace, host, scheme)


def canonical(text: str) -> str:
    """Return the form to compare by. Raises BadRequest for what is no name."""
    return parse(text).canonical


def display(text: str) -> str:
    """Return the shortest form, with its tag. Raises BadRequest for what is no name."""
    return parse(text).display


def key(text: str) -> str:
    """Return the form to compare by, of any text: what is no name stands for itself. Never raises."""
    try:
        return canonical(text)
    except BadRequest:
        return text.strip().lower()


def same(a: str, b: str) -> bool:
    """Return True if Ollama takes both for the same model."""
    return key(a) == key(b)


def split_source(text: str) -> tuple[str, Source]:
    """Split off `:local`, `:cloud` or `-cloud`: where the model must run. Raises BadRequest on two."""
    text = text.strip()
    bare, source = _cut_source(text)
    if source and _cut_source(bare)[1]:
        raise BadRequest(f'use either :local or :cloud, not both: "{text}"')
    return bare, source


def is_cloud(text: str) -> bool:
    """Return True if the name says that the model runs in Ollama's cloud."""
    return _cut_source(text.strip())[1] == "cloud"


def _cut_source(text: str) -> tuple[str, Source]:
    before, colon, suffix = text.rpartition(":")
    word = suffix.strip().lower()
    if not colon or "/" in word:
        return text, ""
    if word == "cloud":
        return before, "cloud"
    if word == "local":
        return before, "local"
    if word.endswith("-cloud"):
        return f"{before}:{suffix.strip()[: -len('-cloud')]}", "cloud"
    return text, ""

"""Request bodies of the engine's routes: what it honours of a conversation, and what it refuses."""

from __future__ import annotations

from osync.errors import NotSupported
from osync.wire import fields


class Fields(fields.Fields):
    """A request of /api/generate or /api/chat."""

    def messages(self) -> list[dict[str, str]]:
        """Return a conversation: role and content of each message. Raises NotSupported for more."""
        messages: list[dict[str, str]] = []
        for item in self.array("messages", "[]api.Message"):
            if not isinstance(item, dict):
                raise self.wrong("messages", item, "api.Message")
            message = Fields(item, f"{self._struct}.messages")
            for name in ("images", "tool_calls"):
                if message.raw(name):
                    raise not_supported(f"messages.{name}")
            messages.append({"role": message.text("role").lower(), "content": message.text("content")})
        return messages

    def refuse(self, *names: str) -> None:
        """Raise NotSupported if one of these fields asks for something."""
        for name in names:
            if self.raw(name):
                raise not_supported(name)


def not_supported(name: str) -> NotSupported:
    """Return the error for a field that the engine cannot honour yet."""
    return NotSupported(
        f'the engine backend does not support "{name}" yet; leave it out, or use a node whose backend is ollama'
    )

"""What the commands of `osync` share: which server, how errors end, options of a request."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, ParamSpec

import typer

from osync.client.synchronous import OllamaClient
from osync.errors import ConfigError, OsyncError

P = ParamSpec("P")

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000

Host = Annotated[str | None, typer.Option(help="Host of the proxy.", show_default=DEFAULT_HOST)]
Port = Annotated[int | None, typer.Option(help="Its HTTP port.", show_default=str(DEFAULT_PORT))]
Url = Annotated[str | None, typer.Option(help="Its whole address [OSYNC_URL]; several with commas.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="Option of the model, repeatable.")
]


def urls(host: str | None, port: int | None, url: str | None) -> list[str]:
    """Return the servers to ask: --url, --host and --port, OSYNC_URL, this host; the first that is given."""
    if url is None and host is None and port is None:
        url = os.environ.get("OSYNC_URL", "").strip() or None
    if url is not None:
        given = [part.strip() for part in url.split(",") if part.strip()]
        return [part if "://" in part else f"http://{part}" for part in given]
    name = host or DEFAULT_HOST
    name = f"[{name}]" if ":" in name and not name.startswith("[") else name
    return [f"http://{name}:{port or DEFAULT_PORT}"]


def connect(host: str | None, port: int | None, url: str | None) -> OllamaClient:
    """Return a client for the servers that the flags name."""
    return OllamaClient(base_urls=urls(host, port, url), api_key=os.environ.get("OSYNC_API_KEY") or None)


def model_options(pairs: list[str] | None) -> dict[str, Any]:
    """Parse NAME=VALUE; a value is JSON where it can be, else text."""
    options: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not (name and equals):
            raise ConfigError(f"option {pair!r} is not NAME=VALUE, such as temperature=0")
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = text
    return options


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end with one line on stderr and status 1 where osync has an error."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except OsyncError as error:
            typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from None
        except BrokenPipeError:  # the reader of our output has seen enough, as in `osync models | head -1`
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - Python flushes it at the end
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return run

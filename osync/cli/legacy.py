"""The original's commands: server, proxy and client, of `osync` and as scripts of their own.

What starts a daemon is imported when it starts one, so that `osync --help` stays quick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from osync.cli.options import reported, urls

Insecure = Annotated[bool | None, typer.Option("--insecure", help="Listen beyond loopback without authentication.")]


def _run(flags: dict[str, object]) -> None:
    from osync.cli.daemon import run

    raise typer.Exit(run(flags))


@reported
def _server(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port.", show_default="50051")] = None,
    ollama_host: Annotated[
        str | None, typer.Option(help="The Ollama that it lends [OLLAMA_HOST].", show_default="localhost:11434")
    ] = None,
    insecure: Insecure = None,
) -> None:
    """Lend this host's Ollama to proxies: `osyncd --role node`."""
    backend = {"ollama_host": _with_scheme(ollama_host)} if ollama_host else {}
    _run({"role": ["node"], "host": host, "grpc_port": port, "insecure": insecure, **backend})


def _with_scheme(host: str) -> str:
    return host if "://" in host else f"http://{host}" if ":" in host else f"http://{host}:11434"


@reported
def _proxy(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port.", show_default="8000")] = None,
    servers: Annotated[
        list[str] | None, typer.Option(help="Nodes as host:port, with commas or repeated [OLLAMA_SERVERS].")
    ] = None,
    insecure: Insecure = None,
) -> None:
    """Make one Ollama of several nodes: `osyncd --role proxy`."""
    _run({"role": ["proxy"], "host": host, "port": port, "servers": servers or None, "insecure": insecure})


@reported
def _client(
    model: Annotated[str, typer.Option(help="Name of the model.")],
    prompt: Annotated[str, typer.Option(help="What to answer.")],
    host: Annotated[str, typer.Option(help="Host of the proxy.")] = "localhost",
    port: Annotated[int, typer.Option(help="Its HTTP port.")] = 8000,
    use_async: Annotated[bool, typer.Option("--async", help="Ask with AsyncOllamaClient.")] = False,
) -> None:
    """Print one answer as it comes."""
    servers = urls(host, port, None)
    if use_async:
        import asyncio

        asyncio.run(_ask_async(servers, model, prompt))
        return
    from osync.client.synchronous import OllamaClient

    with OllamaClient(base_urls=servers) as client, client.generate(model, prompt) as stream:
        for piece in stream:
            _print(piece.response)
    typer.echo()


async def _ask_async(servers: list[str], model: str, prompt: str) -> None:
    from osync.client.asynchronous import AsyncOllamaClient

    async with AsyncOllamaClient(base_urls=servers) as client, client.generate(model, prompt) as stream:
        async for piece in stream:
            _print(piece.response)
    typer.echo()


def _print(text: str) -> None:
    typer.echo(text, nl=False)


def add_to(app: typer.Typer) -> None:
    """Add server, proxy and client to the commands of `osync`."""
    for name, command in (("server", _server), ("proxy", _proxy), ("client", _client)):
        app.command(name, rich_help_panel="As in the original")(command)


def script(name: str, command: Callable[..., None]) -> None:
    """Run one command as a program of its own."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(command)
    app(prog_name=name)


def server() -> None:
    """Entry point of osync-server."""
    script("osync-server", _server)


def proxy() -> None:
    """Entry point of osync-proxy."""
    script("osync-proxy", _proxy)


def client() -> None:
    """Entry point of osync-client."""
    script("osync-client", _client)

"""The original's commands for distributed inference: dist and rpc-server, of `osync` and as scripts of their own.

What starts a daemon is imported when it starts one, so that `osync --help` stays quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from osync.cli.legacy import Insecure, script
from osync.cli.options import Options, connect, model_options, reported

DEFAULT_PORT = 50052
"""The original's port of a shard."""


def listed(values: Sequence[str] | None) -> list[str]:
    """Return the items of an option that is repeated, or has commas."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


@reported
def _dist(
    model: Annotated[str, typer.Option(help="Name of the model.")],
    prompt: Annotated[str, typer.Option(help="What to answer.")],
    servers: Annotated[
        list[str] | None,
        typer.Option(help="Shards and nodes as host:port, with commas or repeated: one answer without a proxy."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Host of a running proxy.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Its HTTP port.", show_default="8000")] = None,
    stages: Annotated[int | None, typer.Option(help="At most so many stages.", min=1)] = None,
    shards: Annotated[list[str] | None, typer.Option(help="Only these of the shards.")] = None,
    activation_dtype: Annotated[str | None, typer.Option(help="f32, f16 or q8: what stages send each other.")] = None,
    models_dir: Annotated[list[Path] | None, typer.Option(help="With --servers: where this host's models are.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="With --servers: where headers are kept.")] = None,
    option: Options = None,
    insecure: Insecure = None,
) -> None:
    """Print one answer of a model that is split over shards."""
    options: dict[str, Any] = {**model_options(option), "distributed": True}
    given = {"stages": stages, "shards": listed(shards) or None, "activation_dtype": activation_dtype}
    options |= {name: value for name, value in given.items() if value is not None}
    if not servers:
        with connect(host, port, None) as client, client.generate(model, prompt, options=options) as stream:
            for piece in stream:
                typer.echo(piece.response, nl=False)
        typer.echo()
        return
    import asyncio

    from osync.cli.temporary import answer
    from osync.config import load

    flags: dict[str, Any] = {
        "role": ["proxy"],
        "host": ("0.0.0.0" if insecure else "127.0.0.1"),  # noqa: S104 (asked for)
        "port": 0,
        "grpc_port": 0,
        "servers": servers,
        "rpc_servers": [],
        "models_dir": [str(path) for path in models_dir] if models_dir else None,
        "state_dir": str(state_dir) if state_dir else None,
        "insecure": insecure,
        "distributed": True,
    }
    settings = load(flags).settings
    asyncio.run(answer(settings, model, prompt, options, lambda text: typer.echo(text, nl=False)))
    typer.echo()


@reported
def _rpc_server(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int, typer.Option(help="gRPC port.")] = DEFAULT_PORT,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, metal or vulkan.", show_default="auto")] = None,
    flash_attention: Annotated[
        bool | None, typer.Option("--flash-attention/--no-flash-attention", help="As the device can, where not given.")
    ] = None,
    context_window: Annotated[int | None, typer.Option(help="Context length of models.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Quantization to prefer, such as q4_0.")] = None,
    discovery: Annotated[
        bool | None, typer.Option("--discovery/--no-discovery", help="Let proxies find this shard by themselves.")
    ] = None,
    interface: Annotated[str | None, typer.Option(help="Network interface to be found on.")] = None,
    memory: Annotated[str | None, typer.Option(help="What it lends: 80%, 12GiB, bytes.", show_default="80%")] = None,
    models_dir: Annotated[list[Path] | None, typer.Option(help="Where this host's models are.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Where slices of models are kept.")] = None,
    insecure: Insecure = None,
) -> None:
    """Lend this host's memory and compute to models split over several: `osyncd --role shard`."""
    from osync.cli.daemon import run
    from osync.config import fields

    known = {f.name for f in fields()}
    network = {"discovery": discovery, "interface": interface}
    for name in [name for name, value in network.items() if value and name not in known]:
        typer.echo(f"osync: --{name} has no effect yet: name this shard to proxies with --servers host:port", err=True)
    flags: dict[str, Any] = {
        "role": ["shard"],
        "host": host,
        "grpc_port": port,
        "device": device,
        "flash_attention": None if flash_attention is None else "on" if flash_attention else "off",
        "context_window": context_window,
        "quantize": quantize,
        "memory": memory,
        "models_dir": [str(path) for path in models_dir] if models_dir else None,
        "state_dir": str(state_dir) if state_dir else None,
        "insecure": insecure,
        **{name: value for name, value in network.items() if name in known},
    }
    raise typer.Exit(run(flags))


def add_to(app: typer.Typer) -> None:
    """Add dist and rpc-server to the commands of `osync`."""
    for name, command in (("dist", _dist), ("rpc-server", _rpc_server)):
        app.command(name, rich_help_panel="As in the original")(command)


def dist() -> None:
    """Entry point of osync-dist."""
    script("osync-dist", _dist)


def rpc_server() -> None:
    """Entry point of osync-rpc."""
    script("osync-rpc", _rpc_server)

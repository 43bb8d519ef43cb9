"""The command `osync`: what a user asks a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from osync.cli import distributed, legacy
from osync.cli.options import Host, Json, Options, Port, Url, connect, model_options, reported
from osync.cli.tables import ago, print_json, print_table, size
from osync.client.answers import ShowResponse
from osync.errors import BadRequest, ModelNotFound, NotSupported, OsyncError
from osync.version import __version__

app = typer.Typer(
    name="osync",
    help="Ask a cluster of Ollamas. The daemon is `osyncd`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="Name of the model, as name:tag.")]


def main() -> None:
    """Entry point of osync."""
    app()


@app.command()
@reported
def status(host: Host = None, port: Port = None, url: Url = None, as_json: Json = False) -> None:
    """Show the nodes of the cluster."""
    from osync.cli.status import print_status

    with connect(host, port, url) as client:
        cluster = client.status()
    if not cluster.raw:
        raise NotSupported("what answers there is no osync proxy; name one with --host and --port, or --url")
    if as_json:
        print_json(cluster.raw)
    else:
        print_status(cluster)


@app.command()
@reported
def plan(
    model: Model,
    stages: Annotated[int | None, typer.Option(help="At most so many stages.", min=1)] = None,
    shards: Annotated[
        list[str] | None, typer.Option(help="Only these, by address, node id or host; commas or repeated.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of one sequence.", min=1)] = None,
    host: Host = None,
    port: Port = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show how a model would be split over the shards now, and why. Status 1 where it cannot be."""
    with connect(host, port, url) as client:
        found = client.plan(model, stages=stages, shards=distributed.listed(shards), context=context)
    if as_json:
        print_json(found.raw)
    elif found.plan:
        print_table(found.table["header"], found.table["rows"])
        typer.echo(found.reason)
        where = "split" if found.decision.get("is_split") else f"whole, on {found.decision.get('node') or 'no node'}"
        typer.echo(f"{found.model} is served {where}: {found.decision.get('reason')}")
    else:
        typer.echo(f"{found.model} cannot be split: {found.reason}")
    if not found.plan:
        raise typer.Exit(1)


@app.command()
@reported
def models(host: Host = None, port: Port = None, url: Url = None, as_json: Json = False) -> None:
    """List the models that nodes have, and which nodes have them."""
    with connect(host, port, url) as client:
        found, cluster = client.list(), client.status()
    where = {str(row["name"]): [str(h["hostname"]) for h in row["hosts"]] for row in cluster.models}
    if as_json:
        rows = [{**m.raw, "hosts": where.get(m.name or m.model, [])} for m in found.models]
        print_json({**found.raw, "models": rows})
        return
    print_table(
        ("name", "id", "size", "parameters", "quantization", "hosts", "modified"),
        [(m.name or m.model, m.digest.removeprefix("sha256:")[:12], size(m.size),
          m.details.parameter_size or "-", m.details.quantization_level or "-",
          ",".join(where.get(m.name or m.model, [])) or "-", ago(m.modified_at)) for m in found.models],
    )  # fmt: skip


@app.command()
@reported
def ps(host: Host = None, port: Port = None, url: Url = None, as_json: Json = False) -> None:
    """List the models that are in memory."""
    with connect(host, port, url) as client:
        found = client.ps()
    if as_json:
        print_json(found.raw)
        return
    rows = [(m.name or m.model, m.digest.removeprefix("sha256:")[:12], size(m.size), _processor(m.size, m.size_vram),
             str(m.context_length or "-"), ago(m.expires_at)) for m in found.models]  # fmt: skip
    print_table(("name", "id", "size", "processor", "context", "until"), rows)


def _processor(total: int, vram: int) -> str:
    if not vram or not total:
        return "CPU"
    share = min(100, round(100 * vram / total))
    return "GPU" if share == 100 else f"{share}% GPU"


@app.command()
@reported
def run(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Argument(help="What to answer; none: a chat.")] = None,
    option: Options = None,
    host: Host = None,
    port: Port = None,
    url: Url = None,
) -> None:
    """Answer a prompt (given, or piped in), or chat on a terminal."""
    from osync.cli.chat import answer_once, converse

    options = model_options(option)
    text = " ".join(prompt or ())
    if not sys.stdin.isatty():
        piped = sys.stdin.read().strip()
        text = "\n\n".join(part for part in (text, piped) if part)
        if not text:
            raise BadRequest("no prompt: write it after the model's name, or pipe it in")
    with connect(host, port, url) as client:
        if text:
            answer_once(client, model, text, options)
        else:
            converse(client, model, options)


@app.command()
@reported
def pull(
    model: Model,
    insecure: Annotated[bool, typer.Option(help="Allow a registry without TLS.")] = False,
    host: Host = None,
    port: Port = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Fetch a model onto the nodes."""
    from osync.cli.progress import show_progress

    with connect(host, port, url) as client, client.pull(model, insecure=insecure) as steps:
        show_progress(steps, as_json=as_json)


@app.command()
@reported
def rm(
    models: Annotated[list[str], typer.Argument(help="Names of models.")],
    host: Host = None,
    port: Port = None,
    url: Url = None,
) -> None:
    """Remove models from all nodes."""
    failed: OsyncError | None = None
    with connect(host, port, url) as client:
        for model in models:
            try:
                client.delete(model)
            except ModelNotFound as error:  # the others go nevertheless
                typer.echo(f"Error: {error}", err=True)
                failed = error
                continue
            typer.echo(f"deleted '{model}'")
    if failed:
        raise typer.Exit(1)


@app.command()
@reported
def cp(
    source: Annotated[str, typer.Argument(help="Name of the model.")],
    destination: Annotated[str, typer.Argument(help="Its second name.")],
    host: Host = None,
    port: Port = None,
    url: Url = None,
) -> None:
    """Give a model a second name."""
    with connect(host, port, url) as client:
        client.copy(source, destination)
    typer.echo(f"copied '{source}' to '{destination}'")


@app.command()
@reported
def show(
    model: Model,
    host: Host = None,
    port: Port = None,
    url: Url = None,
    as_json: Json = False,
    template: Annotated[bool, typer.Option("--template", help="Print only the template.")] = False,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Print only the Modelfile.")] = False,
) -> None:
    """Show what is known of a model."""
    with connect(host, port, url) as client:
        known = client.show(model)
    if as_json:
        print_json(known.raw)
    elif template or modelfile:
        typer.echo(known.template if template else known.modelfile)
    else:
        print_table(("property", "value"), _properties(known))


def _properties(known: ShowResponse) -> list[tuple[str, str]]:
    info, details = known.model_info, known.details
    family = str(info.get("general.architecture") or details.family)
    rows = [
        ("architecture", family),
        ("parameters", details.parameter_size),
        ("quantization", details.quantization_level),
        ("context length", str(info.get(f"{family}.context_length") or "")),
        ("embedding length", str(info.get(f"{family}.embedding_length") or "")),
        ("capabilities", ", ".join(map(str, known.capabilities))),
        ("system", " ".join(known.system.split())),
        ("license", next((line.strip() for line in known.license.splitlines() if line.strip()), "")),
    ]
    rows += [("parameter", " ".join(line.split())) for line in known.parameters.splitlines() if line.strip()]
    return [(name, value) for name, value in rows if value]


@app.command()
@reported
def doctor(
    file: Annotated[Path | None, typer.Option("--config", help="Settings to look at, beside the environment.")] = None,
    as_json: Json = False,
) -> None:
    """Look at this host as osyncd would: engine, Ollama, models, ports, security. Status 1 on a problem."""
    from osync.cli.doctor import examine, print_findings

    if not print_findings(examine(file=file), as_json=as_json):
        raise typer.Exit(1)


@app.command()
@reported
def version(host: Host = None, port: Port = None, url: Url = None, as_json: Json = False) -> None:
    """Show the versions of this command and of the server."""
    answered: str | None = None
    reason = ""
    try:
        with connect(host, port, url) as client:
            answered = client.version()
    except OsyncError as error:
        reason = str(error)
    if as_json:
        print_json({"osync": __version__, "api": answered})
        return
    typer.echo(f"osync {__version__}")
    typer.echo(f"server speaks Ollama {answered}" if answered is not None else f"no server: {reason}")


legacy.add_to(app)
distributed.add_to(app)

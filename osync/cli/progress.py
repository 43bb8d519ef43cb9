"""Progress of pulls: a bar per digest on a terminal, a line per step elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable

import typer

from osync.cli.tables import is_terminal
from osync.client.answers import Progress


def show_progress(steps: Iterable[Progress], *, as_json: bool = False) -> None:
    """Show each step as it comes."""
    if as_json:
        for step in steps:
            typer.echo(json.dumps(dict(step.raw), ensure_ascii=False))
    elif is_terminal():
        _bars(steps)
    else:
        _lines(steps)


def _lines(steps: Iterable[Progress]) -> None:
    last = ""
    for step in steps:
        if step.status != last:
            last = step.status
            typer.echo(step.status)


def _bars(steps: Iterable[Progress]) -> None:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns) as bars:
        tasks = {}
        last = ""
        for step in steps:
            if step.digest and step.total:
                if step.digest not in tasks:
                    tasks[step.digest] = bars.add_task(step.status, total=step.total)
                bars.update(tasks[step.digest], completed=step.completed, total=step.total)
            elif step.status != last:
                bars.console.print(step.status, markup=False, highlight=False)
            last = step.status

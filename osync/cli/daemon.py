"""The command osyncd: flags made from the table of settings, then the daemon."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osync import config
from osync.errors import OsyncError

_EPILOG = """\
examples:
  osyncd                                     proxy and node on this host
  osyncd --role node --host 0.0.0.0 --insecure
                                             lend this host's Ollama to proxies on a trusted network
  osyncd --role proxy --servers a:50051,b:50051
                                             one Ollama out of the Ollamas of a and b
"""


def parser() -> argparse.ArgumentParser:
    """Return the command line, one flag per setting."""
    made = argparse.ArgumentParser(
        prog="osyncd",
        description="One daemon per host; together they turn several Ollamas into one.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", type=Path, metavar="FILE.toml", help="read settings from this file")
    made.add_argument("--print-config", action="store_true", help="show each setting with its origin, and end")
    made.add_argument("--version", action="store_true", help="show the version, and end")
    for f in config.fields():
        _add(made, f)
    return made


def _add(made: argparse.ArgumentParser, f: dataclasses.Field[Any]) -> None:
    variables = ", ".join(f.metadata["env"])
    text = f"{f.metadata['doc']} [{variables}]".replace("%", "%%")
    flag = "--" + f.name.replace("_", "-")
    if str(f.type) == "bool":
        made.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        action = "append" if str(f.type).startswith("tuple") else "store"
        made.add_argument(flag, action=action, default=None, metavar=f.name.rsplit("_")[-1].upper(), help=text)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of osyncd; ends the process with its status."""
    arguments = vars(parser().parse_args(argv))
    if arguments.pop("version"):
        from osync.version import __version__

        print(f"osyncd {__version__}")
        raise SystemExit(0)
    file, show = arguments.pop("config"), arguments.pop("print_config")
    raise SystemExit(run(arguments, file=file, print_config=show))


def run(flags: dict[str, Any], *, file: Path | None = None, print_config: bool = False) -> int:
    """Start a daemon with flags by field name (None: not given); returns its exit status."""
    try:
        loaded = config.load(flags, file=file)
        if print_config:
            _print(loaded)
            return 0
        from osync.daemon.run import run_daemon  # the imports of grpc and aiohttp take half a second

        return run_daemon(loaded.settings)
    except OsyncError as error:
        print(f"osyncd: {error}", file=sys.stderr)
        return 2


def _print(loaded: config.Loaded) -> None:
    for f in config.fields():
        value = getattr(loaded.settings, f.name)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str("" if value is None else value)
        print(f"{f.name} = {text or '-'}  ({loaded.origin[f.name]})")


if __name__ == "__main__":
    main()

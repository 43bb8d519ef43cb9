"""Who this daemon is: an id that stays the same over restarts and differs between daemons."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
from pathlib import Path

import structlog

from osync.types import NodeId

log = structlog.get_logger("osync.daemon")


def node_id(state_dir: Path, host: str, grpc_port: int) -> NodeId:
    """Return hostname-xxxxxx, stable for one state directory and gRPC address.

    A daemon on a picked port (0), or without a writable state directory, gets a new one at each start.
    """
    if grpc_port:
        seed = hashlib.blake2b(_secret(state_dir) + f"{host}:{grpc_port}".encode(), digest_size=3).hexdigest()
    else:
        seed = secrets.token_hex(3)
    name = re.sub(r"[^a-z0-9-]", "-", socket.gethostname().split(".")[0].lower()) or "host"
    return NodeId(f"{name[:40]}-{seed}")


def _secret(state_dir: Path) -> bytes:
    """Return the state directory's random seed, made at the first start."""
    file = state_dir / "identity"
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not file.exists():
            draft = file.with_suffix(f".{os.getpid()}")
            draft.write_bytes(secrets.token_bytes(16))
            try:
                os.link(draft, file)  # two daemons that start at once end up with one seed
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        return file.read_bytes()
    except OSError as error:
        log.warning("identity_not_kept", state_dir=str(state_dir), error=error.strerror)
        return secrets.token_bytes(16)

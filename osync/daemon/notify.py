"""sd_notify: tells systemd that the daemon is ready, or stopping; silent elsewhere."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Send e.g. "READY=1" to the service manager that started this process, if one did."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(state.encode(), address)
    except OSError:
        pass  # A service manager that went away is no reason to stop serving.

"""Settings of gRPC channels and servers, and the texts of their failures: each number has its reason."""

from __future__ import annotations

from typing import Final

import grpc

DATA_LIMIT: Final = 64 << 20
"""Largest message; what osync sends stays near 1 MiB."""

_LIMITS: Final = (
    ("grpc.max_receive_message_length", DATA_LIMIT),
    ("grpc.max_send_message_length", DATA_LIMIT),
)

# Keepalive finds a host that vanished without a word; the links' own state does that sooner. A ping more
# often than the server permits would cost the connection, so both ends are set together.
_KEEPALIVE: Final = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

CHANNEL: Final = (
    *_LIMITS,
    *_KEEPALIVE,
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # this one is the time that connecting may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),  # else all links to one address share a connection, and its fate
    ("grpc.enable_http_proxy", 0),  # a cluster's hosts are not reached through http_proxy
)

SERVER: Final = (
    *_LIMITS,
    *_KEEPALIVE,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a second daemon on the same port is an error, not a lottery
)


def describe(error: grpc.RpcError) -> str:
    """Return in a few words why a call failed."""
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None
    details = (error.details() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None) or ""
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return "no osync node answers there"
    for phrase in ("Connection refused", "Connection reset", "No route to host", "Network is unreachable"):
        if phrase in details:
            return phrase.lower()
    if "Timeout" in details or "timed out" in details:
        return "connecting timed out"
    if "DNS resolution failed" in details or "name resolution" in details.lower():
        return "its name does not resolve"
    if "Internal error from Core" in details:  # a write found the stream ended before its status was read
        return "connection closed"
    if "Socket closed" in details or "Stream removed" in details or "closed" in details.lower():
        return "connection closed"
    return details.splitlines()[0][:200] if details else (code.name.lower() if code else "unknown error")

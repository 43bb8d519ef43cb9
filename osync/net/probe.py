"""A look at an address from outside the event loop, whether a daemon is there."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def is_daemon(host: str, port: int, timeout_s: float) -> bool:
    """Tell whether an osync daemon answers on a gRPC port; blocking."""
    target = f"{f'[{host}]' if ':' in host else host}:{port}"
    request = health_pb2.HealthCheckRequest(service="osync.v1.Inference")
    try:
        with grpc.insecure_channel(target) as channel:
            health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
    except grpc.RpcError:
        return False
    return True

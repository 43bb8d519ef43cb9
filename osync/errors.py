"""All errors that osync raises on purpose, with the status that each has on every surface.

OsyncError
├─ ConfigError                 a setting is wrong; the text says which and what to do
├─ WireError                   bytes from outside are not what they should be
│  ├─ BadRequest               400
│  ├─ FrameTooLarge            413
│  └─ NotSupported             501, this build or backend cannot do it (yet)
├─ AuthError
│  ├─ Unauthenticated          401
│  └─ Forbidden                403
├─ ClusterError
│  └─ NoNodes                  503, nothing that could answer is up
├─ ModelError
│  ├─ ModelNotFound            404, in Ollama's words
│  └─ ModelUnusable            500, corrupt file, unsupported architecture, does not fit
├─ CapacityError               503 with Retry-After
└─ UpstreamError               502, a backend or a node broke
   ├─ UpstreamUnavailable      nothing was sent to the client yet: another node may be tried
   ├─ UpstreamTimeout          504
   ├─ StageLost                a pipeline lacks a stage; it may be made anew
   └─ StreamBroken             after the first byte of an answer
"""

from __future__ import annotations

from typing import ClassVar


class OsyncError(Exception):
    """Root of the tree. `status` is the HTTP status, `grpc_code` the gRPC status name."""

    status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    """True if the same request may succeed on another node, as long as no byte went out."""


class ConfigError(OsyncError):
    """A setting is unknown, of the wrong type, or contradicts another."""

    grpc_code = "FAILED_PRECONDITION"


class WireError(OsyncError):
    """Bytes from outside are not what they should be."""

    status = 400
    grpc_code = "INVALID_ARGUMENT"


class BadRequest(WireError):
    """The client's request is malformed; the text is the one that Ollama would give."""


class FrameTooLarge(WireError):
    """A body, line or frame is over its bound."""

    status = 413
    grpc_code = "RESOURCE_EXHAUSTED"


class NotSupported(WireError):
    """The backend that would answer cannot do this."""

    status = 501
    grpc_code = "UNIMPLEMENTED"


class AuthError(OsyncError):
    """The caller may not do this."""

    status = 403
    grpc_code = "PERMISSION_DENIED"


class Unauthenticated(AuthError):
    """The caller did not say who it is."""

    status = 401
    grpc_code = "UNAUTHENTICATED"


class Forbidden(AuthError):
    """The caller is known, and may not."""


class ClusterError(OsyncError):
    """The cluster as a whole cannot answer."""

    status = 503
    grpc_code = "UNAVAILABLE"


class NoNodes(ClusterError):
    """No node is up; the text says how to add one."""


class ModelError(OsyncError):
    """Something about a model."""


class ModelNotFound(ModelError):
    """No node has the model."""

    status = 404
    grpc_code = "NOT_FOUND"


class ModelUnusable(ModelError):
    """The model is there and cannot be loaded: corrupt, unsupported, or too large."""

    grpc_code = "FAILED_PRECONDITION"


class CapacityError(OsyncError):
    """Full. `retry_after_s` is what the Retry-After header says."""

    status = 503
    grpc_code = "RESOURCE_EXHAUSTED"
    retryable = True

    def __init__(self, text: str, retry_after_s: float = 1.0) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class UpstreamError(OsyncError):
    """A node or its backend broke."""

    status = 502
    grpc_code = "UNAVAILABLE"


class UpstreamUnavailable(UpstreamError):
    """A node or its backend could not take the request; nothing of an answer was seen."""

    retryable = True


class UpstreamTimeout(UpstreamError):
    """A node or its backend did not answer in time."""

    status = 504
    grpc_code = "DEADLINE_EXCEEDED"
    retryable = True


class StreamBroken(UpstreamError):
    """An answer stopped before its end."""


class StageLost(UpstreamError):
    """A shard of a pipeline is gone, or the way to it; the pipeline may be made anew."""

    retryable = True

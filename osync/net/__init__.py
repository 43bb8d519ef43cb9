"""The only owner of grpc and of sockets between daemons."""

import os

# Both are read when gRPC starts, so they are set before anything here imports it; what the user set stays.
# Its event engine hands each message from thread to thread once more than the poller before it: a small
# ping-pong takes 0.33 ms with it and 0.19 ms without (docs/decisions.md).
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
# Children are spawned, never forked on; the fork handlers would only print warnings about threads.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

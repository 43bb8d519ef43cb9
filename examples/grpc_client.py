"""A client of the typed gRPC API, osync.v1.Inference, which proxies and nodes serve.

Run `make run` in another terminal, then: python examples/grpc_client.py [MODEL] [HOST:PORT]

grpc.aio does not end a call that is left early, so each call has one owner that cancels it: `owned`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.struct_pb2 import Struct

from osync.pb import inference_pb2 as pb
from osync.pb.inference_pb2_grpc import InferenceStub

Call = TypeVar("Call", bound=grpc.aio.Call)


@asynccontextmanager
async def owned(call: Call) -> AsyncIterator[Call]:
    """Hold a call; whatever happens, it has ended afterwards (cancelling an ended call does nothing)."""
    try:
        yield call
    finally:
        call.cancel()


async def main(model: str, address: str) -> None:
    """Print the models, then an answer, stopped at its third sentence."""
    options = Struct()
    options.update({"temperature": 0, "num_predict": 120})
    async with grpc.aio.insecure_channel(address) as channel:
        stub = InferenceStub(channel)
        listed = await stub.List(pb.ListRequest(), timeout=10)
        print("models:", ", ".join(known.name for known in listed.models) or "none")

        messages = [pb.Message(role="user", content="Tell me about the sea.")]
        request = pb.ChatRequest(model=model, messages=messages, options=options)
        sentences = 0
        async with owned(stub.Chat(request, timeout=300)) as call:
            async for piece in call:
                print(piece.message.content, end="", flush=True)
                sentences += piece.message.content.count(".")
                if piece.done:
                    print(f"\n({piece.timings.eval_count} tokens)")
                elif sentences >= 3:
                    print("\n(stopped: the work for it ends on the node, too)")
                    break


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct:q4_1"
    where = sys.argv[2] if len(sys.argv) > 2 else "localhost:50051"
    try:
        asyncio.run(main(name, where))
    except grpc.aio.AioRpcError as failure:
        print(f"{failure.code().name}: {failure.details()}", file=sys.stderr)
        raise SystemExit(1) from None

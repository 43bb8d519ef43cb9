"""The yardstick: a plain aiohttp relay that knows nothing. python -m tests.bench.relay PORT UPSTREAM_URL."""

from __future__ import annotations

import asyncio
import sys

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web


async def main(port: int, upstream: str) -> None:
    """Relay every request to one upstream until killed."""
    session = ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None), auto_decompress=False)

    async def relay(request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        async with session.request(
            request.method,
            upstream + request.path_qs,
            data=body,
            headers={"Content-Type": "application/json"},
        ) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            response.content_length = answer.content_length
            await response.prepare(request)
            async for data in answer.content.iter_any():
                await response.write(data)
            await response.write_eof()
            return response

    runner = web.ServerRunner(web.Server(relay, access_log=None), handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=2048).start()
    print(f"listening http://127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))

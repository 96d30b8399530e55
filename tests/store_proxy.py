"""A proxy before an object store, in a process of its own, that counts requests and makes faults.

`python -m tests.store_proxy LISTEN UPSTREAM` listens on a port of this machine and passes all on
to another. `POST /__proxy/rules` with a JSON object sets what it does (see `Rules`) and forgets
what it counted; `GET /__proxy/log` tells the requests since. Not a store: that is `tests.stores`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import sys
import time
from typing import Any

from aiohttp import ClientSession, DummyCookieJar, TCPConnector, web
from yarl import URL

_HOP = {
    "connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length",
    "content-encoding", "proxy-authorization",
}  # fmt: skip


@dataclasses.dataclass
class Rules:
    """What the proxy does with a request.

    Attributes:
        latency_s: How long each waits first.
        chance: How likely a fault is.
        faults: Which ones there are: `429`, `500`, `503`, `before` (the connection is reset before
            the store has seen it), `after` (once it has applied it), `truncated` (half of the
            answer).
        per_second: How many requests are let through in a second; those beyond get 503.
        seed: Of the chances.
        method: Only requests of this method, all by default.
        drops_conditions: Whether conditions on writes are taken out.
    """

    latency_s: float = 0.0
    chance: float = 0.0
    faults: tuple[str, ...] = ()
    per_second: float = 0.0
    seed: int = 0
    method: str = ""
    drops_conditions: bool = False


class Proxy:
    """Passes requests on, as the rules say."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.rules = Rules()
        self.random = random.Random(0)
        self.second = (0, 0)  # which one, and its requests so far
        self.log: list[tuple[str, str, str]] = []
        self.session: Any = None

    async def control(self, request: web.Request) -> web.Response:
        """Sets rules, or tells the log."""
        if request.method == "POST":
            given = await request.json()
            self.rules = Rules(**{**given, "faults": tuple(given.get("faults", ()))})
            self.random = random.Random(self.rules.seed)
            self.log = []
        return web.json_response(self.log)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Passes one request on."""
        rules = self.rules
        body = await request.read()
        if rules.latency_s:
            await asyncio.sleep(rules.latency_s)
        fault = ""
        if rules.faults and request.method == (rules.method or request.method):
            fault = self.random.choice(rules.faults) if self.random.random() < rules.chance else ""
        if rules.per_second:
            now = int(time.monotonic())
            self.second = (now, self.second[1] + 1 if self.second[0] == now else 1)
            fault = "503" if self.second[1] > rules.per_second else fault
        self.log.append((request.method, request.raw_path, fault))
        if fault in ("429", "500", "503"):
            return web.Response(status=int(fault), text="<Error><Code>SlowDown</Code></Error>")
        if fault == "before":
            return self._reset(request)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP}
        if rules.drops_conditions:
            headers = {k: v for k, v in headers.items() if k.lower() != "if-none-match"}
        url = URL(f"http://127.0.0.1:{self.upstream}{request.raw_path}", encoded=True)
        async with self.session.request(
            request.method,
            url,
            headers=headers,
            data=body or None,
            allow_redirects=False,
            skip_auto_headers=["Content-Type", "Accept", "User-Agent"],  # Azure's are signed
        ) as answer:
            data = await answer.read()
            told = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP}
            if fault == "after":
                return self._reset(request)
            if request.method == "HEAD":
                told["Content-Length"] = answer.headers.get("Content-Length", "0")
                return web.Response(status=answer.status, headers=told)
            if fault == "truncated" and len(data) > 1:
                told["Content-Length"] = str(len(data))
                half = web.StreamResponse(status=answer.status, headers=told)
                await half.prepare(request)
                await half.write(data[: len(data) // 2])
                return self._reset(request)
            return web.Response(status=answer.status, headers=told, body=data)

    def _reset(self, request: web.Request) -> web.Response:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()


async def _session(app: web.Application) -> Any:
    proxy: Proxy = app["proxy"]
    async with ClientSession(
        connector=TCPConnector(limit=0), cookie_jar=DummyCookieJar(), auto_decompress=False
    ) as session:
        proxy.session = session
        yield


def main(listen: int, upstream: int) -> None:
    """Serves until it is stopped."""
    app = web.Application(client_max_size=1 << 31)
    proxy = Proxy(upstream)
    app["proxy"] = proxy
    app.cleanup_ctx.append(_session)
    app.router.add_route("*", "/__proxy/{what}", proxy.control)
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    web.run_app(app, host="127.0.0.1", port=listen, print=None, access_log=None)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

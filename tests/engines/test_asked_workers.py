"""What workers answer, and what becomes of it: small servers that do what none should, or what none does for long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from modekit.engines import workers as module
from modekit.engines.front import Front
from modekit.engines.guard import BrokenOffError
from modekit.engines.workers import WorkerPool, is_short
from modekit.routing.text_router import TextRouter

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PATH = "/v1/completions"
LAW = json.dumps({"data": [{"id": "law"}]})
SAID = b'{"choices": [{"text": "."}]}'


@asynccontextmanager
async def server(answer: Handler, models: Handler | None = None) -> AsyncIterator[str]:
    """Its URL; it says that it serves law, and answers as it is told."""

    async def law(_request: web.Request) -> web.Response:
        return web.Response(text=LAW, content_type="application/json")

    app = web.Application()
    app.router.add_get("/v1/models", models or law)
    app.router.add_post(PATH, answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def asked(workers: WorkerPool) -> tuple[int, bytes] | None:
    """Status and body of an answer, and None where there is none."""
    async with workers.asked("law", PATH, b"{}") as answer:
        if answer is None:
            return None
        return answer.status, await answer.read()


def with_workers(*handlers: Handler, then: Callable[[WorkerPool], Awaitable[Any]], timeout_s: float = 5, **more: Any) -> Any:
    """What `then` makes of servers that answer so."""

    async def run() -> Any:
        async with AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(server(each, **more)) for each in handlers]
            workers = WorkerPool(urls, "secret", timeout_s)
            await stack.enter_async_context(workers.connected())
            await workers.look()
            return await then(workers)

    return asyncio.run(run())


async def good(_request: web.Request) -> web.Response:
    return web.Response(body=SAID, content_type="application/json")


async def long(_request: web.Request) -> web.Response:
    return web.Response(body=bytes(module._SHORT + 1))


async def piecewise(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse()
    await answer.prepare(request)
    for part in (SAID[:9], SAID[9:]):
        await answer.write(part)
    return answer


async def cut_short(request: web.Request) -> web.StreamResponse:
    """Half of what it announced."""
    answer = web.StreamResponse(headers={"Content-Length": str(len(SAID))})
    await answer.prepare(request)
    await answer.write(SAID[:9])
    assert request.transport is not None
    request.transport.close()
    return answer


async def failing(_request: web.Request) -> web.Response:
    return web.Response(status=500)


async def hanging(_request: web.Request) -> web.Response:
    await asyncio.sleep(60)
    raise AssertionError


@pytest.mark.parametrize(
    ("handler", "whole", "expected"),
    [
        (good, True, SAID),
        (piecewise, False, SAID),
        (long, False, bytes(module._SHORT + 1)),
    ],
    ids=["short", "in pieces", "long"],
)
def test_short_answers_are_taken_whole(handler: Handler, whole: bool, expected: bytes) -> None:
    async def then(workers: WorkerPool) -> None:
        async with workers.asked("law", PATH, b"{}") as answer:
            assert answer is not None and is_short(answer) == whole
        assert await asked(workers) == (200, expected)
        assert [each.busy for each in workers.all] == [0]

    with_workers(handler, then=then)


@pytest.mark.parametrize("bad", [cut_short, failing])
def test_one_that_gives_no_whole_answer_is_asked_again_and_then_the_next(bad: Handler) -> None:
    assert with_workers(bad, good, then=asked) == (200, SAID)


def test_where_nobody_gives_a_whole_answer_there_is_none() -> None:
    assert with_workers(cut_short, then=asked) is None


def test_a_status_of_the_last_one_is_passed_on() -> None:
    assert with_workers(failing, then=asked) == (500, b"")


def test_one_that_takes_too_long_is_not_asked_elsewhere() -> None:
    with pytest.raises(asyncio.TimeoutError):
        with_workers(hanging, good, then=asked, timeout_s=0.3)


def test_a_kept_connection_that_was_closed_costs_nothing() -> None:
    """The server closes it without a word after its first answer, as servers do with idle ones."""
    number = 0

    async def once(request: web.Request) -> web.Response:
        nonlocal number
        number += 1
        transport = request.transport
        assert transport is not None
        asyncio.get_running_loop().call_later(0.05, transport.abort)
        return web.Response(body=SAID)

    async def then(workers: WorkerPool) -> None:
        for _ in range(3):
            assert await asked(workers) == (200, SAID)
            await asyncio.sleep(0.1)

    with_workers(once, then=then)
    assert number == 3


def test_nobody_is_sent_elsewhere() -> None:
    """A worker decides neither where the key and a request go, nor what other clients' requests bear."""
    seen: list[web.Request] = []

    async def elsewhere(request: web.Request) -> web.Response:
        seen.append(request)
        return web.Response(body=SAID)

    async def run() -> tuple[int, bytes] | None:
        async with server(elsewhere) as other:

            async def redirecting(request: web.Request) -> web.Response:
                seen.append(request)
                return web.Response(status=307, headers={"Location": other + PATH, "Set-Cookie": "a=b"})

            async with server(redirecting) as url:
                workers = WorkerPool([url], "secret")
                async with workers.connected():
                    await workers.look()
                    await asked(workers)
                    return await asked(workers)

    assert asyncio.run(run()) == (307, b"")
    assert len(seen) == 2 and not any("Cookie" in request.headers for request in seen)
    assert all(request.headers["Authorization"] == "Bearer secret" for request in seen)


@pytest.mark.parametrize("said", ["[]", "{", '{"data": [{}]}', '{"data": 3}', "[" * 100_000])
def test_one_that_says_nonsense_serves_nothing(said: str) -> None:
    async def nonsense(_request: web.Request) -> web.Response:
        return web.Response(text=said)

    async def then(workers: WorkerPool) -> set[str]:
        return workers.models

    assert with_workers(good, then=then, models=nonsense) == set()


def streaming(*parts: bytes, kind: str = "text/event-stream", pause_s: float = 0.2, cut: bool = True) -> Handler:
    """Sends these, and breaks off."""

    async def handler(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": kind})
        await answer.prepare(request)
        for part in parts:
            await answer.write(part)
            await asyncio.sleep(pause_s)
        assert request.transport is not None
        if cut:
            request.transport.close()
        return answer

    return handler


async def passed_on(workers: WorkerPool) -> bytes:
    """What a front before the workers sends a client, to the end."""
    content, sent = json.dumps({"model": "law", "prompt": "x"}).encode(), bytearray()
    front = Front(TextRouter.__new__(TextRouter), workers)  # a model that is named is not asked about
    head = [(b"content-length", str(len(content)).encode())]
    asked_for = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if asked_for.is_set():
            await asyncio.sleep(60)
        asked_for.set()
        return {"type": "http.request", "body": content, "more_body": False}

    ended = False

    async def send(message: dict[str, Any]) -> None:
        nonlocal ended
        if message["type"] == "http.response.body":
            sent.extend(message["body"])
            ended = not message.get("more_body")

    scope = {"type": "http", "path": PATH, "raw_path": PATH.encode(), "method": "POST", "headers": head, "query_string": b""}
    await front.app()(scope, receive, send)
    assert ended and [each.busy for each in workers.all] == [0]
    return bytes(sent)


EVENT, CHUNKS = b'data: {"choices": [{"text": "a"}]}\n\n', b'data: {"choices": [{"text": "'


@pytest.mark.parametrize(
    "parts",
    [
        (EVENT,),
        (EVENT, EVENT + CHUNKS),
        (EVENT, b": still here\n\n", CHUNKS[:9]),
        (EVENT[:-1],),
        (EVENT.replace(b"\n", b"\r\n"), CHUNKS),
        (EVENT[:9], EVENT[9:] + EVENT[:-2], b"\n"),
    ],
    ids=["between", "within", "comment", "before the blank line", "line ends", "any pieces"],
)
def test_a_stream_that_breaks_off_ends_with_an_error(parts: tuple[bytes, ...]) -> None:
    """And with no half event before it, which a client could not read."""
    sent = with_workers(streaming(*parts), then=passed_on).replace(b"\r\n", b"\n").decode()
    events = [event.strip() for event in sent.split("\n\n") if event.strip()]
    *before, last = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: ")]
    assert before and all(event["choices"] for event in before)
    assert last["error"]["code"] == 503 and "send the request again" in last["error"]["message"]
    assert sent.endswith("\n\n")


def test_a_stream_without_end_ends_with_an_error() -> None:
    sent = with_workers(streaming(*[EVENT] * 100, pause_s=0.1), then=passed_on, timeout_s=1)
    assert b'"error"' in sent.rstrip().rpartition(b"\n")[2] and 1 <= sent.count(b"choices") < 100


def test_a_whole_stream_is_passed_on_as_it_is() -> None:
    whole = (EVENT, EVENT[:20], EVENT[20:], b"data: [DONE]\n\n")
    assert with_workers(streaming(*whole, cut=False), then=passed_on) == b"".join(whole)
    endless = b"data: " + b"x" * 3 * 2**20
    assert with_workers(streaming(endless, endless, cut=False), then=passed_on) == endless * 2


def test_another_answer_that_breaks_off_ends_with_its_connection() -> None:
    with pytest.raises(BrokenOffError):
        with_workers(streaming(b'{"choices": [', kind="application/json"), then=passed_on)

"""What stands before every server: what a request may hold, what a template does with it, what a mistake leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatting import TEMPLATE, word_tokenizer
from modekit.engines.guard import BODY, LARGEST_BODY, MOST_MESSAGES, MOST_VALUES, App, Guard, sizes_of
from modekit.engines.request_template import RequestTemplate

SAID = [{"role": "user", "content": "what is fever"}]


def asked(app: App, content: bytes, path: str = "/v1/chat/completions") -> tuple[int, str]:
    """Status and answer."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    head = [(b"content-length", str(len(content)).encode())]
    asyncio.run(app({"type": "http", "path": path, "method": "POST", "headers": head}, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers what it was sent, and how many messages the guard found in it."""
    message = await receive()
    body = {"sent": len(message["body"]), "messages": len(scope[BODY].get("messages", []))}
    assert json.loads(message["body"]) == scope[BODY]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def messages(count: int) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}] * count}).encode()


@pytest.mark.parametrize(
    ("content", "status", "why"),
    [
        (messages(MOST_MESSAGES), 200, f'"messages": {MOST_MESSAGES}'),
        (messages(MOST_MESSAGES + 1), 413, "messages: 4,097 found; a request may have at most 4,096"),
        (messages(200_000)[: LARGEST_BODY - 2] + b"]}", 413, "at most 262,144"),
        (b'{"messages": []}', 400, "give at least one message"),
        (json.dumps({"prompt": list(range(100_000))}).encode(), 200, ""),
        (b'{"prompt": [' + b"[]," * 2_000_000 + b"1]}", 413, "at most 262,144"),
        (b'{"prompt": [' + b"{}," * 2_000_000 + b"1]}", 413, "at most 262,144"),
        (b'{"prompt": [' + b'"",' * 2_000_000 + b"1]}", 413, "at most 262,144"),
        (b'{"prompt": ' + b"[" * 2_000_000, 413, "at most 262,144"),
        (b'{"prompt": ' + b"[" * 200_000, 400, "not JSON"),
        (json.dumps({"prompt": '{"a": [1, 2, "\\n"], }\\' * 200_000}).encode(), 200, ""),
        ('{"prompt": "\u2222"}'.encode("utf-16"), 400, "JSON in UTF-8"),
        (b'{"x": [' + b",".join([b"9" * 4_300] * 1_800) + b"]}", 400, "not JSON"),
        (json.dumps({f"k{n}": 1 for n in range(70_000)}).encode(), 413, "at most 65,536"),
        (b"[1]", 400, "must be a JSON object"),
        (b"\xff", 400, "JSON in UTF-8"),
    ],
    ids=lambda value: value[:24].decode(errors="replace") if isinstance(value, bytes) else None,
)
def test_a_request_is_counted_before_it_is_built(content: bytes, status: int, why: str) -> None:
    found, said = asked(Guard(echo, None), content)
    assert found == status and why in said


_KEYS = st.text(alphabet='ab"\\,[{:\n\u2222\ud800', max_size=4)
_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), _KEYS),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_KEYS, inner, max_size=5),
    max_leaves=40,
)


def counted(value: object) -> int:
    """Commas and opening brackets that a value is written with."""
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1 + max(len(inside) - 1, 0) + sum(map(counted, inside))


@given(_VALUES, st.booleans())
@settings(max_examples=300, deadline=None)
def test_strings_hide_nothing_from_the_count_and_add_nothing_to_it(value: object, ascii: bool) -> None:
    assert sizes_of(json.dumps(value, ensure_ascii=ascii))[0] == counted(value)


def test_a_large_request_leaves_the_event_loop_its_turn() -> None:
    """Eight at once, each of the most that is taken: the loop is never away for as long as one of them takes."""
    content = json.dumps({"prompt": [{"a": 1}] * (MOST_VALUES // 3)}).encode()

    async def longest() -> float:
        guard, gaps, loop = Guard(echo, None), [0.0], asyncio.get_running_loop()

        async def ask() -> None:
            head = [(b"content-length", str(len(content)).encode())]

            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": content, "more_body": False}

            async def send(_: object) -> None:
                pass

            async def nothing(*_: object) -> None:
                pass

            guard._app = nothing
            await guard({"type": "http", "path": "/v1/completions", "method": "POST", "headers": head}, receive, send)

        requests = [asyncio.ensure_future(ask()) for _ in range(8)]
        while not all(each.done() for each in requests):
            before = loop.time()
            await asyncio.sleep(0)
            gaps.append(loop.time() - before)
        await asyncio.gather(*requests)
        return max(gaps)

    assert asyncio.run(longest()) < 2


def template_guard(source: str | None, app: App = echo) -> Guard:
    return Guard(app, None, rewrite=RequestTemplate(word_tokenizer(source)).checked)


@pytest.mark.parametrize("body", [{"messages": SAID}, {"messages": 7}, {"prompt": "x"}, {"messages": [{"content": None}]}])
def test_everything_else_does(body: dict[str, Any]) -> None:
    """Also what the template refuses at once: the engine has its own error for that."""
    status, _ = asked(template_guard(TEMPLATE, _accepting), json.dumps(body).encode())
    assert status == 200


async def _accepting(_scope: Any, receive: Any, send: Callable[..., Any]) -> None:
    assert (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_a_mistake_leaves_where_it_was_and_no_text_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def faulty(scope: Any, *_: object) -> None:
        try:
            raise KeyError(scope[BODY]["messages"][0]["content"])
        except KeyError as error:
            raise ValueError(f"no {error}") from None

    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match="fever"):
        asked(Guard(faulty, None), json.dumps({"messages": SAID}).encode())
    (record,) = caplog.records
    logged = json.loads(record.getMessage())
    assert logged["fault"] == "ValueError" and "test_guard.py" in logged["at"][-1] and "faulty" in logged["at"][-1]
    assert logged["after"]["fault"] == "KeyError" and "fever" not in record.getMessage()

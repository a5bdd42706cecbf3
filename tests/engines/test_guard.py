"""What stands before the servers of transformers and vLLM: key, paths, and sizes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from modekit.engines.guard import LARGEST_BODY, Guard


def asked(app: Any, content: bytes, path: str = "/v1/completions", method: str = "POST", key: str = "k") -> tuple[int, str]:
    """Status and answer; the request comes in two pieces."""
    sent: list[dict[str, Any]] = []
    pieces = [(content[:3], True), (content[3:], False)]

    async def receive() -> dict[str, Any]:
        body, more = pieces.pop(0)
        return {"type": "http.request", "body": body, "more_body": more}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    head = [(b"Content-Length", str(len(content)).encode()), (b"Authorization", f"Bearer {key}".encode())]
    asyncio.run(app({"type": "http", "path": path, "method": method, "headers": head}, receive, send))
    return sent[0]["status"], sent[1]["body"].decode()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers what it was sent."""
    body = (await receive())["body"] if scope["method"] == "POST" else b"read"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize(
    ("content", "path", "method", "key", "status", "said"),
    [
        (b"no JSON at all", "/v1/completions", "POST", "k", 200, "no JSON at all"),
        (b"", "/health", "GET", "", 200, "read"),
        (b"", "/v1/models", "GET", "k", 200, "read"),
        (b"", "/v1/models", "GET", "x", 401, "key"),
        (b"{}", "/v1/completions", "POST", "", 401, "key"),
        (b"{}", "/load_model", "POST", "k", 404, "nothing"),
        (b"{}", "/v1/audio/transcriptions", "POST", "k", 404, "nothing"),
        (bytes(LARGEST_BODY + 1), "/v1/completions", "POST", "k", 413, "8,388,608 bytes"),
    ],
)
def test_who_comes_through(content: bytes, path: str, method: str, key: str, status: int, said: str) -> None:
    found, answer = asked(Guard(echo, "k"), content, path, method, key)
    assert found == status and said in answer


def test_without_a_key_all_comes_as_it_is() -> None:
    assert asked(Guard(echo, None), b"no JSON at all", key="") == (200, "no JSON at all")

"""Requests to a server that a test has started, and what it answers."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any


def opened(url: str, body: object = None, *, key: str = "") -> Any:
    """The answer, to be read as it comes; a body is sent as JSON, or as the bytes that it is."""
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120)


def asked(url: str, body: object = None, *, key: str = "") -> tuple[int, dict[str, str], str]:
    """Status, headers and answer, also of a request that is refused."""
    try:
        answer = opened(url, body, key=key)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read().decode()

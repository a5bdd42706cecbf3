"""What a request may ask of an engine, before it gets there; tests/engines/test_serve.py asks real engines."""

from __future__ import annotations

import json
from typing import Any

import pytest

from modekit.engines.bounds import BOUNDS, SCHEMA_BOUNDS, check_chat, check_request
from modekit.engines.guard import RefusedError, body_of


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = {"items": value}
    return value


def refused(request: object) -> str:
    content = request if isinstance(request, bytes) else json.dumps(request).encode()
    with pytest.raises(RefusedError) as error:
        check_request(body_of(content))
    assert error.value.status in {400, 413} and len(error.value.why) < 600
    return error.value.why


SCHEMAS: list[tuple[Any, str]] = [
    ({"type": "array", "minItems": 1_000_000_000}, "minItems: 1,000,000,000 repeats found; allowed: 0 to 2,000"),
    ({"properties": {"a": {"items": {"maxLength": 1e300}}}}, "properties.a.items.maxLength: 1e+300"),
    ({"type": "array", "minItems": -1}, "minItems: -1"),
    ({"properties": {f"p{n}": {"minLength": 2_000} for n in range(11)}}, "22,000 repeats in all found"),
    ({"enum": [str(n) for n in range(501)]}, "enum: 501 choices"),
    ({"properties": {f"p{n}": {"enum": list(range(400))} for n in range(3)}}, "1,200 choices in all"),
    ({"properties": {f"p{n}": {} for n in range(201)}}, "properties: 201 properties"),
    ({"prefixItems": [[{}] * 90] * 100}, "values found; allowed: 0 to 8,192"),
    ({"minimum": 10**30}, "minimum: 1000000000000000000000000000000 found"),
    ({"pattern": "a" * 257}, "pattern: 257 characters"),
    ({"pattern": "^a{1000000}$"}, "pattern: 1,000,000 repeats"),
    ({"pattern": "^(([a-z]*|[a-z ]*)*)$"}, "pattern: a repeat inside a repeated group"),
    ({"pattern": r"^(a\)*)+$"}, "pattern: a repeat inside a repeated group"),
    ({"$ref": "http://127.0.0.1:1/secret"}, "it must be inside the schema"),
    ({"description": "x" * 20_000}, "20,000 characters"),
    (nested(65), "nested too deeply"),
    ({"type": "grammar", "grammar": "root ::= ((((("}, "grammar: grammars are not taken"),
]


@pytest.mark.parametrize(("schema", "why"), SCHEMAS, ids=[why[:30] for _, why in SCHEMAS])
def test_a_schema_beyond_the_bounds_is_refused_wherever_it_stands(schema: Any, why: str) -> None:
    for key, request in (
        ("json_schema", {"json_schema": schema}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}),
        ("guided_json", {"guided_json": json.dumps(schema)}),
        ("structured_outputs", {"structured_outputs": {"json": schema}}),
    ):
        said = refused(request)
        assert why in said and said.startswith(key)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"n": 17}, "n: 17 answers found; allowed: 1 to 16"),
        ({"best_of": 0}, "best_of: 0 answers"),
        ({"max_tokens": 10**9}, "max_tokens: 1,000,000,000 tokens found; allowed: 0 to 1,048,576"),
        ({"max_completion_tokens": -1}, "max_completion_tokens: -1"),
        ({"logit_bias": {str(n): 1 for n in range(2_000)}}, "logit_bias: 2,000 entries"),
        ({"stop": ["x"] * 17}, "stop: 17 texts"),
        ({"stop": "x" * 300}, "stop: 300 characters"),
        ({"dry_sequence_breakers": ["x"] * 20_000}, "dry_sequence_breakers: 20,000 texts"),
        ({"dry_penalty_last_n": 2_000_000_000}, "dry_penalty_last_n: 2,000,000,000"),
        ({"n_probs": 1_000_000}, "n_probs: 1,000,000"),
        ({"samplers": ["temperature"] * 100_000}, "samplers: 100,001 values"),
        ({"messages": []}, "messages: the list is empty"),
        ({"messages": [{"role": "user", "content": "x"}] * 5_000}, "messages: 5,000 found"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 30_000}]}, "messages: 90,004 values"),
        ({"tools": [{"type": "function"}] * 129}, "tools: 129 tools"),
        ({"prompt": ["x"] * 65}, "prompt: 65 prompts"),
        ({"prompt": [[1, 2]] * 65}, "prompt: 65 prompts"),
        ({"grammar": 'root ::= "a"'}, "grammar: grammars are not taken"),
        ({"json_schema": "{"}, "json_schema: the schema is not JSON"),
        ({"chat_template_kwargs": nested(100)}, "nested too deeply"),
        ({"temperature": 1e999}, "not JSON"),
        ([], "a JSON object"),
        (b'{"n": NaN}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"x": [' + b"[]," * 2_600_000 + b"[]]}", "too many values"),
        (b'{"prompt": [' + b"1," * 4_000_000 + b"1]}", "too many values"),
        (b'{"n": ' + b"9" * 5_000 + b"}", "not JSON"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "request",
)
def test_a_request_beyond_the_bounds_is_refused_by_key(request_: object, why: str) -> None:
    assert why in refused(request_)


def test_what_clients_send_passes() -> None:
    person = {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "maxLength": 200, "pattern": r"^[A-Z][a-z]+( [A-Z]\.)?$"},
            "born": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
            "children": {"type": "array", "maxItems": 20, "items": {"$ref": "#"}},
            "minItems": {"enum": ["a", "b", None]},
        },
    }
    for request in (
        {"model": "OUT", "prompt": [1] * 100_000, "max_tokens": 0, "temperature": 0.7, "seed": 2**63, "stop": ["\n\n"]},
        {"model": "OUT", "prompt": "x" * 2_000_000, "max_tokens": None, "n": 2, "logprobs": 5, "stream": True, "user": "me"},
        {
            "messages": [{"role": "user", "content": "x" * 1_000_000}] * 4,
            "stream_options": {"include_usage": True},
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": person, "strict": True}},
            "tools": [{"type": "function", "function": {"name": "add", "description": "x" * 4_000, "parameters": person}}] * 8,
            "logit_bias": {"50256": -100},
            "logprobs": True,
            "top_logprobs": 20,
            "metadata": {"a": "b"},
        },
    ):
        check_request(body_of(json.dumps(request).encode()))


def test_every_bound_allows_its_limits_and_nothing_beyond() -> None:
    """A row that bounds a number: both ends pass, and what is one further does not."""
    for bound in (*BOUNDS, *SCHEMA_BOUNDS):
        if bound.measure(1) is None:
            continue
        for key in bound.keys:
            for value in (bound.least, bound.most):
                bound.check(key, value)
            for value in (bound.least - 1, bound.most * 2 + 1):
                with pytest.raises(RefusedError):
                    bound.check(key, value)


@pytest.mark.parametrize(
    "chat",
    [
        {},
        {"messages": "hi"},
        {"messages": [3]},
        {"messages": [{"content": "hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}]},
        {"messages": [{"role": "user", "content": ["hi"]}]},
        {"messages": [{"role": "user", "content": "hi"}], "tools": [3]},
        {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function", "function": {}}]},
    ],
)
def test_a_chat_of_another_form_is_refused(chat: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=r"messages|tools"):
        check_chat(chat)


def test_a_chat_passes() -> None:
    parts = [{"type": "text", "text": "hi"}]
    called = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    check_chat(
        {
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": None, "tool_calls": called},
                {"role": "tool", "content": "3", "tool_call_id": "1"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        }
    )

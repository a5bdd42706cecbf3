"""What a request may ask of an engine: one table of bounds, checked before the engine sees the request. Its size is guard.py's.

An engine bounds little of this itself: a JSON schema with many choices keeps llama.cpp from all other requests, one with
`minItems` of a thousand million took 7 GB, and a grammar with deep brackets ended the process.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from modekit.engines.guard import RefusedError, no_constant

_DEEPEST = 64
_MOST_COUNTED = 2**17
_SHOWN = 60
_BRACES = re.compile(r"\{(\d*),?(\d*)\}")


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _entries(value: object) -> int | None:
    return len(value) if isinstance(value, list | dict) else None


def _prompts(value: object) -> int | None:
    """Texts of a prompt; a list of tokens is one."""
    return len(value) if isinstance(value, list) and not all(isinstance(each, int) for each in value) else None


def _characters(value: object) -> int | None:
    """Of the longest text in it."""
    return max((len(each) for _, _, each in walk("", value) if isinstance(each, str)), default=None)


def _values(value: object) -> int | None:
    """Of a list or an object, how many values are in it; counted no further than to _MOST_COUNTED."""
    return sum(1 for _ in islice(walk("", value), _MOST_COUNTED)) if isinstance(value, list | dict) else None


@dataclass(frozen=True)
class Bound:
    """A bound on keys of a request, or of a schema in it.

    Attributes:
        measure: what is bounded; None of a value that has no such measure.
        in_all: the most that all such keys of one schema may have together.
    """

    keys: frozenset[str]
    measure: Callable[[object], float | None]
    unit: str
    most: float
    least: float = 0
    in_all: float | None = None

    def check(self, where: str, value: object) -> float:
        """What is measured. Raises RefusedError where it is outside the bounds."""
        found = self.measure(value)
        if found is not None and not self.least <= found <= self.most:
            raise _refused(where, found, f"{self.least:,} to {self.most:,}", self.unit)
        return found or 0


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


_STOPS = "stop dry_sequence_breakers bad_words"
BOUNDS: Sequence[Bound] = (
    Bound(_keys("n best_of n_cmpl"), _number, "answers", 16, 1),
    Bound(_keys("max_tokens max_completion_tokens n_predict min_tokens"), _number, "tokens", 2**20),
    Bound(_keys("logprobs top_logprobs n_probs prompt_logprobs"), _number, "tokens", 100),
    Bound(_keys("seed"), _number, "", 2**64, -(2**63)),
    Bound(_keys("logit_bias"), _entries, "entries", 1_024),
    Bound(_keys(_STOPS), _entries, "texts", 16),
    Bound(_keys(_STOPS), _characters, "characters", 256),
    Bound(_keys("messages"), _values, "values", 2**16),
    Bound(_keys("tools functions"), _entries, "tools", 128),
    Bound(_keys("prompt"), _prompts, "prompts", 64),
    Bound(_keys("prompt"), _entries, "tokens", 2**20),
)
"""By key. What is in no row is bounded by OTHERS."""
OTHERS: Sequence[Bound] = (
    Bound(frozenset(), _number, "", 2**20, -(2**20)),
    Bound(frozenset(), _values, "values", 2**12),
    Bound(frozenset(), _characters, "characters", 2**16),
)
SCHEMAS = _keys("json_schema response_format tools functions guided_json guided_regex guided_choice structured_outputs")
"""Keys that hold a JSON schema, or what an engine treats like one."""
SCHEMA_BOUNDS: Sequence[Bound] = (
    Bound(
        _keys("minItems maxItems minLength maxLength minProperties maxProperties minContains maxContains"),
        _number,
        "repeats",
        2_000,
        in_all=20_000,
    ),
    Bound(_keys("enum anyOf oneOf choice guided_choice"), _entries, "choices", 500, in_all=1_000),
    Bound(_keys("properties patternProperties"), _entries, "properties", 200),
    Bound(_keys("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf"), _number, "", 2**53, -(2**53)),
    Bound(_keys("pattern regex guided_regex"), _characters, "characters", 256),
)
"""By key of a schema, at any depth."""
_REPEATS = SCHEMA_BOUNDS[0]
_PATTERNS = SCHEMA_BOUNDS[-1].keys
_MOST_VALUES = Bound(frozenset(), _values, "values", 2**13)
_MOST_TEXT = Bound(frozenset(), _characters, "characters", 2**14)
_GRAMMARS = _keys("grammar guided_grammar")


def check_request(request: Mapping[str, object]) -> None:
    """Raise RefusedError where a request asks for more than the bounds allow."""
    for key, value in request.items():
        check_key(key, value)


def check_chat(request: Mapping[str, object]) -> None:
    """Raise RefusedError where a chat has not the form that engines take for granted."""
    messages, tools = request.get("messages"), request.get("tools") or []
    if not isinstance(messages, list) or not messages:
        raise RefusedError(400, "messages: a list of objects with role and content is missing")
    for place, each in enumerate(messages):
        if not isinstance(each, dict) or not isinstance(each.get("role"), str):
            raise RefusedError(400, f"messages[{place}]: it must be an object with role and content")
        parts = each.get("content")
        for part in parts if isinstance(parts, list) else ():
            if not isinstance(part, dict) or part.get("type") != "text":
                raise RefusedError(400, f"messages[{place}].content: only text is read")
    for place, tool in enumerate(tools if isinstance(tools, list) else [tools]):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RefusedError(400, f"tools[{place}]: it must be an object with type 'function' and a function with a name")


def check_key(key: str, value: object) -> None:
    """Raise RefusedError where a key of a request asks for more than its bounds allow."""
    _check_depth(key, value)
    if key in _GRAMMARS and value:
        raise RefusedError(400, f"{key}: grammars are not taken; describe the answer by response_format with a JSON schema")
    if key in SCHEMAS:
        _check_schema(key, value)
    rows = [bound for bound in BOUNDS if key in bound.keys]
    for bound in rows or (() if key in SCHEMAS else OTHERS):
        bound.check(key, value)


def _check_depth(key: str, value: object) -> None:
    """Raise RefusedError where a value is nested too deeply."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        inside = (each for one in level for each in (one.values() if isinstance(one, dict) else one))
        level = [each for each in inside if isinstance(each, dict | list)]
        if not level:
            return
    raise RefusedError(400, f"{key[:_SHOWN]}: lists and objects are nested too deeply; at most {_DEEPEST} levels")


def _check_schema(key: str, value: object) -> None:
    """Raise RefusedError where a schema asks for more than its bounds allow."""
    if isinstance(value, str) and key not in _PATTERNS:  # vLLM takes a schema as text, too
        try:
            value = json.loads(value, parse_constant=no_constant)
        except (ValueError, RecursionError):
            raise RefusedError(400, f"{key}: the schema is not JSON") from None
        _check_depth(key, value)
    _MOST_VALUES.check(key, value)
    _MOST_TEXT.check(key, value)
    in_all: defaultdict[Bound, float] = defaultdict(int)
    for where, name, each in walk(key, value):
        if name in _GRAMMARS and isinstance(each, str):
            raise RefusedError(400, f"{where}: grammars are not taken; describe the answer by a JSON schema")
        if name == "$ref" and isinstance(each, str) and not each.startswith("#"):
            raise RefusedError(400, f"{where}: {each[:_SHOWN]!r} found; it must be inside the schema, such as '#/$defs/name'")
        for bound in SCHEMA_BOUNDS:
            if name in bound.keys:
                in_all[bound] += bound.check(where, each)
        if name in _PATTERNS and isinstance(each, str):
            in_all[_REPEATS] += _check_pattern(where, each)
    for bound, found in in_all.items():
        if bound.in_all is not None and found > bound.in_all:
            raise _refused(key, found, f"at most {bound.in_all:,}", f"{bound.unit} in all")


def _check_pattern(where: str, pattern: str) -> int:
    """The repeats that a regular expression asks for. Raises RefusedError where it repeats what repeats, or too often."""
    inside = [False]
    plain = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "x", pattern)  # without escapes and classes of characters
    for place, character in enumerate(plain):
        following = plain[place + 1 : place + 2]
        if character == "(":
            inside.append(False)
        elif character == ")" and len(inside) > 1:
            repeats = inside.pop()
            if repeats and following in {"*", "+", "{"}:
                raise RefusedError(400, f"{where}: a repeat inside a repeated group; write it without")
            inside[-1] |= repeats
        elif character in "*+{":
            inside[-1] = True
    return sum(int(_REPEATS.check(where, int(number))) for found in _BRACES.findall(plain) for number in found if number)


def walk(where: str, value: object) -> Iterator[tuple[str, str, object]]:
    """Every value in a value, and itself: where it is, the key that it stands under, and the value."""
    yield where, where, value
    waiting = [(where, value)]
    while waiting:
        where, value = waiting.pop()
        items: Iterable[tuple[str, object]] = ()
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list):
            items = (("", each) for each in value)
        for name, each in items:
            inner = f"{where}.{name[:_SHOWN]}" if name else where
            yield inner, name, each
            if isinstance(each, dict | list):
                waiting.append((inner, each))


def _refused(where: str, found: float, allowed: str, unit: str) -> RefusedError:
    shown = f"{found:,}" if abs(found) < 1e18 else f"{str(found)[:_SHOWN]}"
    return RefusedError(400, f"{where[: _SHOWN * 4]}: {shown} {unit}".rstrip() + f" found; allowed: {allowed}")

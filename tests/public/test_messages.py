"""A message is short and can be printed, whatever strangers called their things."""

from __future__ import annotations

import pytest

from modekit.errors import ModekitError

VALUES: list[object] = ["x" * 10**6, ["x" * 100] * 10**4, 10**5_000, "\x1b]0;title\x07", "\ud800", "\x9b2J", b"\xff" * 10**5]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_what_is_echoed(value: object) -> None:
    error = ModekitError(
        f"what {value}" if not isinstance(value, int) else "what", where=str(type(value)), found=value, expected=value
    )
    message = str(error)
    assert len(message) < 13_000
    message.encode()
    assert not {"\x1b", "\x9b", "\x07"} & set(message)
    assert "found:" in message and "expected:" in message


def test_a_list_within_itself() -> None:
    endless: list[object] = []
    endless.append(endless)
    assert "[[...]]" in str(ModekitError("what", found=endless))


def test_ordinary_values_are_shown_as_they_are() -> None:
    error = ModekitError("one\ntwo", where="café: x", found=["a", 1], remedy="mend\tit")
    assert str(error) == "one\ntwo\n  where:    café: x\n  found:    ['a', 1]\n  to do:    mend\tit"

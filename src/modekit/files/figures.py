"""Figures as people read them: sizes, numbers of parameters, times, and small shares."""

from __future__ import annotations


def bytes_of(count: int) -> str:
    """A size in the unit that suits it."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def file_count(count: int) -> str:
    """So many files, in words."""
    return f"{count} file{'' if count == 1 else 's'}"


def count_of(number: int) -> str:
    """A number of parameters, in millions or billions."""
    if number < 10_000:
        return str(number)
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"


def three_digits(value: float) -> str:
    """A figure with three digits that mean something, however small it is."""
    if value == 0 or not abs(value) < 100:
        return f"{value:.0f}" if value else "0"
    return f"{value:#.3g}"


def clock_of(seconds: float) -> str:
    """A time as a clock shows it: 0:07, 12:30, 1:02:30."""
    whole = round(seconds)
    minutes = whole // 60 % 60
    hours = whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def or_dash(value: float | None, form: str = "") -> str:
    """A figure in a format such as .3f, or with three digits; a dash where there is none."""
    return "-" if value is None else format(value, form) if form else three_digits(value)

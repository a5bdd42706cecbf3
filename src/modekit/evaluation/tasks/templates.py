"""Templates of tasks, which a stranger may have written: they run in a process with limits (text/template_process.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modekit.errors import TextError
from modekit.text.template_process import TEMPLATES, RenderError

LONGEST = 2**20
"""Characters of one text."""


def render(template: str, item: Mapping[str, Any]) -> str:
    """As the harness's `apply_template`. Raises TextError when the template fails, does not end, or gives a huge text."""
    try:
        text = TEMPLATES.text_of_item(template, item)
        if len(text) <= LONGEST:
            return text
        problem = f"it gives {len(text):,} characters"
    except RenderError as error:
        problem = str(error)
    raise TextError(
        "a task's template cannot be used",
        where="TASKS",
        found=f"{problem[:300]} ({' '.join(template.split())[:200]})",
        remedy=f"correct the template, which may give at most {LONGEST:,} characters",
    )

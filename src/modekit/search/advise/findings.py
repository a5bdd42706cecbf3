"""A finding: something about the models or texts that the user should know before building, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modekit.errors import ModekitError

Level = Literal["error", "warning", "note"]
"""error: the expert cannot be mixed as it is. warning: it can, and something will be lost or wasted. note: good to know."""


@dataclass(frozen=True)
class Finding:
    """One finding. `about` names the expert, or experts, or `base_model`."""

    level: Level
    about: str
    what: str
    found: str = ""
    to_do: str = ""


def finding_of(error: ModekitError, about: str) -> Finding:
    """What a build would have stopped at, as a finding."""
    found = [] if error.found is None else [f"found {error.found}"]
    found += [] if error.expected is None else [f"expected {error.expected}"]
    place = f" ({error.where})" if error.where else ""
    return Finding("error", about, error.what + place, ", ".join(found), error.remedy or "")

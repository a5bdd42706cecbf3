"""How a command runs, said once and handed down."""

from __future__ import annotations

from dataclasses import dataclass

from modekit.progress import Progress, silent


@dataclass(frozen=True)
class Run:
    """What every step of a command needs to know and none of them decides.

    Attributes:
        trust_remote_code: whether Python that a model brings may run; False unless the user said so.
        progress: who is told how far a stage is; library code neither prints nor draws.
    """

    trust_remote_code: bool = False
    progress: Progress = silent


QUIET = Run()
"""No code of others runs, and nobody is told."""

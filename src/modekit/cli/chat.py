"""`modekit eval --chat`: its options, and the call of what asks questions."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from modekit.cli.printing.console import out
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import resolved
from modekit.run import Run


@dataclass(frozen=True)
class ChatOptions:
    """Options of `--chat`."""

    chat: Annotated[
        bool, typer.Option("--chat", help="Ask short questions in the chat template and show which expert leads.")
    ] = False
    system: Annotated[str | None, typer.Option(help="System prompt (with --chat; default: the template's own).")] = None
    questions: Annotated[int | None, typer.Option(min=1, help="Questions per domain (with --chat; default 32).")] = None

    def beside_chat(self) -> dict[str, object]:
        """Those that mean nothing without --chat."""
        return {"--system": self.system, "--questions": self.questions}


def score_chat(checkpoint: Path, options: ChatOptions, *, as_json: bool, trust_remote_code: bool) -> None:
    """Ask the questions and draw who leads."""
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.checkpoint.pairs import refuse_pairs
    from modekit.cli.printing.chat import print_chat
    from modekit.evaluation.chat import evaluate_chat
    from modekit.evaluation.results_folder import RESULTS_FOLDER

    opened = open_checkpoint(resolved(checkpoint))
    refuse_pairs(opened, "chats are with models that write a text on", option="--chat")
    with drawn_progress() as progress:
        results = evaluate_chat(
            opened,
            questions=options.questions or 32,
            system=options.system,
            run=Run(trust_remote_code, progress),
        )
    if as_json:
        sys.stdout.write(json.dumps(results.as_data(), indent=2) + "\n")
    else:
        print_chat(results)
        out.print(Text(f"{checkpoint / RESULTS_FOLDER}: chat.json, chat.md", style="dim"))

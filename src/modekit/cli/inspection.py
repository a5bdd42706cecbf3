"""The command that shows what the routers do."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modekit.cli.options import grouped
from modekit.cli.printing.inspection import print_inspection, print_trace
from modekit.cli.printing.mixtures import print_forced
from modekit.cli.progress import drawn_progress
from modekit.cli.shell import AsJson, OutFolder, Trust, app, resolved
from modekit.errors import ModekitError
from modekit.run import Run
from modekit.text.amounts import SAMPLE_TOKENS

if TYPE_CHECKING:
    from modekit.evaluation.inspection.text import UserMessage

_OPTIONS = ("--text", "--text-file", "--chat", "--system", "--layer")


@dataclass(frozen=True)
class TextOptions:
    """A text to show in place of the tables."""

    text: Annotated[str | None, typer.Option(help="Show this text word by word; - reads standard input.")] = None
    text_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Show the text of this file word by word.")] = None
    chat: Annotated[bool, typer.Option("--chat", help="Read the text as a user message in the chat template.")] = False
    system: Annotated[str | None, typer.Option(help="System prompt (with --chat; default: the template's own).")] = None
    layer: Annotated[int | None, typer.Option(min=0, help="Only the routers of this layer (with a text).")] = None

    def given(self) -> list[str]:
        """The options that were given."""
        values = [self.text, self.text_file, self.chat or None, self.system, self.layer]
        return [option for option, value in zip(_OPTIONS, values, strict=True) if value is not None]

    def read(self) -> str | UserMessage | None:
        """The text, or a user message (--chat); None without a text. Raises ModekitError, TextError."""
        from modekit.evaluation.inspection.text import STDIN, UserMessage, read_text

        if self.text is not None and self.text_file is not None:
            raise ModekitError("two texts are given", where="--text, --text-file", remedy="give one")
        if self.system is not None and not self.chat:
            raise ModekitError("this option needs --chat", where="--system", remedy="add --chat, or leave it out")
        if self.text is None and self.text_file is None:
            for option in self.given():
                raise ModekitError("this option needs a text", where=option, remedy="add --text, or leave it out")
            return None
        text = read_text(self.text_file) if self.text is None or self.text == STDIN else self.text
        return UserMessage(self.system, text) if self.chat else text


@app.command()
@grouped
def inspect(
    checkpoint: OutFolder,
    shown: TextOptions,
    tokens: Annotated[int, typer.Option(min=64, help="Held-out tokens per domain.")] = SAMPLE_TOKENS,
    sequence_length: Annotated[int, typer.Option(min=8, help="Longest piece of a document or text, in tokens.")] = 512,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show what the routers do: expert weights per domain, leave-one-out losses, similarity, tokens; or one text by word."""
    from modekit.checkpoint.checkpoint import open_checkpoint
    from modekit.checkpoint.pairs import refuse_pairs
    from modekit.evaluation.forced import ForcedExperts
    from modekit.evaluation.inspection.inspect import inspect
    from modekit.evaluation.inspection.result import Inspection, TextTrace
    from modekit.evaluation.inspection.text import inspect_text
    from modekit.evaluation.results_folder import RESULTS_FOLDER

    opened = open_checkpoint(resolved(checkpoint))
    for option in shown.given():
        refuse_pairs(
            opened,
            "a source and its target are shown together, and this asks for one text",
            option=option,
            remedy="leave it out: inspect.json and the report have pairs of the held-out text, token by token",
        )
    text = shown.read()
    found: Inspection | TextTrace
    with drawn_progress() as progress:
        run = Run(trust_remote_code, progress)
        if text is None:
            found = inspect(opened, tokens_per_domain=tokens, sequence_length=sequence_length, run=run)
        else:
            found = inspect_text(opened, text, layer=shown.layer, sequence_length=sequence_length, run=run)
    if as_json:
        sys.stdout.write(json.dumps(found.model_dump(), indent=2) + "\n")
    elif isinstance(found, Inspection):
        print_inspection(checkpoint / RESULTS_FOLDER, found)
        forced = ForcedExperts.find(opened)
        if forced is not None:
            print_forced(forced)
    else:
        print_trace(found)

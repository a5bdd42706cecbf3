"""Commands that prepare the text that experts are made of: `modekit data balance`, `modekit data tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modekit.cli.options import grouped, texts_by_domain
from modekit.cli.printing import print_done, print_json, print_notes, print_table
from modekit.cli.progress import running
from modekit.cli.shell import NewFolder, Writing, app, common, model_in, writable
from modekit.cli.words import Words, settings_in
from modekit.evaluation.tables import ResultTable
from modekit.files.figures import or_dash
from modekit.files.place import replaced_by

if TYPE_CHECKING:
    from modekit.experts.corpus.balance import Balanced
    from modekit.experts.corpus.tokenizer import TrainedTokenizer

data = typer.Typer(
    name="data", help="Prepare the text that experts are made of: domains of equal size, a tokenizer.", no_args_is_help=True
)
app.add_typer(data)

GivenText = Annotated[list[str], typer.Option(help="NAME=FILE, FOLDER or hub data set; once per domain.")]


@data.command()
@grouped
def balance(
    output: NewFolder,
    text: GivenText,
    tokenizer: Annotated[str, typer.Option(metavar="MODEL", help="Folder or hub id of the model whose tokens are counted.")],
    said: Writing,
    words: Words = None,
) -> None:
    """Choose whole documents so that every domain has as many tokens, in train and in validation."""
    texts, target = texts_by_domain(text), writable(output, said.overwrite)
    with running() as run:
        from modekit.experts.corpus.balance import BalanceSettings, balance
        from modekit.experts.corpus.texts import GivenTexts

        settings = settings_in(words, BalanceSettings, "data balance")
        folder, _ = model_in(tokenizer, "--tokenizer", run)
        given = GivenTexts(texts, Path.cwd(), tokenizer, folder)
        balanced = balance(given, settings, target, replace=replaced_by(said.overwrite), run=run)
    if common().json:
        print_json(balanced.model_dump(mode="json"))
    else:
        print_balanced(balanced, output)


@data.command(name="tokenizer")
@grouped
def make_tokenizer(
    output: NewFolder,
    text: GivenText,
    said: Writing,
    vocabulary: Annotated[
        int,
        typer.Option(min=260, max=2**20, help="Largest size of the vocabulary."),  # all bytes and special tokens, and more
    ] = 8_000,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Folder or hub id of a model whose tokenizer to compare with.")
    ] = None,
) -> None:
    """Train a byte-level BPE in which every domain weighs the same, and say how many tokens it makes of each."""
    texts, target = texts_by_domain(text), writable(output, said.overwrite)
    with running() as run:
        from modekit.experts.corpus.texts import GivenTexts
        from modekit.experts.corpus.tokenizer import train_tokenizer

        folder, _ = (None, None) if against is None else model_in(against, "--against", run)
        given = GivenTexts(texts, Path.cwd(), against, folder)
        trained = train_tokenizer(given, vocabulary, target, replace=replaced_by(said.overwrite), run=run)
    if common().json:
        print_json(trained.model_dump(mode="json"))
    else:
        print_tokenizer(trained, output)


def print_balanced(balanced: Balanced, folder: Path) -> None:
    """Draw what was kept and dropped."""
    rows = []
    for split in balanced.diff_percent:
        for domain in balanced.domains:
            share = domain.splits[split]
            dropped = 1 - share.tokens / share.found_tokens
            rows.append([f"{split} {domain.name}", f"{share.documents:,}", f"{share.tokens:,}", f"{dropped:.1%}"])
    print_table(ResultTable("", ["split domain", "documents", "tokens", "dropped"], rows))
    print_notes(balanced.notes())
    apart = ", ".join(f"{split} {percent:.2f} %" for split, percent in balanced.diff_percent.items())
    print_done(folder, f"{len(balanced.domains)} domains, at most {balanced.settings.max_diff_percent:g} % apart: {apart}")


def print_tokenizer(trained: TrainedTokenizer, folder: Path) -> None:
    """Draw fertility per domain."""
    compared = trained.against is not None
    titles, rows = ["domain", "documents", "kB", "tokens per word", "per 1,000 bytes", "against", "change"], []
    for each in trained.domains:
        cells = [f"{each.documents:,}", f"{each.bytes / 1000:,.1f}", f"{each.per_word:.2f}", f"{each.per_1000_bytes:.1f}"]
        other = [or_dash(each.against_per_1000_bytes, ".1f"), or_dash(each.change, "+.1%")]
        rows.append([each.name, *cells, *(other if compared else [])])
    against = f", against {trained.against}" if compared else ""
    said = f"Tokens of documents held out of the training{against}."
    print_table(ResultTable("", titles if compared else titles[:-2], rows, said))
    print_notes(trained.notes)
    print_done(folder, f"a tokenizer of {trained.vocabulary:,} tokens")

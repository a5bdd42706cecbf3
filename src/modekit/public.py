"""The public face: what `import modekit` offers. Each verb of the command line is a function here, over the same code.

    checkpoint = modekit.build(modekit.plan("recipe.yaml"), "OUT")
    modekit.fit("OUT", fit="lexical")
    print(modekit.evaluate("OUT").markdown())
    model, tokenizer = modekit.load("OUT")

Everything else in the package is inner and may move. Nothing heavy is imported before a function is called, so that a plan
needs no torch. All functions raise `ModekitError` for what a user can mend; they print nothing and write only what they say.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modekit.run import QUIET, Run
from modekit.text.amounts import TABLE_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modekit.building.verify import Check
    from modekit.checkpoint.checkpoint import Checkpoint
    from modekit.evaluation.results import Results
    from modekit.evaluation.rows import Labels
    from modekit.planning.plan import Plan
    from modekit.recipes.recipe import Recipe
    from modekit.routing.text_router import TextRouter
    from modekit.training.train import TrainedMixture

    Folder = str | Path | Checkpoint
    """A checkpoint's folder, or the checkpoint itself."""


def recipe(source: str | Path | Mapping[str, object], *, root: str | Path | None = None) -> Recipe:
    """Read and check a recipe: a YAML file, whose paths are relative to its folder, or a mapping.

    Paths of the recipe that is returned are relative to `root`, by default the current folder, as those of a mapping are.
    Raises RecipeError, which lists every problem with its key.
    """
    from modekit.recipes.edit import as_written
    from modekit.recipes.paths import from_folder, spelled_out
    from modekit.recipes.read import load_recipe, parse_recipe

    folder = _real("." if root is None else root)
    if isinstance(source, Mapping):
        return parse_recipe(spelled_out(dict(source), folder))
    return parse_recipe(from_folder(as_written(load_recipe(Path(source))), _real(source).parent, folder))


def plan(source: Recipe | str | Path | Mapping[str, object], *, root: str | Path | None = None, run: Run = QUIET) -> Plan:
    """Every tensor of the result and where it comes from, from configs and headers alone.

    Paths in the recipe are relative to `root`: by default the folder of the recipe's file, or the current one.
    Raises RecipeError, SourceError, MismatchError or UnsupportedError; nothing is written.
    """
    from modekit.planning.make import make_plan
    from modekit.recipes.read import load_recipe

    if isinstance(source, (str, Path)):
        root = _real(source).parent if root is None else root
        return make_plan(load_recipe(Path(source)), _real(root), run=run)
    root = _real("." if root is None else root)
    return make_plan(recipe(source, root=root) if isinstance(source, Mapping) else source, root, run=run)


def build(
    source: Plan | Recipe | str | Path | Mapping[str, object], out: str | Path, *, overwrite: bool = False, run: Run = QUIET
) -> Checkpoint:
    """Write the checkpoint that a plan (or a recipe, which is planned first) describes; it appears in `out` whole.

    Raises OutputError, SourceError or TextError, also for a text that is not there and that only an evaluation will read;
    nothing is left behind then.
    """
    from modekit.building.build import build as write
    from modekit.planning.plan import Plan
    from modekit.text.held_out import check_texts

    made = source if isinstance(source, Plan) else plan(source, run=run)
    check_texts(made.recipe, made.root)
    return write(made, _real(out), overwrite=overwrite, run=run)


def fit(checkpoint: Folder, *, run: Run = QUIET, **changes: object) -> Checkpoint:
    """Set the router anew; the experts are not touched.

    `changes` are keys of the recipe's `mixture.router` (`fit="lexical"`, `temperature=0.5`) or of `mixture` itself
    (`method`, `top_k`, `top_p`). Raises RecipeError for what would need another build.
    """
    from modekit.recipes.edit import changes_of
    from modekit.routing.fit import refit

    return refit(_opened(checkpoint, with_any_router=True), changes_of(changes), run=run)


def add(
    checkpoint: Folder,
    expert: Mapping[str, object],
    *,
    weight: float | None = None,
    out: str | Path | None = None,
    run: Run = QUIET,
) -> Checkpoint:
    """Let one more expert into a mixture, in its own place or into `out`; the others' models and texts are not needed.

    `expert` is what a recipe says of one (`{"name": "tax", "model": "./tax", "text": ["tax.jsonl"]}`), with paths relative to
    the current folder; `weight` its share where the mixture has given weights. Nothing is measured before. Raises what `build`
    raises, and RecipeError or CheckpointError where the mixture cannot take it; then nothing has changed.
    """
    from modekit.members.change import write_change
    from modekit.members.edits import NewExpert, add_expert

    opened = _opened(checkpoint)
    said = {key: value for key, value in expert.items() if key != "name"}
    wanted = add_expert(opened, str(expert.get("name", "")), NewExpert(said, Path.cwd(), weight))
    return write_change(opened, wanted, opened.folder if out is None else _real(out), run=run)


def remove(checkpoint: Folder, name: str, *, out: str | Path | None = None, run: Run = QUIET) -> Checkpoint:
    """Take an expert out of a mixture, in its own place or into `out`: what is left is what a build without it gives.

    Raises RecipeError where the mixture cannot do without it; then nothing has changed.
    """
    from modekit.members.change import write_change
    from modekit.members.edits import remove_expert

    opened = _opened(checkpoint)
    return write_change(opened, remove_expert(opened, name), opened.folder if out is None else _real(out), run=run)


def train(
    checkpoint: Folder,
    *,
    texts: Mapping[str, Sequence[str]] | None = None,
    out: str | Path | None = None,
    run: Run = QUIET,
    **settings: object,
) -> TrainedMixture:
    """Train a mixture by gradient and write it to `out`, by default in its own place, when that is better on held-out text.

    `settings` are those of docs/training.md (`what=["routers"]`, `steps=100`); `texts` is text per domain instead of the
    recipe's. Raises TextError or TrainingError.
    """
    from modekit.training.settings import TrainSettings, checked_settings
    from modekit.training.train import train as move

    asked = checked_settings(settings, TrainSettings, where="modekit.train")
    return move(_opened(checkpoint), asked, texts=texts, out=None if out is None else _real(out), run=run)


def evaluate(
    checkpoint: Folder,
    *,
    tokens: int = TABLE_TOKENS,
    sequence_length: int = 512,
    labels: Labels | None = None,
    run: Run = QUIET,
) -> Results:
    """Held-out loss of base, experts, weight average, oracle and mixture, also written to the checkpoint's results folder.

    `tokens` are read per domain, in sequences of at most `sequence_length`. `labels`: "gate" or "tag" adds rows of the mixture
    under right and wrong labels. Raises TextError, SourceError, or MismatchError.
    """
    from modekit.evaluation.evaluate import evaluate as score

    return score(
        _opened(checkpoint),
        tokens_per_domain=tokens,
        sequence_length=sequence_length,
        labels=labels,
        run=run,
    )


def verify(checkpoint: Folder, *, run: Run = QUIET) -> list[Check]:
    """Prove a checkpoint: every check with its verdict (proven, failed, not possible). Nothing is written."""
    from modekit.building.verify import verify as prove

    return prove(_opened(checkpoint, with_any_router=True), run=run)


def load(checkpoint: Folder, *, dtype: str = "auto", run: Run = QUIET) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, on the accelerator if there is one, and its tokenizer; `dtype` as in transformers.

    Raises CheckpointError or SourceError.
    """
    from modekit.loaded.load import load_model, load_tokenizer

    folder = _opened(checkpoint).folder
    return load_model(folder, dtype=dtype, run=run), load_tokenizer(folder, run=run)


def router(checkpoint: Folder, *, run: Run = QUIET) -> TextRouter:
    """The mixture's router alone, which says whose a text or a conversation is without running a model: `.decide(said)`.

    Raises UnsupportedError when it reads anything but tokens; CheckpointError or SourceError.
    """
    from modekit.routing.text_router import TextRouter

    return TextRouter(_opened(checkpoint), run=run)


def _real(folder: str | Path) -> Path:
    """A path without links and ways up: what a record says relative to a folder holds from there alone."""
    return Path(os.path.realpath(folder))


def _opened(checkpoint: Folder, *, with_any_router: bool = False) -> Checkpoint:
    """`with_any_router`: for what replaces the router, or says what is wrong with it."""
    from modekit.checkpoint.checkpoint import Checkpoint
    from modekit.checkpoint.open import open_checkpoint, open_with_any_router

    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    return (open_with_any_router if with_any_router else open_checkpoint)(_real(checkpoint))

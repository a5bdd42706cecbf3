"""Held-out text of a checkpoint's domains, as documents and as token sequences; and a model's loss on it: of every next token,
or of pairs of every token of the targets. No figure comes from a model whose output is not finite.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import CheckpointError, TextError
from modekit.evaluation.results import Score, in_blocks
from modekit.loaded.load import load_tokenizer
from modekit.loaded.passes import check_text, losses_of, tokens_per_batch
from modekit.recipes.edit import as_written
from modekit.recipes.paths import from_folder
from modekit.recipes.read import parse_recipe
from modekit.run import QUIET, Run
from modekit.text.document import Conversation, check_kind
from modekit.text.held_out import HeldOutText, RecipeTexts
from modekit.text.sequences import TokenSequence, encode, make_batches
from modekit.text.splits import text_record

Advance = Callable[[int], object]
"""Called with how many tokens more are done."""


@dataclass(frozen=True)
class Domain:
    """Held-out text of one domain. `expert` is the place of its own expert, None for an unseen domain; `record`: which
    documents were read, and how; `chats`: whether there are conversations in it.
    """

    name: str
    expert: int | None
    sequences: Sequence[TokenSequence]
    record: Mapping[str, object] = field(default_factory=dict)
    chats: bool = False

    @property
    def scored_tokens(self) -> int:
        """Tokens that are predicted: all but the first of each sequence, of pairs those of the targets."""
        return sum(sequence.scored for sequence in self.sequences)


def known_and_unseen(domains: Sequence[Domain]) -> tuple[list[str], list[str]]:
    """Names of the domains that have an expert, and of those that have none."""
    known = [domain.name for domain in domains if domain.expert is not None]
    return known, [domain.name for domain in domains if domain.expert is None]


def scored_on(checkpoint: Checkpoint, texts: Mapping[str, Sequence[str]], root: Path) -> Checkpoint:
    """The same, with these texts for evaluation in place of its recipe's, relative to `root`. Raises RecipeError."""
    record, data = checkpoint.record, as_written(checkpoint.record.recipe)
    given = from_folder({**data, "experts": [], "eval": dict(texts)}, root, checkpoint.recipe_root)["eval"]
    recipe = parse_recipe({**data, "eval": {**record.recipe.eval, **given}}, where="--text")
    return replace(checkpoint, record=record.model_copy(update={"recipe": recipe})) if texts else checkpoint


def recipe_texts(checkpoint: Checkpoint) -> RecipeTexts:
    """Which text may be read, of the recipe that a checkpoint was built from."""
    models = [checkpoint.folder / source.folder for source in checkpoint.record.sources]
    return RecipeTexts(checkpoint.record.recipe, checkpoint.recipe_root, models=models, mixture=checkpoint.folder)


def held_out_domains(
    checkpoint: Checkpoint,
    *,
    tokens_per_domain: int,
    sequence_length: int,
    seen: Collection[str] = (),
    run: Run = QUIET,
) -> list[Domain]:
    """The text every row is scored on, as token sequences; see `held_out_texts`. Raises TextError as it does, and for text of
    another kind than the mixture reads.
    """
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    domains = []
    for held in held_out_texts(checkpoint, seen):
        check_kind(held.documents, checkpoint.shape.family.reads, where=held.text.where)
        sequences = encode(
            tokenizer, held.documents, max_tokens=tokens_per_domain, sequence_length=sequence_length, answers=True
        )
        if not sequences:
            raise held.text.none_fits(held.documents, sequence_length)
        record = {**text_record(held.documents, sum(sequence.size for sequence in sequences)), "length": sequence_length}
        chats = any(isinstance(document, Conversation) for document in held.documents)
        domains.append(Domain(held.name, held.expert, sequences, record, chats))
    return domains


def held_out_texts(checkpoint: Checkpoint, seen: Collection[str] = ()) -> list[HeldOutText]:
    """Per domain the documents that may be shown, less those that are `seen`. Raises TextError for a domain of which none is
    left, and when no domain has an expert and text.
    """
    held_out = recipe_texts(checkpoint).report(seen)
    for held in held_out:
        if not held.documents:
            what = "no held-out document is left to evaluate on"
            used = ": all of them set the router, trained a model or chose its state" if held.used else ""
            other = "other text under eval"
            more = f"give {other}" if held.used else f"give more documents (one in ten is held out), or {other}"
            raise held.text.nothing_left(what + used, remedy=more)
    if not any(held.expert is not None for held in held_out):
        raise TextError(
            "there is no text to evaluate on",
            where="experts[].text, eval",
            remedy="add text per expert, or eval: {domain: text}",
        )
    return held_out


def tokens_per_pass(config: PreTrainedConfig) -> int:
    """Padded tokens of a batch whose logits, (B, S, V) float32, stay within bounds."""
    return max(512, min(8_192, 2**26 // int(config.vocab_size)))


def score_domain(model: PreTrainedModel, domain: Domain, advance: Advance) -> Score:
    """Mean loss of a model on a domain's tokens; every sequence starts anew, pads are not scored.

    Raises TextError for text of another kind than the model reads.
    """
    check_text(model, domain.sequences, where=domain.name or None)
    tokens = min(tokens_per_pass(model.config), tokens_per_batch(model))
    sums = torch.zeros(len(domain.sequences), dtype=torch.float64)
    with torch.inference_mode():
        for batch in make_batches(domain.sequences, tokens=tokens):
            sums[list(batch.rows)] = losses_of(model, batch).cpu().double().sum(1)
            advance(batch.scored)
    blocks = in_blocks(sums.tolist(), [sequence.scored for sequence in domain.sequences])
    return Score(float(sums.sum()) / domain.scored_tokens, blocks=blocks)


def not_finite(what: str, where: str) -> CheckpointError:
    """The error of a model that gives NaN or Inf."""
    return CheckpointError(f"{what} not finite", where=where, remedy="look for what is damaged with `modekit verify`")


@contextmanager
def only_finite(model: PreTrainedModel) -> Iterator[None]:
    """While open, a pass whose logits are not finite raises CheckpointError."""

    def check(_: object, _inputs: object, output: Any) -> None:
        if not torch.isfinite(output.logits).all():
            raise not_finite("what the model says is", str(model.config.name_or_path))

    hook = model.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()

"""What a mixture is worth: held-out loss of base, experts, weight average, oracle and mixture on every domain.

Honest by construction: what is scored set, trained and chose nothing (text/held_out.py), and every row reads the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from modekit.checkpoint.carried import lost_by
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.evaluation.domains import Domain, held_out_domains, known_and_unseen, not_finite, score_domain
from modekit.evaluation.results import Results, Row, Score, gapless_notes, label_notes, with_gaps
from modekit.evaluation.rows import Labels, RowJob, label_jobs, row_identity, row_jobs, run_jobs
from modekit.loaded.load import load_tokenizer
from modekit.recipes.strict import did_you_mean
from modekit.run import QUIET, Run
from modekit.text.amounts import TABLE_TOKENS
from modekit.text.written import written_notes


def evaluate(
    checkpoint: Checkpoint,
    *,
    tokens_per_domain: int = TABLE_TOKENS,
    sequence_length: int = 512,
    run: Run = QUIET,
    known: Results | None = None,
    seen: Collection[str] = (),
    labels: Labels | None = None,
    wrong: bool = True,
    write: bool = True,
) -> Results:
    """Score every row on every domain and, with `write`, write OUT/results/eval.json and eval.md.

    With `labels` right ones are read, too, and with `wrong` wrong ones. Documents whose digests are `seen` are left out, as
    those that something was set or trained by always are. Rows of `known`, and of the checkpoint's earlier results, that ran
    the same weights on the same tokens are taken over. Raises TextError, SourceError, MismatchError, and CheckpointError for
    a loss that is not finite.
    """
    run.begin("read the text")
    positions = checkpoint.config.get("max_position_embeddings")
    if labels == "tag" and isinstance(positions, int):  # a tag before a text takes one
        sequence_length = max(2, min(sequence_length, positions - 1))
    domains = held_out_domains(
        checkpoint, tokens_per_domain=tokens_per_domain, sequence_length=sequence_length, seen=seen, run=run
    )
    jobs, notes = row_jobs(checkpoint, run=run)
    if labels is not None:
        jobs += label_jobs(checkpoint, labels, domains, load_tokenizer(checkpoint.folder, run=run), list(jobs), wrong)
    earlier = [row for results in (known, Results.written_here(checkpoint)) if results for row in results.rows]
    rows = list(_rows(jobs, checkpoint, domains, earlier, run))
    owned, unseen = known_and_unseen(domains)
    if checkpoint.record.recipe.digest() != checkpoint.record.recipe_digest:
        notes.append("the text is not all the recipe's: some was given by --text")
    hints = {name: hint for name in unseen if (hint := did_you_mean(name, checkpoint.names))}
    notes += [
        *gapless_notes(rows, owned),
        *label_notes(rows, owned),
        *lost_by(checkpoint),
        *written_notes(checkpoint.record.recipe, checkpoint.recipe_root),
        *(f"no expert is called {name}, so it is an unseen domain; {hint}" for name, hint in hints.items()),
    ]
    results = Results(with_gaps(rows, owned), owned, unseen, notes=notes, checkpoint=checkpoint.identity)
    if write:
        results.write(checkpoint)
    return results


def _rows(
    jobs: Sequence[RowJob], checkpoint: Checkpoint, domains: Sequence[Domain], known: Sequence[Row], run: Run
) -> Iterator[Row]:
    """Every job's scores, taken over where `known` rows have them. Raises CheckpointError for a loss that is not finite."""
    earlier = {(row.identity, name): score for row in known for name, score in row.scores.items()}

    def identity(job: RowJob) -> str:
        return row_identity(job.identity, checkpoint, domains)

    def found(job: RowJob, text: Domain) -> Score | None:
        return earlier.get((identity(job), text.name))

    for job, parameters, scores in run_jobs(checkpoint, jobs, domains, score_domain, run, found):
        for name, score in scores.items():
            if not math.isfinite(score.loss):
                raise not_finite("the loss is", f"{job.name} on the text '{name}'")
        yield Row(job.name, job.kind, *parameters, scores, identity(job))

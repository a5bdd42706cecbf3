"""What a mixture is worth: held-out loss of base, experts, weight average, oracle and mixture on every domain.

Honest by construction: what is scored set, trained and chose nothing (text/held_out.py), and every row reads the same tokens.

    gap closed = (loss of base - loss of row) / (loss of base - loss of the domain's own expert)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial

from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import CheckpointError
from modekit.evaluation.domains import Domain, held_out_domains, known_and_unseen
from modekit.evaluation.identity import row_identity
from modekit.evaluation.jobs import RowJob, label_jobs, row_jobs
from modekit.evaluation.labels import Gain, Labels, check_labels, label_notes, longest_with_tag
from modekit.evaluation.loss import score_domain
from modekit.evaluation.results import SMALLEST_GAP, Results, Row, Score, gaps_of, rows_scored_here, with_gaps
from modekit.evaluation.uncertainty import in_blocks, mean_error
from modekit.loaded.load import load_tokenizer
from modekit.recipes.strict import BASE, did_you_mean
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
    write: bool = True,
) -> Results:
    """Score every row on every domain and, with `write`, write OUT/results/eval.json and eval.md.

    Documents whose digests are `seen` are left out, as those that something was set or trained by always are. Rows of `known`,
    and of the checkpoint's earlier results, that ran the same weights on the same tokens are taken over. Raises TextError,
    SourceError, MismatchError, and CheckpointError for a loss that is not finite.
    """
    run.begin("read the text")
    tokenizer = load_tokenizer(checkpoint.folder, run=run)
    if labels is not None:
        check_labels(checkpoint, labels, tokenizer)
        sequence_length = longest_with_tag(sequence_length, checkpoint) if labels.by == "tag" else sequence_length
    domains = held_out_domains(
        checkpoint, tokens_per_domain=tokens_per_domain, sequence_length=sequence_length, seen=seen, run=run
    )
    jobs, notes = row_jobs(checkpoint, run=run)
    jobs += [] if labels is None else label_jobs(checkpoint, labels, domains, tokenizer, jobs)
    rows = _run(jobs, checkpoint, domains, [*(known.rows if known else ()), *rows_scored_here(checkpoint)], run)
    gaps = gaps_of(rows, [domain.name for domain in domains])
    gapless = [name for name, gap in gaps.items() if gap <= SMALLEST_GAP]
    if gapless:
        notes.append(f"no gap to close, so not in its mean: {', '.join(gapless)} (the own expert is not better than the base)")
    rows = with_gaps(rows, gaps)
    bases = [name for name, place in zip(checkpoint.names, checkpoint.record.expert_sources, strict=True) if place == 0]
    notes += notes_of(rows, domains, SMALLEST_GAP, bases)
    notes += written_notes(checkpoint.record.recipe, checkpoint.recipe_root)
    unseen = known_and_unseen(domains)[1]
    hints = {name: hint for name in unseen if (hint := did_you_mean(name, checkpoint.names))}
    notes += [f"no expert is called {name}, so it is an unseen domain; {hint}" for name, hint in hints.items()]
    if labels is not None:
        named = {row.name: row for row in rows}
        notes += label_notes(labels, domains, checkpoint.record.recipe, named, partial(loss_gains, domains))
    records = {domain.name: domain.record for domain in domains}
    results = Results(rows, *known_and_unseen(domains), records, notes)
    if write:
        results.write(checkpoint)
    return results


def _run(
    jobs: Sequence[RowJob], checkpoint: Checkpoint, domains: Sequence[Domain], known: Sequence[Row], run: Run
) -> list[Row]:
    """Every job's scores, taken over where `known` rows have them; one model is in memory at a time."""
    earlier = {(row.identity, name): score for row in known for name, score in row.scores.items()}
    total = sum(domain.scored_tokens for domain in domains) * len(jobs)
    done, sizes = 0, checkpoint.parameters
    rows: list[Row] = []
    for job in jobs:
        identity = row_identity(job.identity, checkpoint, [domain.record for domain in domains])
        model: PreTrainedModel | None = None
        scores: dict[str, Score] = {}
        for domain in domains:
            text = job.text(domain)
            if text is not None:
                score = earlier.get((identity, domain.name))
                if score is None or (score.blocks is None and len(domain.sequences) > 1):
                    model = model if model is not None else job.load()
                    with job.within(model, text):
                        score = score_domain(model, text, partial(run.progress, f"score {job.name}", total=total), done)
                if not math.isfinite(score.loss):
                    where, remedy = f"{job.name} on the text '{domain.name}'", "look for what is damaged with `modekit verify`"
                    raise CheckpointError("the loss is not finite", where=where, remedy=remedy)
                scores[domain.name] = earlier[identity, domain.name] = score
            done += domain.scored_tokens
            run.progress(f"score {job.name}", done, total)
        parameters = (sizes.dense, sizes.dense) if job.dense else (sizes.total, sizes.active)
        rows.append(Row(job.name, job.kind, *parameters, scores, identity))
        del model
    return rows


def notes_of(rows: Sequence[Row], domains: Sequence[Domain], least: float, bases: Collection[str] = ()) -> list[str]:
    """Notes on scored rows. Losses less than `least` (nats per token) apart are one; `bases`: experts that are the base."""
    return [*_without_errors(rows, domains), *_beaten(rows, domains, least, bases)]


def loss_gains(domains: Sequence[Domain], with_label: Row, without: Row) -> list[Gain]:
    """What a label saves of the loss, mean over the domains that have an expert; none where one of them was not scored."""
    own = [domain for domain in domains if domain.expert is not None]
    if not all(domain.name in with_label.scores for domain in own):
        return []
    scores = [(without.scores[domain.name], with_label.scores[domain.name], domain) for domain in own]
    gain = sum(one.loss - other.loss for one, other, _ in scores) / len(own)
    errors = [error for each in scores if (error := _error_of_difference(*each)) is not None]
    known = len(errors) == len(own)  # of a mean without one of them nothing is known
    error = math.sqrt(sum(error**2 for error in errors)) / len(own) if known else None
    return [Gain(gain, "nats per token", 3, error)]


def _without_errors(rows: Sequence[Row], domains: Sequence[Domain]) -> Iterator[str]:
    single = [domain.name for domain in domains if len(domain.sequences) < 2]
    if single:
        yield f"no standard errors for {', '.join(single)}: the held-out text is a single sequence; give more, or more --tokens"
    undecided = [
        domain.name
        for domain in domains
        if domain.name not in single
        and any(
            score.gap_closed is not None and score.gap_error is None for row in rows if (score := row.scores.get(domain.name))
        )
    ]
    if undecided:
        yield (
            f"no standard error of the gap closed for {', '.join(undecided)}: on a part of so little text there is no gap; "
            "give more, or more --tokens"
        )


def _beaten(rows: Sequence[Row], domains: Sequence[Domain], least: float, bases: Collection[str]) -> Iterator[str]:
    """Domains whose own expert, which is the base where the recipe says so, is surely worse than another expert."""
    named = {row.name: row for row in rows if row.kind in {"base", "expert"}}
    for domain in domains:
        own = named.get(BASE if domain.name in bases else domain.name)
        if domain.expert is None or own is None:
            continue
        others = [row for row in named.values() if row.kind == "expert" and row is not own and domain.name in row.scores]
        best = min(others, key=lambda row: row.scores[domain.name].loss, default=None)
        if best is None:
            continue
        mine, other = own.scores[domain.name], best.scores[domain.name]
        if mine.loss - other.loss > max(least, 2 * (_error_of_difference(mine, other, domain) or 0.0)):
            who = "the base model, which is its expert," if own.kind == "base" else "its own expert"
            yield f"{domain.name}: {who} has {mine.loss:.3f} on its text, worse than {best.name} with {other.loss:.3f}"


def _error_of_difference(one: Score, other: Score, domain: Domain) -> float | None:
    """Standard error of the difference of two mean losses on the same text; None when it is not known."""
    if one.blocks is None or other.blocks is None or len(one.blocks) != len(other.blocks):
        return None
    counts = in_blocks([sequence.scored for sequence in domain.sequences])
    if len(counts) != len(one.blocks):
        return None
    return mean_error([a - b for a, b in zip(one.blocks, other.blocks, strict=True)], counts)

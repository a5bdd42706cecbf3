"""What a mixture is worth: held-out loss of base, experts, weight average, oracle and mixture on every domain.

Honest by construction: of the experts' text only the `report` split is scored; a document that set the router, or that
`modekit specialize` trained on, is dropped even when it comes from another file; every row reads the same tokens.

    gap closed = (loss of base - loss of row) / (loss of base - loss of the domain's own expert)
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.staging import write_atomically, write_json
from modekit.errors import TextError
from modekit.evaluation.uncertainty import gap_error, in_blocks, mean_error
from modekit.loaded.models import forced_expert, load_adapted, load_model, load_tokenizer
from modekit.progress import Progress, silent
from modekit.recipes.recipe import BASE
from modekit.routing.fit import fit_documents
from modekit.sources.adapter import is_adapter, open_adapter
from modekit.sources.families import LAYER
from modekit.sources.model import open_source
from modekit.text.documents import (
    SELECTED_FILE,
    TRAINED_DIGITS,
    TRAINED_FILE,
    Split,
    TokenSequence,
    digest_of,
    digests_in,
    documents_of_split,
    encode,
    make_batches,
    read_documents,
    text_record,
)

RESULTS_FOLDER = "results"
RESULTS_FILE = "eval.json"
_OWN = re.compile(r"\.experts\.\d+\.")
_CACHED_TOKENS = 2_048  # of a batch on a processor: 30 % faster than 8,192, whose activations are in no cache
SMALLEST_GAP = 1e-3  # nats: below it an expert is not better than the base and a share of the gap means nothing

Kind = Literal["base", "expert", "average", "oracle", "mixture"]


@dataclass(frozen=True)
class Score:
    """Of one model on one domain: mean loss per token in nats, perplexity, bits per byte, share of the gap closed.

    `blocks` are the sums of loss, in nats, over up to 20 consecutive parts of the text, the same parts in every row;
    `loss_error` and `gap_error` are standard errors over them. None when there are fewer than two sequences, or in a file of
    an earlier version.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    gap_closed: float | None = None
    loss_error: float | None = None
    gap_error: float | None = None
    blocks: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Row:
    """One model; `identity` names exactly what was run, so that an unchanged row is not run again."""

    name: str
    kind: Kind
    total_parameters: int
    active_parameters: int
    scores: Mapping[str, Score]
    identity: str

    def renamed(self, name: str) -> Row:
        """The same row under another name."""
        return replace(self, name=name)

    def mean_loss(self, domains: Sequence[str]) -> float | None:
        """Mean loss over domains; None unless all were scored."""
        if any(domain not in self.scores for domain in domains):
            return None
        return sum(self.scores[domain].loss for domain in domains) / len(domains)

    def mean_gap(self, domains: Sequence[str]) -> float | None:
        """Mean gap closed over the domains that have a gap."""
        gaps = [self.scores[d].gap_closed for d in domains if d in self.scores and self.scores[d].gap_closed is not None]
        return sum(gap for gap in gaps if gap is not None) / len(gaps) if gaps else None


@dataclass(frozen=True)
class HeldOut:
    """Documents of one domain nothing was made from; `expert` is the place of its own expert, None for an unseen domain."""

    name: str
    expert: int | None
    documents: Sequence[str]
    where: str


@dataclass(frozen=True)
class Domain:
    """Held-out text of one domain. `expert` is the place of its own expert, None for an unseen domain."""

    name: str
    expert: int | None
    sequences: Sequence[TokenSequence]
    record: Mapping[str, Any]

    @property
    def scored_tokens(self) -> int:
        """Tokens that are predicted: all but the first of each sequence."""
        return sum(len(sequence.ids) - 1 for sequence in self.sequences)


@dataclass(frozen=True)
class Results:
    """The table. `domains` have an expert and enter the means; `unseen` have none."""

    rows: Sequence[Row]
    domains: Sequence[str]
    unseen: Sequence[str]
    text: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str]

    def row(self, name: str) -> Row:
        """A row by its name."""
        return next(row for row in self.rows if row.name == name)

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "rows": [
                {
                    **{key: value for key, value in asdict(row).items() if key != "scores"},
                    "domains": {domain: asdict(score) for domain, score in row.scores.items()},
                    "mean": {"loss": row.mean_loss(self.domains), "gap_closed": row.mean_gap(self.domains)},
                }
                for row in self.rows
            ],
            "domains": list(self.domains),
            "unseen": list(self.unseen),
            "text": {name: dict(record) for name, record in self.text.items()},
            "notes": list(self.notes),
        }

    def table(self, between: str = " / ") -> tuple[list[str], list[list[str]]]:
        """Header and cells: loss and perplexity per domain, means, gap closed, total and active parameters.

        `between` separates the two figures of a cell.
        """
        every = [*self.domains, *self.unseen]
        header = ["model", *self.domains, *(f"{name}{between}unseen" for name in self.unseen)]
        header += ["mean loss", "gap closed", f"total{between}active"]
        body = []
        for row in self.rows:
            cells = [row.name]
            for domain in every:
                score = row.scores.get(domain)
                cells.append("-" if score is None else f"{score.loss:.3f}{between}{score.perplexity:.1f}")
            loss, gap = row.mean_loss(self.domains), row.mean_gap(self.domains)
            cells.append("-" if loss is None else f"{loss:.3f}")
            cells.append("-" if gap is None else f"{gap:.2f}")
            cells.append(f"{_millions(row.total_parameters)}{between}{_millions(row.active_parameters)}")
            body.append(cells)
        return header, body

    def markdown(self) -> str:
        """The table, and below it gap closed and bits per byte per domain."""
        header, body = self.table()
        parts = ["Held-out loss in nats per token / perplexity.", "", _markdown(header, body)]
        for title, pick in (("Gap closed", _gap_text), ("Bits per byte", _bits_text)):
            every = [*self.domains, *([] if pick is _gap_text else self.unseen)]
            cells = [[row.name, *(pick(row.scores.get(domain)) for domain in every)] for row in self.rows]
            parts += ["", f"{title} per domain.", "", _markdown(["model", *every], cells)]
        parts += ["", *(f"* {note}" for note in self.notes)] if self.notes else []
        return "\n".join(parts) + "\n"


def evaluate(
    checkpoint: Checkpoint,
    *,
    tokens_per_domain: int = 20_000,
    sequence_length: int = 512,
    trust_remote_code: bool = False,
    known: Results | None = None,
    seen: Collection[str] = (),
    write: bool = True,
    progress: Progress = silent,
) -> Results:
    """Score every row on every domain and, with `write`, write OUT/results/eval.json and eval.md.

    Documents whose digests are `seen` are left out, as those that something was set or trained by always are.

    Rows of `known` (by default the checkpoint's own earlier results) that ran the same weights on the same tokens are
    taken over. Raises TextError when a domain has no held-out text, SourceError when a model cannot be loaded.
    """
    domains = held_out_domains(
        checkpoint, tokens_per_domain=tokens_per_domain, sequence_length=sequence_length, seen=seen,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    known_rows = [*(known.rows if known else ()), *_rows_on_disk(checkpoint)]
    earlier = {(row.identity, name): score for row in known_rows for name, score in row.scores.items()}
    notes: list[str] = []
    jobs = list(_row_jobs(checkpoint, trust_remote_code, notes))
    total = sum(domain.scored_tokens for domain in domains) * len(jobs)
    done = 0
    rows: list[Row] = []
    for job in jobs:
        identity = _row_identity(job.identity, [domain.record for domain in domains])
        model: PreTrainedModel | None = None
        scores: dict[str, Score] = {}
        for domain in domains:
            if job.kind != "oracle" or domain.expert is not None:
                score = earlier.get((identity, domain.name))
                if score is None or (score.blocks is None and len(domain.sequences) > 1):
                    model = model if model is not None else job.load()
                    with job.within(model, domain):
                        score = score_domain(model, domain, partial(progress, f"score {job.name}", total=total), done)
                scores[domain.name] = score
            done += domain.scored_tokens
            progress(f"score {job.name}", done, total)
        rows.append(Row(job.name, job.kind, job.total, job.active, scores, identity))
        del model
    gapless = _without_gap(rows, domains)
    if gapless:
        notes.append(f"no gap to close, so not in its mean: {', '.join(gapless)} (the own expert is not better than the base)")
    results = Results(
        _with_gaps(rows, domains),
        [domain.name for domain in domains if domain.expert is not None],
        [domain.name for domain in domains if domain.expert is None],
        {domain.name: domain.record for domain in domains},
        notes,
    )
    if write:
        folder = checkpoint.folder / RESULTS_FOLDER
        folder.mkdir(exist_ok=True)
        write_json(folder / RESULTS_FILE, results.as_data())
        write_atomically(folder / "eval.md", results.markdown().encode())
    return results


def held_out_domains(
    checkpoint: Checkpoint,
    *,
    tokens_per_domain: int,
    sequence_length: int,
    split: Split = "report",
    seen: Collection[str] = (),
    trust_remote_code: bool = False,
) -> list[Domain]:
    """The text every row is scored on, as token sequences; see `held_out_documents`."""
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
    domains = []
    for held in held_out_documents(checkpoint, split=split, seen=seen):
        sequences = encode(tokenizer, held.documents, max_tokens=tokens_per_domain, sequence_length=sequence_length)
        if not sequences:
            raise _nothing_held_out(held.where)
        tokens = sum(len(sequence.ids) for sequence in sequences)
        record = {**text_record(held.documents, tokens), "sequence_length": sequence_length}
        domains.append(Domain(held.name, held.expert, sequences, record))
    return domains


def held_out_documents(checkpoint: Checkpoint, *, split: Split = "report", seen: Collection[str] = ()) -> list[HeldOut]:
    """Per domain the text that nothing was made from: `eval` of the recipe, else a held-out split of the experts' text.

    Of both, documents are dropped that set the router or that `modekit specialize` trained an expert on.
    """
    recipe, root = checkpoint.record.recipe, checkpoint.recipe_root
    used = {
        digest_of(document)[:TRAINED_DIGITS]
        for place, expert in enumerate(recipe.experts)
        if expert.text or expert.prompts
        for document in fit_documents(expert, root, place)
    }
    folders = [checkpoint.folder, *(checkpoint.folder / source.folder for source in checkpoint.record.sources)]
    used |= {*seen, *(digest for folder in folders for digest in digests_in(folder / TRAINED_FILE))}
    if split == "report":
        used |= digests_in(checkpoint.folder / SELECTED_FILE)
    domains = []
    for name in [*recipe.names, *(name for name in recipe.eval if name not in recipe.names)]:
        expert = recipe.names.index(name) if name in recipe.names else None
        if name in recipe.eval:
            where = f"eval.{name}"
            documents = read_documents(recipe.eval[name], root=root, where=where)
        elif expert is not None and recipe.experts[expert].text:
            where = f"experts[{expert}] '{name}': text"
            documents = documents_of_split(read_documents(recipe.experts[expert].text or [], root=root, where=where), split)
        else:
            continue
        documents = [
            document for document in documents if not used & {digest_of(document), digest_of(document)[:TRAINED_DIGITS]}
        ]
        if not documents:
            raise _nothing_held_out(where)
        domains.append(HeldOut(name, expert, documents, where))
    if not any(domain.expert is not None for domain in domains):
        raise TextError(
            "there is no text to evaluate on",
            where="experts[].text, eval",
            remedy="add text per expert, or eval: {domain: text}",
        )
    return domains


def _nothing_held_out(where: str) -> TextError:
    return TextError(
        "no held-out document is left to evaluate on", where=where,
        remedy="give more documents (one in ten is held out), or other text under eval",
    )  # fmt: skip


def tokens_per_pass(config: Any) -> int:
    """Padded tokens of a batch whose logits, (B, S, V) float32, stay within bounds."""
    return max(512, min(8_192, 2**26 // int(config.vocab_size)))


def score_domain(model: PreTrainedModel, domain: Domain, progress: Callable[[int], object], done: int = 0) -> Score:
    """Mean loss of a model on a domain's tokens; every sequence starts anew, pads are not scored."""
    tokens = tokens_per_pass(model.config)
    if model.device.type == "cpu":
        tokens = min(tokens, _CACHED_TOKENS)
    sums = torch.zeros(len(domain.sequences), dtype=torch.float64)
    with torch.inference_mode():
        for batch in make_batches(domain.sequences, tokens=tokens):
            input_ids, mask = batch.input_ids.to(model.device), batch.mask.to(model.device)
            logits = model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
            target = input_ids[:, 1:].masked_fill(~mask[:, 1:], -100)
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
            sums[list(batch.rows)] = losses.view_as(target).double().sum(1).cpu()
            done += int((target != -100).sum())
            progress(done)
    loss = float(sums.sum()) / domain.scored_tokens
    scored_bytes = sum(sequence.scored_bytes for sequence in domain.sequences)
    perplexity, bits = math.exp(min(loss, 700.0)), float(sums.sum()) / math.log(2) / max(scored_bytes, 1)
    if len(domain.sequences) < 2:
        return Score(loss, perplexity, bits)
    blocks = in_blocks(sums.tolist())
    error = mean_error(blocks, in_blocks([len(sequence.ids) - 1 for sequence in domain.sequences]))
    return Score(loss, perplexity, bits, loss_error=error, blocks=blocks)


@dataclass(frozen=True)
class _Job:
    name: str
    kind: Kind
    total: int
    active: int
    identity: str
    load: Callable[[], PreTrainedModel]
    within: Callable[[PreTrainedModel, Domain], AbstractContextManager[None]] = lambda _model, _domain: nullcontext()


def _row_jobs(checkpoint: Checkpoint, trust_remote_code: bool, notes: list[str]) -> Iterator[_Job]:
    record = checkpoint.record
    folders = [(checkpoint.folder / source.folder).resolve() for source in record.sources]
    hashes = _hashes(checkpoint)
    total, active, dense = parameters_of(checkpoint)
    load = partial(load_model, trust_remote_code=trust_remote_code)
    missing = [source.label for source, folder in zip(record.sources, folders, strict=True) if not folder.is_dir()]
    if missing:
        notes.append(f"rows left out because their models are no longer where the recipe found them: {', '.join(missing)}")
    if folders[0].is_dir():
        yield _Job(BASE, "base", dense, dense, hashes[0], partial(load, folders[0]))
    for name, place in zip(checkpoint.names, record.expert_sources, strict=True):
        if place != 0 and folders[place].is_dir() and (folders[0].is_dir() or not is_adapter(folders[place])):
            # An adapter is nothing without its base; a full model is itself, wherever it comes from.
            identity = f"{hashes[0]} {hashes[place]}" if is_adapter(folders[place]) else hashes[place]
            yield _Job(name, "expert", dense, dense, identity, partial(load_expert, folders[0], folders[place], load))
    if not missing:
        members = list(dict.fromkeys(record.expert_sources))
        identity = "average " + " ".join(hashes[place] for place in members)
        loads = [partial(load_expert, folders[0], folders[place], load) for place in members]
        yield _Job("weight average", "average", dense, dense, identity, lambda: _average(loads))
    carried, decided = _identities(checkpoint, hashes)
    load_mixture = partial(load, checkpoint.folder)
    weights = record.recipe.mixture.weights
    if weights is None:
        yield _Job(
            "oracle", "oracle", total, active, f"oracle {carried}", load_mixture,
            lambda model, domain: forced_expert(model, checkpoint, domain.expert or 0),
        )  # fmt: skip
    else:
        notes.append("oracle left out: given weights are folded into the experts, so none of them is whole in the mixture")
    yield _Job("mixture", "mixture", total, active, f"{carried} {decided}", load_mixture)


def belongs_to(results: Results, checkpoint: Checkpoint) -> bool:
    """Whether a table's mixture is this checkpoint as it is now: experts, router, training and text."""
    mixture = next((row for row in results.rows if row.kind == "mixture"), None)
    names = [*results.domains, *results.unseen]
    if mixture is None or any(set(results.text.get(name, {})) != set(_RECORD_KEYS) for name in names):
        return False
    hashes = _hashes(checkpoint)
    carried, decided = _identities(checkpoint, hashes)
    return mixture.identity == _row_identity(f"{carried} {decided}", [results.text[name] for name in names])


_RECORD_KEYS = ("documents", "tokens", "sha256", "sequence_length")


def _row_identity(model: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Names a model on text: sha256 of both."""
    ordered = [{key: record[key] for key in _RECORD_KEYS} for record in records]  # a file may hold them in another order
    return hashlib.sha256(f"{model} {ordered}".encode()).hexdigest()


def _hashes(checkpoint: Checkpoint) -> list[str]:
    """One string per source that changes with its weights."""
    return [" ".join(file.blake3 for _, file in sorted(source.files.items())) for source in checkpoint.record.sources]


_DECIDES = {"method", "top_k", "top_p", "always_on", "weights", "router"}
"""Keys of a mixture that say how its router decides; the others say what its experts carry."""


def _identities(checkpoint: Checkpoint, hashes: Sequence[str]) -> tuple[str, str]:
    """What the experts carry, which is all that the oracle runs, and how the router decides between them."""
    record = checkpoint.record
    recipe = record.recipe
    low_rank = [expert.lora_rank for expert in recipe.experts]
    carries = recipe.mixture.model_dump(mode="json", exclude=_DECIDES)
    carried = f"{hashes} {record.expert_sources} {low_rank} {carries} {recipe.output.dtype} {record.native_type}"
    carried += f" {sorted(record.trained.items())}" if record.trained else ""
    decides = recipe.mixture.model_dump(mode="json", include=_DECIDES)
    return carried, f"{decides} {record.router.sha256}"


def parameters_of(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Parameters: in all, active per token, and of a dense model of the family."""
    total, per_expert, dense = _parameters(checkpoint)
    return total, total - per_expert * (len(checkpoint.names) - checkpoint.record.recipe.top_k), dense


def _parameters(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Of the mixture, of what it has once per expert, and of a dense model of the family."""
    total = sum(ref.numel for ref in checkpoint.tensors.values())
    if checkpoint.native is None:
        own = sum(ref.numel for name, ref in checkpoint.tensors.items() if _OWN.search(name))
        return total, own // len(checkpoint.names), checkpoint.record.dense_parameters
    router = sum(checkpoint.tensors[slot.name].numel for slot in checkpoint.slots)
    native, layers = checkpoint.native, range(checkpoint.layers)
    constants = sum(checkpoint.tensors[LAYER.format(layer=i) + c.name].numel for i in layers for c in native.constants)
    names = list(native.fused or [name.format(expert=0) for name in (native.experts or {}).values()])
    ffn = sum(checkpoint.tensors[LAYER.format(layer=layer) + name].numel for layer in layers for name in names)
    per_expert = ffn // len(checkpoint.names) if native.fused else ffn
    return total, per_expert, total - router - constants - per_expert * (len(checkpoint.names) - 1)


def load_expert(base: Path, folder: Path, load: Callable[[Path], PreTrainedModel]) -> PreTrainedModel:
    """A full model, or the base with an adapter folded in."""
    if not is_adapter(folder):
        return load(folder)
    return load_adapted(base, open_adapter("expert", str(folder), folder, open_source("base_model", str(base), base)))


def load_expert_source(checkpoint: Checkpoint, expert: int, *, trust_remote_code: bool = False) -> PreTrainedModel | None:
    """The model that the expert at a place was made from, with all that it learned; None when it is no longer there."""
    record = checkpoint.record
    base, folder = (
        (checkpoint.folder / record.sources[place].folder).resolve() for place in (0, record.expert_sources[expert])
    )
    if not folder.is_dir() or (is_adapter(folder) and not base.is_dir()):
        return None
    return load_expert(base, folder, partial(load_model, trust_remote_code=trust_remote_code))


def _average(loads: Sequence[Callable[[], PreTrainedModel]]) -> PreTrainedModel:
    """The mean of the models' tensors, summed in float64; two models are in memory at a time."""
    model = loads[0]()
    sums = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for load in loads[1:]:
        for name, tensor in load().state_dict().items():
            sums[name] += tensor
    model.load_state_dict({name: tensor / len(loads) for name, tensor in sums.items()})
    return model


def _gaps(rows: Sequence[Row], domains: Sequence[Domain]) -> dict[str, float]:
    """Loss of base less loss of the domain's own expert, for domains whose expert was run."""
    by_name = {row.name: row for row in rows if row.kind in {"base", "expert"}}
    return {
        domain.name: by_name[BASE].scores[domain.name].loss - by_name[domain.name].scores[domain.name].loss
        for domain in domains
        if domain.name in by_name and BASE in by_name
    }


def _without_gap(rows: Sequence[Row], domains: Sequence[Domain]) -> list[str]:
    return [name for name, gap in _gaps(rows, domains).items() if gap <= SMALLEST_GAP]


def _with_gaps(rows: Sequence[Row], domains: Sequence[Domain]) -> list[Row]:
    by_name = {row.name: row for row in rows if row.kind in {"base", "expert"}}
    gaps = {name: gap for name, gap in _gaps(rows, domains).items() if gap > SMALLEST_GAP}
    completed = []
    for row in rows:
        scores = {}
        for name, score in row.scores.items():
            closed = error = None
            if name in gaps:
                base, own = by_name[BASE].scores[name], by_name[name].scores[name]
                closed = (base.loss - score.loss) / gaps[name]
                error = gap_error(base.blocks, own.blocks, score.blocks)
            scores[name] = replace(score, gap_closed=closed, gap_error=error)
        completed.append(Row(row.name, row.kind, row.total_parameters, row.active_parameters, scores, row.identity))
    return completed


def _rows_on_disk(checkpoint: Checkpoint) -> list[Row]:
    path = checkpoint.folder / RESULTS_FOLDER / RESULTS_FILE
    try:
        return rows_from_data(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return []  # absent, or of another version: then every row is run


def results_from_data(data: Mapping[str, Any]) -> Results:
    """A table back from `Results.as_data`."""
    return Results(rows_from_data(data), data["domains"], data["unseen"], data["text"], data["notes"])


def rows_from_data(data: Mapping[str, Any]) -> list[Row]:
    """Rows back from `Results.as_data`."""
    return [
        Row(
            row["name"], row["kind"], row["total_parameters"], row["active_parameters"],
            {domain: _score_from_data(score) for domain, score in row["domains"].items()}, row["identity"],
        )
        for row in data["rows"]
    ]  # fmt: skip


def _score_from_data(data: Mapping[str, Any]) -> Score:
    blocks = data.get("blocks")
    return Score(**{**data, "blocks": tuple(blocks) if blocks is not None else None})


def _gap_text(score: Score | None) -> str:
    return "-" if score is None or score.gap_closed is None else f"{score.gap_closed:.2f}"


def _bits_text(score: Score | None) -> str:
    return "-" if score is None else f"{score.bits_per_byte:.3f}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in body)])

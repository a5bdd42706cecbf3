"""`modekit train OUT`: from settings and text to a better checkpoint, or to the same one when training does not help.

    OUT.training/      settings.json, states, logs; removed when all is done. The same command goes on from there after a kill
    OUT                the trained mixture: only what was to move has other bytes
    OUT/results/       train.json, train.md (held-out losses before and after), train.csv (loss by step)

States are compared on the select split; what the tables report was never looked at.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from modekit.checkpoint import Checkpoint, TrainingRecord, open_checkpoint
from modekit.data import (
    TRAINED_DIGITS,
    TokenSequence,
    digest_of,
    documents_of_split,
    encode,
    read_documents,
    text_record,
)
from modekit.errors import CheckpointError, TextError, TrainingError
from modekit.evaluate import RESULTS_FOLDER, Domain, Results, evaluate, score_domain
from modekit.models import gate_parameters, load_model, load_tokenizer
from modekit.processes import processes
from modekit.progress import Progress, silent
from modekit.train.batches import Batches, Corpus, plan_parts, steps_of_one_pass
from modekit.train.cheap import train_cheap
from modekit.train.engine import LOG_FILE, SelectText, Trained, run_trainer
from modekit.train.losses import GENERIC
from modekit.train.low_rank import Trainable, make_trainable
from modekit.train.moving import moving_of
from modekit.train.objective import OF_ROUTERS, Objective
from modekit.train.settings import TrainSettings
from modekit.train.teachers import make_teachers
from modekit.train.write import write_trained
from modekit.training import has_bfloat16_products
from modekit.writer import write_atomically, write_json

GENERIC_NAME = "generic"
_SETTINGS_FILE = "settings.json"
_SHORTEST = 4  # a rest of a document shorter than a quarter of a sequence would mostly be padding


@dataclass(frozen=True)
class Training:
    """What a training came to.

    `improved` is False when no state was better on held-out text than the start: then nothing was written. `results` has the
    rows of `modekit eval` before and after; None when they were not asked for, or in a process that does not write.
    """

    checkpoint: Checkpoint
    improved: bool
    record: TrainingRecord
    results: Results | None
    failed: TrainingError | None


@dataclass(frozen=True)
class _Text:
    """Documents of one domain that are trained on and selected by, as sequences."""

    corpus: Corpus
    select: Sequence[TokenSequence]
    digests: list[str]
    record: dict[str, Any]


def train(
    checkpoint: Checkpoint,
    settings: TrainSettings,
    *,
    texts: Mapping[str, Sequence[str]] | None = None,
    root: Path | None = None,
    out: Path | None = None,
    evaluate_tokens: int | None = 8_192,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Training:
    """Train a mixture and write it to `out` (by default in its own place).

    `texts` gives text per domain, relative to `root`; a domain that it does not name is read from the recipe, and with no
    `texts` all are. Only documents of the fit split move anything.

    Raises TextError for a domain without text, TrainingError for settings that do not fit the mixture or when memory does not
    suffice. A loss that stops being finite ends the training at its best state so far; `failed` then says where.
    """
    checkpoint = open_checkpoint(checkpoint.folder)
    target = (out or checkpoint.folder).resolve()
    if target != checkpoint.folder.resolve() and target.exists():
        raise TrainingError("the output folder exists", where=str(target), remedy="choose another folder, or leave --out away")
    main = processes().is_main
    read = _read_texts(checkpoint, settings, texts or {}, root or Path.cwd(), trust_remote_code)
    folder = target.with_name(target.name + ".training")
    if settings.speed == "cheap":
        if processes().count > 1:
            raise TrainingError("a cheap training is done by one process", where="speed", remedy="start it without a launcher")
        done, moved, notes, parameters = _cheap(checkpoint, read, settings, trust_remote_code, progress)
        steps, tokens = settings.steps or 0, sum(text.corpus.tokens for text in read)
    else:
        _claim(folder, _digest(checkpoint, settings, read), checkpoint)
        try:
            done, moved, notes, parameters, tokens = _full(checkpoint, read, settings, folder, trust_remote_code, progress)
        except BaseException:
            if main and not _has_states(folder):  # nothing to go on from
                shutil.rmtree(folder, ignore_errors=True)
            raise
        steps = done.steps
    record = TrainingRecord(
        settings=settings.model_dump(mode="json"), text={text.corpus.name: text.record for text in read},
        parameters=parameters, steps=steps, tokens=tokens, notes=notes,
        select_loss={name: {"before": before, "after": done.after[name]} for name, before in done.before.items()},
    )  # fmt: skip
    improved = done.best_step > 0
    if not main:
        return Training(checkpoint, improved, record, None, done.failed)
    before = _evaluate(checkpoint, evaluate_tokens, trust_remote_code, None, progress) if improved else None
    trained = checkpoint
    if improved:
        trained = write_trained(checkpoint, target, moved, record, [digest for text in read for digest in text.digests])
    after = _evaluate(trained, evaluate_tokens, trust_remote_code, before, progress)
    results = _compared(before, after) if before is not None and after is not None else after
    _write_results(trained, record, results, folder)
    return Training(trained, improved, record, results, done.failed)


def _read_texts(
    checkpoint: Checkpoint, settings: TrainSettings, texts: Mapping[str, Sequence[str]], root: Path, trust_remote_code: bool
) -> list[_Text]:
    """Text of every domain, in recipe order, then generic text."""
    recipe = checkpoint.record.recipe
    unknown = [name for name in texts if name not in recipe.names]
    if unknown:
        raise TextError(
            "there is no expert for this domain", where=f"--text {unknown[0]}=...", expected=", ".join(recipe.names),
            remedy="name a domain of the mixture; text of no domain goes under generic",
        )  # fmt: skip
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)

    def read(name: str, expert: int, specs: Sequence[str], place: Path, where: str) -> _Text:
        documents = read_documents(specs, root=place, where=where)
        fit = [document for document in documents_of_split(documents, "fit") if _is_in_share(document, settings.share)]
        select = documents_of_split(documents, "select")
        length = settings.sequence_length
        sequences = encode(tokenizer, fit, max_tokens=2**62, sequence_length=length, shortest_rest=length // _SHORTEST)
        held_out = encode(tokenizer, select, max_tokens=settings.select_tokens, sequence_length=length)
        for found, what in ((sequences, "training"), (held_out, "comparing states")):
            if not found:
                raise TextError(
                    f"no document is left for {what}", where=where, found=f"{len(documents)} documents",
                    expected="eight in ten are trained on, one in ten is for comparing, one in ten for the tables",
                    remedy="give more documents" if settings.share == 1.0 else "give more documents, or raise share",
                )  # fmt: skip
        tokens = sum(len(sequence.ids) for sequence in sequences)
        digests = [digest_of(document)[:TRAINED_DIGITS] for document in fit]
        return _Text(Corpus(name, expert, sequences), held_out, digests, text_record(fit, tokens))

    found = []
    for place, expert in enumerate(recipe.experts):
        if expert.name in texts:
            found.append(read(expert.name, place, texts[expert.name], root, f"--text {expert.name}"))
        elif expert.text and not texts:
            found.append(
                read(expert.name, place, expert.text, checkpoint.recipe_root, f"experts[{place}] '{expert.name}': text")
            )
    if not found:
        raise TextError(
            "there is no text to train on", where="experts[].text, --text", remedy="give --text domain=FILE for every domain"
        )
    if settings.generic:
        found.append(read(GENERIC_NAME, GENERIC, settings.generic, root, GENERIC_NAME))
    return found


def _is_in_share(document: str, share: float) -> bool:
    """Whether a document belongs to a share of them that its hash alone decides (other digits than those of the splits)."""
    return int(digest_of(document)[8:16], 16) < share * 2**32


def _cheap(
    checkpoint: Checkpoint, texts: Sequence[_Text], settings: TrainSettings, trust_remote_code: bool, progress: Progress
) -> tuple[Trained, dict[str, torch.Tensor], list[str], int]:
    """Train gates on kept activations, and take them when the mixture's held-out loss falls."""
    if _has_no_router(checkpoint):
        raise _no_router(checkpoint)
    result = train_cheap(
        checkpoint, [text.corpus for text in texts], {text.corpus.expert: text.select for text in texts}, settings, progress
    )
    model = load_model(checkpoint.folder, trust_remote_code=trust_remote_code)
    domains = [Domain(text.corpus.name, text.corpus.expert, text.select, {}) for text in texts]

    def losses() -> dict[str, float]:
        return {domain.name: score_domain(model, domain, lambda _: None).loss for domain in domains}

    before = losses()
    gates = gate_parameters(model, checkpoint)
    for parameter, gate in zip(gates, result.gates, strict=True):
        parameter.data = gate.to(parameter)
    after = losses()
    better = sum(after.values()) < sum(before.values())
    moved = {slot.name: gate for slot, gate in zip(checkpoint.slots, result.gates, strict=True)} if better else {}
    notes = [] if better else ["the trained gates are no better on held-out text than those before: nothing was changed"]
    pairs = ", ".join(f"{old:.3f} -> {new:.3f}" for old, new in zip(result.before, result.after, strict=True))
    notes.append(f"cross-entropy of the domains per router on held-out text: {pairs}")
    done = Trained(0, int(better), before, after if better else before, None)
    return done, moved, notes, sum(gate.numel() for gate in gates)


def _full(
    checkpoint: Checkpoint, texts: Sequence[_Text], settings: TrainSettings, folder: Path, trust_remote_code: bool,
    progress: Progress,
) -> tuple[Trained, dict[str, torch.Tensor], list[str], int, int]:  # fmt: skip
    """Train end to end; the moved tensors by their names on disk, none when no state was better than the start."""
    if _has_no_router(checkpoint) and (set(settings.what) == {"routers"} or OF_ROUTERS & set(settings.losses)):
        raise _no_router(checkpoint)
    corpora = [text.corpus for text in texts]
    mixture = load_model(checkpoint.folder, trust_remote_code=trust_remote_code)
    if checkpoint.native is not None and not torch.cuda.is_available():
        mixture.set_experts_implementation("eager")  # faster than grouped products on a processor (benchmarks/training.md)
    trainable = make_trainable(mixture, moving_of(mixture, checkpoint).names(settings.what), settings.lora)
    if settings.checkpointing:
        mixture.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        mixture.enable_input_require_grads()
    train_top_k, notes = _train_top_k(checkpoint, settings)
    packed = _packs(checkpoint, settings)
    accumulate = settings.accumulate or (1 if packed else 2)
    steps = settings.steps or steps_of_one_pass(corpora, settings)
    parts = plan_parts(
        corpora, settings, steps=steps, experts=len(checkpoint.names), parts=accumulate * processes().count, pack=packed
    )
    teachers = (
        make_teachers(checkpoint, corpora, folder, trust_remote_code=trust_remote_code, progress=progress)
        if {"distill", "distill_reverse"} & set(settings.losses) else []
    )  # fmt: skip
    objective = Objective(mixture, checkpoint, settings, teachers=teachers, train_top_k=train_top_k, packed=packed)
    device = mixture.device
    done = run_trainer(
        objective, trainable.names, Batches(corpora, parts, pad_id=0),
        [SelectText(text.corpus.name, text.select) for text in texts], settings, folder, steps=steps, accumulate=accumulate,
        bfloat16=_in_bfloat16(settings, device), progress=progress,
    )  # fmt: skip
    read = parts[: done.steps * accumulate * processes().count]
    tokens = sum(len(corpora[draw.corpus].sequences[draw.sequence].ids) for part in read for row in part.rows for draw in row)
    if done.stopped:
        notes.append(f"ended after step {done.steps} of {steps}: {done.stopped}; the state of step {done.best_step} was taken")
    parameters = sum(parameter.numel() for parameter in mixture.parameters() if parameter.requires_grad)
    if done.best is None:
        notes.append("no state was better on held-out text than the start: nothing was changed")
        return done, {}, notes, parameters, tokens
    if not processes().is_main:
        return done, {}, notes, parameters, tokens
    if done.sharded:  # one process has to hold it whole, to fold in and to write
        mixture = load_model(checkpoint.folder, trust_remote_code=trust_remote_code)
        trainable = make_trainable(mixture, moving_of(mixture, checkpoint).names(settings.what), settings.lora)
    best = {name.removeprefix("mixture."): value for name, value in load_file(done.best).items()}
    mixture.load_state_dict(best, strict=False)
    return done, _moved_on_disk(trainable, mixture, folder), notes, parameters, tokens


def _has_no_router(checkpoint: Checkpoint) -> bool:
    return not checkpoint.slots or checkpoint.record.recipe.mixture.method == "linear"


def _no_router(checkpoint: Checkpoint) -> TrainingError:
    return TrainingError(
        "this mixture has no router to train", where=str(checkpoint.folder),
        found=f"method {checkpoint.record.recipe.mixture.method}",
        remedy="set one first: modekit fit OUT --method routing --top-k 2",
    )  # fmt: skip


def _train_top_k(checkpoint: Checkpoint, settings: TrainSettings) -> tuple[int | None, list[str]]:
    """How many experts a token gets while training, and what has to be said about it."""
    experts, own = len(checkpoint.names), checkpoint.record.recipe.top_k
    if settings.train_top_k is not None:
        wanted = settings.train_top_k or experts
        if wanted > experts:
            raise TrainingError(
                "there are fewer experts", where="train_top_k", found=wanted, expected=f"at most {experts}, or 0 for all",
                remedy="lower it",
            )  # fmt: skip
        return wanted, [f"trained with {wanted} experts per token; the checkpoint goes on to use {own}"]
    if (
        own == 1
        and experts > 1
        and checkpoint.slots
        and "routers" in {*settings.what, *(["routers"] if "all" in settings.what else [])}
    ):
        return 2, [
            "trained with 2 experts per token: a single expert's renormalised weight is 1, which gives its router no gradient; "
            "the checkpoint goes on to use 1"
        ]
    return None, []


def _packs(checkpoint: Checkpoint, settings: TrainSettings) -> bool:
    """Whether rows hold several documents."""
    averaging = checkpoint.native is None and any(
        average["decay"] is not None for average in checkpoint.config["modekit"]["routing"]["averages"]
    )
    if settings.pack and averaging:
        raise TrainingError(
            "context and sequence routers average over a row, so that it can hold one document only", where="pack",
            remedy="leave pack away",
        )  # fmt: skip
    return not averaging if settings.pack is None else settings.pack


def _in_bfloat16(settings: TrainSettings, device: torch.device) -> bool:
    if settings.precision is not None:
        return settings.precision == "bfloat16"
    return device.type != "cpu" and has_bfloat16_products(device)


def _moved_on_disk(trainable: Trainable, mixture: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What moved, under its names on disk: transformers itself says how memory and disk correspond."""
    place = folder / "moved"
    shutil.rmtree(place, ignore_errors=True)
    mixture.save_pretrained(place, state_dict=trainable.moved())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(place.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def _digest(checkpoint: Checkpoint, settings: TrainSettings, texts: Sequence[_Text]) -> str:
    """What a training depends on; one that goes on after a kill must be the same."""
    record = checkpoint.record
    state = [record.recipe_digest, record.router.sha256, sorted(record.trained.items()), len(record.training)]
    what = [settings.model_dump(mode="json"), [text.record for text in texts], [text.corpus.name for text in texts], state]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _claim(folder: Path, digest: str, checkpoint: Checkpoint) -> None:
    """Make the training folder, or go on in the one that a kill left. Raises TrainingError when it is another training's."""
    problem = None
    if processes().is_main:
        path = folder / _SETTINGS_FILE
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            written = kept["trainings"] != len(checkpoint.record.training)  # before the kill
            if kept["digest"] != digest and (written or not _has_states(folder)):
                shutil.rmtree(folder)
            elif kept["digest"] != digest:
                problem = "other settings or text"
        elif folder.exists() and any(folder.iterdir()):
            problem = "something else"
        if problem is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"digest": digest, "trainings": len(checkpoint.record.training)})
    problem = processes().agree(problem)
    if problem:
        raise TrainingError(
            "an unfinished training is in the way", where=str(folder), found=problem,
            remedy="run the command that began it to finish it, or remove the folder",
        )  # fmt: skip


def _has_states(folder: Path) -> bool:
    return next(folder.glob("checkpoint-*"), None) is not None


def _evaluate(
    checkpoint: Checkpoint, tokens: int | None, trust_remote_code: bool, known: Results | None, progress: Progress
) -> Results | None:
    """The table of `modekit eval`; None when there is no text for it or it is not wanted."""
    if tokens is None:
        return None
    try:
        return evaluate(
            checkpoint, tokens_per_domain=tokens, trust_remote_code=trust_remote_code, known=known, progress=progress
        )
    except (TextError, CheckpointError):
        return None


def _compared(before: Results, after: Results) -> Results:
    """One table: the models that did not change once, oracle and mixture before and after."""
    rows = []
    for row in before.rows:
        rows.append(row if row.kind != "mixture" else row.renamed("mixture before"))
    for row in after.rows:
        if row.kind == "mixture" or (row.kind == "oracle" and row.identity != before.row("oracle").identity):
            rows.append(row if row.kind == "mixture" else row.renamed("oracle after"))
    return Results(rows, after.domains, after.unseen, after.text, after.notes)


def _write_results(checkpoint: Checkpoint, record: TrainingRecord, results: Results | None, folder: Path) -> None:
    target = checkpoint.folder / RESULTS_FOLDER
    target.mkdir(exist_ok=True)
    data = {"training": record.model_dump(mode="json"), "results": results.as_data() if results is not None else None}
    write_json(target / "train.json", data)
    if results is not None:
        write_atomically(target / "train.md", results.markdown().encode())
    if (folder / LOG_FILE).exists():
        shutil.copyfile(folder / LOG_FILE, target / "train.csv")
    if (folder / "tensorboard").exists():
        shutil.copytree(folder / "tensorboard", target / "tensorboard", dirs_exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)

"""`modekit train OUT`: from settings and text to a better checkpoint, or to the same one when training does not help.

    OUT.training/      states, logs (folder.py); removed when all is done
    OUT                the trained mixture: only what was to move has other bytes
    OUT/results/       train.json, train.md (held-out losses before and after), train.csv (loss by step)

States are compared on the select split; what the tables report was never looked at.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from modekit.checkpoint.checkpoint import Checkpoint, TrainingRecord, open_checkpoint
from modekit.checkpoint.staging import write_atomically, write_json
from modekit.errors import TextError, TrainingError
from modekit.evaluation.evaluate import evaluate
from modekit.evaluation.loss import score_domain
from modekit.evaluation.results import Results, results_from_data
from modekit.evaluation.results_folder import RESULTS_FOLDER
from modekit.loaded.models import gate_parameters, load_model
from modekit.loaded.next_token import has_bfloat16_products
from modekit.processes import processes
from modekit.progress import Progress, silent
from modekit.training.batches import Batches, plan_parts, steps_of_one_pass
from modekit.training.cheap import train_cheap
from modekit.training.engine import LOG_FILE, Trained, run_trainer
from modekit.training.folder import TrainingFolder
from modekit.training.low_rank import make_trainable
from modekit.training.moving import moving_of
from modekit.training.objective import Objective
from modekit.training.settings import DISTILLS, OF_ROUTERS, TrainSettings
from modekit.training.teachers import make_teachers
from modekit.training.texts import Text, read_texts, silent_domains
from modekit.training.write import write_trained


@dataclass(frozen=True)
class Training:
    """What a training came to.

    `improved` is False when no state was better on held-out text than the start: then nothing was written. `results` has the
    rows of `modekit eval` before and after; None when nothing was written, there is no held-out text for them, or they were
    not asked for. `failed` is the error that ended it early, after its best state was written.
    """

    checkpoint: Checkpoint
    improved: bool
    record: TrainingRecord
    results: Results | None
    failed: TrainingError | None


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

    `texts` gives text per domain, relative to `root`; a domain that it does not name is read from the recipe. Only documents
    of the fit split move anything. Under a launcher only the main process writes, and the others return the old checkpoint.

    Raises TextError for a domain whose text is empty, TrainingError for settings that do not fit the mixture or when memory
    does not suffice. A loss that stops being finite ends the training at its best state so far; `failed` then says where.
    """
    checkpoint = open_checkpoint(checkpoint.folder.resolve())
    target = (out or checkpoint.folder).resolve()
    folder = TrainingFolder(target.with_name(target.name + ".training"))
    if target != checkpoint.folder and target.exists() and not folder.is_written:
        raise TrainingError("the output folder exists", where=str(target), remedy="choose another folder, or leave --out away")
    read = read_texts(checkpoint, settings, texts or {}, root or Path.cwd(), trust_remote_code=trust_remote_code)
    _check(checkpoint, settings, read)
    if settings.speed == "cheap":
        with _memory_errors():
            ended = _cheap(checkpoint, read, settings, trust_remote_code, progress)
        return _finish(checkpoint, target, settings, read, ended, None, evaluate_tokens, trust_remote_code, progress)
    folder.claim(checkpoint, settings, read)
    kept = folder.recall("trained")
    if kept is not None:
        ended = _Ended.from_data(kept)
    else:
        try:
            with _memory_errors():
                ended = _full(checkpoint, read, settings, folder, trust_remote_code, progress)
        except BaseException:
            if processes().is_main and not folder.has_states:
                folder.remove()
            raise
        if processes().is_main:
            folder.keep("trained", ended.as_data())
    return _finish(checkpoint, target, settings, read, ended, folder, evaluate_tokens, trust_remote_code, progress)


@dataclass(frozen=True)
class _Ended:
    """A training that has ended and is not written yet; `gates` are those of a cheap one."""

    trained: Trained
    notes: list[str]
    parameters: int
    tokens: int
    gates: dict[str, torch.Tensor] | None = None

    def as_data(self) -> dict[str, Any]:
        trained = self.trained
        failed = None if trained.failed is None else [trained.failed.what, trained.failed.where, trained.failed.found]
        return {
            "steps": trained.steps, "best_step": trained.best_step, "before": dict(trained.before),
            "after": dict(trained.after), "stopped": trained.stopped, "failed": failed,
            "best": None if trained.best is None else str(trained.best), "notes": self.notes,
            "parameters": self.parameters, "tokens": self.tokens,
        }  # fmt: skip

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> _Ended:
        failed = None
        if data["failed"]:
            what, where, found = data["failed"]
            failed = TrainingError(what, where=where, found=found)
        best = None if data["best"] is None else Path(data["best"])
        trained = Trained(data["steps"], data["best_step"], data["before"], data["after"], data["stopped"], failed, best)
        return cls(trained, data["notes"], data["parameters"], data["tokens"])


def _finish(
    checkpoint: Checkpoint, target: Path, settings: TrainSettings, texts: Sequence[Text], ended: _Ended,
    folder: TrainingFolder | None, tokens: int | None, trust_remote_code: bool, progress: Progress,
) -> Training:  # fmt: skip
    """Write the trained mixture if it is better, and the tables; whatever of this a kill left undone."""
    trained = ended.trained
    record = TrainingRecord(
        settings=settings.model_dump(mode="json"), text={text.corpus.name: text.record for text in texts},
        parameters=ended.parameters, steps=trained.steps, tokens=ended.tokens, notes=ended.notes,
        select_loss={name: {"before": before, "after": trained.after[name]} for name, before in trained.before.items()},
    )  # fmt: skip
    improved = trained.best_step > 0
    if not processes().is_main:
        return Training(checkpoint, improved, record, None, trained.failed)
    if not improved:
        if folder is not None:
            folder.remove()
        return Training(checkpoint, improved, record, None, trained.failed)
    known = folder.recall("before") if folder is not None else None
    before = results_from_data(known) if known else None
    if folder is None or not folder.is_written:
        if before is None:
            before = _evaluate(checkpoint, texts, tokens, trust_remote_code, None, False, progress)
            if folder is not None and before is not None:
                folder.keep("before", before.as_data())
        moved = ended.gates or _moved(checkpoint, settings, ended, trust_remote_code)
        trained_on = [digest for text in texts for digest in text.trained_on]
        selected_by = [digest for text in texts for digest in text.selected_by]
        written = write_trained(checkpoint, target, moved, record, trained_on=trained_on, selected_by=selected_by)
        if folder is not None:
            folder.mark_written()
    else:
        written = open_checkpoint(target)
    after = _evaluate(written, texts, tokens, trust_remote_code, before, True, progress)
    results = _compared(before, after) if before is not None and after is not None else None
    _write_results(written, record, results, folder)
    if folder is not None:
        folder.remove()
    return Training(written, improved, record, results, trained.failed)


def _check(checkpoint: Checkpoint, settings: TrainSettings, texts: Sequence[Text]) -> None:
    """Raise TrainingError when the settings ask for what this mixture or its text cannot give."""
    of_routers = OF_ROUTERS & set(settings.losses) if settings.speed == "full" else {"label"}
    routers_only = set(settings.what) == {"routers"}
    if _has_no_router(checkpoint) and (routers_only or of_routers):
        raise TrainingError(
            "this mixture has no router to train", where=str(checkpoint.folder),
            found=f"method {checkpoint.record.recipe.mixture.method}",
            remedy="set one first: modekit fit OUT --method routing --top-k 2",
        )  # fmt: skip
    silent = silent_domains(checkpoint, texts)
    if silent and (settings.speed == "cheap" or "label" in settings.losses):
        raise TrainingError(
            "labels of some domains alone would turn every router to them", where="--text",
            found=f"no text of {', '.join(silent)}", remedy="give text of every domain, or train on lm or distill",
        )  # fmt: skip
    if settings.speed == "cheap" and processes().count > 1:
        raise TrainingError("a cheap training is done by one process", where="speed", remedy="start it without a launcher")


def _has_no_router(checkpoint: Checkpoint) -> bool:
    return not checkpoint.slots or checkpoint.record.recipe.mixture.method == "linear"


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Say what to lower when memory does not suffice."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        words = ("out of memory", "not enough memory", "can't allocate memory")
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(word in str(error) for word in words):
            raise
        raise TrainingError(
            "there is not enough memory", found=(str(error).splitlines() or ["MemoryError"])[0][:200],
            remedy="raise accumulate or set checkpointing: true, which go on from the last kept state; "
            "or lower batch_tokens or sequence_length",
        ) from None  # fmt: skip


def _cheap(
    checkpoint: Checkpoint, texts: Sequence[Text], settings: TrainSettings, trust_remote_code: bool, progress: Progress
) -> _Ended:
    """Train gates on kept activations, and take them when the mixture's held-out loss falls."""
    result = train_cheap(
        checkpoint, [text.corpus for text in texts], {text.corpus.expert: text.select for text in texts}, settings, progress
    )
    model = load_model(checkpoint.folder, trust_remote_code=trust_remote_code)
    domains = [text.held_out for text in texts]

    def losses() -> dict[str, float]:
        return {domain.name: score_domain(model, domain, lambda _: None).loss for domain in domains}

    before = losses()
    gates = gate_parameters(model, checkpoint)
    for parameter, gate in zip(gates, result.gates, strict=True):
        parameter.data = gate.to(parameter)
    after = losses()
    better = sum(after.values()) < sum(before.values())
    notes = [] if better else ["the trained gates are no better on held-out text than those before: nothing was changed"]
    pairs = ", ".join(f"{old:.3f} -> {new:.3f}" for old, new in zip(result.before, result.after, strict=True))
    notes.append(f"cross-entropy of the domains per router on held-out text: {pairs}")
    named = {slot.name: gate for slot, gate in zip(checkpoint.slots, result.gates, strict=True)}
    trained = Trained(result.steps, result.steps if better else 0, before, after if better else before, None)
    return _Ended(trained, notes, sum(gate.numel() for gate in gates), result.tokens, named if better else None)


def _full(
    checkpoint: Checkpoint, texts: Sequence[Text], settings: TrainSettings, folder: TrainingFolder, trust_remote_code: bool,
    progress: Progress,
) -> _Ended:  # fmt: skip
    """Train end to end."""
    corpora = [text.corpus for text in texts]
    mixture = load_model(checkpoint.folder, trust_remote_code=trust_remote_code)
    if checkpoint.native is not None and not torch.cuda.is_available():
        mixture.set_experts_implementation("eager")  # faster than grouped products on a processor (benchmarks/training.md)
    trainable = make_trainable(mixture, moving_of(mixture, checkpoint).names(settings.what), settings.lora)
    if settings.checkpointing:
        mixture.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        mixture.enable_input_require_grads()
    train_top_k, notes = _train_top_k(checkpoint, settings)
    silent = silent_domains(checkpoint, texts)
    notes += [f"no text of {', '.join(silent)}: nothing was trained on it"] if silent else []
    packed = _packs(checkpoint, settings)
    accumulate = settings.accumulate or (1 if packed else 2)
    steps = settings.steps or steps_of_one_pass(corpora, settings)
    per_step = accumulate * processes().count
    parts = plan_parts(corpora, settings, steps=steps, experts=len(checkpoint.names), parts=per_step, pack=packed)
    distills = bool(DISTILLS & set(settings.losses))
    teachers = (
        make_teachers(checkpoint, corpora, folder.path, trust_remote_code=trust_remote_code, progress=progress)
        if distills else []
    )  # fmt: skip
    objective = Objective(mixture, checkpoint, settings, teachers=teachers, train_top_k=train_top_k, packed=packed)
    done = run_trainer(
        objective, trainable.names, Batches(corpora, parts, pad_id=0),
        [text.held_out for text in texts], settings, folder.path, steps=steps,
        accumulate=accumulate, bfloat16=_in_bfloat16(settings, mixture.device), progress=progress,
    )  # fmt: skip
    read = parts[: done.steps * per_step]
    tokens = sum(len(corpora[draw.corpus].sequences[draw.sequence].ids) for part in read for row in part.rows for draw in row)
    if done.stopped:
        notes.append(f"ended after step {done.steps} of {steps}: {done.stopped}; the state of step {done.best_step} was taken")
    if done.best is None:
        notes.append("no state was better on held-out text than the start: nothing was changed")
    return _Ended(done, notes, sum(p.numel() for p in trainable.parameters()), tokens)


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
    if own == 1 and experts > 1 and not _has_no_router(checkpoint) and {"routers", "all"} & set(settings.what):
        return 2, [
            "trained with 2 experts per token: a single expert's renormalised weight is 1, which gives its router no gradient; "
            "the checkpoint goes on to use 1"
        ]
    return None, []


def _packs(checkpoint: Checkpoint, settings: TrainSettings) -> bool:
    """Whether rows hold several documents. Raises TrainingError where they must not."""
    averaging = checkpoint.native is None and any(
        average["decay"] is not None for average in checkpoint.config["modekit"]["routing"]["averages"]
    )
    running = any("linear" in kind or "conv" in kind for kind in checkpoint.config.get("layer_types") or [])
    if settings.pack and (averaging or running):
        what = "context, sequence and n-gram routers" if averaging else "layers with linear attention"
        raise TrainingError(
            f"{what} read a row from its beginning, so that it can hold one document only", where="pack",
            remedy="leave pack away",
        )  # fmt: skip
    return not (averaging or running) if settings.pack is None else settings.pack


def _in_bfloat16(settings: TrainSettings, device: torch.device) -> bool:
    if settings.precision is not None:
        return settings.precision == "bfloat16"
    return device.type != "cpu" and has_bfloat16_products(device)


def _moved(checkpoint: Checkpoint, settings: TrainSettings, ended: _Ended, trust_remote_code: bool) -> dict[str, torch.Tensor]:
    """What moved, as it was in the best state, under its names on disk.

    The mixture is loaded anew: whatever shards and wrappers it was trained in, what is written is what a state says.
    transformers itself says how memory and disk correspond.
    """
    assert ended.trained.best is not None
    mixture = load_model(checkpoint.folder, trust_remote_code=trust_remote_code)
    trainable = make_trainable(mixture, moving_of(mixture, checkpoint).names(settings.what), settings.lora)
    best = {name.removeprefix("mixture."): value for name, value in load_file(ended.trained.best).items()}
    mixture.load_state_dict(best, strict=False)
    place = ended.trained.best.parent.with_name("moved")
    shutil.rmtree(place, ignore_errors=True)
    mixture.save_pretrained(place, state_dict=trainable.moved())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(place.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def _evaluate(
    checkpoint: Checkpoint, texts: Sequence[Text], tokens: int | None, trust_remote_code: bool, before: Results | None,
    write: bool, progress: Progress,
) -> Results | None:  # fmt: skip
    """The table of `modekit eval`, on text that this training does not see; None when there is none or it is not wanted."""
    if tokens is None:
        return None
    seen = {digest for text in texts for digest in (*text.trained_on, *text.selected_by)}
    try:
        return evaluate(
            checkpoint, tokens_per_domain=tokens, trust_remote_code=trust_remote_code, known=before, seen=seen,
            write=write, progress=progress,
        )  # fmt: skip
    except TextError:
        return None


def _compared(before: Results, after: Results) -> Results:
    """One table: the models that did not change once, oracle and mixture before and after."""
    rows = [row if row.kind != "mixture" else row.renamed("mixture before") for row in before.rows]
    oracle = next((row.identity for row in before.rows if row.kind == "oracle"), None)
    for row in after.rows:
        if row.kind == "mixture" or (row.kind == "oracle" and row.identity != oracle):
            rows.append(row if row.kind == "mixture" else row.renamed("oracle after"))
    return Results(rows, after.domains, after.unseen, after.text, after.notes)


def _write_results(
    checkpoint: Checkpoint, record: TrainingRecord, results: Results | None, folder: TrainingFolder | None
) -> None:
    target = checkpoint.folder / RESULTS_FOLDER
    target.mkdir(exist_ok=True)
    data = {"training": record.model_dump(mode="json"), "results": results.as_data() if results is not None else None}
    write_json(target / "train.json", data)
    if results is not None:
        write_atomically(target / "train.md", results.markdown().encode())
    if folder is not None and (folder.path / LOG_FILE).exists():
        shutil.copyfile(folder.path / LOG_FILE, target / "train.csv")
    if folder is not None and (folder.path / "tensorboard").exists():
        shutil.copytree(folder.path / "tensorboard", target / "tensorboard", dirs_exist_ok=True)

"""Runs a plan: tensors stream from their sources to shards, then the router is set, then the folder appears.

A copied tensor goes from the page cache of its source to that of the result without passing through the process. Other threads
read the sources meanwhile: every file's blake3 hash, and NaN or Inf in the tensors that are used.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from blake3 import blake3

from modekit.building.carrying import Carrying, carry
from modekit.building.text import complete_text
from modekit.building.update import CheckpointUpdate
from modekit.checkpoint.carried import CARRIED_FILE, Carried, carried_digest, lost_notes
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.made import make_record
from modekit.checkpoint.record import RECORD_FILE, STATISTICS_FOLDER, MixtureRecord, RouterRecord
from modekit.checkpoint.router_file import write_index, write_router_file
from modekit.checkpoint.sources import source_records
from modekit.errors import SourceError
from modekit.files.copies import copy_file, link_file
from modekit.files.disk import check_room
from modekit.files.output import work_of
from modekit.files.place import Replace, replaced_by
from modekit.files.read import UNREADABLE
from modekit.files.staging import Staging, staging
from modekit.files.write import make_folder, remove, write_all, write_file, write_json
from modekit.planning.plan import ROUTER_FILE, Plan
from modekit.planning.reuse import digest_of
from modekit.planning.room import disk_needed
from modekit.planning.tensors import PlannedTensor
from modekit.recipes.edit import RECIPE_FILE, as_file
from modekit.recipes.strict import WRITTEN_FOLDER
from modekit.routing.fit import Fitting, fit_router
from modekit.run import QUIET, Run
from modekit.sources.adapter import AdapterSource
from modekit.sources.contents import OpenFiles, WeightFile
from modekit.sources.header import TensorRef
from modekit.sources.tokenizer import copied_content
from modekit.text.documents import folders_of
from modekit.text.written import files_of
from modekit.weights.flat import same_bytes
from modekit.weights.numeric import DTYPES
from modekit.weights.reading import WeightReader, check_finite

_THREADS = 4
"""A disk that has to be read gives no more to more."""


def build(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    update: CheckpointUpdate | None = None,
    run: Run = QUIET,
) -> Checkpoint:
    """Write the checkpoint that a plan describes, or what it says `otherwise`. `update`: the mixture that it changes, whose
    place it may take. A plan whose root is the work folder of `out` is of a recipe that goes into `out`, with the text that its
    experts write.

    Raises OutputError, SourceError (NaN weights, a file that changed or ended early) or TextError; nothing is left behind then,
    and a mixture that was to be changed is as it was. Whether all text is there, `check_texts` says before.
    After a kill, the same call keeps the shards that were whole, and ends in the same bytes.
    """
    known = () if update is None else update.statistics
    within = plan.root == work_of(out).path
    if not within:
        complete_text(plan, known, run)
    run.begin("check the models")
    _check_copies(plan, update)
    in_place = update is not None and update.is_of(out)
    own = [each.text or [] for each in plan.recipe.experts if not each.writes_text]
    texts = [] if in_place else folders_of([*own, *plan.recipe.eval.values()], plan.root)
    sources = [*(model.folder for model in plan.models if not in_place or model.folder != out), *texts]
    replace: Replace = "in place" if in_place else replaced_by(overwrite)
    check_room(out, disk_needed(plan))
    with staging(out, digest_of(plan), "checkpoint", sources=sources, replace=replace, sync=run.sync) as stage:
        if within:
            complete_text(plan, known, run)
        record, notes = _write(plan, stage, within, update, run)
        for file in files_of(plan.recipe, plan.root) if within else ():
            make_folder(stage.folder / WRITTEN_FOLDER)
            copy_file(file, stage.folder / WRITTEN_FOLDER / file.name)
    return Checkpoint(out, record, notes=notes)


def _write(
    plan: Plan, stage: Staging, within: bool, update: CheckpointUpdate | None, run: Run
) -> tuple[MixtureRecord, tuple[str, ...]]:
    """Everything of the checkpoint into its staged folder, the record last; and what a user should know of it."""
    if update is not None:
        update.checkpoint.check_unchanged()
        update.carry_statistics(stage.folder)
        stage.last = partial(update.carry_over, stage.folder, stage.out)
    more = plan.shape.channels is not None and plan.shape.channels.carry is not None
    carried = carry(plan, stage.folder, update, run) if more else None
    notes = list[str]()
    asked = plan
    if carried is not None:
        otherwise = plan.otherwise if any(each.is_too_much for each in carried.lost) else None
        notes += lost_notes(plan.recipe.names, carried.lost, would=otherwise is not None)
        if otherwise is not None:
            plan = otherwise
            carried = None
            remove(stage.folder / CARRIED_FILE)
    if asked.otherwise is not None:
        notes += (each for each in plan.tell() if each not in asked.notes)
    with Inspector(plan, update.hashes if update is not None else {}) as inspector:
        write_shards(plan, stage, carried, run)
        run.begin("check the models")
        hashes = inspector.finish()
    write_index(plan, stage.folder)
    write_json(stage.folder / "config.json", dict(plan.shape.config))
    for file in (*plan.copied_files, *plan.shape.code_files):
        write_file(stage.folder / file.name, _content(file), sync=False)
    recipe = {} if update is None else update.checkpoint.recipe_file(plan.recipe, stage.out)
    recipe |= {RECIPE_FILE: as_file(plan.recipe, plan.root, plan.root)} if within else {}
    for name, content in {**plan.written_files, **recipe}.items():
        make_folder((stage.folder / name).parent)
        write_file(stage.folder / name, content)
    record = _set_router(plan, stage, hashes, update, run)
    write_json(stage.folder / RECORD_FILE, record.model_dump(mode="json"))
    run.begin("write to the disk" if run.sync else "put in place")
    return record, tuple(notes)


def _check_copies(plan: Plan, update: CheckpointUpdate | None) -> None:
    """Raise SourceError where a file that goes along cannot be read, or a model's file holds a head, or an encoder's embedding,
    that is to be its one embedding and is not: transformers keeps both then, whatever the config says.
    """
    for file in plan.copied_files:
        _content(file)
    known = update.sources if update is not None else {}
    new = [each for each in dict.fromkeys(plan.sources) if each not in known and not isinstance(each, AdapterSource)]
    with OpenFiles() as opened:
        for source in new:
            for name, embedding in plan.family.copies_of(source).items():
                ours, theirs = source.tensor(embedding), source.tensor(name)
                if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape) or not same_bytes(opened, ours, theirs):
                    raise SourceError(
                        "a model's files hold two embeddings that are to be one",
                        where=f"{source.where}: {name}",
                        found=f"other values than {embedding}",
                        expected="the same values, or no such tensor",
                        remedy="give a model that shares its embedding; where they are meant to differ, its config.json must "
                        "say tie_word_embeddings: false (which T5 does not know)",
                    )


def _content(file: Path) -> bytes:
    """A file that goes beside the weights. Raises SourceError: the writing around it would call it an error of OUT."""
    try:
        return copied_content(file)
    except UNREADABLE as error:
        found = getattr(error, "strerror", None) or error
        raise SourceError(
            "a file of the base model cannot be read", where=str(file), found=found, remedy="put it back and build again"
        ) from None


def _set_router(plan: Plan, stage: Staging, hashes: dict[str, str], update: CheckpointUpdate | None, run: Run) -> MixtureRecord:
    """Fit the router over the experts as they are staged, write it beside them, and give the record."""
    remove(stage.folder / RECORD_FILE)  # of a build that was killed here: it is not what this one knows
    # Zero gates stand in while the fit reads the staged experts as those of a finished checkpoint.
    placeholder = [np.zeros(slot.shape, np.float32) for slot in plan.shape.slots]
    sha256 = write_router_file(stage.folder / ROUTER_FILE, plan.shape.slots, placeholder, plan.router_dtype)
    sources = source_records(plan, stage.out, hashes, update.sources if update is not None else {})
    unfitted = RouterRecord.unfitted(plan.recipe, sha256)
    record = make_record(plan, stage.out, sources, unfitted, carried_digest(stage.folder))
    checkpoint = Checkpoint(stage.folder, record, plan.shape)
    if update is not None:
        checkpoint = Checkpoint(stage.folder, update.continued(record, checkpoint.tensors), plan.shape)
    stays = update.statistics if update is not None else ()
    run = Run(plan.trust_remote_code, run.progress)
    fitting = Fitting(checkpoint, plan.recipe, plan.root, stage.folder / STATISTICS_FOLDER, run, stays)
    if update is not None and update.keeps_training:  # the router that it has, with rows for who is new
        from modekit.routing.linear import trained_gates

        fitted = trained_gates(fitting, update.checkpoint, update.origins)
    else:
        fitted = fit_router(fitting)
    record, files = checkpoint.router_files(fitted.gates, fitted.record, plan.recipe, evidence=fitted.evidence)
    for name, content in files.items():
        write_file(stage.folder / name, content)
    return record


def write_shards(plan: Plan, stage: Staging, carried: Carried | None, run: Run) -> None:
    """The weights of a plan, but for its gates. Raises SourceError."""
    total = sum(shard.nbytes for shard in plan.shards)
    written = 0
    with OpenFiles() as opened:
        read = WeightReader(opened, plan.models)
        if carried is not None:
            read.fills = Carrying(plan, read, carried).fill
        for shard in plan.shards:
            if plan.reused is not None and shard.file in plan.reused.files:
                if not (stage.folder / shard.file).exists():
                    link_file(plan.reused.model.folder / shard.file, stage.folder / shard.file)
                written += shard.nbytes
                continue

            def write_next(number: int, stream: io.FileIO, tensors: tuple[PlannedTensor, ...] = shard.tensors) -> None:
                nonlocal written
                run.progress("build", min(written, total), total)
                write_tensor(tensors[number], read, stream)
                written += tensors[number].nbytes

            entries = [(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes) for tensor in shard.tensors]
            stage.write_shard(shard.file, entries, write_next)
        run.progress("build", total, total)


def write_tensor(tensor: PlannedTensor, read: WeightReader, stream: io.FileIO) -> None:
    """Write the bytes of a planned tensor. Raises SourceError."""
    if tensor.copied is not None:
        for ref in tensor.copied:
            read.copy(ref, stream)
    else:
        for block in tensor.blocks(read):
            write_all(stream, block)


class Inspector:
    """Threads that start at once; `finish` waits for them and gives what was found, leaving the context ends them early.

    `known`: hashes of files as they were when they were read for a mixture that is changed now. Of them only those are read
    from which something is taken again, and they must be what they were.
    """

    def __init__(self, plan: Plan, known: Mapping[Path, str]) -> None:
        self._plan, self._known, self._halt = plan, known, threading.Event()
        used: dict[Path, list[TensorRef]] = {file: [] for file in plan.source_states}
        for ref in dict.fromkeys(part for tensor in plan.tensors for read in tensor.made.refs for part in read.parts):
            if ref.file in used:  # and not of a mixture that is changed, which was looked at when it was built
                used[ref.file].append(ref)
        unread = {*known, *(file for file, state in plan.source_states.items() if state is None)}
        files = {file: refs for file, refs in used.items() if refs or file not in unread}
        self._threads = ThreadPoolExecutor(_THREADS, "inspector")
        self._hashes = {file: self._threads.submit(self._inspect, file, refs) for file, refs in files.items()}

    def __enter__(self) -> Inspector:
        return self

    def __exit__(self, *_: object) -> None:
        self._halt.set()
        self._threads.shutdown(cancel_futures=True)

    def finish(self) -> dict[str, str]:
        """The hashes by file. Raises SourceError when something is wrong with a source, and whatever else ended a thread."""
        found = {**self._known, **{file: future.result() for file, future in self._hashes.items()}}
        return {str(file): found.get(file, "") for file in self._plan.source_states}

    def _inspect(self, file: Path, refs: list[TensorRef]) -> str:
        """Hash of a file's content; empty when halted."""
        opened, hasher = WeightFile(file, self._plan.source_states[file]), blake3()
        try:
            for start, end, ref in _stretches(refs, opened.state.size):
                for chunk in opened.chunks(start, end):
                    if self._halt.is_set():
                        return ""
                    hasher.update(chunk)
                    if ref is not None and ref.dtype in DTYPES:
                        check_finite(self._plan.models, ref, chunk)
            opened.check_unchanged()
        finally:
            opened.close()
        digest: str = hasher.hexdigest()
        if self._known.get(file, digest) != digest:
            raise SourceError(
                "a model has changed since the mixture was built, and something of it is needed again",
                where=str(file),
                remedy="put back what it was, or build the mixture again",
            )
        return digest


def _stretches(refs: list[TensorRef], size: int) -> Iterator[tuple[int, int, TensorRef | None]]:
    """All of a file in order: where a tensor of the list lies, and what lies between."""
    position = 0
    for ref in sorted(refs, key=lambda ref: (ref.start, ref.end)):
        yield position, ref.start, None
        yield max(position, ref.start), ref.end, ref
        position = max(position, ref.end)
    yield position, size, None

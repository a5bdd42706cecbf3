"""Proof that a checkpoint is what modekit.json says: `modekit verify OUT`.

Each check is a row with its own verdict; a checkpoint is proven when no row failed. Sources that are gone make the
comparison impossible, which is reported as such and never as a success.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from modekit.building.again import Check, check_made
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.record import RECORD_FILE
from modekit.checkpoint.sources import changed_settings
from modekit.errors import ModekitError
from modekit.files.figures import file_count
from modekit.files.read import LARGE, UNREADABLE, read_bytes
from modekit.files.typed import shortened
from modekit.planning.make import make_plan
from modekit.planning.plan import Plan
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles, blake3_of
from modekit.sources.header import DTYPE_NAMES
from modekit.sources.tokenizer import copied_content, gone_pair_files
from modekit.weights.stored import holds_only_finite


def verify(checkpoint: Checkpoint, *, run: Run = QUIET, reload: bool = True) -> list[Check]:
    """Run all checks; nothing is written. `reload` also opens the checkpoint in plain transformers.

    Raises SourceError when a weight file cannot be read to its end, or changes meanwhile: then nothing is said of it.
    """
    checks = [_check_digest(checkpoint), *_check_sources(checkpoint, run)]
    try:
        plan = make_plan(checkpoint.record.pinned_recipe, checkpoint.recipe_root, run=run)
    except ModekitError as error:
        checks.append(Check("copied tensors", "not possible", f"the recipe's sources cannot be read: {error.what}"))
        plan = None
    with OpenFiles() as opened:
        checks.append(_check_names(checkpoint, plan))
        if plan is not None:
            checks.append(_check_config(checkpoint, plan))
            checks.append(_check_files(checkpoint, plan))
            checks += _check_code(checkpoint, plan)
            checks += check_made(checkpoint, plan, opened, run)
        if checkpoint.record.trained:
            checks.append(_check_trained(checkpoint, opened))
        checks.append(_check_finite(checkpoint, opened, run))
    checks.append(_check_router(checkpoint))
    if reload:
        checks.append(_check_reload(checkpoint, run))
    return checks


def is_proven(checks: Iterable[Check]) -> bool:
    """Whether no check failed and none was impossible."""
    return all(check.verdict == "proven" for check in checks)


def _check_digest(checkpoint: Checkpoint) -> Check:
    record = checkpoint.record
    same = record.recipe.digest() == record.recipe_digest
    return Check(
        "recipe digest", "proven" if same else "failed", record.recipe_digest[:16] if same else f"{RECORD_FILE} was edited"
    )


def _check_sources(checkpoint: Checkpoint, run: Run) -> Iterator[Check]:
    for source in checkpoint.record.sources:
        folder = checkpoint.source_folder(source)
        name = f"source {source.label}"
        read = {file: expected for file, expected in source.files.items() if expected.blake3}
        gone = [file for file in read if not (folder / file).exists()]
        if gone:
            yield Check(name, "not possible", f"no longer at {folder}")
            continue
        changed = []
        try:
            for file, expected in read.items():
                path, progress = folder / file, partial(run.progress, name)
                if path.stat().st_size != expected.size or blake3_of(path, progress) != expected.blake3:
                    changed.append(file)
        except OSError as error:
            yield Check(name, "not possible", f"cannot be read: {error.strerror}")
            continue
        changed += changed_settings(source, folder)
        if changed:
            yield Check(name, "failed", f"changed since the build: {', '.join(changed)}")
        else:
            yield Check(name, "proven", f"{file_count(len(read))}, blake3 as recorded")


def _check_names(checkpoint: Checkpoint, plan: Plan | None) -> Check:
    found = {name: (ref.dtype, ref.shape) for name, ref in checkpoint.tensors.items()}
    if plan is None:
        return Check("tensor names and shapes", "not possible", "no plan without the sources")
    planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.tensors}
    names = (planned.keys() | found.keys()) - checkpoint.shape.left_out
    wrong = sorted(name for name in names if planned.get(name) != found.get(name))
    if wrong:
        return Check("tensor names and shapes", "failed", f"{len(wrong)} differ from the plan, first {wrong[0]}")
    return Check("tensor names and shapes", "proven", f"{len(found)} tensors as planned")


def _check_trained(checkpoint: Checkpoint, opened: OpenFiles) -> Check:
    """What a training moved cannot be computed again; it is what modekit.json records."""
    for name, digest in checkpoint.record.trained.items():
        ref = checkpoint.tensors.get(name)
        if ref is None or opened.blake3(ref) != digest:
            return Check("trained tensors", "failed", f"{name} is not the one that {RECORD_FILE} records")
    runs = len(checkpoint.record.training)
    return Check("trained tensors", "proven", f"{len(checkpoint.record.trained)} tensors as recorded by {runs} training(s)")


def _check_config(checkpoint: Checkpoint, plan: Plan) -> Check:
    planned, found = dict(plan.shape.config), checkpoint.shape.config
    wrong = list(_differences(planned, found))
    if wrong:
        return Check("config.json", "failed", f"{len(wrong)} settings differ: {wrong[0]}")
    return Check("config.json", "proven", f"{len(found)} settings as planned")


def _differences(planned: Mapping[str, object], found: Mapping[str, object], within: str = "") -> Iterator[str]:
    """Every setting that is another than planned, in words, whatever mapping it stands in."""
    for key in sorted(planned.keys() | found.keys()):
        ours, theirs = planned.get(key), found.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(ours, theirs, f"{within}{key}.")
        elif ours != theirs:
            yield f"{within}{key} is {shortened(repr(theirs))}, planned {shortened(repr(ours))}"


def _check_files(checkpoint: Checkpoint, plan: Plan) -> Check:
    expected = {file.name: partial(copied_content, file) for file in plan.copied_files}
    wrong = _differing(checkpoint, expected | {name: partial(bytes, content) for name, content in plan.written_files.items()})
    gone = gone_pair_files(checkpoint.folder, plan.copied_files)
    if wrong is not None or gone:
        return Check("tokenizer files", "failed", wrong or f"{gone[0]} is no longer beside the base model")
    owner = "the base model's" if plan.vocabulary is None else plan.vocabulary.tokenizer.owner
    return Check("tokenizer files", "proven", f"{file_count(len(plan.copied_files) + len(plan.written_files))} as {owner}")


def _check_code(checkpoint: Checkpoint, plan: Plan) -> Iterator[Check]:
    """The code of the modekit architecture: another version's cannot be told from code that somebody changed."""
    files = plan.shape.code_files
    if files:
        wrong = _differing(checkpoint, {file.name: partial(copied_content, file) for file in files})
        why = "another version of modekit wrote it, or somebody changed it: build again"
        said = f"{file_count(len(files))} as this version's" if wrong is None else f"{wrong}; {why}"
        yield Check("code that opens it", "proven" if wrong is None else "failed", said)


def _differing(checkpoint: Checkpoint, expected: Mapping[str, Callable[[], bytes]]) -> str | None:
    """What is wrong with the first of the checkpoint's files that is not, byte for byte, what is expected."""
    for name, content in expected.items():
        try:
            same = read_bytes(checkpoint.folder / name, LARGE) == content()
        except UNREADABLE as error:
            return f"{name} cannot be compared with what it was made from ({error})"
        if not same:
            return f"{name} differs from what it was made from"
    return None


def _check_finite(checkpoint: Checkpoint, opened: OpenFiles, run: Run) -> Check:
    total, done = sum(ref.nbytes for ref in checkpoint.tensors.values()), 0
    for name, ref in checkpoint.tensors.items():
        if ref.dtype == "U8":  # codes: any byte is one
            done += ref.nbytes
            continue
        if ref.dtype not in DTYPE_NAMES:
            return Check("finite values", "failed", f"{name} is of no dtype that a mixture has")
        if not holds_only_finite(opened, ref):
            return Check("finite values", "failed", f"NaN or Inf in {name}")
        done += ref.nbytes
        run.progress("finite", done, total)
    return Check("finite values", "proven", f"{total:,} bytes")


def _check_router(checkpoint: Checkpoint) -> Check:
    for slot in checkpoint.slots:
        ref = checkpoint.tensors.get(slot.name)
        if ref is None or ref.shape != slot.shape:
            found = None if ref is None else list(ref.shape)
            return Check("router", "failed", f"{slot.name}: {found}, expected {list(slot.shape)}")
    try:
        checkpoint.check_router()
    except ModekitError as error:
        return Check("router", "failed", f"{error.what}: {error.found}")
    recipe = checkpoint.record.recipe
    if checkpoint.with_recipe(recipe).config != checkpoint.config:
        return Check(
            "router", "failed", "config.json routes in another way than the recipe in modekit.json; modekit fit sets it again"
        )
    evidence = ""
    if checkpoint.shape.channels is not None:
        if not (checkpoint.record.router.evidence or checkpoint.carrier[1].name in checkpoint.record.trained):
            why = f"{RECORD_FILE} does not say which table the embedding carries: modekit fit sets it again"
            return Check("router", "not possible", why)
        evidence = ", its table in the embedding as recorded"
    shapes = ", ".join(sorted({str(list(slot.shape)) for slot in checkpoint.slots})) or "none"
    status = checkpoint.record.router.status
    return Check("router", "proven", f"{len(checkpoint.slots)} gates of {shapes}, {status}, top_k {recipe.top_k}{evidence}")


def _check_reload(checkpoint: Checkpoint, run: Run) -> Check:
    import torch

    from modekit.loaded.load import LOADING, auto_class, check_loadable, said_by, without_bars, without_report

    run.begin(LOADING)
    try:
        check_loadable(checkpoint.folder, run=run)
        load: Callable[..., Any] = auto_class(checkpoint.folder).from_pretrained
        with without_bars(), without_report(checkpoint.folder):
            model, report = load(checkpoint.folder, trust_remote_code=run.trust_remote_code, output_loading_info=True)
    except Exception as error:  # whatever transformers raises, the proof has failed
        return Check("reload in transformers", "failed", f"{type(error).__name__}: {said_by(error)}")
    missing = set(report["missing_keys"]) - checkpoint.shape.left_out
    wrong = [*sorted(missing), *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        return Check(
            "reload in transformers", "failed", f"{len(wrong)} keys missing, unexpected or mismatched, first {wrong[0]}"
        )
    try:
        with torch.inference_mode():
            ids_BS = torch.arange(8)[None] % checkpoint.vocabulary
            written = {"decoder_input_ids": ids_BS} if model.config.is_encoder_decoder else {}
            logits = model(input_ids=ids_BS, **written).logits
    except Exception as error:  # a model's code raises what it likes, and the proof has failed
        return Check("reload in transformers", "failed", f"{type(error).__name__}: {said_by(error)}")
    if not torch.isfinite(logits).all():
        return Check("reload in transformers", "failed", "the logits of a first pass are not finite")
    empty = set(report["missing_keys"]) & checkpoint.shape.left_out
    but = f" but {len(empty)} tensors without a number, which are left out" if empty else ""
    return Check("reload in transformers", "proven", f"{type(model).__name__}, all keys matched{but}, finite logits")

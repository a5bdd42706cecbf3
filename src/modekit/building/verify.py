"""Proof that a checkpoint is what modekit.json says: `modekit verify OUT`.

Each check is a row with its own verdict; a checkpoint is proven when no row failed. Sources that are gone make the
comparison impossible, which is reported as such and never as a success.

Every tensor is made again from its sources, and comes out bit for bit. Low-rank parts of full models (`as: lora`) do so on the
kind of processor that built them. Elsewhere the factors may be turned or differ in their last bits; what counts is their
product, the change that an expert makes. What a native checkpoint carries besides FFNs is computed with the bases that it
keeps, and may differ in its last bits, too.

Shape legend: O, I rows and columns of a weight, R ranks of all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from modekit.building.carrying import Carrying
from modekit.checkpoint.carried import CARRIED_FILE, carried_digest, read_carried
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import check_router
from modekit.checkpoint.record import RECORD_FILE
from modekit.checkpoint.sources import changed_settings
from modekit.errors import ModekitError, SourceError
from modekit.files.figures import file_count
from modekit.files.read import LARGE, UNREADABLE, read_bytes
from modekit.files.typed import said_by, shortened
from modekit.planning.make import make_plan
from modekit.planning.plan import Plan
from modekit.planning.tensors import PlannedTensor
from modekit.run import QUIET, Run
from modekit.sources.contents import OpenFiles
from modekit.sources.digests import blake3_of
from modekit.sources.header import DTYPE_NAMES
from modekit.sources.tokenizer import copied_content, gone_pair_files
from modekit.weights.flat import holds_only_finite, read_float32
from modekit.weights.made import Delta, Join
from modekit.weights.numeric import Array, as_array, to_float32
from modekit.weights.reading import WeightReader

_ALIKE = {"F32": 1e-4, "F16": 5e-3, "BF16": 2e-2}
"""Dtype of factors -> largest difference of two products, as a share of the product: some roundings of the dtype."""

_MISFITS = (AssertionError, LookupError, TypeError, ValueError)
"""What arrays of carried.safetensors raise that fit no such mixture: whoever forged them wrote their digest, too."""

Verdict = Literal["proven", "failed", "not possible"]


@dataclass(frozen=True)
class Check:
    """One line of the proof."""

    name: str
    verdict: Verdict
    detail: str


def _row(name: str, wrong: str | None, said: str) -> Check:
    return Check(name, "failed" if wrong else "proven", wrong or said)


def verify(checkpoint: Checkpoint, *, run: Run = QUIET, reload: bool = True) -> list[Check]:
    """Run all checks; nothing is written. `reload` also opens the checkpoint in plain transformers.

    Raises SourceError when a weight file cannot be read to its end, or changes meanwhile: then nothing is said of it.
    """
    record = checkpoint.record
    same = record.recipe.digest() == record.recipe_digest
    checks = [_row("recipe digest", None if same else f"{RECORD_FILE} was edited", record.recipe_digest[:16])]
    checks += _check_sources(checkpoint, run)
    try:
        plan = make_plan(record.pinned_recipe, checkpoint.recipe_root, run=run)
    except ModekitError as error:
        checks.append(Check("copied tensors", "not possible", f"the recipe's sources cannot be read: {error.what}"))
        plan = None
    with OpenFiles() as opened:
        checks.append(_check_names(checkpoint, plan))
        if plan is not None:
            checks.append(_check_config(checkpoint, plan))
            checks.append(_check_files(checkpoint, plan))
            checks += _check_made(checkpoint, plan, opened, run)
        if record.trained:
            checks.append(_check_trained(checkpoint, opened))
        checks.append(_check_finite(checkpoint, opened, run))
    checks.append(_check_router(checkpoint))
    if reload:
        checks.append(_check_reload(checkpoint, run))
    return checks


def is_proven(checks: Iterable[Check]) -> bool:
    """Whether no check failed and none was impossible."""
    return all(check.verdict == "proven" for check in checks)


def _check_sources(checkpoint: Checkpoint, run: Run) -> Iterator[Check]:
    for source in checkpoint.record.sources:
        folder, name = checkpoint.source_folder(source), f"source {source.label}"
        read = {file: expected for file, expected in source.files.items() if expected.blake3}
        changed = []
        try:
            for file, expected in read.items():
                path, progress = folder / file, partial(run.progress, name)
                if path.stat().st_size != expected.size or blake3_of(path, progress) != expected.blake3:
                    changed.append(file)
        except OSError as error:
            yield Check(name, "not possible", f"cannot be read at {folder}: {error.strerror}")
            continue
        changed += filter(None, [changed_settings(source, folder)])
        wrong = f"changed since the build: {', '.join(changed)}" if changed else None
        yield _row(name, wrong, f"{file_count(len(read))}, blake3 as recorded")


def _check_names(checkpoint: Checkpoint, plan: Plan | None) -> Check:
    name, found = "tensor names and shapes", {name: (ref.dtype, ref.shape) for name, ref in checkpoint.tensors.items()}
    if plan is None:
        return Check(name, "not possible", "no plan without the sources")
    planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.tensors}
    names = (planned.keys() | found.keys()) - checkpoint.shape.left_out
    wrong = sorted(each for each in names if planned.get(each) != found.get(each))
    said = f"{len(wrong)} differ from the plan, first {wrong[0]}" if wrong else None
    return _row(name, said, f"{len(found)} tensors as planned")


def _check_trained(checkpoint: Checkpoint, opened: OpenFiles) -> Check:
    """What a training moved cannot be computed again; it is what modekit.json records."""
    refs, digests = checkpoint.tensors, checkpoint.record.trained
    wrong = next((name for name, digest in digests.items() if name not in refs or opened.blake3(refs[name]) != digest), None)
    runs = len(checkpoint.record.training)
    return _row(
        "trained tensors",
        wrong and f"{wrong} is not the one that {RECORD_FILE} records",
        f"{len(digests)} tensors as recorded by {runs} training(s)",
    )


def _check_config(checkpoint: Checkpoint, plan: Plan) -> Check:
    planned, found = dict(plan.shape.config), checkpoint.shape.config
    wrong = list(_differences(planned, found))
    said = f"{len(wrong)} settings differ: {wrong[0]}" if wrong else None
    return _row("config.json", said, f"{len(found)} settings as planned")


def _differences(planned: Mapping[str, object], found: Mapping[str, object], within: str = "") -> Iterator[str]:
    """Every setting that is another than planned, in words, whatever mapping it stands in."""
    for key in sorted(planned.keys() | found.keys()):
        ours, theirs = planned.get(key), found.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(ours, theirs, f"{within}{key}.")
        elif ours != theirs:
            yield f"{within}{key} is {shortened(repr(theirs))}, planned {shortened(repr(ours))}"


def _check_files(checkpoint: Checkpoint, plan: Plan) -> Check:
    """Tokenizer and code: another version's code cannot be told from code that somebody changed."""
    files = (*plan.copied_files, *plan.shape.code_files)
    expected = {file.name: partial(copied_content, file) for file in files}
    wrong = _differing(checkpoint, expected | {name: partial(bytes, content) for name, content in plan.written_files.items()})
    gone = gone_pair_files(checkpoint.folder, plan.copied_files)
    if gone and wrong is None:
        wrong = f"{gone[0]} is no longer beside the base model"
    return _row("tokenizer and code", wrong, f"{file_count(len(files) + len(plan.written_files))} as they were made")


def _differing(checkpoint: Checkpoint, expected: Mapping[str, Callable[[], bytes]]) -> str | None:
    """What is wrong with the first of the checkpoint's files that is not, byte for byte, what is expected."""
    for name, content in expected.items():
        try:
            same = read_bytes(checkpoint.folder / name, LARGE) == content()
        except UNREADABLE as error:
            return f"{name} cannot be compared with what it was made from ({error})"
        if not same:
            return f"{name} differs from what it was made from (another version of modekit, or somebody changed it)"
    return None


def _check_finite(checkpoint: Checkpoint, opened: OpenFiles, run: Run) -> Check:
    total, done, wrong = sum(ref.nbytes for ref in checkpoint.tensors.values()), 0, None
    for name, ref in checkpoint.tensors.items():
        if ref.dtype not in {*DTYPE_NAMES, "U8"}:
            wrong = f"{name} is of no dtype that a mixture has"
        elif ref.dtype != "U8" and not holds_only_finite(opened, ref):  # of codes any byte is one
            wrong = f"NaN or Inf in {name}"
        if wrong:
            break
        done += ref.nbytes
        run.progress("finite", done, total)
    return _row("finite values", wrong, f"{total:,} bytes")


def _check_router(checkpoint: Checkpoint) -> Check:
    recipe = checkpoint.record.recipe
    try:
        check_router(checkpoint)
    except ModekitError as error:
        return Check("router", "failed", f"{error.what}: {error.found}")
    again = "modekit fit sets it again"
    if checkpoint.with_recipe(recipe).config != checkpoint.config:
        return Check("router", "failed", f"config.json routes in another way than the recipe in {RECORD_FILE}; {again}")
    evidence = ""
    if checkpoint.shape.channels is not None:
        if not (checkpoint.record.router.evidence or checkpoint.carrier[1].name in checkpoint.record.trained):
            return Check("router", "not possible", f"{RECORD_FILE} does not say which table the embedding carries: {again}")
        evidence = ", its table in the embedding as recorded"
    shapes = ", ".join(sorted({str(list(slot.shape)) for slot in checkpoint.slots}))
    gates = f"{len(checkpoint.slots)} gates of {shapes}" if shapes else "the experts' own gates"
    return Check("router", "proven", f"{gates}, {checkpoint.record.router.status}, {recipe.chosen}{evidence}")


def _check_reload(checkpoint: Checkpoint, run: Run) -> Check:
    import torch

    from modekit.loaded.load import LOADING, auto_class, check_loadable, without_bars, without_report

    run.begin(LOADING)
    name = "reload in transformers"
    try:
        check_loadable(checkpoint.folder, run=run)
        load: Callable[..., Any] = auto_class(checkpoint.folder).from_pretrained
        with without_bars(), without_report(checkpoint.folder):
            model, report = load(checkpoint.folder, trust_remote_code=run.trust_remote_code, output_loading_info=True)
        wrong = [*sorted({*report["missing_keys"]} - checkpoint.shape.left_out), *report["unexpected_keys"]]
        wrong += report["mismatched_keys"]
        if wrong:
            return Check(name, "failed", f"{len(wrong)} keys missing, unexpected or mismatched, first {wrong[0]}")
        with torch.inference_mode():
            ids_BS = torch.arange(8)[None] % checkpoint.vocabulary
            written = {"decoder_input_ids": ids_BS} if model.config.is_encoder_decoder else {}
            logits = model(input_ids=ids_BS, **written).logits
    except Exception as error:  # transformers and a model's code raise what they like, and the proof has failed
        return Check(name, "failed", f"{type(error).__name__}: {said_by(error)}")
    empty = {*report["missing_keys"]} & checkpoint.shape.left_out
    but = f" but {len(empty)} tensors without a number, which are left out" if empty else ""
    wrong_logits = None if torch.isfinite(logits).all() else "the logits of a first pass are not finite"
    return _row(name, wrong_logits, f"{type(model).__name__}, all keys matched{but}, finite logits")


def _check_made(checkpoint: Checkpoint, plan: Plan, opened: OpenFiles, run: Run) -> list[Check]:
    """Compare every tensor, gates and trained ones aside, with what the recipe makes of its sources."""
    read = WeightReader(opened, plan.models)
    tensors = [each for each in plan.tensors if each.role != "router" and each.name not in checkpoint.record.trained]
    done, total = 0, sum(each.nbytes for each in tensors)
    wrong, alike = {True: "", False: _wrong_bases(checkpoint, plan, read)}, dict[str, None]()
    for tensor in tensors:
        is_copied = tensor.copied is not None
        if not wrong[is_copied] and not _is_same(checkpoint, tensor, read):
            if isinstance(tensor.made, Join) and any(isinstance(part, Delta) and part.rank for part in tensor.made.of):
                alike[tensor.name.rpartition(".")[0]] = None
            else:
                wrong[is_copied] = tensor.name
        done += tensor.nbytes
        run.progress("compare", done, total)
    copied = [each for each in tensors if each.copied is not None]
    computed = wrong[False] or next((each for each in alike if not _same_change(checkpoint, plan, each, read)), "")
    said = f"{len(tensors) - len(copied)} cast, scaled, folded, merged, widened or zero tensors computed again, equal"
    if alike:
        said += f"; low-rank parts of {len(alike)} modules give the same change in other bits (another processor)"
    both = f"{len(copied)} tensors, {sum(each.nbytes for each in copied):,} bytes, bit for bit"
    return [
        _row("copied tensors", wrong[True] and f"{wrong[True]} differs from its source", both if copied else "none is copied"),
        _row("computed tensors", computed and f"{computed} is not what the recipe makes of its sources", said),
    ]


def _wrong_bases(checkpoint: Checkpoint, plan: Plan, read: WeightReader) -> str:
    """What is wrong with the bases by which more than FFNs is carried; else they are read."""
    record, planned = checkpoint.record.carry, plan.shape.channels and plan.shape.channels.carry
    if record is None:
        return ""
    if not planned or dict(planned) != record.model_dump(exclude={"sha256"}):
        return "carry in modekit.json"
    try:
        if carried_digest(checkpoint.folder) == record.sha256:
            read.fills = Carrying(plan, read, read_carried(checkpoint.folder)).fill
            return ""
    except (SourceError, *_MISFITS):
        pass
    return CARRIED_FILE


def _is_same(checkpoint: Checkpoint, tensor: PlannedTensor, read: WeightReader) -> bool:
    try:
        return _equals(checkpoint, tensor, read)
    except _MISFITS:
        if tensor.pad is None or tensor.pad.carried is None:
            raise
        return False


def _equals(checkpoint: Checkpoint, tensor: PlannedTensor, read: WeightReader) -> bool:
    ref, pad = checkpoint.tensors.get(tensor.name), tensor.pad
    if ref is None or ref.nbytes != tensor.nbytes:
        return False
    start = 0
    for block in tensor.blocks(read):
        found = np.frombuffer(read.opened.read(ref, start, start + len(block)), np.uint8)
        start += len(block)
        if pad is None:
            if not np.array_equal(found, np.frombuffer(block, np.uint8)):
                return False
            continue
        ours, theirs = (as_array(view, tensor.dtype).reshape(-1, tensor.shape[-1]) for view in (found.data, block))
        if pad.free is not None:  # what the router's fit wrote is not of the recipe alone
            ours = ours.copy()
            ours[:, pad.free] = 0
        if not (_alike(tensor, ours, theirs) if pad.carried is not None else ours.tobytes() == theirs.tobytes()):
            return False
    return True


def _alike(tensor: PlannedTensor, ours: Array, theirs: Array) -> bool:
    """Whether whole rows have the base's numbers as they are, and the new ones up to some roundings."""
    assert tensor.pad is not None
    columns = tensor.shape[-1] - tensor.pad.columns
    parts = [(to_float32(ours[:, cut]), to_float32(theirs[:, cut])) for cut in (slice(columns), slice(columns, None))]
    return all(
        bool(np.linalg.norm(one - other) <= _ALIKE[tensor.dtype] * np.linalg.norm(other)) for one, other in parts if one.size
    )


def _same_change(checkpoint: Checkpoint, plan: Plan, module: str, read: WeightReader) -> bool:
    """Whether B A of every expert is what its source gives."""
    a, b = (next(t for t in plan.tensors if t.name == f"{module}.lora_{side}") for side in "AB")
    here = [checkpoint.tensors.get(tensor.name) for tensor in (a, b)]
    if [(ref.dtype, ref.shape) for ref in here if ref is not None] != [(tensor.dtype, tensor.shape) for tensor in (a, b)]:
        return False
    a_RI, b_OR = (read_float32(read.opened, checkpoint.tensors[tensor.name]) for tensor in (a, b))
    start = 0
    for made_a, made_b in zip(a.made.parts, b.made.parts, strict=True):
        again_RI = to_float32(made_a.numbers(read)[:]).reshape(-1, a.shape[1])
        again_OR = to_float32(made_b.numbers(read)[:]).reshape(b.shape[0], -1)
        stop = start + len(again_RI)
        again_OI, found_OI = again_OR @ again_RI, b_OR[:, start:stop] @ a_RI[start:stop]
        if not np.linalg.norm(found_OI - again_OI) <= _ALIKE[a.dtype] * np.linalg.norm(again_OI):
            return False
        start = stop
    return True

"""Write what a training moved: new tensors in the place of old ones, everything else bit for bit.

Gates alone are a file of their own and are replaced where they are. For other tensors a folder is made beside OUT, in which
files without a moved tensor are linked or copied and the others written anew, and it takes OUT's place by rename.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3

from modekit.checkpoint.checkpoint import Checkpoint
from modekit.checkpoint.open import open_checkpoint
from modekit.checkpoint.record import RECORD_FILE, MixtureRecord, TrainingRecord
from modekit.checkpoint.router_file import router_bytes, sha256_of, write_router_file
from modekit.errors import TrainingError
from modekit.evaluation.results_folder import RESULTS_FOLDER
from modekit.files.copies import carry_over, link_file
from modekit.files.marker import INTERNAL
from modekit.files.staging import Staging, staging
from modekit.files.write import json_bytes, write_all, write_file
from modekit.planning.plan import ROUTER_FILE
from modekit.run import Run
from modekit.sources.contents import OpenFiles
from modekit.sources.header import TensorRef
from modekit.sources.weight_files import INDEX_FILE
from modekit.text.splits import SELECTED_FILE, TRAINED_FILE, digests_in
from modekit.training.request import Request
from modekit.weights.numeric import DTYPES, is_finite, to_bytes


def write_trained(request: Request, tensors: Mapping[str, torch.Tensor], training: TrainingRecord, run: Run) -> Checkpoint:
    """Write the request's checkpoint with new tensors (by their names on disk) to its target, which may be its own folder.

    The documents that moved something or chose a state are kept beside it: no table may show them any more. Each tensor gets
    the dtype that it has on disk. Raises TrainingError when one is not finite in it.
    """
    checkpoint, out = request.checkpoint, request.target
    run.begin("write")
    content = {name: _bytes_of(checkpoint, name, tensor) for name, tensor in tensors.items()}
    gate_names = {slot.name for slot in checkpoint.slots}
    files = {
        name: "".join(f"{digest}\n" for digest in sorted({*digests, *digests_in(checkpoint.folder / name)}))
        for name, digests in ((TRAINED_FILE, request.trained_on), (SELECTED_FILE, request.selected_by))
    }
    record = _record(checkpoint, out, tensors.keys() - gate_names, content, training)
    gates = [
        tensors[slot.name].detach().float().contiguous().numpy() if slot.name in tensors else gate
        for slot, gate in zip(checkpoint.slots, checkpoint.gates(), strict=True)
    ]
    if any(not np.array_equal(*both) for both in zip(gates, checkpoint.gates(), strict=True)):
        record = record.model_copy(update={"router": record.router.model_copy(update={"status": "trained"})})
    dtype = checkpoint.tensors[checkpoint.slots[0].name].dtype if checkpoint.slots else "F32"
    if out == checkpoint.folder and tensors.keys() <= gate_names:
        router = router_bytes(checkpoint.slots, gates, dtype)
        checkpoint.change({ROUTER_FILE: router, **_rest(record, sha256_of(router), files)})
        return open_checkpoint(out)
    in_place = out == checkpoint.folder
    with staging(
        out,
        f"train {training.settings} {sorted(record.trained.items())}",
        "checkpoint",
        sync=run.sync,
        sources=() if in_place else [checkpoint.folder],
        replace="in place" if in_place else "nothing",
    ) as stage:
        stage.last = checkpoint.check_unchanged
        _copy_rest(checkpoint, stage.folder, in_place=in_place)
        _write_shards(checkpoint, content, stage)
        sha256 = write_router_file(stage.folder / ROUTER_FILE, checkpoint.slots, gates, dtype) if checkpoint.slots else ""
        for name, beside in _rest(record, sha256, files).items():
            write_file(stage.folder / name, beside)
    return open_checkpoint(out)


def _write_shards(checkpoint: Checkpoint, content: Mapping[str, memoryview], stage: Staging) -> None:
    """Files with a moved tensor anew, the others linked."""
    with OpenFiles() as opened:
        for file in sorted({ref.file for ref in checkpoint.tensors.values()} - {checkpoint.folder / ROUTER_FILE}):
            inside = [(name, ref) for name, ref in checkpoint.tensors.items() if ref.file == file]
            if not any(name in content for name, _ in inside):
                link_file(file, stage.folder / file.name)
                continue
            entries = [(name, ref.dtype, ref.shape, ref.nbytes) for name, ref in inside]

            def write(index: int, stream: io.FileIO, inside: Sequence[tuple[str, TensorRef]] = inside) -> None:
                name, ref = inside[index]
                write_all(stream, content[name] if name in content else opened.read(ref))

            stage.write_shard(file.name, entries, write)


def _bytes_of(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> memoryview:
    ref = checkpoint.tensors[name]
    assert tuple(tensor.shape) == tuple(ref.shape), f"{name}: {tuple(tensor.shape)} for {ref.shape}"
    view = to_bytes(tensor.detach().float().contiguous().numpy().ravel(), ref.dtype)
    if not is_finite(view, ref.dtype):
        raise TrainingError(
            f"a trained tensor is not finite in {DTYPES[ref.dtype]}", where=name, remedy="lower the learning rate"
        )
    return view


def _record(
    checkpoint: Checkpoint, out: Path, moved: set[str], content: Mapping[str, memoryview], training: TrainingRecord
) -> MixtureRecord:
    """modekit.json after the training; what it says of the router is still to be set."""
    old = checkpoint.record
    return old.model_copy(
        update={
            "trained": {**old.trained, **{name: blake3(content[name]).hexdigest() for name in sorted(moved)}},
            "training": [*old.training, training],
            "recipe_folder": os.path.relpath(checkpoint.recipe_root, out),
            "sources": [
                source.model_copy(update={"folder": os.path.relpath((checkpoint.folder / source.folder).resolve(), out)})
                for source in old.sources
            ],
        }
    )


def _rest(record: MixtureRecord, router_sha256: str, files: Mapping[str, str]) -> dict[str, bytes]:
    """What is written last: the lists of documents, then the record."""
    router = record.router.model_copy(update={"sha256": router_sha256})
    said = record.model_copy(update={"router": router}).model_dump(mode="json")
    return {**{name: content.encode() for name, content in files.items()}, RECORD_FILE: json_bytes(said)}


def _copy_rest(checkpoint: Checkpoint, folder: Path, *, in_place: bool) -> None:
    """Everything that is neither weights nor the record: config, tokenizer, code, statistics; in place, all that is there."""
    checkpoint.check_unchanged()
    weights = {ref.file.name for ref in checkpoint.tensors.values()}
    results = set() if in_place else {RESULTS_FOLDER}
    carry_over(checkpoint.folder, folder, but={RECORD_FILE, ROUTER_FILE, *weights, *INTERNAL, *results}, links=in_place)
    assert (folder / INDEX_FILE).exists()

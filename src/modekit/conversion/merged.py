"""A merge of a mixture's models as one dense model: streamed to files, or in memory to be compared and trained."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from modekit.building.build import write_shards
from modekit.building.tensors import PieceReader, stored_blocks
from modekit.files.staging import Staging
from modekit.files.write import write_file, write_json
from modekit.planning.dense import DensePlan
from modekit.planning.plan import INDEX_FILE
from modekit.run import Run
from modekit.sources.contents import OpenFiles
from modekit.sources.tokenizer import copied_content

State = dict[str, torch.Tensor]


def write_merged(dense: DensePlan, stage: Staging, run: Run) -> None:
    """Weights, block by block, config and index."""
    write_shards(dense.plan, stage, None, run)
    size = sum(shard.nbytes for shard in dense.plan.shards)
    write_json(stage.folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": dense.weight_map})
    write_json(stage.folder / "config.json", dict(dense.config))


def write_tokenizer(dense: DensePlan, folder: Path) -> None:
    """The mixture's tokenizer."""
    for file in dense.plan.copied_files:
        write_file(folder / file.name, copied_content(file))
    for name, content in dense.plan.written_files.items():
        write_file(folder / name, content)


def merged_state(dense: DensePlan, run: Run) -> State:
    """Its tensors in memory, float32. `dense` is planned in float32."""
    tensors = [tensor for shard in dense.plan.shards for tensor in shard.tensors]
    with OpenFiles() as opened:
        read = PieceReader(opened)
        found = {}
        for tensor in run.over("merge", tensors, len(tensors)):
            data = bytearray()
            for block in stored_blocks(dense.plan, tensor, read):  # each lies where the one before it lay
                data += block
            found[tensor.name] = torch.frombuffer(data, dtype=torch.float32).view(tensor.shape)
    return found


def state_of(model: PreTrainedModel, like: State) -> State:
    """A copy of those tensors of a model that a merge has."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: named[name].detach().clone() for name in like}


@torch.no_grad()
def set_between(model: PreTrainedModel, base: State, merged: State, scale: float) -> None:
    """Let the model be base + scale * (merged - base)."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, origin in base.items():
        named[name].copy_(origin + scale * (merged[name].to(origin.device) - origin))

"""Which file of the result holds which tensor: what comes and goes together lies together.

    model-backbone-00001.safetensors      what does not know which experts there are
    model-shared-00001.safetensors        what is of all experts at once: low-rank changes side by side, fused experts, and
                                          what of the backbone leads a router's evidence to the gates
    model-expert-00001-00001.safetensors  the first expert's own, and so on
    model-embedding.safetensors           the embedding where it carries a router's evidence
    model-router.safetensors              the gates

An expert that comes or goes leaves the backbone's files, and those of the experts before it, byte for byte as they are
(members/change.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from modekit.planning.plan import EMBEDDING_FILE, PlannedTensor, Shard


def cut_into_shards(tensors: Sequence[PlannedTensor], shard_size: int) -> tuple[Shard, ...]:
    """Files of at most `shard_size` bytes, but for larger tensors; in the order of the tensors."""
    groups: dict[str, list[PlannedTensor]] = {"backbone": [], "shared": []}
    for tensor in tensors:
        groups.setdefault(_group_of(tensor), []).append(tensor)
    embedding = groups.pop(EMBEDDING_FILE, [])
    shards = [
        Shard(f"model-{name}-{number:05d}.safetensors", part)
        for name, group in sorted(groups.items())
        for number, part in enumerate(_parts(group, shard_size), 1)
    ]
    return (*shards, *([Shard(EMBEDDING_FILE, tuple(embedding))] if embedding else []))


def _group_of(tensor: PlannedTensor) -> str:
    if tensor.pad is not None and tensor.pad.free is not None:
        return EMBEDDING_FILE
    if tensor.expert is not None:
        return f"expert-{tensor.expert + 1:05d}"
    changes_with_experts = tensor.role != "backbone" or (tensor.inner or tensor).operation == "merge"
    return "shared" if changes_with_experts or (tensor.pad is not None and tensor.pad.entries) else "backbone"


def _parts(tensors: Sequence[PlannedTensor], shard_size: int) -> list[tuple[PlannedTensor, ...]]:
    parts: list[list[PlannedTensor]] = []
    size = 0
    for tensor in tensors:
        if not parts or size + tensor.nbytes > shard_size:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    return [tuple(part) for part in parts]

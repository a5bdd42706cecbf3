"""modekit.json of a build."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from modekit.checkpoint.record import CarryRecord, FileRecord, MixtureRecord, RouterRecord, SourceRecord, TokensRecord
from modekit.files.output import work_of
from modekit.planning.plan import Plan
from modekit.sources.config import settings_digest
from modekit.sources.source import ModelSource


def make_record(
    plan: Plan,
    out: Path,
    hashes: Mapping[str, str],
    router: RouterRecord,
    known: Mapping[ModelSource, SourceRecord] = {},
    carried: str = "",
) -> MixtureRecord:
    """The record of a build; paths are kept relative to `out`, so that two builds side by side are the same bytes.

    `known`: records of sources that were read before, and may be gone; `carried`: sha256 of carried.safetensors.
    """
    unique, carry = list(dict.fromkeys(plan.sources)), plan.shape.channels and plan.shape.channels.carry
    return MixtureRecord(
        format=1,
        modekit_version=version("modekit"),
        recipe=plan.recipe,
        recipe_digest=plan.recipe.digest(),
        recipe_folder="." if plan.root == work_of(out).path else os.path.relpath(plan.root, out),
        dense_config=plan.family.dense_config(plan.sources[0].config),
        native_type=plan.shape.native_type,
        dense_parameters=plan.sources[0].parameters,
        expert_sources=[unique.index(source) for source in plan.sources[1:]],
        sources=[_source_record(source, out, hashes, known.get(source)) for source in unique],
        router=router,
        tokens=_tokens_record(plan),
        carry=CarryRecord(**dict(carry), sha256=carried) if carry else None,
    )


def _tokens_record(plan: Plan) -> TokensRecord | None:
    if plan.vocabulary is None or not plan.vocabulary.is_grown:
        return None
    tokenizer = plan.vocabulary.tokenizer
    return TokensRecord(tokenizer=tokenizer.number, eos=list(tokenizer.eos), written=sorted(tokenizer.written))


def _source_record(source: ModelSource, out: Path, hashes: Mapping[str, str], known: SourceRecord | None) -> SourceRecord:
    if known is not None:
        files, config = known.files, known.config
    else:
        files = {file.name: FileRecord(size=file.stat().st_size, blake3=hashes[str(file)]) for file in source.files}
        config = settings_digest(source.written_config)
    return SourceRecord(
        label=source.label,
        spec=source.spec,
        revision=source.revision,
        folder=os.path.relpath(source.folder, out),
        files=files,
        config=config,
        packed=source.packed,
    )

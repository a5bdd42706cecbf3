"""modekit.json of a build."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

from modekit.checkpoint.record import CarryRecord, MixtureRecord, RouterRecord, SourceRecord, TokensRecord
from modekit.files.output import work_of
from modekit.planning.plan import Plan


def make_record(plan: Plan, out: Path, sources: list[SourceRecord], router: RouterRecord, carried: str) -> MixtureRecord:
    """The record of a build; paths are kept relative to `out`, so that two builds side by side are the same bytes.

    `carried`: sha256 of carried.safetensors.
    """
    unique = list(dict.fromkeys(plan.sources))
    carry = plan.shape.channels and plan.shape.channels.carry
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
        sources=sources,
        router=router,
        tokens=_tokens_record(plan),
        carry=CarryRecord(**dict(carry), sha256=carried) if carry else None,
    )


def _tokens_record(plan: Plan) -> TokensRecord | None:
    if plan.vocabulary is None or not plan.vocabulary.is_grown:
        return None
    tokenizer = plan.vocabulary.tokenizer
    return TokensRecord(tokenizer=tokenizer.number, eos=list(tokenizer.eos), written=sorted(tokenizer.written))

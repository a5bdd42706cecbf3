"""Parameters of a mixture from its config.json alone, in all and per token: nothing is allocated, no weights are read.

A token uses all of a model but for its experts, of which its router chooses top_k of E: active = rest + experts * top_k / E
(the formula behind Table 2 of arXiv:2407.06204). What every token uses, such as shared experts, is part of the rest. The class
is made on torch's meta device, so that every family that transformers knows counts as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from modekit.errors import SourceError
from modekit.files.read import UNREADABLE, read_json
from modekit.run import QUIET, Run
from modekit.sources.config import check_no_code, read_config
from modekit.sources.names import split_layer
from modekit.sources.structure import is_installed, structure

if TYPE_CHECKING:
    from torch import nn


class ParameterCount(BaseModel):
    """What a model holds and what a token uses of it.

    Attributes:
        experts, top_k: of the layers that have experts; each number once.
        expert_parameters: of all experts in all layers; shared ones, which every token uses, do not count.
        layers: how many layers have experts.
    """

    model_config = ConfigDict(frozen=True)

    model_type: str
    total: int
    active: int
    expert_parameters: int
    layers: int
    experts: list[int]
    top_k: list[int]


def is_config(path: Path) -> bool:
    """Whether a file is a model's config in JSON, not a recipe."""
    try:
        said = read_json(path) if path.suffix == ".json" else None
    except UNREADABLE:
        return False
    return isinstance(said, dict) and "model_type" in said


def count_parameters(config_file: Path, *, run: Run = QUIET) -> ParameterCount:
    """Count a model's parameters by its config file. Raises SourceError where transformers cannot make such a model."""
    where = str(config_file)
    config = read_config(config_file, where=where)
    check_no_code(config, where=where, run=run)
    if not is_installed(str(config["model_type"])):
        raise SourceError(
            f"transformers has no language model of the type '{config['model_type']}'",
            where=where,
            remedy="give the config.json of a language model that transformers knows",
        )
    model = structure(config, where=where).model
    choices = list(_choices(model))
    in_experts = sum(size for _, size, _, _ in choices)
    used = sum(size * top_k // experts for _, size, experts, top_k in choices)
    total = sum(parameter.numel() for parameter in model.parameters())
    return ParameterCount(
        model_type=str(config["model_type"]),
        total=total,
        active=total - in_experts + used,
        expert_parameters=in_experts,
        layers=len({split_layer(holder)[0] for holder, _, _, _ in choices}),
        experts=sorted({experts for _, _, experts, _ in choices}),
        top_k=sorted({top_k for _, _, _, top_k in choices}),
    )


def _choices(model: nn.Module) -> Iterator[tuple[str, int, int, int]]:
    """Of every module of experts: what holds it, its parameters, how many experts it has, and how many a token uses."""
    for name, module in model.named_modules():
        holder, _, called = name.rpartition(".")
        if not type(module).__name__.endswith("Experts") or "shared" in called:
            continue
        own = list(module.parameters(recurse=False))
        experts = own[0].shape[0] if own else sum(1 for _ in module.children())
        chosen = (getattr(each, "top_k", None) for each in model.get_submodule(holder).modules())
        top_k = next((each for each in chosen if isinstance(each, int)), 1)
        yield holder, sum(each.numel() for each in module.parameters()), experts, min(top_k, experts)

"""What of a loaded mixture moves: parameters by group.

Groups are found by what parameters are, never by a word in their names. Every parameter is in one: routers, experts,
attention, mlp (FFN of the backbone), embeddings, head, norms (all that is left in the decoder). Tied embeddings are in two.
Tensors that a native architecture wants and that must stay zero are in none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.architecture.modekit_mixed import Mixed
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import TrainingError
from modekit.loaded.mixture import LoadedMixture
from modekit.loaded.shapes import mixture_of
from modekit.planning.leaders import ATTENTION
from modekit.sources.stack import Stack
from modekit.training.settings import Group

_PARTS: tuple[Group, ...] = ("routers", "experts", "attention", "mlp", "embeddings", "head", "norms")


def names_of(groups: Mapping[Group, list[str]], what: Iterable[Group], *, but: Collection[Group] = ()) -> list[str]:
    """Names of all parameters that move, each once; `but` is what all leaves out. Raises TrainingError for a group that is
    empty here.
    """
    wanted = [part for part in _PARTS if part not in but] if "all" in what else list(what)
    empty = [group for group in wanted if not groups[group] and "all" not in what]
    if empty:
        raise TrainingError(
            f"this mixture has no {', no '.join(empty)} to train",
            where="what",
            expected=", ".join(group for group in _PARTS if groups[group]),
            remedy="leave it out" if empty != ["routers"] else "set a router first: modekit fit OUT method=routing",
        )
    return list(dict.fromkeys(name for group in wanted for name in groups[group]))


def _of_pairs(layer: nn.Module, stack: Stack) -> Iterator[tuple[Group, nn.Module]]:
    """FFN and attention of a layer of a model with an encoder, by the names that its family gives them."""
    for path in stack.ffn_modules:
        if isinstance(getattr(layer, path.partition(".")[0], None), nn.Module):
            yield "mlp", layer.get_submodule(path)
    for path in dict.fromkeys(stack.parts[part].rpartition(".")[0] for part in ATTENTION if part in stack.parts):
        yield "attention", layer.get_submodule(path)


def moving_of(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[Group, list[str]]:
    """Names of parameters by group, in the order of the model, of a mixture as transformers loads it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken: dict[int, Group] = {}

    def take(group: Group, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            taken.setdefault(id(parameter), group)

    mixture = mixture_of(model, checkpoint)
    untouchable = {id(parameter) for parameter in mixture.constants()}
    if checkpoint.record.recipe.mixture.method == "linear":  # its gates are zero so that weights are fixed
        untouchable |= {id(gate) for gate in mixture.gates()}
    take("routers", mixture.gates())
    take("experts", mixture.experts())
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    take("embeddings", embeddings.parameters())
    take("head", head.parameters())
    family = checkpoint.shape.family
    for layer in family.layers(checkpoint.config):
        module = model.get_submodule(family.in_layer(layer).removesuffix("."))
        if family.pair:
            for group, parts in _of_pairs(module, family.stack_of(layer)):
                take(group, parts.parameters())
            continue
        block = mixture.ffn(module)
        take("mlp", block.parameters())  # what is left of it without the experts
        for child in module.children():  # what mixes tokens has parts of its own; norms have not
            inner = child.base if isinstance(child, Mixed) else child
            if child is not block and inner is not None and next(inner.children(), None) is not None:
                take("attention", inner.parameters())
    take("norms", model.parameters())
    groups: dict[Group, list[str]] = {group: [] for group in _PARTS}
    for key, name in names.items():
        if key not in untouchable:
            groups[taken[key]].append(name)
    if not groups["head"]:  # tied: the head is the embeddings; heads of experts are theirs
        tied = (parameter for parameter in head.parameters() if taken[id(parameter)] == "embeddings")
        groups["head"] = [names[id(parameter)] for parameter in tied if id(parameter) in names]
    return groups


def make_trainable(mixture: LoadedMixture, names: Collection[str]) -> None:
    """Freeze a model but for the parameters of these names. Of those that carry whole experts, gradients reach only what the
    base has, too: the channels compute what they were built for, whatever moves beside them.
    """
    for name, parameter in mixture.model.named_parameters():
        parameter.requires_grad_(name in names)
        corner = mixture.own_corner(name, parameter) if name in names else None
        if corner is not None:
            parameter.register_hook(partial(_within, corner))


def _within(corner: tuple[slice, ...], gradient: torch.Tensor) -> torch.Tensor:
    """A gradient that is zero outside of a corner."""
    kept = torch.zeros_like(gradient)
    split = (gradient.shape[0], 2, -1, gradient.shape[-1])  # gate and up
    inside, every = (kept.view(split), gradient.reshape(split)) if len(corner) > gradient.ndim else (kept, gradient)
    inside[corner] = every[corner]
    return kept

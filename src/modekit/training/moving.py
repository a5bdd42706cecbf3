"""What of a loaded mixture moves: parameters by group, and what gets gradients for them.

Groups are found by what parameters are, never by a word in their names. Every parameter is in one: routers, experts,
attention, mlp (FFN of the backbone), embeddings, head, norms (all that is left in the decoder). Tied embeddings are in two.
Tensors that a native architecture wants and that must stay zero are in none.

What moves gets gradients itself, or through a low-rank change of it that is folded in at the end. PEFT puts its layers into
the loaded model; which parameters they are put on is decided by identity, and said to PEFT by their whole names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from modekit.architecture.modekit_mixed import Mixed
from modekit.checkpoint.checkpoint import Checkpoint
from modekit.errors import TrainingError
from modekit.loaded.mixture import LoadedMixture
from modekit.loaded.shapes import mixture_of
from modekit.planning.routing_config import ATTENTION
from modekit.sources.family import Stack
from modekit.training.settings import Group

_PARTS: tuple[Group, ...] = ("routers", "experts", "attention", "mlp", "embeddings", "head", "norms")


@dataclass(frozen=True)
class Moving:
    """Names of parameters by group, in the order of the model."""

    groups: dict[Group, list[str]]

    def names(self, what: Iterable[Group], *, but: Collection[Group] = ()) -> list[str]:
        """Names of all parameters that move, each once; `but` is what all leaves out. Raises TrainingError for a group that is
        empty here.
        """
        wanted = [part for part in _PARTS if part not in but] if "all" in what else list(what)
        empty = [group for group in wanted if not self.groups[group] and "all" not in what]
        if empty:
            raise TrainingError(
                f"this mixture has no {', no '.join(empty)} to train",
                where="what",
                expected=", ".join(group for group in _PARTS if self.groups[group]),
                remedy="leave it out" if empty != ["routers"] else "set a router first: modekit fit OUT method=routing",
            )
        return list(dict.fromkeys(name for group in wanted for name in self.groups[group]))


def _of_pairs(layer: nn.Module, stack: Stack) -> Iterator[tuple[Group, nn.Module]]:
    """FFN and attention of a layer of a model with an encoder, by the names that its family gives them."""
    for path in stack.ffn_modules:
        if isinstance(getattr(layer, path.partition(".")[0], None), nn.Module):
            yield "mlp", layer.get_submodule(path)
    for path in dict.fromkeys(stack.parts[part].rpartition(".")[0] for part in ATTENTION if part in stack.parts):
        yield "attention", layer.get_submodule(path)


def moving_of(model: PreTrainedModel, checkpoint: Checkpoint) -> Moving:
    """All groups of a mixture as transformers loads it."""
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
    return Moving(groups)


@dataclass(frozen=True)
class TrainableMixture:
    """A model and the `targets` that move, themselves or by low-rank changes, by their names before these were added."""

    model: PreTrainedModel
    targets: dict[str, nn.Parameter]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those with gradients."""
        return (parameter for parameter in self.model.parameters() if parameter.requires_grad)

    def moved(self) -> dict[str, torch.Tensor]:
        """Every target's value after training, by its name before, on the CPU. Low-rank changes are folded in, once."""
        for module in self.model.modules():
            if hasattr(module, "merge") and hasattr(module, "base_layer") and not module.merged:
                module.merge()
        return {name: parameter.detach().float().cpu() for name, parameter in self.targets.items()}


def make_trainable(model: PreTrainedModel, names: Sequence[str], rank: int | None) -> TrainableMixture:
    """Freeze a model but for the parameters of these names, or for changes of rank `rank` of those that are matrices.

    What is no plain layer or stack of matrices moves itself (gates, adapters, vectors), and so does a matrix with no more rows
    or columns than the rank, or one that serves as embedding and head at once, of which a layer would see one use only.
    """
    parameters = dict(model.named_parameters())
    targets = {name: parameters[name] for name in names}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    modules = [name for name in targets if rank is not None and _is_layer(model, name, rank)]
    stacks = [name for name, each in targets.items() if rank is not None and each.ndim == 3 and min(each.shape[-2:]) > rank]
    known = {id(parameter) for parameter in parameters.values()}
    if modules or stacks:
        assert rank is not None
        _inject(model, [name.removesuffix(".weight") for name in modules], stacks, rank)
    moving = {id(each) for name, each in targets.items() if name not in {*modules, *stacks}}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in moving or id(parameter) not in known)
    return TrainableMixture(model, targets)


def keep_channels(trainable: TrainableMixture, mixture: LoadedMixture) -> None:
    """Let gradients reach only what the base has, too, where a native mixture carries whole experts: its channels compute what
    they were built for, whatever moves beside them.
    """
    for name, parameter in trainable.targets.items():
        corner = mixture.own_corner(name, parameter)
        if corner is not None:
            register: Callable[[Callable[[torch.Tensor], torch.Tensor]], object] = parameter.register_hook  # which has no types
            register(partial(_within, corner))


def _within(corner: tuple[slice, ...], gradient: torch.Tensor) -> torch.Tensor:
    """A gradient that is zero outside of a corner."""
    kept = torch.zeros_like(gradient)
    split = (gradient.shape[0], 2, -1, gradient.shape[-1])  # gate and up
    inside, every = (kept.view(split), gradient.reshape(split)) if len(corner) > gradient.ndim else (kept, gradient)
    inside[corner] = every[corner]
    return kept


def _is_layer(model: PreTrainedModel, name: str, rank: int) -> bool:
    """Whether a parameter is the weight of a linear layer or an embedding that PEFT can wrap with that rank."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf != "weight" or not isinstance(module, (nn.Linear, nn.Embedding)):
        return False
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(embedding, "weight", None) is getattr(head, "weight", None) and module in {embedding, head}
    return min(module.weight.shape) > rank and not tied


def _inject(model: PreTrainedModel, modules: Sequence[str], stacks: Sequence[str], rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(modules) or None,
        target_parameters=list(stacks) or None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT asks it
        inject_adapter_in_model(config, model)

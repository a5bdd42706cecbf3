"""What gets gradients: the parameters themselves, or a low-rank change of them that is folded in at the end.

PEFT puts its layers into the loaded model; which parameters they are put on is decided by identity, and said to PEFT by
their whole names.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trainable:
    """`names` of the parameters with gradients, as the model has them now, and the `targets` that move through them."""

    model: PreTrainedModel
    names: list[str]
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


def make_trainable(model: PreTrainedModel, names: Sequence[str], rank: int | None) -> Trainable:
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
    return Trainable(model, [name for name, each in model.named_parameters() if each.requires_grad], targets)


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
